"""What noise does to a real model: train one arm, then measure its speed, its acceptance and its quality.

    python benchmarks/evidence.py --arm paper --seed 0 --data DIR --runs RUNS

Arms are those of evidence.yaml, and `untouched`. Each is a normal run of train.py from the same weights, with the same
rows in the same order; all of it can be cut off and goes on with the same command. The figures go to
results/ARM-seedS.json.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import yaml
from record import run_record

from msn_jax import InputError

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results"
KEPT = ("loss", "loss_clean", "loss_noisy", "eval_loss", "eval_top1")  # of metrics.jsonl, and all by noise depth


def run(script: str, *args: object) -> str:
    """A command of this repository; its output goes to the terminal, its last line comes back."""
    command = [sys.executable, script, *map(str, args)]
    print("+", " ".join(command[1:]), flush=True)
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    last = ""
    for line in process.stdout:
        print(line, end="", flush=True)
        last = line
    if process.wait():
        raise InputError(f"{script} ended with {process.returncode}; its message is above")
    return last


def row_hash(path: Path) -> str:
    """SHA-256 of the rows of a file, packed or not."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def train_config(plan: dict, arm: str, seed: int, sources: list[str], out: Path) -> dict:
    sections = {name: dict(values) for name, values in plan["common"].items()}
    for name, values in plan["arms"][arm].items():
        sections[name] = sections.get(name, {}) | values
    sections["model"] = {"ckpt": plan["base"]}
    sections["data"] = sections["data"] | {"sources": [{"path": path} for path in sources]}
    sections["train"] = sections["train"] | {"out": str(out), "seed": seed}
    return sections


def metrics(out: Path) -> list[dict]:
    """What is plotted over training, without the figures of speed."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    wanted = lambda name: name == "step" or name in KEPT or "depth" in name
    return [{name: value for name, value in line.items() if wanted(name)} for line in lines]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--arm", required=True)
    p.add_argument("--seed", type=int, default=0, help="of the noise, the order of rows and the adapter's start")
    p.add_argument("--data", type=Path, required=True, help="a folder with sft/ and eval/")
    p.add_argument("--hub", action="store_true", help="train on the hub's copies; only eval/ is read from --data")
    p.add_argument("--runs", type=Path, required=True, help="where runs are kept, outside the working tree")
    p.add_argument("--config", type=Path, default=Path(__file__).with_suffix(".yaml"))
    args = p.parse_args()

    plan = yaml.safe_load(args.config.read_text(encoding="utf-8"))
    if args.arm != "untouched" and args.arm not in plan["arms"]:
        raise InputError(f"--arm {args.arm}: accepted: untouched, {', '.join(plan['arms'])}")
    if args.runs.resolve().is_relative_to(ROOT):
        raise InputError(f"--runs {args.runs} lies in the working tree; accepted: a folder outside of it")
    name = f"{args.arm}-seed{args.seed}"
    folder = (args.runs / name).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    data = args.data.resolve()

    # The command without folders, which differ from machine to machine.
    command = {"command": f"python benchmarks/evidence.py --arm {args.arm} --seed {args.seed}"}
    result: dict = {"arm": args.arm, "seed": args.seed, **run_record(), **command}
    ckpt = plan["base"]
    if args.arm != "untouched":
        files = [data / "sft" / file for file in plan["sources"]]
        sources = list(plan["sources"].values()) if args.hub else [str(file) for file in files]
        config = train_config(plan, args.arm, args.seed, sources, folder / "run")
        (folder / "train.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        run("train.py", "--config", folder / "train.yaml")
        ckpt = str(folder / "run")
        config["data"]["sources"] = list(plan["sources"])
        config["train"].pop("out")
        result["train"] = config | {"rows_sha256": {} if args.hub else {f.name: row_hash(f) for f in files}}
        result["metrics"] = metrics(folder / "run")
    questions = data / "eval" / "spec_bench.dev.jsonl"
    spec = ["--ckpt", ckpt, "--questions", questions, "--limit", plan["questions"], "--methods", plan["methods"]]
    spec += ["--max_new_tokens", plan["max_new_tokens"], "--results", folder / "spec.jsonl"]
    measured = json.loads(run("benchmarks/spec_bench.py", *spec))
    result["spec_bench"] = {name: measured[name] for name in ("dtype", "seed", "methods", "categories")}
    rows = [row for line in (folder / "spec.jsonl").read_text().splitlines()[1:] for row in json.loads(line)]
    columns = ("question_id", "turn", "category", "method", "tokens", "forwards", "accepted", "rep4_frac")
    result["answers"] = [{column: row[column] for column in columns} for row in rows]
    tasks = ["--ckpt", ckpt, "--data", data / "eval", "--tasks", plan["tasks"]["names"]]
    tasks += ["--limit", plan["tasks"]["limit"], "--out", folder / "tasks"]
    result["tasks"] = json.loads(run("benchmarks/tasks.py", *tasks))["tasks"]
    for task in result["tasks"]:
        kept = [json.loads(line) for line in (folder / "tasks" / f"{task}.jsonl").read_text().splitlines()]
        result["tasks"][task]["correct_items"] = [row["id"] for row in kept if row["correct"]]

    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result) + "\n")
    print(json.dumps({"arm": args.arm, "seed": args.seed, "methods": result["spec_bench"]["methods"]}))


if __name__ == "__main__":
    try:
        main()
    except InputError as e:
        sys.exit(f"evidence.py: error: {e}")
