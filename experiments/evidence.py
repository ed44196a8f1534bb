"""What noise does to a real model: train one arm, then measure its speed, its acceptance and its quality.

    python -m experiments.evidence --arm paper --seed 0 --data DIR --runs RUNS

Arms are those of evidence.yaml. One with a section of train.py is a normal run of it from the same weights, with the
same rows in the same order; the others measure the base, alone or with adapters that are there. All of it can be cut
off and goes on with the same command. The figures go to results/ARM-seedS.json; results.py makes RESULTS.md
and plots of them.
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

from msn_jax import InputError
from msn_jax.records import kept_rows, run_record
from msn_jax.terminal import run_command

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results"
SECTIONS = {"data", "noise", "train", "lora"}  # of an arm, as in a config of train.py
KEPT = (
    "loss",
    "loss_clean",
    "loss_noisy",
    "response_tokens",
    "eval_loss",
    "eval_top1",
)  # of metrics.jsonl, and all by noise depth


def run(*args: object) -> str:
    """Python in this repository with `args`; its output goes to the terminal, its last line comes back."""
    command = [sys.executable, *map(str, args)]
    print("+", " ".join(command[1:]), flush=True)
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    last = ""
    for line in process.stdout:
        print(line, end="", flush=True)
        last = line
    if process.wait():
        raise InputError(f"{' '.join(command[1:3])} ended with {process.returncode}; its message is above")
    return last


def row_hash(path: Path) -> str:
    """SHA-256 of the rows of a file, packed or not."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def train_config(plan: dict, arm: str, seed: int, sources: list[dict], out: Path) -> dict:
    """Settings of train.py: `common`, and over it the sections that the arm states."""
    sections = {name: dict(values) for name, values in plan["common"].items()}
    for name in SECTIONS & plan["arms"][arm].keys():
        sections[name] = sections.get(name, {}) | plan["arms"][arm][name]
    sections["model"] = {"ckpt": plan["base"]}
    sections["data"] = sections["data"] | {"sources": sources}
    sections["train"] = sections["train"] | {"out": str(out), "seed": seed}
    return sections


def own_replies(plan: dict, paths: list[str], out: Path) -> None:
    """The base's replies to prompts of the sources, all of them or those that are still missing."""
    settings = {name: value for name, value in plan["own_replies"].items() if name != "sources"}
    options = [text for name, value in settings.items() for text in (f"--{name}", value)]
    run("-m", "experiments.own_responses", "--ckpt", plan["base"], "--sources", *paths, *options, "--out", out)


def metrics(out: Path) -> list[dict]:
    """What is plotted over training, without the figures of speed."""
    wanted = lambda name: name == "step" or name in KEPT or "depth" in name
    return [{name: value for name, value in line.items() if wanted(name)} for line in kept_rows(out / "metrics.jsonl")]


