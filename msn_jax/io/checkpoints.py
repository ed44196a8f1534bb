"""The checkpoints of a run: written in the background, kept by number and by worth, read with suspicion."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import sys
import time
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from etils import epath
from jax.experimental import multihost_utils

from msn_jax.errors import InputError
from msn_jax.io.files import first_cause, is_remote, replace_file, writing

_COMMITTED = "commit_success.txt"  # orbax writes it last
_FILES = "files.json"  # what `_check_files` compares, written after that: for a damaged file orbax prints pages
TEMPORARY = ".orbax-checkpoint-tmp"  # in the name of a directory that orbax is still writing
# Not signs of a damaged file: too little memory, no permission, a store that does not answer.
_NO_FAULT_OF_THE_FILE = (MemoryError, PermissionError, TimeoutError, jax.errors.JaxRuntimeError)


def _not_orbax(record: logging.LogRecord) -> bool:
    """orbax logs a traceback for each of its threads when the disk is full; what it raises becomes one line here."""
    return "orbax" not in record.pathname


class _Unusable(Exception):
    """A checkpoint that is half-written or damaged; the message says how."""


class Checkpoints:
    """The checkpoints of one run, written in the background: the last `keep` and the best are kept.

    Every process of the run makes every call.
    """

    def __init__(self, directory: str | os.PathLike, keep: int):
        """directory: of the run. Raises InputError where it cannot be written."""
        logging.getLogger("absl").addFilter(_not_orbax)
        self._folder, self._keep = _absolute(directory) / "checkpoints", keep
        self._background = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._writing: tuple[int, Future] | None = None
        with writing(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)

    def steps(self) -> list[int]:
        """Steps of the whole checkpoints, ascending. Files of a whole checkpoint can still be damaged."""
        return [step for step in _steps(self._folder) if (self._folder / str(step) / _COMMITTED).exists()]

    def save(self, step: int, state: Any, data_state: dict, metric: float | None = None) -> None:
        """Write `state` (a pytree of jax.Array) and `data_state` (JSON) as checkpoints/<step>, in the background.

        metric: lower is better; None or not finite is never the best. A step that is there already is left as it is.
        The arrays may be donated as soon as this returns: on an accelerator they are copied to the host, on CPU the
        next program that is given them waits until they are written (1.3 s for 1.1 GB on a local disk).
        Raises InputError where this or the save before it could not be written; earlier checkpoints stay usable.
        """
        self.wait()
        if step in self.steps():
            return
        metric = None if metric is None or not math.isfinite(metric) else float(metric)
        items = {"state": state, "data": {"data_state": data_state, "metric": metric}}
        with self._written(step), _context():
            # Overwrites what a store without rename keeps of a half-written checkpoint of this step.
            response = ocp.save_checkpointables_async(self._folder / str(step), items, overwrite=True)
        self._writing = step, self._background.submit(self._finish, step, response)

    def wait(self) -> None:
        """Wait until the save under way is whole. Raises InputError where it could not be written."""
        if self._writing is not None:
            (step, writing), self._writing = self._writing, None
            with self._written(step):
                writing.result()

    def close(self) -> None:
        """`wait`, for the last time. Raises InputError as it does."""
        self._background.shutdown()
        self.wait()

    def restore(self, abstract_state: Any) -> tuple[Any, dict, int] | None:
        """The newest usable checkpoint, or None: (state, data_state, step).

        abstract_state: a pytree of jax.ShapeDtypeStruct with shardings (or of arrays), whose shardings the state gets.
        One that is half-written or damaged is skipped with a line on stderr; it is kept as <step>.corrupt, so that
        its step can be saved again. Raises InputError for a tensor that is missing, extra, or of another shape or
        dtype, by its name.
        """
        self.wait()
        self._delete_unfinished()
        _barrier("unfinished checkpoints deleted")
        for step in reversed(_steps(self._folder)):
            path = self._folder / str(step)
            try:
                return *_read(path, abstract_state), step
            except _Unusable as e:
                aside = self._set_aside(path)
                _warn(f"{path}: skipped, not a usable checkpoint ({e}); kept as {aside.name}")
        return None

    @contextlib.contextmanager
    def _written(self, step: int):
        path = self._folder / str(step)
        try:
            yield
        except Exception as e:  # orbax and tensorstore raise ValueError, OSError and their own for a full disk
            with contextlib.suppress(OSError):
                self._delete_unfinished()  # a full disk needs the room
            raise InputError(
                f"{path}: the checkpoint could not be written ({first_cause(e)}); earlier ones stay usable"
            ) from e

    def _delete_unfinished(self) -> None:
        if jax.process_index() == 0:
            for path in self._folder.glob(f"*{TEMPORARY}*"):
                _remove(path)
                _warn(f"{path}: a half-written checkpoint, deleted")

    def _finish(self, step: int, response: ocp.AsyncResponse) -> None:
        response.result()
        if jax.process_index() == 0:
            path = self._folder / str(step)
            replace_file(path / _FILES, json.dumps(_fingerprints(path)).encode())
            self._delete_old()

    def _delete_old(self) -> None:
        steps = self.steps()
        scored = [(metric, -step) for step in steps if (metric := self._metric(step)) is not None]
        kept = {*steps[-self._keep :], *(-step for _, step in sorted(scored)[:1])}
        for step in _steps(self._folder):
            if step not in kept:
                # First the mark that it is whole: a deletion that is cut short must not leave one behind.
                (self._folder / str(step) / _COMMITTED).unlink(missing_ok=True)
                (self._folder / str(step)).rmtree()

    def _metric(self, step: int) -> float | None:
        try:
            return json.loads((self._folder / str(step) / "data/data.json").read_text())["metric"]
        except (OSError, ValueError, KeyError, TypeError):  # damaged: `restore` deals with it
            return None

    def _set_aside(self, path: epath.Path) -> epath.Path:
        taken = sum(1 for _ in self._folder.glob(f"{path.name}.corrupt*"))
        aside = self._folder / f"{path.name}.corrupt{f'-{taken + 1}' if taken else ''}"
        _barrier(f"{path} found damaged")
        if jax.process_index() == 0:
            with writing(self._folder):
                path.rename(aside)
        _barrier(f"{path} set aside")
        return aside


def kept(directory: str | os.PathLike) -> str:
    """The last checkpoint of a run that cannot go on, in words."""
    steps = _steps(_absolute(directory) / "checkpoints")
    return f"the last checkpoint is step {steps[-1]} of {directory}" if steps else "no checkpoint was written before it"


def restore_params(directory: str | os.PathLike, abstract_params: Any) -> tuple[Any, int]:
    """The `params` of the newest usable checkpoint of a run, as np.ndarray of `abstract_params`' dtypes, and its step.

    abstract_params: a pytree of anything with shape and dtype. The optimiser state is not read; the read's peak is
    the params and once more the largest of them (SmolLM2: 0.74 GB for 0.54). Changes nothing on disk.
    Raises InputError for a run without a usable checkpoint, and for a tensor of another shape by its name.
    """
    folder = _absolute(directory) / "checkpoints"
    # A view of one number: how orbax is asked for an np.ndarray, without making one.
    abstract = jax.tree.map(lambda a: np.broadcast_to(np.zeros((), a.dtype), a.shape), abstract_params)
    for step in reversed(_steps(folder)):
        try:
            return _read(folder / str(step), {"params": abstract}, partial=True)[0]["params"], step
        except _Unusable as e:
            _warn(f"{folder / str(step)}: skipped, not a usable checkpoint ({e})")
    raise InputError(f"{directory}: no usable checkpoint in {folder}; train.py writes one every train.save_every steps")


def _read(path: epath.Path, abstract: Any, partial: bool = False) -> tuple[Any, dict]:
    """(state, data_state) of one checkpoint. partial: the stored state may have more entries at its top.

    Raises _Unusable for a half-written or damaged one and InputError for another shape.
    """
    try:
        _check_files(path)
        with _context(partial):
            stored = ocp.metadata(path, checkpointable_name="state").metadata
            if stored is None:  # what orbax says of files it cannot parse
                raise _Unusable("the metadata of `state` cannot be read")
            if partial:
                stored = {name: stored[name] for name in abstract if name in stored}
            _check_shapes(path, stored, abstract, dtypes=not partial)
            loaded = ocp.load_checkpointables(path, {"state": abstract, "data": None})
        return loaded["state"], loaded["data"]["data_state"]
    except (InputError, _Unusable, *_NO_FAULT_OF_THE_FILE):
        raise
    except Exception as e:  # damaged files make orbax raise ValueError, KeyError, FileNotFoundError, TypeError, ...
        raise _Unusable(first_cause(e)) from e


def _check_files(path: epath.Path) -> None:
    """Raises _Unusable for a checkpoint with a file that is missing, cut short, or (up to 1 MB) changed."""
    if not (path / _COMMITTED).exists():
        raise _Unusable(f"half-written: no {_COMMITTED}")
    if not (path / _FILES).exists():  # killed in the moment between the commit and its writing
        return
    found = _fingerprints(path)
    for name, (size, crc) in json.loads((path / _FILES).read_text()).items():
        if name not in found:
            raise _Unusable(f"{name} is missing")
        if found[name] != [size, crc]:
            raise _Unusable(f"{name} is not as it was written ({found[name][0]} of {size} bytes)")


def _fingerprints(folder: epath.Path, prefix: str = "") -> dict[str, list[int | None]]:
    """Relative path -> bytes, and CRC of what is not larger than 1 MB, of every file below `folder`."""
    found = {}
    for path in folder.iterdir():
        name = prefix + path.name
        if path.is_dir():
            found |= _fingerprints(path, name + "/")
        else:
            size = path.stat().length
            found[name] = [size, zlib.crc32(path.read_bytes()) if size <= 2**20 else None]
    return found


def _check_shapes(path: epath.Path, stored: Any, abstract: Any, dtypes: bool) -> None:
    stored, wanted = _named_shapes(stored, dtypes), _named_shapes(abstract, dtypes)
    for name in sorted(stored.keys() | wanted.keys()):
        here, asked = stored.get(name, "missing"), wanted.get(name, "no such tensor")
        if here != asked:
            raise InputError(f"{path}: {name} is {here} in this checkpoint; the config asks for {asked}")


def _named_shapes(tree: Any, dtypes: bool) -> dict[str, str]:
    """params.layers.qkv -> float32[2, 4, 8]; the names are the same for a dataclass and the dict orbax makes of it."""
    key = lambda k: str(next(getattr(k, a) for a in ("name", "key", "idx") if hasattr(k, a)))
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {".".join(map(key, path)): f"{a.dtype if dtypes else ''}{list(a.shape)}" for path, a in leaves}


def _context(partial: bool = False) -> ocp.Context:
    context = ocp.Context()
    context.checkpointables.registry = ocp.handlers.local_registry().add(
        ocp.handlers.JsonHandler, checkpointable_name="data"
    )
    # It would make weights 8% smaller, and their writing 2.6 times as long.
    context.array.saving.use_compression = False
    context.pytree.loading.partial_load = partial
    return context


def _warn(line: str) -> None:
    if jax.process_index() == 0:
        print(f"warning: {line}", file=sys.stderr, flush=True)


def _remove(path: epath.Path) -> None:
    """Delete a directory for good: threads of orbax may still write there for a moment after a save has failed.

    A file that they write makes the directory again, so it has to stay away for three looks in a row.
    """
    away = 0
    for attempt in range(50):
        if path.exists():
            away = 0
            try:
                path.rmtree()
            except OSError as e:  # a file came into it, or left it, meanwhile
                if attempt == 49 or e.errno not in (errno.ENOTEMPTY, errno.ENOENT):
                    raise
        elif (away := away + 1) == 3:
            return
        time.sleep(0.1)


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _steps(folder: epath.Path) -> list[int]:
    """Steps of every checkpoint that bears its final name, ascending."""
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal()) if folder.exists() else []


def _absolute(directory: str | os.PathLike) -> epath.Path:
    """orbax takes no other."""
    path = epath.Path(directory)
    return path if is_remote(path) else epath.Path(os.path.abspath(path))
