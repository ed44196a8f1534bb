"""Wide trees, for devices where a pass of many nodes costs little: all sources of drafts, noise under many ends."""

from __future__ import annotations

import heapq

from msn_jax.decode.tree import JACOBI, NOISE, RECYCLING, RETRIEVAL, ROOT, TreeSpec

# How often a candidate is the next token: of the adapter's by rank under the root; below a draft its own next
# prediction, then what the model said after that token before, by rank.
FIRST = (0.5, 0.14, 0.07, 0.05, 0.035, 0.03, 0.02, 0.02)
BELOW = (0.45, 0.2, 0.08, 0.05)
NOISE_LENGTH = 3


def candidates(depth: int) -> list[tuple[float, tuple]]:
    """(odds, what the node prefers) of the children of a node at this depth."""
    if depth == 0:
        return [(p, ((JACOBI, rank), (RECYCLING, rank))) for rank, p in enumerate(FIRST)]
    first = ((JACOBI, 0), (RECYCLING, 0)) if depth < NOISE_LENGTH else ((RECYCLING, 0),)
    others = [((RECYCLING, rank - 1), (RECYCLING, rank)) for rank in range(1, len(BELOW))]
    return list(zip(BELOW, [first, *others], strict=True))


def wide(name: str, retrieval: int, drafts: int, ends: int) -> TreeSpec:
    """A retrieved chain, the `drafts` likeliest candidates, and a chain of noise under the `ends` likeliest nodes."""
    parents, sources = list(range(-1, retrieval)), [(ROOT, 0)] + [((RETRIEVAL, 0), (RECYCLING, 0))] * retrieval
    reached = {0: 1.0}
    heap = [(-p, 0, 1, prefers) for p, prefers in candidates(0)]
    heapq.heapify(heap)
    while len(parents) <= retrieval + drafts:
        p, parent, depth, prefers = heapq.heappop(heap)
        node = len(parents)
        parents.append(parent)
        sources.append(prefers)
        reached[node] = -p
        for odds, below in candidates(depth):
            heapq.heappush(heap, (p * odds, node, depth + 1, below))
    for node in sorted(reached, key=lambda node: -reached[node])[:ends]:
        for place in range(NOISE_LENGTH):
            parents.append(len(parents) - 1 if place else node)
            sources.append((NOISE, 0))
    return TreeSpec(name, tuple(parents), tuple(sources))
