"""What evidence.py measured, arm by arm (results/ARM-seedS.json), and which arm is compared with which."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.spec_bench import split_method
from msn_jax.decode.tree import NGRAMS, NOISE
from msn_jax.decode.tree_sets import TREE_SETS
from msn_jax.errors import InputError

NOISY = ("paper", "several", "several-1", "several-8", "random")
COMPARED = ("jacobi", "tr-jacobi")  # methods whose tokens a pass are compared between arms


def load_results(folder: Path) -> dict[str, dict]:
    """Name (ARM-seedS) -> what evidence.py measured, in the order of the plan."""
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*-seed*.json"))}
    if not found:
        raise InputError(f"{folder}: no results; experiments/evidence.py writes them")
    order = ("untouched", "plain", *NOISY, "draft", "shipped")
    rank = lambda result: order.index(result["arm"]) if result["arm"] in order else len(order)
    return dict(sorted(found.items(), key=lambda item: (rank(item[1]), item[1]["seed"])))


def speeds(results: dict[str, dict]) -> list[tuple[str, str, dict]]:
    """(arm, dtype, what was measured in it)."""
    return [(name, dtype, speed) for name, result in results.items() for dtype, speed in result["speed"].items()]


def plain_of(results: dict[str, dict]) -> dict[str, str]:
    """Of each arm with noise the plain one of its seed, where that has run."""
    plain = {name: f"plain-seed{result['seed']}" for name, result in results.items() if result["arm"] in NOISY}
    return {name: base for name, base in plain.items() if base in results}


def plotted(result: dict) -> dict:
    """What a plot shows: bfloat16, in which all arms are measured, else what there is."""
    return result["speed"].get("bfloat16", next(iter(result["speed"].values())))


def measured(speed: dict, family: str) -> str | None:
    """The METHOD:TREE that stands for a method: the first of it that was measured."""
    return next((method for method in speed["methods"] if split_method(method)[0] == family), None)


def without_adapters(method: str) -> bool:
    """Whether METHOD:TREE names trees without noise nodes and n-grams, and so leaves the adapters out."""
    tree = split_method(method)[1]
    return bool(tree) and not {NOISE, NGRAMS} & set(TREE_SETS[tree].names)


def draft_only(result: dict) -> bool:
    return "adapters" in result or bool(result.get("train", {}).get("lora", {}).get("draft_only"))


def last(result: dict, name: str) -> float | None:
    """The last value of a metric of training."""
    return next((line[name] for line in reversed(result.get("metrics", [])) if name in line), None)


def noisy_share(metrics: list[dict]) -> float:
    """Share of the scored tokens whose input was noise, over training: the loss is the mean of both kinds."""
    noisy = tokens = 0.0
    for line in metrics:
        if "loss_noisy" in line and line["loss_noisy"] != line["loss_clean"]:
            share = (line["loss"] - line["loss_clean"]) / (line["loss_noisy"] - line["loss_clean"])
            noisy += share * line["response_tokens"]
        tokens += line["response_tokens"]
    return noisy / tokens
