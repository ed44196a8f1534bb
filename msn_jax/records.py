"""What measurements share: what a closing JSON line says of the run, and rows that outlive a run that was cut off."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax

from msn_jax.errors import InputError


def print_record(**figures: Any) -> None:
    """The closing line of a measurement: one JSON object of the run and its figures."""
    print(json.dumps(run_record() | figures, default=str))


def run_record() -> dict[str, str]:
    """The command, the commit of the script's checkout ("" outside of one), and the device."""
    module = sys.modules["__main__"].__spec__  # of `python -m`; None of a script
    program = [_in_checkout(Path(sys.argv[0]))] if module is None else ["-m", module.name]
    return {
        "command": " ".join(["python", *program, *sys.argv[1:]]),
        "commit": _commit(Path(sys.argv[0]).resolve().parent),
        "device": machine(),
    }


def machine(backend: str | None = None) -> str:
    """The devices of a backend (None: the default one), and the processor beside them."""
    kind, count = jax.devices(backend)[0].device_kind, jax.device_count(backend)
    return f"{kind} x{count}, {os.cpu_count()} cores{processor()}"


def _in_checkout(script: Path) -> str:
    """A script by its place in its checkout: where that stands is no part of the command."""
    root = Path(__file__).resolve().parent.parent
    return str(script.resolve().relative_to(root) if script.resolve().is_relative_to(root) else script)


def _commit(folder: Path) -> str:
    try:
        done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=folder)
    except OSError:  # no git, or no such folder
        return ""
    return done.stdout.strip()


def processor() -> str:
    """What Linux says of the processor, in brackets: its name and its products of bfloat16; else nothing."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    fields = dict(reversed([[part.strip() for part in line.split(":", 1)] for line in lines if ":" in line]))
    if "model name" not in fields:
        return ""
    has = set(fields.get("flags", "").split())
    fast = [name for name in ("amx_bf16", "avx512_bf16") if name in has]
    return f" ({', '.join([fields['model name'], *fast])})"


def kept_rows(path: Path) -> list:
    """The rows that an earlier run left in a JSONL file, none without one. A half-written last line does not count."""
    whole = path.read_bytes() if path.exists() else b""
    return [json.loads(line) for line in whole[: whole.rfind(b"\n") + 1].splitlines()]


def keep_rows(path: Path, rows: Iterable) -> None:
    """Add rows to a JSONL file, on the disk when this returns; they take the place of a half-written last line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    end = path.read_bytes().rfind(b"\n") + 1 if path.exists() else 0
    with path.open("r+b" if path.exists() else "wb") as file:
        file.seek(end)
        file.truncate()
        file.writelines(json.dumps(row).encode() + b"\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())


def listed(flag: str, text: str, known: Iterable[str]) -> list[str]:
    """The names that a flag lists by commas. Raises InputError for one that is not known."""
    names, known = text.split(","), list(known)
    if unknown := [name for name in names if name not in known]:
        raise InputError(f"{flag} {','.join(unknown)}: accepted: {', '.join(known)}")
    return names


def same_settings(path: Path, settings: dict) -> None:
    """Keep what a run was asked for in a JSON file beside its rows; InputError where an earlier run's are others."""
    settings = json.loads(json.dumps(settings, default=str))
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings) + "\n", encoding="utf-8")
        return
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
        names = [name for name in settings | earlier if settings.get(name) != earlier.get(name)]
    except (ValueError, TypeError):
        raise InputError(f"{path}: is not JSON with the settings of a run; name another --out") from None
    if names:
        were = ", ".join(f"{name} {earlier.get(name)}" for name in names)
        raise InputError(f"{path}: the answers beside it were given with {were}; name another --out")
