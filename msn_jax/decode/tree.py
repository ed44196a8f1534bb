"""Token trees as data: who hangs under whom, and where each node's token comes from. NumPy only, no model."""

from __future__ import annotations

import dataclasses
from functools import cached_property

import numpy as np

from msn_jax.errors import InputError

# Where the token of a node comes from. A node of depth d stands d positions after the root.
ROOT = "root"
JACOBI = "jacobi"  # candidate `rank` of the prediction that the last pass made for d positions ahead
RETRIEVAL = "retrieval"  # d-th token after the longest earlier match of the text's end
EITHER = "either"  # retrieval where there is one, else jacobi
NOISE = "noise"  # a token of the prefix; never verified: its logits are the next pass's jacobi predictions


@dataclasses.dataclass(frozen=True)
class TreeSpec:
    """A static token tree of M nodes; node 0 is the root, a parent comes before its children, noise after all drafts.

    sources: (kind, rank) of each node. Hashable: one compiled program a tree.
    Raises InputError where the nodes do not make a tree.
    """

    name: str
    parents: tuple[int, ...]
    sources: tuple[tuple[str, int], ...]

    def __post_init__(self):
        if len(self.parents) != len(self.sources) or not self.parents:
            raise InputError(f"tree {self.name!r}: {len(self.parents)} parents, {len(self.sources)} sources")
        if self.parents[0] != -1 or self.sources[0][0] != ROOT:
            raise InputError(f"tree {self.name!r}: node 0 must be the root, with parent -1")
        for node, (parent, (kind, rank)) in enumerate(zip(self.parents, self.sources, strict=True)):
            if node and not 0 <= parent < node:
                raise InputError(f"tree {self.name!r}: parent {parent} of node {node} does not come before it")
            if node and kind not in (JACOBI, RETRIEVAL, EITHER, NOISE):
                raise InputError(f"tree {self.name!r}: node {node} has the unknown source {kind!r}")
            if node and kind != NOISE and self.sources[parent][0] == NOISE:
                raise InputError(f"tree {self.name!r}: draft node {node} hangs under the noise node {parent}")
            if node and kind != NOISE and self.sources[node - 1][0] == NOISE:
                raise InputError(f"tree {self.name!r}: draft node {node} comes after the noise node {node - 1}")
            if rank < 0:
                raise InputError(f"tree {self.name!r}: node {node} has the rank {rank}; accepted: 0 or more")

    @property
    def size(self) -> int:
        """Number of nodes (M)."""
        return len(self.parents)

    def kind(self, *kinds: str) -> np.ndarray:
        """Which nodes have one of these sources. bool[M]"""
        return np.array([kind in kinds for kind, _ in self.sources])

    @cached_property
    def rank(self) -> np.ndarray:
        return np.array([rank for _, rank in self.sources])

    @cached_property
    def depth(self) -> np.ndarray:
        """Positions after the root. int[M]"""
        depth = np.zeros(self.size, int)
        for node, parent in enumerate(self.parents[1:], 1):
            depth[node] = depth[parent] + 1
        return depth

    @cached_property
    def ancestors(self) -> np.ndarray:
        """ancestors[m, a]: a is m or above m. The attention mask of the tree. bool[M, M]"""
        seen = np.eye(self.size, dtype=bool)
        for node, parent in enumerate(self.parents[1:], 1):
            seen[node] |= seen[parent]
        return seen

    @cached_property
    def width(self) -> int:
        """Most tokens one pass can emit: the depth of the deepest draft, and one (E)."""
        return int(self.depth[~self.kind(NOISE)].max()) + 1

    @cached_property
    def path(self) -> np.ndarray:
        """path[m, i]: the node at depth i on the way from the root to m; m itself beyond its depth. int[M, E]"""
        path = np.tile(np.arange(self.size)[:, None], self.width)
        for node in range(self.size):
            above = node
            for i in range(self.depth[node], -1, -1):
                if i < self.width:
                    path[node, i] = above
                above = self.parents[above]
        return path

    @cached_property
    def noise_depth(self) -> np.ndarray:
        """The place of each noise node in its chain of noise, from 1; 0 for the others. int[M]"""
        place = np.zeros(self.size, int)
        for node in np.flatnonzero(self.kind(NOISE)):
            place[node] = place[self.parents[node]] + 1
        return place

    @cached_property
    def follow(self) -> np.ndarray:
        """The nodes whose logits predict ahead once node m is the last accepted one; -1 where there are none. int[M, J]

        Row j predicts the draft of depth j + 1 under the next root. That is the noise which stands so far ahead under
        m, else under the nearest node above m: it saw less of the text, but predicts the same place. Where there is no
        such noise it is the rest of the first path through m: rejected drafts play the noise (paper section 3.2).
        """
        children = [[c for c, parent in enumerate(self.parents) if parent == node] for node in range(self.size)]
        noise = [[c for c in below if self.sources[c][0] == NOISE] for below in children]

        def walk(node: int, below: list[list[int]]) -> list[int]:
            nodes = []
            while below[node]:
                nodes.append(node := below[node][0])
            return nodes

        chains = []
        for m in range(self.size):
            chain, above = [], m
            while above >= 0:
                chain += walk(above, noise)[self.depth[m] - self.depth[above] + len(chain) :]
                above = self.parents[above]
            chains.append(chain or walk(m, [n or c for n, c in zip(noise, children)]))
        longest = max(map(len, chains))
        return np.array([chain + [-1] * (longest - len(chain)) for chain in chains], int).reshape(self.size, longest)

    def only(self, *kinds: str) -> TreeSpec:
        """This tree without the drafts that come from elsewhere; what hung under them goes too."""
        kept, new = {0: 0}, [(-1, self.sources[0])]
        for node, (parent, (kind, rank)) in enumerate(zip(self.parents, self.sources, strict=True)):
            if kind == EITHER and not (JACOBI in kinds and RETRIEVAL in kinds):
                kind = JACOBI if JACOBI in kinds else RETRIEVAL
                if kind not in kinds:
                    continue
            if node and parent in kept and (kind in kinds or kind == EITHER):
                kept[node] = len(new)
                new.append((kept[parent], (kind, rank)))
        parents, sources = zip(*new, strict=True)
        return TreeSpec(self.name, parents, sources)


