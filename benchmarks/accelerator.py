"""One command that measures an accelerator: is the output right, what does a pass cost, which trees pay, how fast is
training.

    python benchmarks/accelerator.py --out DIR [--ckpt C] [--adapter DIR] [--questions FILE] [--budget_s 540]

Stages run one after the other, each in a process of its own with a share of the time, and keep every figure in
DIR/STAGE.json as soon as it is measured. The same command again goes on where it was cut off. accelerator_report.py
makes a page of the files.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # run as a script, with `benchmarks` beside it

from benchmarks.accelerator_report import summary  # noqa: E402
from benchmarks.stages.files import read, row_of  # noqa: E402

# Share of the budget that each stage may take at most, in order of worth; what one leaves the next ones have.
STAGES = {"check": 0.16, "passes": 0.22, "graphs": 0.1, "decode": 0.22, "train": 0.16, "learn": 1.0}
MODULES = {"graphs": "passes", "decode": "decoding", "train": "training", "learn": "learning"}
GRAPHS = "--xla_gpu_enable_command_buffer=+WHILE,+CONDITIONAL"
FLASH_ERROR = 0.02  # of the largest gradient; two forms in bfloat16 differ by about 0.01
LEAST_S = 10  # a stage with less is left for the next run
GRACE_S = 20  # what a stage may take past its share to end what it has begun


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("--ckpt", default="smollm2-135m-instruct")
    p.add_argument("--adapter", help="a draft-only adapter; by default the shipped one, with its model")
    p.add_argument("--out", type=Path, default=Path("out/accelerator"), help="folder of the figures")
    p.add_argument("--budget_s", type=float, default=540)
    p.add_argument("--stages", default=",".join(STAGES), help="some of them, in this order; NAME:SECONDS sets a share")
    p.add_argument("--questions", help="Spec-Bench questions (JSONL); else the twelve prompts of the check")
    p.add_argument("--prompts", default="", help="rows to learn from (JSONL), see experiments/learn.py")
    p.add_argument("--learn_args", default="", help="further arguments of experiments/learn.py")
    p.add_argument("--trees", default="", help="further trees to decode with, by name")
    p.add_argument("--small", action="store_true", help="a rehearsal: all stages on a CPU in minutes")
    p.add_argument("--worker", help=argparse.SUPPRESS)
    args = p.parse_args()
    args.stages = [part.partition(":")[::2] for part in args.stages.split(",")]
    for name, seconds in args.stages:
        if name not in STAGES or not (seconds or "0").isdecimal():
            p.error(f"--stages {name}: accepted: {', '.join(STAGES)}, each alone or with :SECONDS")
    if args.adapter is None and args.ckpt == "smollm2-135m-instruct":
        args.adapter = str(Path(__file__).parent.parent / "adapters" / "smollm2-135m-msn")
    args.out.mkdir(parents=True, exist_ok=True)
    return work(args) if args.worker else conduct(args, sys.argv[1:])


def work(args) -> int:
    """One stage, in this process."""
    from benchmarks.stages.stage import Stage

    stage = Stage(args.worker, args.out, args.budget_s, args.small)
    args.graphs = args.worker == "graphs"
    importlib.import_module(f"benchmarks.stages.{MODULES.get(args.worker, args.worker)}").run(stage, args)
    stage.finish()
    return 0


def conduct(args, arguments: list[str]) -> int:
    """Every stage in turn, each a child; none stops the next by failing. On SIGTERM the child ends with this."""
    start, outcomes, child = time.monotonic(), {}, None

    def stop(*_):
        if child is not None:
            kill(child)
        raise SystemExit(143)

    signal.signal(signal.SIGTERM, stop)
    for name, seconds in args.stages:
        left = args.budget_s - (time.monotonic() - start)
        if (read(args.out / f"{name}.json") or {}).get("complete"):
            outcomes[name] = "kept from before"
            continue
        if left < LEAST_S:
            outcomes[name] = "no time left"
            continue
        share = min(left, float(seconds) if seconds else max(STAGES[name] * args.budget_s, LEAST_S))
        print(f"== {name}: up to {share:.0f} s of {left:.0f} s", flush=True)
        command = [sys.executable, __file__, *arguments, "--worker", name, "--budget_s", f"{share:.0f}"]
        child = subprocess.Popen(command, env=environment(args.out, name), start_new_session=True)
        try:
            code = child.wait(timeout=min(left, share + GRACE_S))
            outcomes[name] = "done" if code == 0 else f"failed with {code}"
        except subprocess.TimeoutExpired:
            kill(child)
            outcomes[name] = "cut off"
    record = summary(args.out) | {"stages": outcomes, "seconds": round(time.monotonic() - start, 1)}
    print(json.dumps(record))
    return 0


def kill(child: subprocess.Popen) -> None:
    """End a stage, and what it has started."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:  # it has ended by itself
        pass
    child.wait()


def environment(out: Path, stage: str) -> dict[str, str]:
    """The environment of a stage: a compile cache that the stages share; CUDA graphs where they were found right."""
    env = dict(os.environ)
    env.setdefault("JAX_COMPILATION_CACHE_DIR", str(out.resolve() / "compiled"))
    env.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "1")
    env.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    env.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if stage == "graphs" or (stage in ("decode", "learn") and graphs_pay(out)):
        env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} {GRAPHS}".strip()
    if stage == "learn" and flash_pays(out):
        env["MSN_JAX_FLASH"] = "on"
    return env


def flash_pays(out: Path) -> bool:
    """Whether cuDNN's attention was right, and a step with it faster."""
    error = row_of(read(out / "check.json"), what="cudnn attention").get("largest_error", 1.0)
    steps = [row_of(read(out / "train.json"), weights="ckpt", attention=name) for name in ("xla", "cudnn")]
    return error < FLASH_ERROR and steps[1].get("tokens_per_s", 0) > steps[0].get("tokens_per_s", 0)


def graphs_pay(out: Path) -> bool:
    """Whether passes under CUDA graphs gave the same answers, twice, and one token took less time."""
    plain, graphs = (read(out / f"{name}.json") for name in ("passes", "graphs"))
    answers = [row_of(file, what="answers") for file in (plain, graphs)]
    ones = [row_of(file, nodes=1, weights="ckpt") for file in (plain, graphs)]
    if not all(answers) or not all("ms" in one for one in ones):
        return False
    same = answers[0]["tokens"] == answers[1]["tokens"] and answers[1]["second_run_same"]
    return same and ones[1]["ms"] < ones[0]["ms"]


if __name__ == "__main__":
    sys.exit(main())
