"""What a draft-only adapter learns: at noise hung under any token of a reply, what the frozen model says itself there.

The model reads a packed row once, clean. Under each anchor, a token that decoding could have as its root, hang J noise
tokens that see the row up to the anchor, and each other. The one of depth j stands j places after the anchor; it is to
predict, without the tokens between, the distribution that the clean model has at that place.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from msn_jax.model import REMAT, attention, block, causal_attention, embed, final_norm, rope_angles, unembed
from msn_jax.model_config import ModelConfig
from msn_jax.params import DraftAdapter, Params
from msn_jax.sharding import constrain


def draw_anchors(key: Array, counts: Array, anchors: int) -> Array:
    """Places to hang noise under, int32[B, anchors], -1 where a row has too few; each at most once.

    counts bool[B, T]: whether the token after a place is to be predicted. An anchor's own next token is what the pass
    itself emits, so that the one after it must count: the first that noise can predict.
    """
    able = jnp.pad(counts[:, 1:], ((0, 0), (0, 1))) & counts
    order = jnp.where(able, jax.random.uniform(key, counts.shape), -1.0)
    best, places = jax.lax.top_k(order, min(anchors, counts.shape[1]))
    places = jnp.where(best >= 0, places, -1).astype(jnp.int32)
    return jnp.pad(places, ((0, 0), (0, anchors - places.shape[1])), constant_values=-1)


def two_streams(
    params: Params,
    cfg: ModelConfig,
    adapter: DraftAdapter,
    batch: dict[str, Array],
    anchors: Array,
    remat: str = "none",
    dtype=None,
) -> tuple[Array, Array]:
    """Hidden rows of the clean row [B, T, D] and of the noise under its anchors [B, A, J, D].

    params, adapter stacked; batch: arrays [B, T] of data.py; anchors int32[B, A] (below 0: noise under the first
    token, to be left out); dtype: see `forward`. Layer by layer the noise attends to keys and values of the clean
    stream, which nothing flows back into.
    """
    B, A = anchors.shape
    J, at = adapter.noise_embed.shape[0], jnp.maximum(anchors, 0)
    of_anchor = lambda x: jnp.take_along_axis(x, at, axis=1)
    x = embed(params, batch["tokens"])
    x = x.astype(dtype or x.dtype)
    noise = jnp.broadcast_to(adapter.noise_embed.astype(x.dtype), (B, A, J, x.shape[-1])).reshape(B, A * J, -1)
    positions = (of_anchor(batch["positions"])[..., None] + 1 + jnp.arange(J)).reshape(B, A * J)
    angles, noise_angles = rope_angles(cfg, batch["positions"]), rope_angles(cfg, positions)

    segments = batch["segment_ids"]
    seen = (jnp.arange(x.shape[1]) <= at[..., None]) & (segments[:, None] == of_anchor(segments)[..., None])
    seen = jnp.repeat(seen, J, axis=1)
    if cfg.sliding_window is not None:
        places = (at[..., None] + 1 + jnp.arange(J)).reshape(B, A * J)
        seen &= places[..., None] - jnp.arange(x.shape[1]) < cfg.sliding_window
    own = np.kron(np.eye(A), np.tril(np.ones((J, J)))) > 0  # its own chain of noise, up to itself
    mask = jnp.concatenate([seen, jnp.broadcast_to(own, (B, A * J, A * J))], axis=2)

    def one_layer(streams, layer_adapter):
        layer, low_rank = layer_adapter
        x, noise = streams
        clean = lambda q, k, v: causal_attention(q, k, v, segments, cfg.sliding_window)
        x, (k, v) = block(cfg, layer, x, *angles, clean)

        def to_both(q, noise_k, noise_v):
            join = lambda a, b: jnp.concatenate([a, b], axis=2)
            return attention(q, join(k, noise_k), join(v, noise_v), mask)

        noise, _ = block(cfg, layer, noise, *noise_angles, to_both, low_rank)
        return (x, noise), None

    (x, noise), _ = jax.lax.scan(REMAT[remat](one_layer), (x, noise), (params.layers, adapter.layers))
    return final_norm(params, cfg, x), final_norm(params, cfg, noise).reshape(B, A, J, -1)


def draft_loss_sums(
    params: Params,
    cfg: ModelConfig,
    batch: dict[str, Array],
    counts: Array,
    anchors: Array,
    adapter: DraftAdapter,
    *,
    remat: str = "none",
    head_chunk: int = 128,
    dtype=None,
) -> tuple[Array, Array]:
    """KL divergence of the noise's predictions from the clean model's, summed, and what it is made of.

    batch, anchors as in `two_streams`; counts bool[B, T] as in `draw_anchors`. Returns (float32[], float32[1 + J, 4]:
    COUNT, LOSS, TOP1, TOP10 by depth, row 0 empty); top-k is how often the clean model's best token, the one that
    greedy decoding will ask for, is among the k best of the noise. Logits of head_chunk noise tokens a row exist at
    one time.
    """
    clean, noise = two_streams(params, cfg, adapter, batch, anchors, remat, dtype)
    B, A, J, _ = noise.shape
    # What noise of depth j stands in for, and whether the reply goes on beyond it without a break.
    places = jnp.minimum(jnp.maximum(anchors, 0)[..., None] + 1 + jnp.arange(J), counts.shape[1] - 1)
    weight = jnp.take_along_axis(counts, places.reshape(B, A * J), axis=1).reshape(B, A, J) & (anchors >= 0)[..., None]
    weight = jnp.cumprod(weight, axis=2).astype(jnp.float32)

    @jax.checkpoint
    def score(noise, places, weight):
        there = jnp.take_along_axis(clean, places.reshape(B, -1)[..., None], axis=1).reshape(noise.shape)
        target = jax.nn.log_softmax(constrain(unembed(params, cfg, there), "batch", None, None, "vocab"))
        logits = constrain(unembed(params, cfg, noise), "batch", None, None, "vocab")
        divergence = (jnp.exp(target) * (target - jax.nn.log_softmax(logits))).sum(axis=-1)
        best = jnp.take_along_axis(logits, jnp.argmax(target, axis=-1)[..., None], axis=-1)
        rank = jax.lax.stop_gradient((logits > best).sum(axis=-1))
        hits = [(rank < k).astype(jnp.float32) for k in (1, 10)]
        columns = jnp.stack([jnp.ones_like(weight), divergence, *hits], axis=-1)
        return (columns * weight[..., None]).sum(axis=(0, 1))

    chunk = max(1, min(A, head_chunk // J))
    short = -A % chunk
    split = lambda x: jnp.moveaxis(
        jnp.pad(x, ((0, 0), (0, short)) + ((0, 0),) * (x.ndim - 2)).reshape(B, -1, chunk, *x.shape[2:]), 1, 0
    )
    sums = jax.lax.map(lambda part: score(*part), (split(noise), split(places), split(weight))).sum(axis=0)
    sums = jnp.pad(sums, ((1, 0), (0, 0)))
    return sums[:, 1].sum(), sums
