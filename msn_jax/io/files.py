"""Files of a run, on a local disk or in an object store (gs://), where nothing can be appended or renamed."""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import tempfile
from pathlib import Path

from etils import epath

from msn_jax.errors import InputError, first_line

TEMPORARY_SUFFIX = ".tmp"  # of a file that is being written


def is_remote(path: str | os.PathLike) -> bool:
    """Whether the path is an address in an object store."""
    return "://" in os.fspath(path)


@contextlib.contextmanager
def writing(path: epath.Path):
    """Raise an InputError that names `path` for what the system says against a write inside."""
    try:
        yield
    except OSError as e:
        raise InputError(f"{path}: cannot be written ({e.strerror or first_cause(e)})") from e


def replace_file(path: epath.Path, content: bytes) -> None:
    """Write a file so that it is never half there. (An object of a store appears only when it is whole.)"""
    if is_remote(path):
        path.write_bytes(content)
        return
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    with temporary.open("wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())
    temporary.replace(path)


def first_cause(error: Exception) -> str:
    """The first cause of an error, in one line."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    line = first_line(error)
    return f"{type(error).__name__}: {line if len(line) < 300 else line[:100] + ' ... ' + line[-150:]}"


def local_files(directory: str | os.PathLike) -> Path:
    """A local directory with a run's config and tokenizer files: itself, or a temporary copy from an object store."""
    folder = epath.Path(directory)
    if not is_remote(folder):
        return Path(directory)
    copy = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, copy, ignore_errors=True)
    for path in folder.iterdir():
        if path.suffix in (".json", ".yaml", ".jinja"):
            (copy / path.name).write_bytes(path.read_bytes())
    return copy


def is_hub_id(name: str) -> bool:
    """Whether a name that is no local path may be one of the hub: org/name."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not name.endswith("/")


def download(flag: str, hub_id: str, files: list[str]) -> Path:
    """The local directory of what of the hub's `files` there is. Raises InputError, which names the flag."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=files))
    except Exception as e:  # no network, no such id, no access: all mean that it cannot be had
        raise InputError(f"{flag} {hub_id}: not a local path, and the hub gave: {first_line(e)}") from e
