"""Noise in the text (Make Some Noise, section 3.1): the next token everywhere, where noise stands too."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import Array

from msn_jax.adapters import Parts
from msn_jax.config import NoiseConfig, RunConfig
from msn_jax.model import forward
from msn_jax.model_config import ModelConfig
from msn_jax.noise import fill_noise, noise_depth, segment_length
from msn_jax.objectives.scores import COUNT, LOSS, next_labels, sums_by_depth, token_scores


def draw(key: Array, batch: dict[str, Array], noise: NoiseConfig, step: Array | int) -> tuple[Array, Array]:
    """(inputs int32[B, T], depth int32[B, T]) of a batch at a step."""
    where, what = jax.random.split(key)
    length = segment_length(jnp.asarray(step), noise)
    depth = noise_depth(where, batch["response"], batch["segment_ids"], noise, length)
    return fill_noise(what, batch["tokens"], depth, batch["segment_ids"], noise), depth


def loss_sums(
    parts: Parts,
    cfg: ModelConfig,
    batch: dict[str, Array],
    inputs: Array,
    depth: Array,
    *,
    noise: NoiseConfig,
    remat: str = "none",
    head_chunk: int = 512,
    dtype=None,
) -> tuple[Array, tuple[Array, Array]]:
    """Loss over the reply tokens of a batch that is fed as `inputs`, see __init__.py.

    batch: arrays [B, T] of data.py, whose tokens give the labels; inputs int32[B, T], with noise where depth
    int32[B, T] is above 0.
    """
    hidden, _ = forward(
        parts.weights,
        cfg,
        inputs,
        batch["positions"],
        segments=batch["segment_ids"],
        adapter=parts.adapter,
        marks=None if parts.noise_embed is None else (parts.noise_embed, depth),
        remat=remat,
        dtype=dtype,
    )
    labels, counts = next_labels(batch)
    nll, rank = token_scores(parts.weights, cfg, hidden, labels, counts, head_chunk)
    sums = sums_by_depth(nll, rank, depth, counts, noise.length)
    return sums[:, LOSS].sum(), (sums[:, COUNT].sum(), sums)


def held_out(
    parts: Parts, cfg: ModelConfig, batch: dict[str, Array], key: Array, *, noise: NoiseConfig, **settings
) -> tuple[Array, Array]:
    """Sums with clean inputs, and with one segment of noise.length an example; the same for every kind and density."""
    one = replace(noise, kind="ahead", segments=1, density=0.0, progressive_steps=0)
    inputs, depth = draw(key, batch, one, 0)
    score = lambda *drawn: loss_sums(parts, cfg, batch, *drawn, noise=one, **settings)[1][1]
    return score(batch["tokens"], jnp.zeros_like(depth)), score(inputs, depth)


def flops(run: RunConfig, frozen: int, trained: int) -> int:
    """2 a weight and token forward, 2 for what flows back through it, 2 for the gradient of what is trained."""
    return (4 * frozen + 6 * trained) * run.train.batch_size * run.data.max_tokens
