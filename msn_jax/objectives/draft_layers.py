"""What the first layers of a model learn, with its norm and head behind them, so that they draft for it (Leviathan et
al. 2023): at each place of a reply the frozen model's own distribution.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from msn_jax.adapters import Parts
from msn_jax.config import NoiseConfig, RunConfig
from msn_jax.model import forward
from msn_jax.model_config import ModelConfig
from msn_jax.objectives.scores import COUNT, draw_nothing, next_labels
from msn_jax.objectives.streams import divergence_sums, weighted

draw = draw_nothing


def loss_sums(
    parts: Parts,
    cfg: ModelConfig,
    batch: dict[str, Array],
    *,
    noise: NoiseConfig,
    remat: str = "none",
    head_chunk: int = 128,
    dtype=None,
) -> tuple[Array, tuple[Array, Array]]:
    """Divergence of the smaller model's predictions from the whole one's, of the kind of noise.loss, see __init__.py.

    Row 0 of the sums is empty, row 1 that of the next token; top-k is how often the whole model's best token is among
    the k best. A row's first place, which no reply can follow, is left out.
    """
    weights, count = parts.weights, len(jax.tree.leaves(parts.adapter)[0])
    small = weights.replace(layers=jax.tree.map(lambda w: w[:count], weights.layers))
    read = partial(forward, segments=batch["segment_ids"], remat=remat, dtype=dtype)
    text = batch["tokens"], batch["positions"]
    whole, _ = read(weights, cfg, *text)
    own, _ = read(small, dataclasses.replace(cfg, layers=count), *text, adapter=parts.adapter)
    _, counts = next_labels(batch)
    # As noise of depth 1 under each place, which stands for the place after it.
    anchors = jnp.broadcast_to(jnp.arange(counts.shape[1] - 1), (len(counts), counts.shape[1] - 1))
    sums = divergence_sums(weights, cfg, whole, own[:, 1:, None], counts, anchors, noise.loss, head_chunk)
    return weighted(sums, 1.0), (sums[:, COUNT].sum(), sums)


def held_out(
    parts: Parts, cfg: ModelConfig, batch: dict[str, Array], key: Array, *, noise: NoiseConfig, **settings
) -> tuple[Array, Array]:
    """The sums of the smaller model, twice: the whole one learns nothing. Its loss is the KL divergence."""
    plain = dataclasses.replace(noise, loss="kl")
    return (loss_sums(parts, cfg, batch, noise=plain, **settings)[1][1],) * 2


def flops(run: RunConfig, frozen: int, trained: int) -> int:
    """Forward through the frozen weights, there and back through the first layers. (The share of these in all weights
    is not known here: counted is the forward pass and what is trained.)"""
    return (2 * frozen + 6 * trained) * run.train.batch_size * run.data.max_tokens
