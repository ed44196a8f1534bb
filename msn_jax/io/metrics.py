"""`metrics.jsonl` of a run: one JSON object a step."""

from __future__ import annotations

import errno
import json
import math
import os
from typing import Any

from etils import epath

from msn_jax.io.files import is_remote, replace_file, writing


class MetricsLog:
    """`metrics.jsonl`: one JSON object a step. One process of a run keeps it.

    Nothing can be appended to an object in a store: there the lines stay in memory, and `flush` writes all of them.
    """

    def __init__(self, directory: str | os.PathLike):
        """directory: of the run. Raises InputError where it cannot be written."""
        self._path, self._lines, self._file = epath.Path(directory) / "metrics.jsonl", [], None
        with writing(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._open()

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Add the line of a step. Numbers that are not finite become null: JSON has none. Raises InputError."""
        numbers = {name: value.item() if hasattr(value, "item") else value for name, value in values.items()}
        finite = {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in numbers.items()}
        line = json.dumps({"step": step, **finite}) + "\n"
        if self._file is None:
            self._lines.append(line)
            return
        with writing(self._path):
            if self._file.write(line.encode()) < len(line):  # json.dumps gives ASCII
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def flush(self) -> None:
        """Put every line on the disk. Comes before the save of the same step. Raises InputError."""
        with writing(self._path):
            if self._file is None:
                self._path.write_text("".join(self._lines))
            else:
                os.fsync(self._file.fileno())

    def cut_back(self, step: int) -> None:
        """Drop the lines of steps after `step`, and a last line that is half-written. Raises InputError."""
        with writing(self._path):
            self.close()
            if self._path.exists():
                lines = self._path.read_bytes().splitlines(keepends=True)
                replace_file(self._path, b"".join(line for line in lines if 0 <= _step_of(line) <= step))
            self._open()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _open(self) -> None:
        if not is_remote(self._path):
            self._file = open(self._path, "ab", buffering=0)  # a line is in the file when `write` returns
        elif self._path.exists():
            self._lines = self._path.read_text().splitlines(keepends=True)


def _step_of(line: bytes) -> int:
    """The step of a line of metrics.jsonl; -1 where it is half-written."""
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else -1
    except (ValueError, KeyError, TypeError):
        return -1


def read_metrics(directory: str | os.PathLike) -> list[dict[str, Any]]:
    """The objects of metrics.jsonl, one a step."""
    return [json.loads(line) for line in (epath.Path(directory) / "metrics.jsonl").read_text().splitlines()]
