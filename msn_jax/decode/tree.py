"""Token trees as data: who hangs under whom, and where each node's token comes from. NumPy only, no model."""

from __future__ import annotations

import dataclasses
import heapq
from functools import cached_property

import numpy as np

from msn_jax.errors import InputError

# Where the token of a node comes from: the names of the sources in sources/, and of probes. A node of depth d stands d
# positions after the root.
ROOT = "root"
JACOBI = "jacobi"  # candidate `rank` of the prediction that the last pass made for d positions ahead
RETRIEVAL = "retrieval"  # d-th token of the `rank`-th continuation found earlier in the text
RECYCLING = "recycling"  # candidate `rank` of what the model last predicted after the parent's token
LOOKAHEAD = "lookahead"  # d-th token of the `rank`-th n-gram that the pool holds for the root
EITHER = "either"  # short for (RETRIEVAL, 0), else (JACOBI, rank)
NGRAMS = "ngrams"  # candidate `rank` of what came next in earlier replies
DRAFT_MODEL = "draft-model"  # candidate `rank` of a smaller model after what stands above
EAGLE = "eagle"  # candidate `rank` of its head after what stands above
MEDUSA = "medusa"  # candidate `rank` of the head for d positions ahead
# Probes are never verified; a source reads their logits. They come after all drafts.
NOISE = "noise"  # a token of the prefix: its logits are the next pass's jacobi predictions
WINDOW = "window"  # of lookahead: column `rank`, level d - rank
PROBES = (NOISE, WINDOW)
NAMES = (JACOBI, RETRIEVAL, RECYCLING, LOOKAHEAD, MEDUSA, NGRAMS, DRAFT_MODEL, EAGLE)
LONGEST_MATCH = 16  # tokens of the text's end that retrieval compares

Preference = tuple[tuple[str, int], ...]  # (source, rank), the best first


@dataclasses.dataclass(frozen=True)
class TreeSpec:
    """A static token tree of M nodes; node 0 is the root, a parent comes before its children, probes after all drafts.

    sources: of each node (source, rank), or several of them: it takes the first that has a token which no earlier
    sibling took. Hashable: one compiled program a tree. Raises InputError where the nodes do not make a tree.
    """

    name: str
    parents: tuple[int, ...]
    sources: tuple[tuple[str, int] | Preference, ...]
    twins: bool = False  # whether a node may repeat an earlier sibling: to see what each source would have said

    def __post_init__(self):
        if len(self.parents) != len(self.sources) or not self.parents:
            raise InputError(f"tree {self.name!r}: {len(self.parents)} parents, {len(self.sources)} sources")
        if self.parents[0] != -1 or self.wants[0][0][0] != ROOT:
            raise InputError(f"tree {self.name!r}: node 0 must be the root, with parent -1")
        probe = self.kind(*PROBES)
        for node, (parent, wants) in enumerate(zip(self.parents, self.wants, strict=True)):
            if node and not 0 <= parent < node:
                raise InputError(f"tree {self.name!r}: parent {parent} of node {node} does not come before it")
            if node and not probe[node] and probe[parent]:
                raise InputError(f"tree {self.name!r}: draft node {node} hangs under the noise node {parent}")
            if node and not probe[node] and probe[node - 1]:
                raise InputError(f"tree {self.name!r}: draft node {node} comes after the noise node {node - 1}")
            if probe[node] and len(wants) > 1:
                raise InputError(f"tree {self.name!r}: node {node} is noise or a draft, not both")
            for _, rank in wants:
                if rank < 0:
                    raise InputError(f"tree {self.name!r}: node {node} has the rank {rank}; accepted: 0 or more")

    @property
    def size(self) -> int:
        """Number of nodes (M)."""
        return len(self.parents)

    @cached_property
    def wants(self) -> tuple[Preference, ...]:
        """The sources of each node in order of preference, written out."""
        either = lambda kind, rank: ((RETRIEVAL, 0), (JACOBI, rank)) if kind == EITHER else ((kind, rank),)
        several = ((entry,) if isinstance(entry[0], str) else entry for entry in self.sources)
        return tuple(tuple(pair for entry in entries for pair in either(*entry)) for entries in several)

    def kind(self, *kinds: str) -> np.ndarray:
        """Which nodes may take a token from one of these. bool[M]"""
        return np.array([any(kind in kinds for kind, _ in wants) for wants in self.wants])

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
        return int(self.depth[~self.kind(*PROBES)].max()) + 1

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
        is_noise = self.kind(NOISE)
        noise = [[c for c in below if is_noise[c]] for below in children]

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
        for node, (parent, wants) in enumerate(zip(self.parents, self.wants, strict=True)):
            left = tuple(pair for pair in wants if pair[0] in kinds)
            if node and parent in kept and left:
                kept[node] = len(new)
                new.append((kept[parent], self.sources[node] if left == wants else left[0] if len(left) == 1 else left))
        parents, sources = zip(*new, strict=True)
        return TreeSpec(self.name, parents, sources, self.twins)

    def with_less_noise(self, most: int) -> TreeSpec:
        """This tree with at most so many noise nodes in a row."""
        kept = np.flatnonzero(self.noise_depth <= most).tolist()
        place = {-1: -1} | {node: i for i, node in enumerate(kept)}
        parents = tuple(place[self.parents[node]] for node in kept)
        return TreeSpec(self.name, parents, tuple(self.sources[node] for node in kept), self.twins)


