"""Noise beside the text: the clean text learns by the plain loss, untouched; noise hung under it what stands ahead.

Under anchors, tokens of a reply that decoding could have as its root, hang chains of noise. They see the clean text up
to the anchor, and themselves. The one of depth j is to predict the token j + 1 places after the anchor. One set of
weights learns both.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import Array

from msn_jax.adapters import Parts
from msn_jax.config import NoiseConfig, RunConfig
from msn_jax.model import embed
from msn_jax.model_config import ModelConfig
from msn_jax.noise import hung_tokens
from msn_jax.objectives.scores import COUNT, LOSS, next_labels, sums_by_depth, token_scores
from msn_jax.objectives.streams import (
    divergence_sums,
    draw_anchors,
    hung_embeddings,
    hung_places,
    two_streams,
    weighted,
)


def draw(key: Array, batch: dict[str, Array], noise: NoiseConfig, step: Array | int) -> tuple[Array, Array, Array]:
    """(anchors int32[B, A], tokens of their noise int32[B, A * J], share float32[B]) of a batch.

    share: clean tokens for each noise token of the whole batch, the same for all rows. With it both means count alike,
    however the batch is split.
    """
    where, what = jax.random.split(key)
    _, counts = next_labels(batch)
    anchors = draw_anchors(where, counts, noise.anchors)
    tokens = hung_tokens(what, batch["tokens"], batch["segment_ids"], anchors, noise)
    _, weight = hung_places(counts, anchors, noise.length)
    share = counts.sum().astype(jnp.float32) / jnp.maximum(weight.sum(), 1).astype(jnp.float32)
    return anchors, tokens, jnp.broadcast_to(share, len(anchors))


def loss_sums(
    parts: Parts,
    cfg: ModelConfig,
    batch: dict[str, Array],
    anchors: Array,
    tokens: Array,
    share: Array,
    *,
    noise: NoiseConfig,
    remat: str = "none",
    head_chunk: int = 512,
    dtype=None,
) -> tuple[Array, tuple[Array, Array]]:
    """The clean text's loss, and noise.weight times that of the noise, see __init__.py. drawn: see `draw`."""
    weights, adapter = parts.weights, parts.adapter
    B, A = anchors.shape
    if parts.noise_embed is None:
        hung = embed(weights, tokens).reshape(B, A, noise.length, -1)
    else:
        hung = hung_embeddings(parts.noise_embed, anchors)
    clean, hung = two_streams(weights, cfg, batch, anchors, hung, (adapter, adapter), remat, dtype)

    labels, counts = next_labels(batch)
    nll, rank = token_scores(weights, cfg, clean, labels, counts, head_chunk)
    sums = sums_by_depth(nll, rank, jnp.zeros_like(labels), counts, noise.length)
    if noise.target == "model":
        of_noise = divergence_sums(weights, cfg, clean, hung, counts, anchors, noise.loss, head_chunk)
    else:
        of_noise = _label_sums(parts, cfg, hung, labels, counts, anchors, head_chunk)
    loss = sums[0, LOSS] + noise.weight * share[0] * weighted(of_noise, noise.decay)
    return loss, (sums[0, COUNT], sums + of_noise)


def _label_sums(
    parts: Parts, cfg: ModelConfig, hung: Array, labels: Array, counts: Array, anchors: Array, head_chunk: int
) -> Array:
    """Sums over noise rows [B, A, J, D], which are to predict the tokens ahead of their anchors. float32[1 + J, 4]"""
    B, A, J, D = hung.shape
    places, weight = hung_places(counts, anchors, J)
    flat = lambda x: x.reshape(B, A * J)
    ahead = jnp.take_along_axis(labels, flat(places), axis=1)
    nll, rank = token_scores(parts.weights, cfg, hung.reshape(B, A * J, D), ahead, flat(weight), head_chunk)
    depth = jnp.broadcast_to(jnp.arange(1, J + 1), (B, A, J))
    return sums_by_depth(nll, rank, flat(depth), flat(weight), J)


def held_out(
    parts: Parts, cfg: ModelConfig, batch: dict[str, Array], key: Array, *, noise: NoiseConfig, **settings
) -> tuple[Array, Array]:
    """Sums of the clean text, and of the noise beside it; labels are the targets, for all settings."""
    plain = replace(noise, target="label")
    sums = loss_sums(parts, cfg, batch, *draw(key, batch, plain, 0), noise=plain, **settings)[1][1]
    clean = (jnp.arange(len(sums)) == 0)[:, None]
    return jnp.where(clean, sums, 0), jnp.where(clean, 0, sums)


def flops(run: RunConfig, frozen: int, trained: int) -> int:
    """Those of inline.py, and those of the noise rows."""
    a_row = run.data.max_tokens + run.noise.anchors * run.noise.length
    return (4 * frozen + 6 * trained) * run.train.batch_size * a_row
