"""A run directory: what train.py writes and resumes from, and decode.py reads. Local, or an object store's gs://.

config.yaml, config.json   the resolved settings; the model's shape in Hugging Face layout
tokenizer.json, ...        as `save_pretrained` writes them
checkpoints/<step>/        orbax: `state` (a pytree of arrays) and `data` (JSON). It bears this name once it is whole
metrics.jsonl              one object a step (metrics.py)
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import filelock
import jax
import yaml
from etils import epath
from transformers import PreTrainedTokenizerBase

from msn_jax.config import RunConfig
from msn_jax.errors import InputError, first_line
from msn_jax.io.checkpoints import TEMPORARY
from msn_jax.io.files import TEMPORARY_SUFFIX, first_cause, is_remote, replace_file, writing
from msn_jax.io.tokenizer import save_tokenizer

_LOCK = ".lock"  # held by the process that trains


def is_run(path: str | os.PathLike) -> bool:
    """Whether `path` is a run directory (it may not hold a checkpoint yet)."""
    try:
        return all((epath.Path(path) / name).exists() for name in ("config.yaml", "config.json"))
    except ImportError as e:  # of the file system that a store's address needs
        raise InputError(f"{path}: {first_line(e)}; for gs:// pip install 'etils[epath-gcs]'") from None


def has_begun(path: str | os.PathLike) -> bool:
    """Whether `path` is a run directory with a checkpoint, be it a damaged one: something that can be gone on with."""
    return is_run(path) and any(TEMPORARY not in entry.name for entry in epath.Path(path).glob("checkpoints/*"))


def check_out(directory: str | os.PathLike, ckpt: str | None) -> None:
    """Raise InputError for a train.out whose files a new run would overwrite: it has some, and they are no run's.

    ckpt: what the run starts from.
    """
    folder = epath.Path(directory)
    accepted = "accepted: a new or empty directory, or that of a run"
    if not folder.exists():
        return
    if not folder.is_dir():
        raise InputError(f"train.out {directory}: a file; {accepted}")
    if ckpt is not None and Path(ckpt).exists() and os.path.realpath(ckpt) == os.path.realpath(directory):
        raise InputError(f"train.out {directory}: is also model.ckpt; {accepted}")
    # What a first start that was cut off leaves: `write_run_files` begins with config.yaml.
    others = sorted(e.name for e in folder.iterdir() if e.name != _LOCK and not e.name.endswith(TEMPORARY_SUFFIX))
    if not others:
        return
    try:
        read_config(directory)
    except InputError as e:
        raise InputError(f"train.out {directory}: other files are in it ({', '.join(others[:3])}); {accepted}") from e


@contextlib.contextmanager
def held(directory: str | os.PathLike):
    """Keep a local run directory to this run, made where it is missing; one process of a run holds it.

    Raises InputError where another run has it, or it cannot be written.
    """
    if is_remote(directory) or jax.process_index() > 0:
        yield
        return
    with writing(epath.Path(directory)):
        Path(directory).mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(Path(directory) / _LOCK, timeout=0)
        try:
            lock.acquire()
        except filelock.Timeout as e:
            raise InputError(f"train.out {directory}: another process is training there") from e
    try:
        yield
    finally:
        lock.release()


def write_run_files(
    directory: str | os.PathLike, config_yaml: str, hf_config: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Write all but checkpoints and metrics, each file whole or not at all. One process of a run calls it.

    Raises InputError for a directory that cannot be written.
    """
    folder = epath.Path(directory)
    with tempfile.TemporaryDirectory() as scratch, writing(folder):
        save_tokenizer(tokenizer, Path(scratch))
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / "config.yaml", config_yaml.encode())  # first: the mark of a run, see `check_out`
        for file in sorted(Path(scratch).iterdir()):
            replace_file(folder / file.name, file.read_bytes())
        # Last: `is_run` means that the others are there.
        replace_file(folder / "config.json", json.dumps(hf_config, indent=2).encode() + b"\n")


def read_config(directory: str | os.PathLike) -> RunConfig:
    """The settings that a run was begun with. Raises InputError where its config.yaml cannot be read."""
    path = epath.Path(directory) / "config.yaml"
    try:
        return RunConfig.from_dict(yaml.safe_load(path.read_text())).with_absolute_base()
    except (OSError, yaml.YAMLError, TypeError, KeyError) as e:
        raise InputError(f"{path}: not the config of a run ({first_cause(e)})") from e
