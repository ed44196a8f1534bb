"""Trees grown from which drafts were right in each cycle of a survey (tune.py), and what a pass of each size costs.

A smaller tree would have emitted one token more than the depth of its deepest right node. So a tree grows node by node,
each time by the one that adds the most tokens, until another node costs more time than its tokens save.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from msn_jax.decode.tree import LONGEST_MATCH, PROBES, ROOT, TreeSet, TreeSpec, with_noise

FROM = (0, 1, 3, 6)  # matches from which on another tree may be taken


@dataclasses.dataclass(frozen=True)
class Cycles:
    """What the survey saw, of the cycles of all prompts."""

    tree: TreeSpec
    right: np.ndarray  # bool[cycles, drafts]
    match: np.ndarray  # int[cycles]: the confidence of the row

    def only(self, names: Iterable[str]) -> Cycles:
        """The same where drafts of no other source were right."""
        drafts = self.right.shape[1]
        wrong = np.array([not {kind for kind, _ in wants} <= {*names, ROOT} for wants in self.tree.wants[:drafts]])
        under = (self.tree.ancestors[:drafts, :drafts] & wrong).any(axis=1)
        return dataclasses.replace(self, right=self.right & ~under)


def grow(cycles: Cycles, which: np.ndarray, most: int) -> tuple[list[int], list[float]]:
    """Draft nodes in the order in which they add most, and the tokens a pass with the first 0, 1, 2, ... of them."""
    right, depth = cycles.right[which], cycles.tree.depth[: cycles.right.shape[1]]
    chosen, reached = [0], np.zeros(len(right), int)
    tokens = [1.0]
    while len(chosen) <= most:
        open_ = [n for n in range(1, len(depth)) if cycles.tree.parents[n] in chosen and n not in chosen]
        if not open_:
            break
        gain = (np.maximum(depth[open_] - reached[:, None], 0) * right[:, open_]).sum(axis=0)
        if not gain.max(initial=0):
            break
        best = open_[int(gain.argmax())]
        chosen.append(best)
        reached = np.maximum(reached, depth[best] * right[:, best])
        tokens.append(1 + float(reached.mean()))
    return chosen[1:], tokens


def cut_out(tree: TreeSpec, nodes: Sequence[int], name: str, noise: int) -> TreeSpec:
    """The tree of these drafts. A node with a sibling from elsewhere takes the next rank where that one has its token.

    noise: how many noise nodes in a row hang under the root, as in the survey: where drafts are accepted, the rest of
    them still predicts what comes after these.
    """
    kept, parents, sources, kinds = {0: 0}, [-1], [(ROOT, 0)], [{ROOT}]
    for node in sorted(nodes):
        above, wants = kept[tree.parents[node]], tree.wants[node]
        own, (kind, rank) = {k for k, _ in wants}, wants[-1]
        others = [k for k, parent in zip(kinds, parents, strict=True) if parent == above and k != own]
        kept[node] = len(parents)
        parents.append(above)
        kinds.append(own)
        sources.append((*wants, (kind, rank + 1)) if others else tree.sources[node])
    return with_noise(TreeSpec(name, tuple(parents), tuple(sources)), {0: noise})


def tokens_of(cycles: Cycles, which: np.ndarray, nodes: Sequence[int]) -> float:
    """Tokens a pass of these drafts in these cycles."""
    depth = cycles.tree.depth[list(nodes)] * cycles.right[which][:, list(nodes)]
    return 1 + float(depth.max(axis=1, initial=0).mean()) if which.any() else 1.0


def _within(cycles: Cycles, low: int, high: int) -> np.ndarray:
    return (cycles.match >= low) & (cycles.match < high)


def build(
    cycles: Cycles, seconds: dict[int, float], name: str, noise: int, begins: tuple[int, ...] = FROM
) -> tuple[TreeSet, dict[str, Any]]:
    """The set with the most tokens a second: for each range of matches, which begin as said, a tree of its own size."""
    cost, most = seconds.__getitem__, max(seconds)
    # A range that no cycle was in goes with the one below it.
    starts = [
        0,
        *[low for low, high in zip(begins[1:], [*begins[2:], LONGEST_MATCH + 1]) if _within(cycles, low, high).any()],
    ]
    ends = [*starts[1:], LONGEST_MATCH + 1]
    ranges = [_within(cycles, low, high) for low, high in zip(starts, ends, strict=True)]
    grown = [grow(cycles, which, most - 1) for which in ranges]
    size = lambda drafts: 1 + drafts + (noise if drafts else 0)
    rate, sizes = 1 / cost(1), []
    for _ in range(20):  # Dinkelbach: the best sizes at a rate give a better rate, until it stays
        value = lambda tokens, drafts: tokens - rate * cost(size(drafts))  # noqa: B023
        # Of sizes that were timed: between them the cost is no straight line.
        fits = [[d for d in range(len(tokens)) if size(d) in seconds] for _, tokens in grown]
        sizes = [max(f, key=lambda d: value(tokens[d], d)) for f, (_, tokens) in zip(fits, grown, strict=True)]  # noqa: B023
        total = sum(w.sum() * tokens[d] for w, d, (_, tokens) in zip(ranges, sizes, grown, strict=True))
        spent = sum(w.sum() * cost(size(d)) for w, d in zip(ranges, sizes, strict=True))
        rate = total / spent
    drafts = [sorted(nodes[:d]) for d, (nodes, _) in zip(sizes, grown, strict=True)]
    first = [i for i, nodes in enumerate(drafts) if i == 0 or nodes != drafts[i - 1]]
    specs = tuple(cut_out(cycles.tree, drafts[i], f"{name}-{starts[i]}", noise if drafts[i] else 0) for i in first)
    repeat = np.diff([*starts, LONGEST_MATCH + 1])
    worth = tuple(
        tuple(np.repeat([round(tokens_of(cycles, which, drafts[i]), 4) for which in ranges], repeat).tolist())
        for i in first
    )
    spent = tuple(round(1e3 * cost(tree.size), 4) for tree in specs)
    figures = {
        "tokens_a_pass": round(float(total) / len(cycles.match), 3),
        "ratio_to_one_token": round(float(rate) * cost(1), 3),
        "nodes": [tree.size for tree in specs],
    }
    return TreeSet(name, specs, tuple(starts[i] for i in first), worth, spent), figures


def candidates(cycles: Cycles) -> dict[str, float]:
    """How often a node of each source, rank and depth was right where its parent was, by its place in the survey."""
    right, tree, out = cycles.right, cycles.tree, {}
    for node in np.flatnonzero(~tree.kind(ROOT, *PROBES, "survey")):
        above = right[:, tree.parents[node]]
        kind, rank = " or ".join(kind for kind, _ in tree.wants[node]), tree.wants[node][0][1]
        key = f"{kind} rank {rank} depth {tree.depth[node]}"
        if key not in out and above.sum():
            out[key] = round(float(right[above, node].mean()), 4)
    return out
