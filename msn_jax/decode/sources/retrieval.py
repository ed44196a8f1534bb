"""Retrieval: what followed the text's end where it stood before."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from msn_jax.decode.source import Ask, At, Source, Text
from msn_jax.decode.tree import LONGEST_MATCH, RETRIEVAL


class Retrieval(Source):
    """No carry: the text is all it knows. Its confidence is the length of the suffix that it found."""

    name = RETRIEVAL

    def begin(self, weights, carry, text: Text, ask: Ask) -> tuple[Array, Array]:
        return retrieve(text.tokens, text.last, ask.depths)

    def level(self, weights, carry, scratch: Array, at: At, tokens) -> tuple[Array, Array]:
        return scratch[:, at.depth - 1], scratch


def retrieve(tokens: Array, last: Array, count: int) -> tuple[Array, Array]:
    """What followed the longest earlier occurrence of the text's end, the latest of equally long ones.

    tokens int32[B, S], the text is tokens[b, : last[b] + 1]. Returns (continuation int32[B, count], -1 past the
    end of the text; match int32[B], the length of the suffix found, 0 with none).
    """
    at, back = jnp.arange(tokens.shape[1])[None], jnp.arange(LONGEST_MATCH)[:, None]
    end = jnp.take_along_axis(tokens, jnp.maximum(last[:, None] - back.T, 0), axis=1)
    # same[b, i, s]: i tokens before s stands what stands i tokens before the end. at < last leaves out the end itself.
    same = tokens[:, jnp.maximum(at - back, 0)] == end[:, :, None]
    same &= (at >= back)[None] & (at[None] < last[:, None, None])
    match = jnp.where(same, LONGEST_MATCH, back[None]).min(axis=1)  # as far back as the first difference
    best = jnp.argmax(match * tokens.shape[1] + at, axis=1)
    match = jnp.take_along_axis(match, best[:, None], axis=1)[:, 0]
    source = best[:, None] + 1 + jnp.arange(count)[None]
    found = (match[:, None] > 0) & (source <= last[:, None])
    continuation = jnp.take_along_axis(tokens, jnp.minimum(source, tokens.shape[1] - 1), axis=1)
    return jnp.where(found, continuation, -1), match