@dataclasses.dataclass(frozen=True)
class TreeSet:
    """Trees of one compiled loop, small to large; each cycle takes one.

    Every row of a cycle has a confidence, 0 to LONGEST_MATCH: the length in tokens of the suffix that retrieval found
    earlier in the text. With figures, `worth[tree][confidence]` tokens a pass and `cost[tree]` of the pass in any unit,
    a cycle takes the tree with the most expected tokens, over the rows of the batch, for its cost. Without, a row asks
    for the last tree whose `min_match` it reaches, and the tree that most rows ask for is taken.
    sources: Source objects beyond those of sources/, see source.py.
    """

    name: str
    trees: tuple[TreeSpec, ...]
    min_match: tuple[int, ...]
    worth: tuple[tuple[float, ...], ...] = ()
    cost: tuple[float, ...] = ()
    sources: tuple = ()

    def __post_init__(self):
        if len(self.trees) != len(self.min_match) or self.min_match[0] != 0:
            raise InputError(f"tree set {self.name!r}: one min_match a tree, the first 0")
        if list(self.min_match) != sorted(set(self.min_match)):
            raise InputError(f"tree set {self.name!r}: min_match must rise, got {self.min_match}")
        if self.min_match[-1] > LONGEST_MATCH:
            raise InputError(f"tree set {self.name!r}: min_match {self.min_match[-1]}; accepted: 0 to {LONGEST_MATCH}")
        figures = {len(self.worth), len(self.cost)} - {len(self.trees)}
        if (self.worth or self.cost) and (figures or {len(row) for row in self.worth} != {LONGEST_MATCH + 1}):
            raise InputError(f"tree set {self.name!r}: a cost and {LONGEST_MATCH + 1} worths for each tree, or none")
        known = {*NAMES, *PROBES, ROOT} | {source.name for source in self.sources}
        for name in self.names:
            if name not in known:
                raise InputError(f"tree set {self.name!r}: unknown source {name!r}; accepted: {', '.join(known)}")

    @property
    def width(self) -> int:
        """Most tokens one pass of any tree emits (E)."""
        return max(tree.width for tree in self.trees)

    @property
    def names(self) -> tuple[str, ...]:
        """The sources that the trees name, in a fixed order; probes among them."""
        named = {kind for tree in self.trees for wants in tree.wants for kind, _ in wants} - {ROOT}
        return tuple(sorted(named))

    def ask(self, source: str) -> tuple[int, int]:
        """Depths and ranks that the trees want of a source."""
        wanted = [
            (int(tree.depth[node]), rank + 1)
            for tree in self.trees
            for node, wants in enumerate(tree.wants)
            for kind, rank in wants
            if kind == source
        ]
        return (max(d for d, _ in wanted), max(r for _, r in wanted)) if wanted else (0, 0)

    @property
    def drafts(self) -> int:
        """Most nodes of a tree that are verified, the root included."""
        return max(int((~tree.kind(*PROBES)).sum()) for tree in self.trees)

    @cached_property
    def score(self) -> np.ndarray:
        """What a row of each confidence adds to the choice of each tree. float32[trees, LONGEST_MATCH + 1]"""
        if self.worth:
            return np.float32(self.worth) / np.float32(self.cost)[:, None]
        asked = np.searchsorted(self.min_match, np.arange(LONGEST_MATCH + 1), side="right") - 1
        return np.float32(asked == np.arange(len(self.trees))[:, None])


