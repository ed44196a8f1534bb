"""Tokens a pass (MAT) and accuracies with their 95% intervals.

Of tokens a pass by resampling questions 10,000 times, the same ones for both arms of a ratio; of a difference in
accuracy by resampling items.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from msn_jax.answers import LOOPS


def by_question(speed: dict, method: str) -> dict[int, tuple[int, int]]:
    """Tokens and passes of a method's outputs that do not loop, by question."""
    sums = defaultdict(lambda: (0, 0))
    for row in speed["answers"]:
        if row["method"] == method and row["rep4_frac"] < LOOPS:
            tokens, forwards = sums[row["question_id"]]
            sums[row["question_id"]] = tokens + row["tokens"], forwards + row["forwards"]
    return dict(sums)


def together(parts: list[dict[int, tuple[int, int]]]) -> dict[int, tuple[int, int]]:
    """The sums of several runs, by question."""
    return {q: tuple(map(sum, zip(*(p[q] for p in parts if q in p), strict=True))) for q in sorted(set().union(*parts))}


def over_runs(runs: list[dict], dtype: str) -> dict[str, dict[int, tuple[int, int]]]:
    """`by_question` summed over runs, of each METHOD:TREE that all of them have measured in whatever batch."""
    speeds = [run["speed"][dtype] for run in runs]
    named = [{method.partition("@")[0]: method for method in speed["methods"]} for speed in speeds]
    sums = {}
    for method in (m for m in named[0] if all(m in names for names in named)):
        sums[method] = together([by_question(s, names[method]) for s, names in zip(speeds, named, strict=True)])
    return sums


def mat_interval(sums: dict[int, tuple[int, int]]) -> tuple[float, float, float]:
    """MAT with its interval."""
    pairs = np.array(list(sums.values()))
    picked = pairs[np.random.default_rng(0).integers(0, len(pairs), (10_000, len(pairs)))].sum(axis=1)
    tokens, forwards = pairs.sum(axis=0)
    low, high = np.percentile(picked[:, 0] / picked[:, 1], [2.5, 97.5])
    return tokens / forwards, low, high


def mat_ratio(sums: dict[int, tuple[int, int]], base: dict[int, tuple[int, int]]) -> tuple[float, float, float]:
    """MAT over that of `base` with its interval. A question that only one of them answers without a loop counts
    there alone; resampling takes whole questions."""
    questions = sorted(sums.keys() | base.keys())
    both = np.array([(*sums.get(q, (0, 0)), *base.get(q, (0, 0))) for q in questions])
    ratio = lambda s: (s[..., 0] / s[..., 1]) / (s[..., 2] / s[..., 3])
    picked = both[np.random.default_rng(0).integers(0, len(both), (10_000, len(both)))].sum(axis=1)
    low, high = np.percentile(ratio(picked), [2.5, 97.5])
    return float(ratio(both.sum(axis=0))), low, high


def accuracy_difference(task: dict, base: dict) -> tuple[float, float, float]:
    """Points of accuracy over `base` on the same items, with the interval of the paired difference."""
    right, right_base = set(task["correct_items"]), set(base["correct_items"])
    # Only items that differ matter; the others are zeros.
    differences = np.zeros(task["items"])
    changed = sorted(right ^ right_base)
    differences[: len(changed)] = [1.0 if item in right else -1.0 for item in changed]
    picked = differences[np.random.default_rng(0).integers(0, len(differences), (10_000, len(differences)))].mean(
        axis=1
    )
    low, high = np.percentile(100 * picked, [2.5, 97.5])
    return 100 * float(differences.mean()), low, high
