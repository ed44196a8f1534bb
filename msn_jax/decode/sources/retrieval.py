"""Retrieval: what followed the text's end where it stood before."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from msn_jax.decode.source import Ask, At, Source, Text
from msn_jax.decode.tree import LONGEST_MATCH, RETRIEVAL

PLACES = 32  # earlier places whose continuations vote; those with the longest matches, the latest of equal ones


class Retrieval(Source):
    """No carry: the text is all it knows. Its confidence is the length of the longest suffix that it found."""

    name = RETRIEVAL

    def begin(self, weights, carry, text: Text, ask: Ask) -> tuple[Array, Array]:
        return retrieve(text.tokens, text.last, ask.depths, ask.ranks)

    def level(self, weights, carry, scratch: Array, at: At, tokens) -> tuple[Array, Array]:
        return scratch[:, at.rank, at.depth - 1], scratch


def retrieve(tokens: Array, last: Array, count: int, ranks: int = 1) -> tuple[Array, Array]:
    """Continuations of the text's end that earlier occurrences of it agree on, and how long a suffix was found.

    Where a suffix of n tokens stood before, what followed votes with weight 2^n. The score of a continuation is the
    sum, over its beginnings of each length, of the votes for that beginning: the number of its tokens that will be
    right, if the next token is drawn from the votes (SuffixDecoding's rule, Oliaro et al. 2024, with all lengths of a
    match in one histogram). Rank r is the best one that begins with another token than the ranks before.

    tokens int32[B, S], the text is tokens[b, : last[b] + 1]. Returns (continuation int32[B, ranks, count], -1 past the
    end of the text; match int32[B], the length of the longest suffix found, 0 with none).
    """
    S = tokens.shape[1]
    at, back = jnp.arange(S)[None], jnp.arange(LONGEST_MATCH)[:, None]
    end = jnp.take_along_axis(tokens, jnp.maximum(last[:, None] - back.T, 0), axis=1)
    # same[b, i, s]: i tokens before s stands what stands i tokens before the end. at < last leaves out the end itself.
    same = tokens[:, jnp.maximum(at - back, 0)] == end[:, :, None]
    same &= (at >= back)[None] & (at[None] < last[:, None, None])
    match = jnp.where(same, LONGEST_MATCH, back[None]).min(axis=1)  # as far back as the first difference
    # As float32, in which these are exact: XLA:CPU sorts integers whole.
    _, place = jax.lax.top_k((match * S + at).astype(jnp.float32), min(PLACES, S))
    match = jnp.take_along_axis(match, place, axis=1)
    source = place[:, :, None] + 1 + jnp.arange(count)[None, None]  # [B, places, count]
    follows = jnp.take_along_axis(tokens, jnp.minimum(source, S - 1).reshape(len(tokens), -1), axis=1)
    follows = follows.reshape(source.shape)
    follows = jnp.where((match[:, :, None] > 0) & (source <= last[:, None, None]), follows, -1)

    agree = (follows[:, :, None] == follows[:, None]) & (follows[:, None] >= 0)
    agree = jnp.cumprod(agree.astype(jnp.int32), axis=3)  # [B, places, places, count]: from the first token on
    score = (agree * (1 << match)[:, None, :, None]).sum(axis=(2, 3))
    chosen = []
    for _ in range(ranks):
        best = jnp.argmax(score, axis=1)[:, None]
        found = jnp.take_along_axis(follows, best[:, :, None], axis=1)[:, 0]
        found = jnp.where(jnp.take_along_axis(score, best, axis=1) > 0, found, -1)
        chosen.append(found)
        score = jnp.where(follows[:, :, 0] == found[:, :1], 0, score)
    return jnp.stack(chosen, axis=1), match[:, 0]
