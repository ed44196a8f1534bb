"""Where drafts come from: what a source is, and how a tree's nodes get their tokens from the sources that they name.

A cycle asks each source for candidates (`begin`, `level`), runs one static tree, and lets every source see what came of
it (`observe`, `update`). Nothing that a source says can change a token of the text: drafts are verified.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from msn_jax.decode.tree import PROBES, TreeSet, TreeSpec
from msn_jax.model_config import ModelConfig
from msn_jax.params import Params

DRAFT_STREAM = 2**32 - 1  # no request has this index: the noise of drafts never meets that of samples


@struct.dataclass
class Weights:
    """What a source may compute with."""

    model: Params
    own: Any  # of this source alone, such as an adapter; None
    cfg: ModelConfig = struct.field(pytree_node=False)


@struct.dataclass
class Text:
    """What is known when a cycle begins. The text of a row is tokens[: last + 1]; tokens[last] is the root."""

    tokens: Array  # int32[B, S]
    last: Array  # int32[B]
    request: Array  # int32[B]
    seed: Array  # uint32[] or [B]
    features: Array | None = None  # [B, 1, S, F] of tokens[: last], where a source has `taps`

    @property
    def root(self) -> Array:
        """int32[B]"""
        return jnp.take_along_axis(self.tokens, self.last[:, None], axis=1)[:, 0]

    def key(self) -> Array:
        """A key for each row [B], a function of the seed, the request and the position of the root alone."""

        def of_row(seed, request, last):
            stream = jax.random.fold_in(jax.random.key(seed), DRAFT_STREAM)
            return jax.random.fold_in(jax.random.fold_in(stream, request), last)

        return jax.vmap(of_row)(jnp.broadcast_to(self.seed, self.request.shape), self.request, self.last)


@struct.dataclass
class Seen:
    """What a pass showed. M nodes of `tree`; all but the valid ones stand for nothing."""

    tokens: Array  # int32[B, M]
    valid: Array  # bool[B, M]: drafts that were verified, and the root
    hidden: Array  # [B, M, D]
    logits: Array  # [B, M, V]
    greedy: Array  # int32[B, M]: their argmax
    best: Array  # int32[B]: the last accepted node
    tree: TreeSpec = struct.field(pytree_node=False)


@dataclasses.dataclass(frozen=True)
class Ask:
    """What the trees of a set want of one source: the deepest node, the number of ranks, the most drafts of a tree."""

    depths: int
    ranks: int
    drafts: int  # the root included
    probes: int  # ranks of its probes


@dataclasses.dataclass(frozen=True)
class At:
    """Nodes of a tree that one call is to draft for, and the rank that each wants. NumPy, static."""

    tree: TreeSpec
    nodes: np.ndarray  # int[n]
    rank: np.ndarray  # int[n]

    @property
    def depth(self) -> np.ndarray:
        """int[n], 1 or more"""
        return self.tree.depth[self.nodes]

    @property
    def parent(self) -> np.ndarray:
        """int[n]"""
        return np.asarray(self.tree.parents)[self.nodes]

    @property
    def parents(self) -> np.ndarray:
        """Each parent once, in order. int[P]"""
        return np.unique(self.parent)

    def ranked(self, best: Array) -> Array:
        """What the nodes want of the best R candidates after each of `parents` int32[B, P, R]: int32[B, n], -1 beyond
        R."""
        each, most = np.searchsorted(self.parents, self.parent), best.shape[2]
        return jnp.where((self.rank < most)[None], best[:, each, np.minimum(self.rank, most - 1)], -1)


@dataclasses.dataclass(frozen=True)
class Source:
    """One way to draft. Subclasses set `name` and give `level`; the rest where they need it. Hashable and static.

    What it remembers is its carry: a pytree of fixed shapes that goes from cycle to cycle.
    """

    name = ""
    probe = ""  # the name of its nodes that are never verified, where it has such
    by_parent = False  # whether candidates depend on the tokens above them: then a tree is drafted depth by depth

    def taps(self, cfg: ModelConfig) -> tuple[int, ...]:
        """Layers of the model whose inputs it reads, as `features` of the text; none: it pays nothing for them."""
        return ()

    def init(self, cfg: ModelConfig, ask: Ask, batch: int, slots: int) -> Any:
        """The carry before the first cycle."""
        return ()

    def read(self, weights: Weights, carry: Any, text: Text, live: Array, ask: Ask) -> Any:
        """Once a cycle, before `begin`: the carry of one that reads the text itself. live bool[B]: unfinished rows."""
        return carry

    def begin(self, weights: Weights, carry: Any, text: Text, ask: Ask) -> tuple[Any, Array | None]:
        """Once a cycle: (whatever `level` needs, the confidence of each row int32[B], see TreeSet, or None)."""
        return (), None

    def level(self, weights: Weights, carry: Any, scratch: Any, at: At, tokens: Array) -> tuple[Array, Any]:
        """Candidates int32[B, n] for the nodes `at`, -1 where there is none, and the scratch for the next call.

        tokens int32[B, M]: the tree so far, -1 where nothing stands; with `by_parent` all that is above `at`.
        """
        raise NotImplementedError

    def probes(self, weights: Weights, carry: Any, text: Text, tree: TreeSpec) -> Array | None:
        """Tokens of its probes, and for drafts that nobody gave: int32[B, M], -1 where it wants nothing; or None."""
        return None

    def added(self, weights: Weights, tree: TreeSpec) -> dict:
        """What it adds to the pass: keyword arguments of `forward`."""
        return {}

    def observe(self, weights: Weights, carry: Any, seen: Seen, ask: Ask) -> Any:
        """What is worth knowing of a pass, in shapes that do not depend on its tree."""
        return ()

    def update(self, weights: Weights, carry: Any, news: Any, text: Text, live: Array) -> Any:
        """The carry after a pass of which `observe` gave the news. text: with what was accepted; live bool[B]: rows
        that were not finished before."""
        return carry


class Ahead(Source):
    """One whose candidates come from the last pass alone: carry int32[B, J, R], the best R for each place ahead of the
    root, -1 where there is none. `observe` gives the new ones."""

    def init(self, cfg, ask: Ask, batch: int, slots: int) -> Array:
        return jnp.full((batch, ask.depths, ask.ranks), -1, jnp.int32)

    def level(self, weights, carry, scratch, at: At, tokens) -> tuple[Array, tuple]:
        return carry[:, at.depth - 1, at.rank], scratch

    def update(self, weights, carry, news: Array, text, live) -> Array:
        return news


def ask(trees: TreeSet, source: Source) -> Ask:
    return Ask(*trees.ask(source.name), trees.drafts, trees.ask(source.probe)[1])


def earlier_siblings(tree: TreeSpec) -> list[list[int]]:
    """For each node those before it under the same parent."""
    of = lambda node: [s for s in range(1, node) if tree.parents[s] == tree.parents[node]]
    return [of(node) for node in range(tree.size)]


def waves(tree: TreeSpec, by_parent: set[str]) -> list[np.ndarray]:
    """The drafts of a tree, those together that can be drafted at one time, each after all that it depends on.

    by_parent: sources that must know the tokens above a node. A node with a choice must know its earlier siblings'.
    """
    siblings, wave = earlier_siblings(tree), np.full(tree.size, -1)
    for node, wants in enumerate(tree.wants[1:], 1):
        knows = siblings[node] if len(wants) > 1 else []
        if any(kind in by_parent for kind, _ in wants):
            knows = [*knows, *np.flatnonzero(tree.ancestors[node])[:-1]]
        wave[node] = 0 if not len(knows) else 1 + wave[knows].max(initial=-1)
    wave[tree.kind(*PROBES)] = -1
    return [np.flatnonzero(wave == w) for w in range(wave.max() + 1)]


def fill(tree: TreeSpec, sources: tuple[Source, ...], weights: dict, carry: dict, scratch: dict, root: Array) -> Array:
    """The drafts of a tree, int32[B, M]: the root, -1 at probes and where no source has a token that is not taken.

    weights, carry, scratch: by the name of the source. A node that repeats an earlier sibling has no draft.
    """
    scratch, siblings = dict(scratch), earlier_siblings(tree)
    tokens = jnp.where((np.arange(tree.size) == 0)[None], root[:, None], -1)
    for nodes in waves(tree, {source.name for source in sources if source.by_parent}):
        wants = [tree.wants[node] for node in nodes]
        most, taken = max(map(len, wants)), _padded([siblings[node] for node in nodes])
        drafts = jnp.full((len(root), len(nodes)), -1, jnp.int32)
        for choice in range(most):
            offered = drafts
            for source in sources:
                at = [i for i, w in enumerate(wants) if len(w) > choice and w[choice][0] == source.name]
                if at:
                    where = At(tree, nodes[at], np.array([wants[i][choice][1] for i in at]))
                    known = weights[source.name], carry[source.name], scratch[source.name]
                    found, scratch[source.name] = source.level(*known, where, tokens)
                    offered = spread(found, at, offered)
            if most > 1 and not tree.twins:  # nodes without a choice are compared below
                repeats = (tokens[:, taken] == offered[:, :, None]) & (taken >= 0)[None]
                offered = jnp.where(repeats.any(axis=2), -1, offered)
            drafts = jnp.where(drafts >= 0, drafts, offered)
        tokens = spread(drafts, nodes, tokens)
    if tree.twins:
        return tokens
    taken = _padded(siblings)
    repeats = (tokens[:, taken] == tokens[:, :, None]) & (taken >= 0)[None]
    return jnp.where(repeats.any(axis=2), -1, tokens)


def _padded(lists: list[list[int]]) -> np.ndarray:
    """The lists as one array, filled up with -1. int[n, longest]"""
    longest = max(map(len, lists))
    return np.array([row + [-1] * (longest - len(row)) for row in lists], int).reshape(len(lists), longest)


def spread(values: Array, columns, into: Array) -> Array:
    """`into` [B, M] with values [B, n] at these columns; no scatter, which XLA:CPU runs one by one."""
    source = np.zeros(into.shape[1], int)
    source[columns] = np.arange(values.shape[1])
    return jnp.where(np.isin(np.arange(into.shape[1]), columns)[None], values[:, source], into)
