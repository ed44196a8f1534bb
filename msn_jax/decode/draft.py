"""Where candidate tokens come from: predictions at noise positions, and the text so far."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from msn_jax.decode.tree import EITHER, JACOBI, RETRIEVAL, TreeSpec

LONGEST_MATCH = 16  # suffix tokens compared; among longer matches the latest counts


def retrieve(tokens: Array, last: Array, count: int) -> tuple[Array, Array]:
    """What followed the longest earlier occurrence of the text's end, the latest of equally long ones.

    tokens int32[B, S], the text is tokens[b, : last[b] + 1]. Returns (continuation int32[B, count], -1 past the
    end of the text; match int32[B], the length of the suffix found, 0 with none).
    """
    at, back = jnp.arange(tokens.shape[1]), jnp.arange(LONGEST_MATCH)[:, None]
    end = jnp.take_along_axis(tokens, jnp.maximum(last[:, None] - back[:, 0], 0), axis=1)
    # same[b, i, s]: i tokens before s stands what stands i tokens before the end. at < last leaves out the end itself.
    same = tokens[:, jnp.maximum(at - back, 0)] == end[:, :, None]
    same &= (at >= back) & (at < last[:, None, None])
    match = jnp.where(same, LONGEST_MATCH, back).min(axis=1)  # as far back as the first difference
    best = jnp.argmax(match * tokens.shape[1] + at, axis=1)
    match = jnp.take_along_axis(match, best[:, None], axis=1)[:, 0]
    source = best[:, None] + 1 + jnp.arange(count)
    found = (match[:, None] > 0) & (source <= last[:, None])
    continuation = jnp.take_along_axis(tokens, jnp.minimum(source, tokens.shape[1] - 1), axis=1)
    return jnp.where(found, continuation, -1), match


def prefix_tokens(key: Array, tokens: Array, last: Array, count: int) -> Array:
    """`count` tokens of each row's text, drawn uniformly: what stands at noise positions. int32[B, count]"""
    draw = jax.random.randint(key, (tokens.shape[0], count), 0, last[:, None] + 1)
    return jnp.take_along_axis(tokens, draw, axis=1)


def fill(tree: TreeSpec, root: Array, jacobi: Array, retrieval: Array, noise: Array) -> tuple[Array, Array]:
    """The tokens of a tree's nodes, and which of them are drafts to verify.

    root int32[B]; jacobi int32[B, J, R] and retrieval int32[B, count] with -1 where there is none; noise
    int32[B, M] stands at every node without a draft: such a node is invalid, it can never be accepted.
    Returns (tokens int32[B, M], valid bool[B, M], the root included).
    """
    step = tree.depth - 1
    none = jnp.full(noise.shape, -1, jnp.int32)
    from_jacobi, from_retrieval = none, none
    if (nodes := tree.kind(JACOBI, EITHER)).any():
        from_jacobi = jnp.where(nodes, jacobi[:, step * nodes, tree.rank * nodes], -1)
    if (nodes := tree.kind(RETRIEVAL, EITHER)).any():
        from_retrieval = jnp.where(nodes, retrieval[:, step * nodes], -1)
    draft = jnp.where(from_retrieval >= 0, from_retrieval, from_jacobi)
    draft = draft.at[:, 0].set(root)
    return jnp.where(draft >= 0, draft, noise), draft >= 0


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