@dataclasses.dataclass(frozen=True)
class TreeSet:
    """Trees of one compiled loop, small to large; each cycle takes one.

    A cycle runs the last tree whose `min_match` the retrieval reaches: the length in tokens of the suffix that
    was found earlier in the text (0: none). In a batch the row with the longest match decides.
    """

    name: str
    trees: tuple[TreeSpec, ...]
    min_match: tuple[int, ...]

    def __post_init__(self):
        if len(self.trees) != len(self.min_match) or self.min_match[0] != 0:
            raise InputError(f"tree set {self.name!r}: one min_match a tree, the first 0")
        if list(self.min_match) != sorted(set(self.min_match)):
            raise InputError(f"tree set {self.name!r}: min_match must rise, got {self.min_match}")

    @property
    def width(self) -> int:
        """Most tokens one pass of any tree emits (E)."""
        return max(tree.width for tree in self.trees)

    @property
    def jacobi_shape(self) -> tuple[int, int]:
        """Depths and ranks of predictions that the trees ask for."""
        nodes = [(t.depth[m], t.rank[m]) for t in self.trees for m in np.flatnonzero(t.kind(JACOBI, EITHER))]
        return (max(d for d, _ in nodes), max(int(r) for _, r in nodes) + 1) if nodes else (0, 0)

    @property
    def retrieval_tokens(self) -> int:
        """Most tokens of a match that the trees ask for."""
        depths = [t.depth[t.kind(RETRIEVAL, EITHER)].max(initial=0) for t in self.trees]
        return int(max(depths))


def chain(length: int, kind: str, name: str | None = None, noise: dict[int, int] | None = None) -> TreeSpec:
    """The root and `length` drafts in a row; under the node of each depth in `noise`, so many noise nodes in a row."""
    tree = TreeSpec(name or f"{kind}{length}", tuple(range(-1, length)), ((ROOT, 0),) + ((kind, 0),) * length)
    return _with_noise(tree, noise or {})


def _with_noise(tree: TreeSpec, noise: dict[int, int]) -> TreeSpec:
    parents, sources = list(tree.parents), list(tree.sources)
    for node, length in noise.items():
        for place in range(length):
            parents.append(len(parents) - 1 if place else node)
            sources.append((NOISE, 0))
    return TreeSpec(tree.name, tuple(parents), tuple(sources))


def branching(
    name: str,
    retrieval: int,
    children: dict[tuple[int, ...], int],
    noise: dict[tuple[int, ...], int] | None = None,
) -> TreeSpec:
    """A chain of `retrieval` nodes beside a tree of Jacobi candidates, and chains of noise.

    children: how many candidates, best first, hang under the node that these ranks lead to from the root;
    noise: how many noise nodes in a row hang under it.
    """
    parents, sources = list(range(-1, retrieval)), [(ROOT, 0)] + [(RETRIEVAL, 0)] * retrieval
    at = {(): 0}
    for path in sorted(children, key=lambda path: (len(path), path)):
        if path not in at:
            raise InputError(f"tree {name!r}: the path {path} leads to no node")
        for rank in range(children[path]):
            at[*path, rank] = len(parents)
            parents.append(at[path])
            sources.append((JACOBI, rank))
    for path in (noise or {}).keys() - at.keys():
        raise InputError(f"tree {name!r}: the path {path} leads to no node")
    tree = TreeSpec(name, tuple(parents), tuple(sources))
    return _with_noise(tree, {at[path]: length for path, length in (noise or {}).items()})


