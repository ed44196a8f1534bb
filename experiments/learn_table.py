"""Tables of what `experiments.learn` found, from its learn.jsonl: quality, accuracy by depth, tokens a pass.

    python -m experiments.learn_table OUT/learn.jsonl [--base plain] [--trade]

With --base "" nothing is compared. Seeds of an arm are taken together; a comparison takes those that both arms have.
Intervals are 95%, by question (statistics.py).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from experiments.statistics import by_question, mat_interval, mat_ratio, together
from experiments.tables import interval, table
from msn_jax.errors import InputError
from msn_jax.records import kept_rows
from msn_jax.terminal import run_command


def only_drafts(run: dict) -> bool:
    """Whether an arm learnt to draft for a model that stays."""
    lora = run["lora"]
    return bool(lora["draft_only"] or lora.get("draft_layers") or run.get("heads", {}).get("kind"))


def part_of(records: list[dict], drafts: bool) -> list[dict]:
    """The records of arms that only draft or of the others, with what all are compared with, and their runs."""
    arms = {record["arm"] for record in records if "steps" in record and only_drafts(record) is drafts}
    found, run = [], None
    for record in records:
        if "command" in record:
            run = record
        elif record.get("arm") in {*arms, "untouched"}:
            if run and record["arm"] in arms:
                found.append(run)
                run = None
            found.append(record)
    return found


def base_of(arm: str, arms: Iterable[str], base: str) -> str | None:
    """The arm that one is compared with: `base` of the same steps and rows, or the first of it that there is."""
    name, at, size = arm.partition("@")
    found = [other for other in arms if other.partition("@")[0] == base]
    return next((other for other in found if other == f"{base}{at}{size}"), found[0] if found else None)


def trained_runs(records: list[dict]) -> dict[str, list[dict]]:
    """The runs of each arm that was trained, a seed each."""
    found: dict[str, list[dict]] = {}
    for record in records:
        if "held_out" in record and "steps" in record:
            found.setdefault(record["arm"], []).append(record)
    return found


def shared_seeds(own: Iterable, other: Iterable) -> tuple[set, set]:
    """The seeds that two arms are compared by: those of both, or all of each where they share none."""
    both = {*own} & {*other}
    return (both, both) if both else ({*own}, {*other})


def seed_losses(found: dict[str, list[dict]]) -> dict[str, dict[int, float]]:
    """Held-out clean loss of each arm by seed."""
    return {arm: {run["seed"]: run["held_out"]["loss"] for run in runs} for arm, runs in found.items()}


def loss_over(arm: str, losses: dict[str, dict[int, float]], base: str) -> str:
    """Held-out clean loss in percent over that of the base arm."""
    if (other := base_of(arm, losses, base)) is None:
        return ""
    seeds = shared_seeds(losses[arm], losses[other])
    mine, theirs = (np.mean([losses[a][seed] for seed in own]) for a, own in zip((arm, other), seeds, strict=True))
    return f"{100 * (mine / theirs - 1):+.1f}%"


def learnt_table(records: list[dict], base: str) -> str:
    """Steps, held-out loss and the noise's accuracy by depth of each arm, means over its seeds."""
    found = trained_runs(records)
    losses, rows = seed_losses(found), []
    for arm, runs in found.items():
        over = "" if only_drafts(runs[0]) else loss_over(arm, losses, base)
        shares = [over] if base else []
        for k in (1, 10):
            names = sorted(name for name in runs[0]["held_out"] if name.startswith(f"top{k}_depth"))
            shares.append(", ".join(f"{np.mean([r['held_out'][name] for r in runs]):.3f}" for name in names))
        speed = f"{min(r['step_s'] for r in runs):.4f}"  # seeds may come from machines of other speeds
        loss = f"{np.mean(list(losses[arm].values())):.4f}"
        rows.append([arm, str(len(runs)), str(runs[0]["steps"]), speed, loss, *shares])
    head = ["arm", "seeds", "steps", "s a step, at best", "held-out loss", *compared_with(base)]
    return table([*head, "first of one, by depth", "one of ten"], rows)


