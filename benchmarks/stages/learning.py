"""What this device can teach in the time that is left: experiments/learn.py, run as it is, its figures kept."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.stages.check import golden_prompts
from benchmarks.stages.stage import Stage
from msn_jax.records import kept_rows

ROOT = Path(__file__).parents[2]
ARMS = "draft-r28"
SMALL = "--small --arms draft-r4@2x2 --answer_batch 4 --answer_seconds 5 --max_new_tokens 16"
SMALL += " --tokens 128 --most_rows 64 --dispatch 1 --figure_seconds 1"


def run(stage: Stage, args) -> None:
    """A process that keeps its adapters in OUT/learn as they are done; its figures become the rows of this stage."""
    out = stage.folder / "learn"
    questions, prompts = args.questions, args.prompts.split()
    if not questions:
        questions = stage.folder / "questions.jsonl"
        write(questions, [{"question_id": i, "category": "own", "turns": [t]} for i, t in enumerate(texts())])
    if not prompts:
        prompts = [stage.folder / "prompts.jsonl"]
        write(prompts[0], [{"instruction": text, "response": text} for text in texts()])
    more = args.learn_args or (SMALL if stage.small else f"--arms {ARMS}")
    command = [sys.executable, "-m", "experiments.learn", "--ckpt", args.ckpt, "--out", out, "--questions", questions]
    command += ["--prompts", *prompts, "--seconds", max(30, int(stage.left_s)), *more.split()]
    done = subprocess.run([str(part) for part in command], cwd=ROOT)
    for number, figures in enumerate(kept_rows(out / "learn.jsonl")):
        what = {"line": number}
        if stage.row(**what) is None:
            stage.keep(what, figures=figures)
    if done.returncode:
        stage.leave_out([{"what": "learn"}], f"experiments/learn.py ended with {done.returncode}")


def texts() -> list[str]:
    return [prompt[0]["content"] for prompt in golden_prompts()]


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
