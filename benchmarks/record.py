"""What every benchmark's closing JSON line says of the run itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax


def run_record() -> dict[str, str]:
    """The command as typed, the commit of the code, and the device."""
    here = Path(__file__).parent
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=here)
    return {
        "command": " ".join(["python", *sys.argv]),
        "commit": commit.stdout.strip(),
        "device": f"{jax.devices()[0].device_kind} x{jax.device_count()}, {os.cpu_count()} cores",
    }
