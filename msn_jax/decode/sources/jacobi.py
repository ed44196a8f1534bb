"""Jacobi predictions: what the model says at positions where noise stands (paper section 3.2)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from msn_jax.decode.source import Ahead, Ask, Seen, Text, Weights
from msn_jax.decode.tree import JACOBI, NOISE, TreeSpec


class Jacobi(Ahead):
    """Carry int32[B, J, R]: the best R candidates that the last pass predicts for each place ahead of the root.

    They are read at noise nodes, and where a tree has none, at rejected drafts. `own` of its weights: a DraftAdapter
    for noise nodes, or None.
    """

    name = JACOBI
    probe = NOISE

    def probes(self, weights, carry, text: Text, tree: TreeSpec) -> Array:
        return prefix_tokens(text.key(), text.tokens, text.last, tree.size)

    def added(self, weights: Weights, tree: TreeSpec) -> dict:
        # Static, so that a tree without noise pays nothing for the adapter.
        return {"adapter": weights.own, "noise_depth": tree.noise_depth} if weights.own else {}

    def observe(self, weights, carry, seen: Seen, ask: Ask) -> Array:
        return predict_ahead(seen.tree, seen.logits, seen.greedy, seen.best, ask.depths, ask.ranks)


def prefix_tokens(keys: Array, tokens: Array, last: Array, count: int) -> Array:
    """`count` tokens of each row's text, drawn uniformly: what stands at noise positions. keys [B]; int32[B, count]"""
    draw = jax.vmap(lambda key, last: jax.random.randint(key, (count,), 0, last + 1))(keys, last)
    return jnp.take_along_axis(tokens, draw, axis=1)


def predict_ahead(tree: TreeSpec, logits: Array, greedy: Array, best: Array, depths: int, ranks: int) -> Array:
    """The best candidates at the noise positions that follow the last accepted node.

    logits [B, M, V] and their argmax `greedy` [B, M]; best int32[B]. Returns int32[B, depths, ranks]: row j for the
    draft of depth j + 1 under the next root; -1 where no node of the tree looks that far.
    """
    B = logits.shape[0]
    rows = min(depths, tree.follow.shape[1])
    if rows == 0 or ranks == 0:
        return jnp.full((B, depths, ranks), -1, jnp.int32)
    nodes = jnp.asarray(tree.follow)[best, :rows]
    index = jnp.maximum(nodes, 0)
    if ranks == 1:
        top = jnp.take_along_axis(greedy, index, axis=1)[:, :, None]
    else:
        top = jax.lax.top_k(jnp.take_along_axis(logits, index[:, :, None], axis=1), ranks)[1]
    top = jnp.where(nodes[:, :, None] >= 0, top, -1)
    return jnp.pad(top, ((0, 0), (0, depths - rows), (0, 0)), constant_values=-1)
