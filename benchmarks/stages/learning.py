"""What this device can teach in the time that is left: experiments/learn.py, run as it is, its figures kept."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks.stages.stage import Stage, read

LEARN = Path(__file__).parents[2] / "experiments" / "learn.py"


def run(stage: Stage, args) -> None:
    """A subprocess that keeps its own files in OUT/learn: cut off, it goes on there."""
    out = stage.folder / "learn"
    command = [sys.executable, str(LEARN), "--ckpt", args.ckpt, "--out", str(out)]
    command += ["--budget_s", str(max(30, int(stage.left_s)))]
    if args.prompts:
        command += ["--prompts", args.prompts]
    if args.questions:
        command += ["--questions", args.questions]
    if stage.small:
        command.append("--small")
    command += args.learn_args.split()
    done = subprocess.run(command)
    for path in sorted(out.glob("*.json")):
        what = {"file": path.name}
        if stage.row(**what) is None:
            stage.keep(what, figures=read(path))
    if done.returncode:
        stage.leave_out([{"what": "learn"}], f"learn.py ended with {done.returncode}")
