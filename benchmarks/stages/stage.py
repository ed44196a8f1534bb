"""A stage's figures on disk. Each row is kept as soon as it is measured, so that a run cut off goes on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax

from benchmarks.stages.files import read
from msn_jax.records import run_record


class Stage:
    """Rows of one stage, in `folder`/NAME.json.

    A row says in `what` (a dict of plain values) what was measured; it is measured once. Past the deadline nothing
    new is begun: what is left is listed under `left_out`, and the file stays incomplete.
    """

    def __init__(self, name: str, folder: Path, seconds: float, small: bool = False):
        self.path = folder / f"{name}.json"
        self.folder, self.small = folder, small
        self.start = time.monotonic()
        self.deadline = self.start + seconds
        earlier = read(self.path) or {}
        self.earlier_seconds = earlier.get("seconds", 0.0)
        self.rows = earlier.get("rows", [])
        # The file is remade by what runs now, except where a part was measured on another machine.
        self.record = run_record() | {"stage": name, "machine": machine(), "small": small}
        if self.rows and earlier["machine"]["device"] != self.record["machine"]["device"]:
            raise SystemExit(f"{self.path}: holds figures of {earlier['machine']['device']}; name another --out")
        self.left_out = []
        self.save(complete=False)

    @property
    def left_s(self) -> float:
        return self.deadline - time.monotonic()

    def row(self, **what) -> dict | None:
        """The row that was measured for this, None without one."""
        return next((row for row in self.rows if row["what"] == what), None)

    def todo(self, whats: list[dict]) -> list[dict]:
        """Those without a row yet."""
        return [what for what in whats if self.row(**what) is None]

    def keep(self, what: dict, **figures) -> None:
        self.rows.append({"what": what, **figures})
        self.save(complete=False)
        print(f"  {label(what)}: {label(figures)}"[:160], flush=True)

    def leave_out(self, whats: list[dict], reason: str) -> None:
        self.left_out += [what | {"reason": reason} for what in whats]
        self.save(complete=False)

    def save(self, complete: bool) -> None:
        seconds = round(self.earlier_seconds + time.monotonic() - self.start, 1)
        body = self.record | {"complete": complete, "seconds": seconds, "rows": self.rows, "left_out": self.left_out}
        part = self.path.with_suffix(".tmp")
        part.write_text(json.dumps(body, indent=1) + "\n")
        os.replace(part, self.path)

    def finish(self) -> None:
        self.save(complete=not self.left_out)


def label(values: dict) -> str:
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())


def machine() -> dict:
    """What ran: device, its memory, its driver, the versions of jax and XLA's flags."""
    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    driver = None
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0] or None
    return {
        "device": device.device_kind,
        "devices": jax.device_count(),
        "backend": jax.default_backend(),
        "memory_bytes": stats.get("bytes_limit"),
        "driver": driver,
        "jax": jax.__version__,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def compile_all(lower: dict[str, Callable]) -> dict:
    """Compiled programs by name, or the error of one that does not compile. XLA compiles several at one time.

    lower: name -> a function that lowers the program (jax.stages.Lowered).
    """

    def compile_one(lowered):
        try:
            return lowered.compile()
        except jax.errors.JaxRuntimeError as e:  # it does not fit: a finding about the device, kept by the caller
            return e

    with ThreadPoolExecutor(max(2, min(16, os.cpu_count() or 2))) as pool:
        waiting = {name: pool.submit(compile_one, one()) for name, one in lower.items()}
        return {name: future.result() for name, future in waiting.items()}
