"""Tables of what `experiments.learn` found, from its learn.jsonl: quality, accuracy by depth, tokens a pass.

    python -m experiments.learn_table OUT/learn.jsonl [--base plain]

Seeds of an arm are taken together. Intervals are 95%, by question (statistics.py).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from experiments.statistics import by_question, mat_interval, mat_ratio
from experiments.tables import interval, table
from msn_jax.errors import InputError
from msn_jax.records import kept_rows
from msn_jax.terminal import run_command


def learnt_table(records: list[dict], base: str) -> str:
    """Steps, held-out loss and the noise's accuracy by depth of each arm, means over its seeds."""
    found: dict[str, list[dict]] = {}
    for record in records:
        if "held_out" in record and "steps" in record:
            found.setdefault(record["arm"], []).append(record)
    losses = {arm: np.mean([r["held_out"]["loss"] for r in runs]) for arm, runs in found.items()}
    plain = next((loss for arm, loss in losses.items() if arm.partition("@")[0] == base), None)
    rows = []
    for arm, runs in found.items():
        draft_only = runs[0]["lora"]["draft_only"]
        over = "" if draft_only or plain is None else f"{100 * (losses[arm] / plain - 1):+.1f}%"
        shares = []
        for k in (1, 10):
            names = sorted(name for name in runs[0]["held_out"] if name.startswith(f"top{k}_depth"))
            shares.append(", ".join(f"{np.mean([r['held_out'][name] for r in runs]):.3f}" for name in names))
        speed = f"{np.mean([r['step_s'] for r in runs]):.4f}"
        rows.append([arm, str(len(runs)), str(runs[0]["steps"]), speed, f"{losses[arm]:.4f}", over, *shares])
    head = ["arm", "seeds", "steps", "s a step", "held-out loss", "to " + base, "first of one, by depth", "one of ten"]
    return table(head, rows)


def speed_table(records: list[dict], base: str) -> str:
    """Tokens a pass of answers that do not loop, seeds together, and over the base arm's method of the same place."""
    sums: dict[tuple, list[dict]] = {}
    for record in records:
        if "answers" in record and not record["arm"].startswith("new "):
            for place, method in enumerate(record["methods"]):
                key = record["arm"], record.get("dtype", ""), method, place
                sums.setdefault(key, []).append(by_question(record, method))
    together = {
        key: {q: tuple(map(sum, zip(*(p[q] for p in parts if q in p), strict=True))) for q in set().union(*parts)}
        for key, parts in sums.items()
    }
    plain = {place: found for (arm, _, _, place), found in together.items() if arm.partition("@")[0] == base}
    rows = []
    for (arm, dtype, method, place), found in together.items():
        if found:
            ratio = interval(mat_ratio(found, plain[place]), 3) if plain.get(place) else ""
            rows.append([arm, dtype, method, str(len(found)), interval(mat_interval(found)), ratio])
    return table(["arm", "dtype", "method", "questions", "tokens a pass", "to " + base], rows)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("files", type=Path, nargs="+", help="learn.jsonl of one run, or of several")
    p.add_argument("--base", default="plain", help="the arm that others are compared with, or untouched")
    args = p.parse_args()
    records = [row for file in args.files for row in kept_rows(file)]
    if not records:
        raise InputError(f"{args.files[0]}: no figures in it; accepted: learn.jsonl of experiments.learn")
    print(learnt_table(records, args.base), speed_table(records, args.base), sep="\n\n")


if __name__ == "__main__":
    run_command(main)
