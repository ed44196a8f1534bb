"""The files of stages as a reader finds them. No jax: accelerator.py reads them beside the process that measures."""

from __future__ import annotations

import json
from pathlib import Path


def read(path: Path) -> dict | None:
    """What a stage has written; None where there is nothing to read."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None


def row_of(file: dict | None, **what) -> dict:
    """The first row of a stage's file whose `what` has these values, empty without one."""
    rows = file["rows"] if file else []
    return next((row for row in rows if what.items() <= row["what"].items()), {})
