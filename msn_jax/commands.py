"""The installed commands msn-decode and msn-train: the scripts decode.py and train.py."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from msn_jax.terminal import run_command


def decode() -> None:
    """msn-decode: decode.py."""
    _run("decode.py")


def train() -> None:
    """msn-train: train.py."""
    _run("train.py")


def decode_command() -> str:
    """How a user calls decoding: by its command where training was called by one."""
    return "msn-decode" if Path(sys.argv[0]).stem == "msn-train" else "python decode.py"


def _run(script: str) -> None:
    here = Path(__file__).parent
    installed = here / "scripts" / script
    path = installed if installed.exists() else here.parent / script  # of a checkout
    spec = importlib.util.spec_from_file_location(f"msn_{path.stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up there
    spec.loader.exec_module(module)
    run_command(module.main)