def compared_with(base: str) -> list[str]:
    """The heading of the column that compares, if there is one."""
    return [f"to {base}"] if base else []


def accepted(records: list[dict]) -> dict[tuple, dict]:
    """(arm, dtype, method, its place) -> seed -> sums by question of answers that do not loop."""
    sums: dict[tuple, dict] = {}
    for record in records:
        if "answers" in record and not record["arm"].startswith("new "):
            for place, method in enumerate(record["methods"]):
                if found := by_question(record, method):
                    key = record["arm"], record.get("dtype", ""), method, place
                    sums.setdefault(key, {})[record.get("seed")] = found
    return sums


def speed_over(key: tuple, speeds: dict[tuple, dict], base: str) -> str:
    """Tokens a pass of an arm's method over those of the base arm by the method of the same place."""
    by_arm = {other[0]: parts for other, parts in speeds.items() if other[3] == key[3]}
    if (other := base_of(key[0], by_arm, base)) is None:
        return ""
    own, theirs = shared_seeds(speeds[key], by_arm[other])
    sums = lambda parts, seeds: together([parts[seed] for seed in seeds])
    return interval(mat_ratio(sums(speeds[key], own), sums(by_arm[other], theirs)), 3)


def speed_table(records: list[dict], base: str) -> str:
    """Tokens a pass of answers that do not loop, and over the base arm's method of the same place."""
    speeds = accepted(records)
    rows = []
    for key, parts in speeds.items():
        found = together(list(parts.values()))
        mine = [str(len(found)), interval(mat_interval(found))]
        rows.append([*key[:3], str(len(parts)), *mine, *([speed_over(key, speeds, base)] if base else [])])
    return table(["arm", "dtype", "method", "seeds", "questions", "tokens a pass", *compared_with(base)], rows)


def trade_table(records: list[dict], base: str) -> str:
    """What each setting of noise costs on clean text and buys, an arm a row, over the base arm of the same steps."""
    found, speeds = trained_runs(records), accepted(records)
    losses, rows = seed_losses(found), []
    for arm, runs in found.items():
        noise, lora, size = runs[0]["noise"], runs[0]["lora"], arm.partition("@")[2]
        if only_drafts(runs[0]) or noise["kind"] == "none":
            continue
        beside = noise["layout"] == "beside"
        own = [noise["weight"], noise["anchors"], noise["target"]] if beside else ["-", "-", "label"]
        own[2] += f", {noise['loss']}" if noise["target"] == "model" else ""
        marked = ", marked" if noise["mark"] else ""
        at = [next((key for key in speeds if key[0] == arm and key[3] == place), None) for place in (0, 1)]
        bought = [key and speed_over(key, speeds, base) or "" for key in at]
        rows.append(
            [
                f"{noise['layout']}{marked}",
                size,
                str(len(runs)),
                *map(str, own),
                str(noise["length"]),
                str(lora["rank"]),
            ]
            + [loss_over(arm, losses, base), *bought]
        )
    head = ["noise", "steps x rows", "seeds", "weight", "anchors", "target", "noise tokens", "LoRA rank"]
    return table([*head, f"clean loss to {base}", "jacobi", "tr-jacobi"], rows)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("files", type=Path, nargs="+", help="learn.jsonl of one run, or of several")
    p.add_argument("--base", default="plain", help="the arm that others are compared with, untouched, or ''")
    p.add_argument("--trade", action="store_true", help="and what each setting of noise costs and buys")
    args = p.parse_args()
    records = [row for file in args.files for row in kept_rows(file)]
    if not records:
        raise InputError(f"{args.files[0]}: no figures in it; accepted: learn.jsonl of experiments.learn")
    tables = [make(records, args.base) for make in (learnt_table, speed_table, *[trade_table] * args.trade)]
    print(*tables, sep="\n\n")


if __name__ == "__main__":
    run_command(main)
