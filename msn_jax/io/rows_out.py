"""Where rows of results go: a file that appears when it is whole, stdout, or a pipe."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from msn_jax.errors import InputError

try:
    import fcntl
except ImportError:  # Windows: two processes with one output are not told apart there
    fcntl = None

STDOUT = ("-", "/dev/stdout")


def check_outputs(outputs: Mapping[str, str | None], inputs: Mapping[str, str | Sequence[str] | None]) -> None:
    """Raise InputError now where an output could not be written later, or would take the place of an input.

    Both are paths by the flags that name them; None: not given. An input may be a folder, or several paths.
    """
    given = [(flag, [paths] if isinstance(paths, str) else paths or []) for flag, paths in inputs.items()]
    taken = {Path(path).resolve(): f"{flag} {path}" for flag, paths in given for path in paths}
    for flag, path in outputs.items():
        if path is None or path in STDOUT:
            continue
        target = Path(path)
        try:
            real, partial = target.resolve(), _partial(target.resolve())
            if real in taken:
                raise InputError(f"{flag} {path}: is also {taken[real]}")
            if partial in taken:  # where rows stand until all are there
                raise InputError(f"{flag} {path}: {partial} is also {taken[partial]}")
            inside = [taken[folder] for folder in real.parents if folder in taken]
            if inside and target.exists():
                raise InputError(f"{flag} {path}: is a file of {inside[0]}")
            if target.exists() and not target.is_file():
                if flag != "--out" or not _is_stream(target):  # a page is written whole
                    raise InputError(f"{flag} {path}: not a regular file")
                continue
            # The longest name that a writer gives its unfinished file.
            trial = real.with_name(f".{real.name}.{os.getpid()}.partial")
            trial.touch()
            trial.unlink()
            if partial.is_dir():
                raise InputError(f"{flag} {path}: {partial} is a directory")
        except OSError as e:
            raise InputError(f"{flag} {path}: cannot be written ({e.strerror})") from e
        taken[real] = taken[partial] = f"{flag} {path}"


@contextlib.contextmanager
def rows_out(path: str | None) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A function that writes a row as a JSON line. None: nothing is written; "-": stdout.

    The rows of a file stand in PATH.partial until all of them are there. What an earlier run left there is kept under
    another name. Raises InputError where another process is writing it, or the disk is full.
    """
    if path is None:
        yield lambda row: None
    elif path in STDOUT:
        yield lambda row: _write(sys.stdout, row, ascii=_narrow(sys.stdout))
    elif _is_stream(Path(path)):
        with open(path, "w", encoding="utf-8") as file:
            yield lambda row: _write(file, row)
    else:
        with _whole_file(path) as file:
            yield lambda row: _write(file, row)


def _write(file: TextIO, row: Mapping[str, Any], ascii: bool = False) -> None:
    print(json.dumps(row, ensure_ascii=ascii), file=file, flush=True)


def _narrow(stream: TextIO) -> bool:
    """Whether a stream's encoding does not have all characters."""
    return (getattr(stream, "encoding", None) or "").lower().replace("-", "") not in ("utf8", "utf16", "utf32")


def _is_stream(path: Path) -> bool:
    """Whether a path is a pipe or a device such as /dev/null, into which rows go as they come."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


@contextlib.contextmanager
def _whole_file(path: str) -> Iterator[TextIO]:
    target = Path(path).resolve()
    partial = _partial(target)
    file = _locked(path, partial)
    try:
        yield file
        file.flush()
        os.fsync(file.fileno())
        partial.replace(target)
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            raise
        raise InputError(f"--out {path}: cannot be written ({e.strerror}); {partial} holds the rows before") from e
    finally:
        with contextlib.suppress(OSError):  # what could not be written cannot be on closing either
            file.close()
        if partial.exists() and not partial.stat().st_size:
            partial.unlink()


def _locked(path: str, partial: Path) -> TextIO:
    """PARTIAL, new and empty, kept from other processes until it is closed."""
    while True:
        try:
            file = open(partial, "a", encoding="utf-8")
        except OSError as e:
            raise InputError(f"--out {path}: cannot be written ({e.strerror})") from e
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as e:
                file.close()
                raise InputError(f"--out {path}: another process is writing it ({partial})") from e
            except OSError:  # a file system without locks
                pass
        # Another process may have finished, and renamed it, just before it was locked here.
        if not partial.exists() or not os.path.samestat(os.fstat(file.fileno()), partial.stat()):
            file.close()
            continue
        if partial.stat().st_size:
            number = next(n for n in range(1, 10**9) if not Path(f"{partial}.{n}").exists())
            partial.rename(f"{partial}.{number}")
            print(f"{partial}: rows of a run that broke, kept as {partial.name}.{number}", file=sys.stderr)
            file.close()
            continue
        return file