def train(plan: dict, args: argparse.Namespace, folder: Path) -> dict:
    """Train an arm in folder/run. Returns what of it belongs into the results."""
    arm = plan["arms"][args.arm]

    def places(files: dict[str, str | None]) -> list[str]:
        if args.hub:
            return [hub for hub in files.values() if hub]
        return [str(args.data.resolve() / "sft" / file) for file in files]

    sources = [{"path": path} for path in places(plan["sources"])]
    if "own_replies" in arm:
        own = args.runs.resolve() / "own.jsonl"
        own_replies(plan, places(plan["own_replies"]["sources"]), own)
        sources.append({"path": str(own), "weight": arm["own_replies"]})
    config = train_config(plan, args.arm, args.seed, sources, folder / "run")
    (folder / "train.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    run("train.py", "--config", folder / "train.yaml")
    lines = metrics(folder / "run")
    if lines[-1]["step"] < config["train"]["steps"]:  # train.py saves and ends in good order at SIGTERM
        raise InputError(f"training stopped at step {lines[-1]['step']}; the same command goes on from there")

    # Without folders, which differ from machine to machine.
    files = [Path(source["path"]) for source in sources]
    named = [s | {"path": f.name if f.is_file() else s["path"]} for s, f in zip(sources, files, strict=True)]
    shown = config | {"data": config["data"] | {"sources": named}, "train": dict(config["train"])}
    del shown["train"]["out"]
    hashes = {file.name: row_hash(file) for file in files if file.is_file()}
    return {"train": shown | {"rows_sha256": hashes}, "metrics": lines}


def measure_speed(plan: dict, methods: str, dtype: str, model: list[str], data: Path, folder: Path) -> dict:
    """Figures of spec_bench.py in a dtype: overall, by category, and answer by answer. model: its options for that."""
    questions = data / "eval" / "spec_bench.dev.jsonl"
    spec = [*model, "--questions", questions, "--limit", plan["questions"]]
    kept = folder / f"spec_{dtype}.jsonl"
    spec += ["--methods", methods, "--dtype", dtype, "--max_new_tokens", plan["max_new_tokens"], "--results", kept]
    measured = json.loads(run("benchmarks/spec_bench.py", *spec))
    rows = [row for group in kept_rows(kept)[1:] for row in group]
    columns = ("question_id", "turn", "category", "method", "tokens", "forwards", "accepted", "rep4_frac", "outcome")
    answers = [{column: row[column] for column in columns} for row in rows]
    return {"methods": measured["methods"], "categories": measured["categories"], "answers": answers}


def measure_tasks(plan: dict, ckpt: str, data: Path, folder: Path) -> dict:
    options = ["--ckpt", ckpt, "--data", data / "eval", "--tasks", plan["tasks"]["names"]]
    options += ["--limit", plan["tasks"]["limit"], "--out", folder / "tasks"]
    tasks = json.loads(run("-m", "evals.tasks", *options))["tasks"]
    for task in tasks:
        kept = kept_rows(folder / "tasks" / f"{task}.jsonl")
        tasks[task]["correct_items"] = [row["id"] for row in kept if row["correct"]]
    return {"tasks": tasks}


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
    if args.arm not in plan["arms"]:
        raise InputError(f"--arm {args.arm}: accepted: {', '.join(plan['arms'])}")
    if args.runs.resolve().is_relative_to(ROOT):
        raise InputError(f"--runs {args.runs} lies in the working tree; accepted: a folder outside of it")
    arm, name = plan["arms"][args.arm], f"{args.arm}-seed{args.seed}"
    folder = (args.runs / name).resolve()
    folder.mkdir(parents=True, exist_ok=True)

    result: dict = {"arm": args.arm, "seed": args.seed}
    ckpt, adapters = plan["base"], []
    if "adapters" in arm:
        result["adapters"] = arm["adapters"]
        adapters = ["--adapter", *(str(ROOT / adapter) for adapter in arm["adapters"])]
    if SECTIONS & arm.keys():
        result |= train(plan, args, folder)
        ckpt = str(folder / "run")
    data = args.data.resolve()
    methods = arm.get("methods", plan["repeat_methods" if args.seed else "methods"])
    model = ["--ckpt", ckpt, *adapters]
    result["speed"] = {d: measure_speed(plan, m, d, model, data, folder) for d, m in methods.items()}
    # With what only drafts, replies are those of the base, and so is their quality.
    same_replies = adapters or arm.get("lora", {}).get("draft_only")
    if arm.get("tasks", True) and not (args.seed or same_replies):
        result |= measure_tasks(plan, ckpt, data, folder)

    # Only now: asking for the device takes it, and the runs above need it. The command is without folders, which differ
    # from machine to machine.
    command = f"python -m experiments.evidence --arm {args.arm} --seed {args.seed}"
    result |= run_record() | {"command": command}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result) + "\n")
    print(json.dumps({"arm": args.arm, "seed": args.seed, **{d: s["methods"] for d, s in result["speed"].items()}}))


if __name__ == "__main__":
    run_command(main)
