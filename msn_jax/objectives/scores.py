"""How well hidden rows predict tokens, summed by noise depth, and what a log shows of such sums."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from msn_jax.config import NoiseConfig
from msn_jax.model import unembed
from msn_jax.model_config import ModelConfig
from msn_jax.params import Params
from msn_jax.sharding import constrain

# Columns of sums float32[1 + J, 4], by depth (row 0: clean positions, row j: noise of depth j).
COUNT, LOSS, TOP1, TOP10 = range(4)


def draw_nothing(key: Array, batch: dict[str, Array], noise: NoiseConfig, step: Array | int) -> tuple:
    """What objectives draw that read a batch as it is, see __init__.py."""
    return ()


def token_scores(
    params: Params, cfg: ModelConfig, hidden: Array, labels: Array, counts: Array, chunk: int
) -> tuple[Array, Array]:
    """How well hidden rows [B, T, D] predict labels int32[B, T] where counts bool[B, T], without all logits at once.

    Returns (negative log likelihood float32[B, T], rank int32[B, T]: how many tokens score above the label), both 0
    where it does not count. Logits of `chunk` tokens a row exist at a time, in the backward pass too, which computes
    them again. The positions that count come first, so that chunks without any cost nothing: most of a batch is
    prompts.
    """
    B, T = labels.shape
    chunk = min(chunk, T)
    parts = -(-T // chunk)
    order = jnp.argsort(~counts, axis=1, stable=True)

    def split(x: Array) -> Array:
        x = jnp.take_along_axis(x, order if x.ndim == 2 else order[..., None], axis=1)
        x = jnp.pad(x, ((0, 0), (0, parts * chunk - T)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, parts, chunk, *x.shape[2:]), 1, 0)

    def score(hidden, labels, counts):
        logits = constrain(unembed(params, cfg, hidden), "batch", None, "vocab")
        label = jnp.take_along_axis(logits, labels[..., None], axis=-1)
        nll = jax.nn.logsumexp(logits, axis=-1) - label[..., 0]
        rank = jax.lax.stop_gradient((logits > label).sum(axis=-1, dtype=jnp.int32))
        return jnp.where(counts, nll, 0), jnp.where(counts, rank, 0)

    def nothing(hidden, labels, counts):
        return jnp.zeros(labels.shape), jnp.zeros_like(labels)

    # Computed again as a whole: with the condition outside, each chunk would keep a copy of the table for its branch.
    one = jax.checkpoint(lambda part: jax.lax.cond(part[2].any(), score, nothing, *part))
    scores = jax.lax.map(one, (split(hidden), split(labels), split(counts)))
    places = jnp.argsort(order, axis=1)
    return jax.tree.map(
        lambda x: jnp.take_along_axis(jnp.moveaxis(x, 0, 1).reshape(B, parts * chunk), places, axis=1), scores
    )


def next_labels(batch: dict[str, Array]) -> tuple[Array, Array]:
    """(label of each position int32[B, T], whether it counts bool[B, T]): the next token, where it is a reply's."""
    ahead = lambda x: jnp.pad(x[:, 1:], ((0, 0), (0, 1)))
    counts = ahead(batch["response"]) & (ahead(batch["segment_ids"]) == batch["segment_ids"])
    return ahead(batch["tokens"]), counts & (batch["segment_ids"] > 0)


def sums_by_depth(nll: Array, rank: Array, depth: Array, counts: Array, noise_length: int) -> Array:
    """Sums of `token_scores` by depth int32[B, T], 0 to noise_length, where counts bool[B, T]: float32[1 + J, 4]."""
    columns = jnp.stack([jnp.ones_like(nll), nll, (rank < 1).astype(nll.dtype), (rank < 10).astype(nll.dtype)], axis=-1)
    by_depth = jax.nn.one_hot(depth, noise_length + 1, dtype=nll.dtype) * counts[..., None].astype(nll.dtype)
    return jnp.einsum("btd,btc->dc", by_depth, columns, precision=jax.lax.Precision.HIGHEST)


def metrics_of(by_depth: np.ndarray) -> dict[str, float]:
    """Means from sums; a depth that did not occur is left out."""
    clean, noisy = by_depth[0], by_depth[1:].sum(axis=0)
    out = {"loss": float(by_depth[:, LOSS].sum() / max(by_depth[:, COUNT].sum(), 1))}
    rows = {"clean": clean, "noisy": noisy} | {f"depth{j}": row for j, row in enumerate(by_depth) if j}
    for name, row in rows.items():
        if row[COUNT]:
            if name in ("clean", "noisy"):
                out[f"loss_{name}"] = float(row[LOSS] / row[COUNT])
            out[f"top1_{name}"] = float(row[TOP1] / row[COUNT])
            out[f"top10_{name}"] = float(row[TOP10] / row[COUNT])
    return out | {"response_tokens": int(by_depth[:, COUNT].sum())}
