"""The installed commands msn-decode and msn-train: the scripts decode.py and train.py."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path


def decode() -> None:
    """msn-decode: decode.py."""
    _run("decode.py")


def train() -> None:
    """msn-train: train.py."""
    _run("train.py")


def _run(script: str) -> None:
    here = Path(__file__).parent
    installed = here / "scripts" / script
    path = installed if installed.exists() else here.parent / script  # of a checkout
    sys.argv[0] = script
    runpy.run_path(str(path), run_name="__main__")
