"""Noise for training inputs (Make Some Noise, section 3.1): pure, keyed, on the device, labels never touched.

A noise segment is L consecutive response tokens of one example that are replaced at the input. The token after each
of them stays a label, so that the model learns to predict it from the clean text before the segment and the position
alone: a noise token of depth j stands j places after the last clean one, and predicts what comes next.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from msn_jax.config import NoiseConfig
from msn_jax.errors import InputError
from msn_jax.shape_checks import check_shapes


def add_noise(key: Array, tokens: Array, response_mask: Array, segment_ids: Array, cfg: NoiseConfig) -> Array:
    """Replace noise segments of `tokens`; everything else comes back as it was.

    tokens int32[B, T]; response_mask bool[B, T], where a token belongs to a reply; segment_ids int32[B, T], the
    example of each token in a packed row, 0 for padding. Returns int32[B, T]. Labels are to be taken from `tokens`.
    Raises InputError for an argument of another shape, and for cfg.kind `random` without cfg.vocab_size.
    """
    check_shapes(
        tokens=(tokens, "int[B, T]"),
        response_mask=(response_mask, "bool[B, T]"),
        segment_ids=(segment_ids, "int[B, T]"),
    )
    where, what = jax.random.split(key)
    depth = noise_depth(where, response_mask, segment_ids, cfg)
    return fill_noise(what, tokens, depth, segment_ids, cfg)


def segment_length(step: Array, cfg: NoiseConfig) -> Array:
    """L at a training step, int32[]: constant, or from 1 up to cfg.length over cfg.progressive_steps."""
    if not cfg.progressive_steps:
        return jnp.int32(cfg.length)
    return jnp.minimum(1 + step * cfg.length // cfg.progressive_steps, cfg.length).astype(jnp.int32)


def noise_depth(
    key: Array, response_mask: Array, segment_ids: Array, cfg: NoiseConfig, length: Array | None = None
) -> Array:
    """Where the noise goes: the place of each token in its noise segment, 1..L, and 0 for clean ones. int32[B, T]

    A segment starts anywhere that it and the token after it lie in one reply, with a token of the same example
    before it; all such starts of an example are equally likely. Further segments of an example are drawn from the
    starts that leave a clean token between segments. A reply shorter than L + 1 stays clean.
    length: L as a traced int32[] up to cfg.length (None: cfg.length).
    """
    B, T = segment_ids.shape
    L = jnp.int32(cfg.length) if length is None else length
    if cfg.kind == "none":
        return jnp.zeros((B, T), jnp.int32)
    at = jnp.arange(T)[None]
    first, last = _ends(segment_ids[:, 1:] != segment_ids[:, :-1])
    same = (segment_ids[:, 1:] == segment_ids[:, :-1]) & response_mask[:, 1:] & response_mask[:, :-1]
    _, reply_end = _ends(~same)
    allowed = response_mask & (segment_ids > 0) & (at > first) & (at + L <= reply_end)

    if cfg.density > 0:
        in_example = (response_mask & (segment_ids > 0)).cumsum(axis=1)
        before = jnp.where(first > 0, jnp.take_along_axis(in_example, jnp.maximum(first - 1, 0), axis=1), 0)
        size = jnp.take_along_axis(in_example, last, axis=1) - before
        wanted = jnp.maximum(jnp.round(size.astype(jnp.float32) * cfg.density / L.astype(jnp.float32)), 1)
        wanted = wanted.astype(jnp.int32)
        rounds = wanted.max()
    else:
        wanted, rounds = jnp.full((B, T), cfg.segments), cfg.segments
    # The free start that comes first in a random order is a uniform draw; whole numbers have no ties.
    order = jax.random.permutation(key, jnp.broadcast_to(at, (B, T)), axis=1, independent=True)
    best_of = jax.vmap(lambda score, example: jnp.full(T, -1).at[example].max(score)[example])

    def draw(i, starts):
        before = jax.lax.cummax(jnp.where(starts, at, -T), axis=1)
        after = jax.lax.cummin(jnp.where(starts, at, 2 * T), axis=1, reverse=True)
        free = allowed & (at - before > L) & (after - at > L) & (i < wanted)
        score = jnp.where(free, order, -1)
        return starts | (free & (score == best_of(score, first)))

    starts = jax.lax.fori_loop(0, rounds, draw, jnp.zeros((B, T), bool))
    depth = at - jax.lax.cummax(jnp.where(starts, at, -T), axis=1) + 1
    return jnp.where(depth <= L, depth, 0).astype(jnp.int32)


def fill_noise(key: Array, tokens: Array, depth: Array, segment_ids: Array, cfg: NoiseConfig) -> Array:
    """`tokens` with a noise token wherever `depth` (see `noise_depth`) is above 0. int32[B, T]"""
    if cfg.kind == "none":
        return tokens
    if cfg.kind == "random":
        if cfg.vocab_size < 1:
            raise InputError("noise of kind random needs noise.vocab_size")
        noise = jax.random.randint(key, tokens.shape, 0, cfg.vocab_size, tokens.dtype)
    else:
        # Drawn from what stands before the segment, as decoding draws it from the text up to the root.
        first, _ = _ends(segment_ids[:, 1:] != segment_ids[:, :-1])
        start = jnp.arange(tokens.shape[1])[None] - depth + 1
        source = jax.random.randint(key, tokens.shape, first, jnp.maximum(start, first + 1))
        noise = jnp.take_along_axis(tokens, source, axis=1)
    return jnp.where(depth > 0, noise, tokens)


def hung_tokens(key: Array, tokens: Array, segment_ids: Array, anchors: Array, cfg: NoiseConfig) -> Array:
    """Tokens of chains of noise under anchors int32[B, A], drawn as decoding draws them. int32[B, A * cfg.length]

    Each is one of its example up to the anchor, or, of cfg.kind `random`, of the whole vocabulary. tokens,
    segment_ids int32[B, T].
    """
    at = jnp.repeat(jnp.maximum(anchors, 0), cfg.length, axis=1)
    if cfg.kind == "random":
        return jax.random.randint(key, at.shape, 0, cfg.vocab_size, tokens.dtype)
    first, _ = _ends(segment_ids[:, 1:] != segment_ids[:, :-1])
    source = jax.random.randint(key, at.shape, jnp.take_along_axis(first, at, axis=1), at + 1)
    return jnp.take_along_axis(tokens, source, axis=1)


def _ends(breaks: Array) -> tuple[Array, Array]:
    """First and last index of the run that each of T places is in; breaks bool[B, T-1], between neighbours."""
    B, T = breaks.shape[0], breaks.shape[1] + 1
    at, edge = jnp.arange(T)[None], jnp.ones((B, 1), bool)
    first = jax.lax.cummax(jnp.where(jnp.concatenate([edge, breaks], axis=1), at, 0), axis=1)
    last = jax.lax.cummin(jnp.where(jnp.concatenate([breaks, edge], axis=1), at, T - 1), axis=1, reverse=True)
    return first, last