# The reference decoder of the paper: the 63 nodes of Medusa's mc_sim_7b_63 and a retrieval chain of 5.
_MEDUSA_63 = {
    **{(): 10, (0,): 10, (1,): 7, (2,): 3, (3,): 2, (4,): 1, (5,): 1, (6,): 1, (7,): 1, (8,): 1, (9,): 1},
    **{(0, 0): 10, (0, 1): 3, (0, 2): 2, (0, 3): 1, (0, 4): 1, (0, 5): 1, (0, 6): 1, (0, 7): 1},
    **{(1, 0): 2, (2, 0): 1, (0, 0, 0): 2},
}

_DRAFT_16, _NOISE_16 = {(): 6, (0,): 2}, {(): 2, (0,): 2, (1,): 2, (0, 0): 1}

_ROOT = TreeSpec("root", (-1,), ((ROOT, 0),))
_TREES = (
    _ROOT,
    chain(3, EITHER, "chain4"),
    chain(7, EITHER, "chain8"),
    chain(15, EITHER, "chain16"),
    branching("small13", 5, {(): 3, (0,): 2, (0, 0): 1, (1,): 1}),
    branching("msn69", 5, _MEDUSA_63),
    # For a draft-only adapter: noise under the root and under the drafts most likely to end the accepted path. Found
    # by simulation (experiments/tree_search.py, LOG.md).
    branching("draft6", 0, {(): 2}, noise={(): 1, (0,): 1, (1,): 1}),
    branching("draft8", 0, {(): 3}, noise={(): 1, (0,): 1, (1,): 1, (2,): 1}),
    branching("draft8mix", 2, {(): 2}, noise={(): 1, (0,): 1, (1,): 1}),
    chain(5, EITHER, "draft8long", noise={0: 1, 1: 1}),
    chain(13, EITHER, "draft16long", noise={0: 1, 1: 1}),
    branching("draft16", 0, _DRAFT_16, noise=_NOISE_16),
    branching("draft21", 5, _DRAFT_16, noise=_NOISE_16),
)
_BY_NAME = {tree.name: tree for tree in _TREES}
_DRAFT = ("draft8", "draft8mix", "draft8long", "draft16long")
TREE_SETS: dict[str, TreeSet] = {name: TreeSet(name, (tree,), (0,)) for name, tree in _BY_NAME.items()} | {
    "draft": TreeSet("draft", tuple(_BY_NAME[name] for name in _DRAFT), (0, 1, 3, 5)),
    # Sizes and thresholds from the matches and costs of 40 training prompts (LOG.md), by simulation.
    "adaptive": TreeSet("adaptive", (_ROOT, chain(3, EITHER, "chain4"), chain(7, EITHER, "chain8")), (0, 1, 4)),
}

METHODS = ("tr-jacobi", "jacobi", "lookup", "ar")
# The default trees by backend. CPU: measured by benchmarks/step_cost.py and spec_bench.py (LOG.md). A wide pass
# is close to free on an accelerator, so there the reference's tree; not measured on one yet.
_DEFAULT = {
    "cpu": {"tr-jacobi": "adaptive", "lookup": "adaptive", "jacobi": "chain4"},
    "gpu": {"tr-jacobi": "msn69", "lookup": "chain8", "jacobi": "msn69"},
    "tpu": {"tr-jacobi": "msn69", "lookup": "chain8", "jacobi": "msn69"},
}
# With a draft-only adapter. As above, no accelerator has been measured.
_DRAFT_ONLY = {
    "cpu": {"tr-jacobi": "draft", "jacobi": "draft16"},
    "gpu": {"tr-jacobi": "draft21", "jacobi": "draft16"},
    "tpu": {"tr-jacobi": "draft21", "jacobi": "draft16"},
}


def tree_set(method: str, name: str | None = None, backend: str = "cpu", draft_only: bool = False) -> TreeSet:
    """The trees a method decodes with: those of `name`, less the drafts that the method does not use.

    draft_only: whether a draft-only adapter stands by, which has default trees of its own.
    Raises InputError for an unknown method or name, or where no draft is left.
    """
    if method not in METHODS:
        raise InputError(f"unknown method {method!r}; accepted: {', '.join(METHODS)}")
    if name is not None and name not in TREE_SETS:
        raise InputError(f"unknown tree {name!r}; accepted: {', '.join(TREE_SETS)}")
    if method == "ar":
        return TREE_SETS["root"]
    default = _DEFAULT[backend] | (_DRAFT_ONLY[backend] if draft_only else {})
    base = TREE_SETS[name or default[method]]
    if method == "jacobi":
        # Without retrieval nothing chooses between trees: take the largest.
        trees, min_match = (base.trees[-1].only(JACOBI, NOISE),), (0,)
    elif method == "lookup":
        trees, min_match = tuple(tree.only(RETRIEVAL) for tree in base.trees), base.min_match
    else:
        return base
    if name is not None and not any(tree.kind(JACOBI, RETRIEVAL).any() for tree in trees):
        raise InputError(f"tree {name!r} has no draft that the method {method!r} uses")
    return TreeSet(base.name, trees, min_match)
