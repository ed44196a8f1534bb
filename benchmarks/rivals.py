"""Every way to draft beside ours: one model, one run, one loop; the arms of rivals.yaml take turns.

    python -m benchmarks.rivals --questions FILE.jsonl --limit 26 --out OUT

Prints tokens a pass with their interval (outputs that do not loop, resampled by question), speed to `ar` of the run,
what is added and trained, and how many answers are those of `ar`; OUT/rivals.json keeps it. A run that was cut off goes
on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import yaml
from tqdm import tqdm

from benchmarks.spec_bench import answer_group, parse_method, read_done
from experiments.statistics import by_question, mat_interval
from experiments.tables import interval, table
from msn_jax import DecodeConfig, InputError, load
from msn_jax.answers import figures
from msn_jax.decode.engine import trees_of
from msn_jax.io.loading import LM
from msn_jax.questions import read_questions, spread
from msn_jax.records import keep_rows, run_record
from msn_jax.terminal import run_command

PLAN = Path(__file__).parent / "rivals.yaml"
# The field of LM that an adapter of the plan fills.
PARTS = {"noise": "drafter", "medusa": "heads", "eagle": "eagle", "ngrams": "ngrams", "draft": "draft"}


def load_all(plan: dict) -> tuple[LM, dict[str, int]]:
    """The model with all of the plan that is there: adapters, the draft model; and the bytes that each adds to its
    weights. An adapter `draft` that is there, of first layers, takes the place of the plan's draft model."""
    there = {}
    for name, adapter in plan["adapters"].items():
        if Path(adapter["path"]).exists():
            there[name] = adapter["path"]
        else:
            print(f"left out: what needs {name}; {adapter['path']} is not there ({adapter['trained']})")
    small = None if "draft" in there else plan.get("draft", {}).get("model")
    lm, added = load(plan["ckpt"], adapter=list(there.values()), dtype=plan["dtype"], draft=small), {}
    for name, path in there.items():
        own = getattr(lm, PARTS[name])
        if own is None:
            raise InputError(f"{path}: no draft-only adapter, no heads, no n-grams and no layers that draft")
        own = own.params.layers if name == "draft" else own  # embedding and head are the model's own
        added[name] = sum(x.nbytes for x in jax.tree.leaves(own))
    if small is not None:  # its first layers are the model's own
        added["draft"] = 0 if isinstance(small, int) else sum(x.nbytes for x in jax.tree.leaves(lm.draft.params))
    return lm, added


def row_of(lm: LM, plan: dict, arm: dict, config: DecodeConfig, rows: list[dict], ar: list[dict], added: dict) -> dict:
    """An arm's line of the table."""
    own = [row for row in rows if row["method"] == arm["method"]]
    sums = by_question({"answers": own}, arm["method"])
    needs = needed(arm)
    return {
        **{name: arm.get(name, "") for name in ("method", "what", "differs")},
        "nodes": [tree.size for tree in trees_of(lm, config.method, config.tree, 1).trees],
        "added_bytes": sum(added.get(name, 0) for name in needs),
        "trained": "; ".join(trained_of(plan, name) for name in needs),
        "mat_no_loops_interval": mat_interval(sums) if sums else None,
        **figures(own, ar),
    }


def needed(arm: dict) -> list[str]:
    """The names of what an arm needs: one by itself, or a list."""
    needs = arm.get("needs", [])
    return [needs] if isinstance(needs, str) else needs


def trained_of(plan: dict, name: str) -> str:
    """How what an arm needs was trained."""
    adapter = plan["adapters"].get(name)
    there = adapter and (name != "draft" or Path(adapter["path"]).exists())
    return (adapter if there else plan["draft"])["trained"]


def as_table(rows: list[dict[str, Any]]) -> str:
    """The lines as Markdown, the best of our own last."""
    head = [
        "",
        "method",
        "nodes",
        "tokens a pass, no loops",
        "all",
        "speed, x ar",
        "same / answers",
        "added",
        "differs",
    ]
    lines = []
    for row in rows:
        sure = row["mat_no_loops_interval"]
        lines.append(
            [
                row["what"],
                f"`{row['method']}`",
                ", ".join(map(str, row["nodes"])),
                "1.00" if row["method"] == "ar" else interval(sure) if sure else "all loop",
                f"{row['mat']:.2f}",
                f"{row['ratio_to_ar']:.2f}",
                f"{row['identical']} / {row['outputs']}",
                f"{row['added_bytes'] / 1e6:.0f} MB, {row['trained']}" if row["trained"] else "-",
                row["differs"] or "-",
            ]
        )
    return table(head, lines)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--plan", type=Path, default=PLAN, help="what to compare; left out: rivals.yaml beside this file")
    p.add_argument("--questions", required=True, help="JSONL with question_id, category, turns")
    p.add_argument("--limit", type=int, help="use this many questions, spread over the categories")
    p.add_argument("--out", type=Path, required=True, help="folder for rivals.json, and for the answers so far")
    args = p.parse_args()
    plan = yaml.safe_load(args.plan.read_text(encoding="utf-8"))
    if plan["arms"][0]["method"] != "ar":
        raise InputError(f"--plan {args.plan}: the first arm must be ar; the others are compared with it")
    questions = spread(read_questions(args.questions), args.limit)
    lm, added = load_all(plan)
    base = DecodeConfig(max_new_tokens=plan["max_new_tokens"])
    arms = [arm for arm in plan["arms"] if all(name in added for name in needed(arm))]
    configs = {arm["method"]: parse_method(arm["method"], base) for arm in arms}
    run = {"plan": plan, "arms": list(configs), "questions": [q["question_id"] for q in questions]}
    kept = args.out / "answers.jsonl"
    done = read_done(kept, run)
    for question in tqdm(questions[len(done) :], total=len(questions), initial=len(done), unit="question"):
        done.append(answer_group(lm, [question], configs))
        keep_rows(kept, [done[-1]])
    rows = [row for group in done for row in group]
    ar = [row for row in rows if row["method"] == "ar"]
    lines = [row_of(lm, plan, arm, configs[arm["method"]], rows, ar, added) for arm in arms]
    print(as_table(lines))
    record = run_record() | {"dtype": plan["dtype"], "ckpt": plan["ckpt"], "arms": lines}
    (args.out / "rivals.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {args.out / 'rivals.json'}")


if __name__ == "__main__":
    run_command(main)
