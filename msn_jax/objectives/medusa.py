"""What Medusa's heads learn beside a frozen model: the tokens of a reply that stand further ahead (Cai et al. 2024).

The loss is that of the authors' second recipe: cross entropy; each head counts noise.decay of the one before it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from msn_jax.adapters import Parts
from msn_jax.config import NoiseConfig, RunConfig
from msn_jax.heads import ahead
from msn_jax.model import forward
from msn_jax.model_config import ModelConfig
from msn_jax.objectives.scores import COUNT, draw_nothing, next_labels, sums_by_depth, token_scores
from msn_jax.objectives.streams import weighted

draw = draw_nothing


def loss_sums(
    parts: Parts,
    cfg: ModelConfig,
    batch: dict[str, Array],
    *,
    noise: NoiseConfig,
    remat: str = "none",
    head_chunk: int = 512,
    dtype=None,
) -> tuple[Array, tuple[Array, Array]]:
    """Cross entropy of the heads, see __init__.py; row 0 of the sums is empty, row j that of head j - 1."""
    hidden, _ = forward(
        parts.weights,
        cfg,
        batch["tokens"],
        batch["positions"],
        segments=batch["segment_ids"],
        remat=remat,
        dtype=dtype,
    )
    rows = ahead(parts.heads, jax.lax.stop_gradient(hidden))
    labels, counts = next_labels(batch)
    K, sums = rows.shape[2], 0
    for k in range(K):
        later = lambda x: jnp.pad(x[:, k + 1 :], ((0, 0), (0, min(k + 1, x.shape[1]))))  # noqa: B023
        same = later(batch["segment_ids"]) == batch["segment_ids"]
        there = counts & later(counts) & same
        nll, rank = token_scores(parts.weights, cfg, rows[:, :, k], later(labels), there, head_chunk)
        sums += sums_by_depth(nll, rank, jnp.full_like(labels, k + 1), there, K)
    return weighted(sums, noise.decay), (sums[:, COUNT].sum(), sums)


def held_out(
    parts: Parts, cfg: ModelConfig, batch: dict[str, Array], key: Array, *, noise: NoiseConfig, **settings
) -> tuple[Array, Array]:
    """The sums of the heads, twice: nothing is learnt of clean text."""
    return (loss_sums(parts, cfg, batch, noise=noise, **settings)[1][1],) * 2


def flops(run: RunConfig, frozen: int, trained: int) -> int:
    """Forward alone through the frozen weights, and there and back through the heads. (Not counted: the model's head
    under each of them.)"""
    return (2 * frozen + 6 * trained) * run.train.batch_size * run.data.max_tokens