def chain(length: int, kind: str, name: str | None = None, noise: dict[int, int] | None = None) -> TreeSpec:
    """The root and `length` drafts in a row; under the node of each depth in `noise`, so many noise nodes in a row."""
    tree = TreeSpec(name or f"{kind}{length}", tuple(range(-1, length)), ((ROOT, 0),) + ((kind, 0),) * length)
    return with_noise(tree, noise or {})


def with_noise(tree: TreeSpec, noise: dict[int, int]) -> TreeSpec:
    """A tree of drafts with so many noise nodes in a row under each node of `noise`."""
    parents, sources = list(tree.parents), list(tree.sources)
    for node, length in noise.items():
        for place in range(length):
            parents.append(len(parents) - 1 if place else node)
            sources.append((NOISE, 0))
    return TreeSpec(tree.name, tuple(parents), tuple(sources), tree.twins)


def guesses(name: str, grams: int, length: int, columns: int) -> TreeSpec:
    """`grams` chains of `length` lookahead drafts, and the window of so many columns that finds them."""
    parents, sources = [-1], [(ROOT, 0)]

    def hang(parent: int, kind: str, rank: int) -> int:
        parents.append(parent)
        sources.append((kind, rank))
        return len(parents) - 1

    for rank in range(grams):
        node = 0
        for _ in range(length):
            node = hang(node, LOOKAHEAD, rank)
    top = [0]
    for column in range(1, columns):
        top.append(hang(top[-1], WINDOW, column))
    for column, node in enumerate(top):
        for _ in range(length - 1):
            node = hang(node, WINDOW, column)
    # Two n-grams may begin alike, and each is verified whole.
    return TreeSpec(name, tuple(parents), tuple(sources), twins=True)


def branching(
    name: str,
    retrieval: int,
    children: dict[tuple[int, ...], int],
    noise: dict[tuple[int, ...], int] | None = None,
    kind: str = JACOBI,
) -> TreeSpec:
    """A chain of `retrieval` nodes beside a tree of candidates of `kind`, and chains of noise.

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
            sources.append((kind, rank))
    for path in (noise or {}).keys() - at.keys():
        raise InputError(f"tree {name!r}: the path {path} leads to no node")
    tree = TreeSpec(name, tuple(parents), tuple(sources))
    return with_noise(tree, {at[path]: length for path, length in (noise or {}).items()})


def likely(name: str, drafts: int, odds: tuple[float, ...], kind: str, retrieval: int = 0) -> TreeSpec:
    """The `drafts` nodes of `kind` that are most likely right where rank r is with probability odds[r] at any depth.

    retrieval: of a chain of retrieved nodes before them, which `kind` continues or stands in for.
    """
    parents, sources = list(range(-1, retrieval)), [(ROOT, 0)] + [((RETRIEVAL, 0), (kind, 0))] * retrieval
    heap = [(-p, 0, rank) for rank, p in enumerate(odds)]
    while len(parents) <= retrieval + drafts:
        p, parent, rank = heapq.heappop(heap)
        beside = retrieval and parent == 0  # the retrieved sibling may have this rank
        sources.append(((kind, rank), (kind, rank + 1)) if beside else (kind, rank))
        for below, q in enumerate(odds):
            heapq.heappush(heap, (p * q, len(parents), below))
        parents.append(parent)
    return TreeSpec(name, tuple(parents), tuple(sources))
