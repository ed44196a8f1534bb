"""A clean text and noise hung under it, run side by side: what noise beside the text and draft-only adapters share.

The model reads a packed row once, clean. Under each anchor, a token that decoding could have as its root, hang J noise
tokens that see the row up to the anchor, and each other; the one of depth j stands j places after the anchor. Nothing
of the noise is seen by the clean text.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from msn_jax.linear import HIGHEST
from msn_jax.model import MASKED, REMAT, block, causal_attention, embed, final_norm, rope_angles, unembed
from msn_jax.model_config import ModelConfig
from msn_jax.objectives.scores import LOSS
from msn_jax.params import Layer, Params
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


def hung_places(counts: Array, anchors: Array, J: int) -> tuple[Array, Array]:
    """What noise stands in for: (places int32[B, A, J], whether there is something to predict bool[B, A, J]).

    Nothing is to be predicted where the reply does not go on up to there without a break; counts as in `draw_anchors`.
    """
    B, A = anchors.shape
    places = jnp.minimum(jnp.maximum(anchors, 0)[..., None] + 1 + jnp.arange(J)[None, None], counts.shape[1] - 1)
    there = jnp.take_along_axis(counts, places.reshape(B, A * J), axis=1).reshape(B, A, J) & (anchors >= 0)[..., None]
    return places, jnp.cumprod(there, axis=2) > 0


def hung_embeddings(noise_embed: Array, anchors: Array) -> Array:
    """Embeddings by depth [J, D] as noise under anchors [B, A]: [B, A, J, D]."""
    return jnp.broadcast_to(noise_embed, (*anchors.shape, *noise_embed.shape))


def two_streams(
    params: Params,
    cfg: ModelConfig,
    batch: dict[str, Array],
    anchors: Array,
    noise: Array,
    adapters: tuple[Layer | None, Layer | None] = (None, None),
    remat: str = "none",
    dtype=None,
) -> tuple[Array, Array]:
    """Hidden rows of the clean row [B, T, D] and of the noise under its anchors [B, A, J, D].

    params stacked; batch: arrays [B, T] of data.py; anchors int32[B, A] (below 0: noise under the first token, to be
    left out); noise [B, A, J, D]: what enters there; adapters: stacked, of the clean row and of the noise; dtype: see
    `forward`. Layer by layer the noise attends to keys and values of the clean stream.
    """
    B, A, J, D = noise.shape
    at = jnp.maximum(anchors, 0)
    of_anchor = lambda x: jnp.take_along_axis(x, at, axis=1)
    x = embed(params, batch["tokens"])
    x = x.astype(dtype or x.dtype)
    noise = noise.astype(x.dtype).reshape(B, A * J, D)
    positions = (of_anchor(batch["positions"])[..., None] + 1 + jnp.arange(J)[None, None]).reshape(B, A * J)
    angles, noise_angles = rope_angles(cfg, batch["positions"]), rope_angles(cfg, positions)

    segments = batch["segment_ids"]
    seen = seen_by_noise(segments, at, J, cfg.sliding_window)

    def one_layer(streams, layer_adapters):
        layer, (of_clean, of_noise) = layer_adapters
        x, noise = streams
        clean = lambda q, k, v: causal_attention(q, k, v, segments, cfg.sliding_window)
        x, text = block(cfg, layer, x, *angles, clean, of_clean)
        hung = lambda q, k, v: hung_attention(q, text, (k, v), seen, cfg.sliding_window)
        noise, _ = block(cfg, layer, noise, *noise_angles, hung, of_noise)
        return (x, noise), None

    (x, noise), _ = jax.lax.scan(REMAT[remat](one_layer), (x, noise), (params.layers, adapters))
    return final_norm(params, cfg, x), final_norm(params, cfg, noise).reshape(B, A, J, D)


def seen_by_noise(segments: Array, anchors: Array, J: int, window: int | None = None) -> Array:
    """Which of the text each noise token sees: its example up to its anchor. bool[B, A, J, T]

    segments int32[B, T]; anchors int32[B, A], 0 and above; window: see cfg.sliding_window.
    """
    places = jnp.arange(segments.shape[1])[None, None]
    of_anchor = jnp.take_along_axis(segments, anchors, axis=1)
    seen = (places <= anchors[..., None]) & (segments[:, None] == of_anchor[..., None])
    seen = jnp.broadcast_to(seen[:, :, None], (*anchors.shape, J, segments.shape[1]))
    if window is not None:
        ahead = anchors[..., None] + 1 + jnp.arange(J)[None, None]
        seen &= ahead[..., None] - places[None] < window
    return seen


def hung_attention(
    q: Array, text: tuple[Array, Array], own: tuple[Array, Array], seen: Array, window: int | None = None
) -> Array:
    """Attention of noise over the text that it sees and over its own chain up to itself: [B, A * J, N, H].

    q [B, A * J, K, G, H]; text: keys and values [B, K, T, H]; own: those of the noise [B, K, A * J, H]; seen
    bool[B, A, J, T]. The two blocks of scores share one softmax, as in `attention`; joined into one, they would be
    mostly masked: of the noise each sees J - 1 others.
    """
    B, _, K, G, H = q.shape
    _, A, J, T = seen.shape
    dot = partial(jnp.einsum, precision=HIGHEST if q.dtype == jnp.float32 else None, preferred_element_type=jnp.float32)
    rows = (q * H**-0.5).reshape(B, A, J, K, G, H).transpose(0, 3, 1, 2, 4, 5)
    own_k, own_v = (x.reshape(B, K, A, J, H) for x in own)
    chain = jnp.tril(jnp.ones((J, J), bool))
    if window is not None:
        chain &= ~jnp.tril(jnp.ones((J, J), bool), -window)
    past = jnp.where(seen[:, None, :, :, None], dot("bkajgh,bkth->bkajgt", rows, text[0]), MASKED)
    near = jnp.where(chain[None, None, None, :, None], dot("bkajgh,bkaih->bkajgi", rows, own_k), MASKED)
    top = jax.lax.stop_gradient(jnp.maximum(past.max(axis=-1, keepdims=True), near.max(axis=-1, keepdims=True)))
    past, near = jnp.exp(past - top), jnp.exp(near - top)
    total = past.sum(axis=-1, keepdims=True) + near.sum(axis=-1, keepdims=True)
    out = dot("bkajgt,bkth->bkajgh", past.astype(q.dtype), text[1])
    out = (out + dot("bkajgi,bkaih->bkajgh", near.astype(q.dtype), own_v)) / total
    return out.astype(q.dtype).transpose(0, 2, 3, 1, 4, 5).reshape(B, A * J, K * G, H)


def divergence(loss: str, target: Array, predicted: Array) -> Array:
    """How far predicted log probabilities [..., V] are from those of the target, by the kind of noise.loss."""
    if loss == "kl":
        return (jnp.exp(target) * (target - predicted)).sum(axis=-1)
    if loss == "overlap":
        # The share of drafts that sampling would accept.
        return -jnp.log(jnp.exp(jnp.minimum(target, predicted)).sum(axis=-1))
    best = jnp.take_along_axis(predicted, jnp.argmax(target, axis=-1)[..., None], axis=-1)[..., 0]
    return 0.9 * jnp.abs(jnp.exp(target) - jnp.exp(predicted)).sum(axis=-1) - 0.1 * best


def divergence_sums(
    params: Params,
    cfg: ModelConfig,
    clean: Array,
    noise: Array,
    counts: Array,
    anchors: Array,
    loss: str,
    head_chunk: int,
) -> Array:
    """Sums by depth (scores.py) of the noise's predictions against those of the clean text at the same places.

    clean [B, T, D] and noise [B, A, J, D]: hidden rows; what is predicted from clean ones is a constant. top-k is how
    often the best token of the clean text is among the k best of the noise.
    """
    B, A, J, _ = noise.shape
    places, weight = hung_places(counts, anchors, J)
    clean = jax.lax.stop_gradient(clean)

    @jax.checkpoint
    def score(noise, places, weight):
        there = jnp.take_along_axis(clean, places.reshape(B, -1)[..., None], axis=1).reshape(noise.shape)
        target = jax.nn.log_softmax(constrain(unembed(params, cfg, there), "batch", None, None, "vocab"))
        target = jax.lax.stop_gradient(target)  # the head is a trained one where all weights are
        logits = constrain(unembed(params, cfg, noise), "batch", None, None, "vocab")
        far = divergence(loss, target, jax.nn.log_softmax(logits))
        best = jnp.take_along_axis(logits, jnp.argmax(target, axis=-1)[..., None], axis=-1)
        rank = jax.lax.stop_gradient((logits > best).sum(axis=-1))
        hits = [(rank < k).astype(jnp.float32) for k in (1, 10)]
        columns = jnp.stack([jnp.ones_like(far), far, *hits], axis=-1)
        return jnp.where(weight[..., None], columns, 0).sum(axis=(0, 1))

    parts = -(-A // max(1, head_chunk // J))
    chunk = -(-A // parts)
    short = -A % chunk
    split = lambda x: jnp.moveaxis(
        jnp.pad(x, ((0, 0), (0, short)) + ((0, 0),) * (x.ndim - 2)).reshape(B, -1, chunk, *x.shape[2:]), 1, 0
    )
    sums = jax.lax.map(lambda part: score(*part), (split(noise), split(places), split(weight))).sum(axis=0)
    return jnp.pad(sums, ((1, 0), (0, 0)))


def weighted(sums: Array, decay: float) -> Array:
    """The loss of noise from sums by depth; each depth counts `decay` of the one before it. float32[]"""
    return sums[1:, LOSS] @ jnp.asarray(decay ** np.arange(len(sums) - 1), sums.dtype)
