"""Lookahead decoding (Fu et al. 2024): n-grams out of Jacobi iterations, drafted again after their first token.

A window of W columns and N - 1 levels hangs under the root as probes. Level 0 is a chain of W - 1 tokens whose column 0
is the root; level k of a column hangs under level k - 1 and holds what an earlier pass said there. The last level says
a new one. What stands in a column from top to bottom, and the new token, is an n-gram; a pool keeps the newest of each
first token.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from msn_jax.cache import waiting_for
from msn_jax.decode.source import Ask, At, Seen, Source, Text, Weights, spread
from msn_jax.decode.sources.jacobi import prefix_tokens
from msn_jax.decode.tree import LOOKAHEAD, WINDOW, TreeSpec


@struct.dataclass
class Pool:
    """What lookahead remembers."""

    window: Array  # int32[B, N - 1, W]: the tokens of the next pass; column 0 of level 0 is not read
    levels: Array  # int32[B]: that the model has filled, level 0 not counted; the others hold nothing
    grams: Array  # int32[B, V, G, N - 1]: what followed each token, the newest last, -1 where there is none


@struct.dataclass
class News:
    """Of a pass with a window. Without one `said` is -1."""

    ran: Array  # int32[B, N - 1, W]: its tokens, with the root
    said: Array  # int32[B, W]: what the lowest filled level says


class Lookahead(Source):
    """Carry: a Pool. Rank r of `lookahead` is the r-th newest n-gram that begins with the root; the depths of the trees
    give N - 1, the ranks G, those of the window's nodes W.

    As published, but for the first N - 2 passes: the text's tokens that level 0 begins with stay where they are.
    """

    name = LOOKAHEAD
    probe = WINDOW

    def init(self, cfg, ask: Ask, batch: int, slots: int) -> Pool:
        return Pool(
            window=jnp.full((batch, ask.depths, ask.probes), -1, jnp.int32),
            levels=jnp.zeros(batch, jnp.int32),
            grams=jnp.full((batch, cfg.vocab_size, ask.ranks, ask.depths), -1, jnp.int32),
        )

    def begin(self, weights: Weights, carry: Pool, text: Text, ask: Ask) -> tuple[Array, None]:
        return carry.grams[jnp.arange(len(carry.grams)), text.root][:, ::-1], None

    def level(self, weights, carry, scratch: Array, at: At, tokens) -> tuple[Array, Array]:
        return scratch[:, at.rank, at.depth - 1], scratch

    def probes(self, weights, carry: Pool, text: Text, tree: TreeSpec) -> Array | None:
        place = places(tree)
        if not len(place):
            return None
        drawn = prefix_tokens(text.key(), text.tokens, text.last, tree.size)
        nodes, level, column = place.T
        held = carry.window[:, level, column]
        return spread(jnp.where(held >= 0, held, drawn[:, nodes]), nodes, jnp.full_like(drawn, -1))

    def observe(self, weights, carry: Pool, seen: Seen, ask: Ask) -> News:
        place = places(seen.tree)
        if not len(place):
            return News(carry.window, jnp.full_like(carry.window[:, 0], -1))
        node = np.zeros((ask.depths, ask.probes), int)  # the root at level 0 of column 0
        node[place[:, 1], place[:, 2]] = place[:, 0]
        said = jnp.take_along_axis(seen.greedy[:, node], carry.levels[:, None, None], axis=1)[:, 0]
        return News(seen.tokens[:, node], said)

    def update(self, weights, carry: Pool, news: News, text: Text, live: Array) -> Pool:
        lowest = carry.window.shape[1] - 1
        new = live & (news.said[:, 0] >= 0)
        full = new & (carry.levels == lowest)
        # A window that is full moves up by a level; otherwise what was said becomes the next level.
        at = (np.arange(lowest + 1)[None] == carry.levels[:, None] + 1)[:, :, None]
        filled = jnp.where(at, news.said[:, None], news.ran)
        moved = jnp.concatenate([news.ran[:, 1:], news.said[:, None]], axis=1)
        unset = (np.arange(lowest + 1)[None] > carry.levels[:, None] + 1)[:, :, None]
        window = jnp.where(full[:, None, None], moved, jnp.where(unset, -1, filled))
        # The text's end is known when nothing reads the pool any more.
        keys = waiting_for(text.last[:1, None], news.ran[:, 0])
        grams = carry.grams
        for column in range(keys.shape[1]):
            key = jnp.where(full, keys[:, column], grams.shape[1])  # beyond the pool: dropped
            grams = remember(grams, key, moved[:, :, column])
        return Pool(
            window=jnp.where(new[:, None, None], window, carry.window),
            levels=jnp.where(new, jnp.minimum(carry.levels + 1, lowest), carry.levels),
            grams=grams,
        )


def places(tree: TreeSpec) -> np.ndarray:
    """(node, level, column) of the nodes of a window. int[n, 3]"""
    nodes = np.flatnonzero(tree.kind(WINDOW))
    column = np.array([tree.wants[node][0][1] for node in nodes], int)
    return np.stack([nodes, tree.depth[nodes] - column, column], axis=1)


def remember(grams: Array, key: Array, gram: Array) -> Array:
    """The pool int32[B, V, G, N - 1] with a gram [B, N - 1] as the newest of its key [B]; the oldest of G goes."""
    B, _, G, _ = grams.shape
    kept = grams[jnp.arange(B), key]
    known = (kept == gram[:, None]).all(axis=2)
    gone = jnp.where(known.any(axis=1), jnp.argmax(known, axis=1), 0)
    newer = jnp.concatenate([kept[:, 1:], gram[:, None]], axis=1)
    after = jnp.where((np.arange(G)[None] < gone[:, None])[:, :, None], kept, newer)
    return grams.at[jnp.arange(B), key].set(after, mode="drop")
