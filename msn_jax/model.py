"""LLaMA and its neighbours as pure functions over pytrees; what tells the families apart are fields of ModelConfig.

Shape key: B batch, T tokens in this call, S cache slots, D embed, N query heads, K kv heads, G = N/K,
H head_dim, F mlp, V vocab, L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from msn_jax import flash, kernels
from msn_jax.cache import KVCache
from msn_jax.linear import HIGHEST, adapted, linear, take_rows
from msn_jax.model_config import ModelConfig
from msn_jax.params import DraftAdapter, Layer, Params
from msn_jax.shape_checks import check_shapes
from msn_jax.sharding import constrain

QUERY_BLOCK = (128, 1024)  # least and most tokens of a row that attend at one time, in training
MASKED = -1e30  # finite: a row with nothing to attend to gives a mean, never a nan
REMAT = {
    "none": lambda f: f,
    "dots": partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable),
    "full": jax.checkpoint,
}


@jax.named_scope("norm")
def norm(x: Array, scale: Array, bias: Array | None, eps: float) -> Array:
    """Over the last axis, in float32: LayerNorm with a bias, root mean square norm where it is None.

    x [..., D]; scale and bias [D], or [..., D] with the last axes of x.
    """

    def rows(name, x, scale, bias):
        flat = lambda a: None if a is None else a.reshape(-1, a.shape[-1])
        y = kernels.norm(name, flat(x).astype(jnp.float32), flat(scale), flat(bias), eps)
        return y.reshape(x.shape).astype(x.dtype)

    return kernels.on_cpu(x.size // x.shape[-1], rows, partial(_xla_norm, eps=eps), x, scale, bias)


def _xla_norm(x: Array, scale: Array, bias: Array | None, eps: float) -> Array:
    x32 = x.astype(jnp.float32)
    if bias is not None:
        x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    x32 = x32 * jnp.broadcast_to(scale.astype(jnp.float32), x32.shape)
    if bias is not None:
        x32 = x32 + jnp.broadcast_to(bias.astype(jnp.float32), x32.shape)
    return x32.astype(x.dtype)


@jax.named_scope("embed")
def embed(params: Params, tokens: Array) -> Array:
    """Rows [B, T, D] of the table for tokens [B, T]."""
    # The table whole along D, or a lookup over a mesh makes every device hold the rows of the whole batch.
    table = jax.tree.map(lambda a: constrain(a, "vocab", *[None] * (a.ndim - 1)), params.embed)
    return constrain(take_rows(table, tokens), "batch", None, None)


def final_norm(params: Params, cfg: ModelConfig, x: Array) -> Array:
    """What stands between the last layer and the head."""
    return norm(x, params.final_norm, params.final_norm_bias, cfg.norm_eps)


def rope_frequencies(cfg: ModelConfig) -> np.ndarray:
    """Radians a position turns each of the H/2 pairs, with the config's scaling. float32[H/2]."""
    freq = cfg.rope_theta ** -(np.arange(0, cfg.head_dim, 2, dtype=np.float64) / cfg.head_dim)
    if cfg.rope_scaling is not None:
        freq = np.array([cfg.rope_scaling.scaled(f) for f in freq])
    return freq.astype(np.float32)


def rope_angles(cfg: ModelConfig, positions: Array) -> tuple[Array, Array]:
    """Cosine and sine [B, T, H/2] of the angles of positions [B, T]."""
    frequencies = rope_frequencies(cfg)

    def each(name, positions):
        cos_sin = kernels.angles(name, positions.astype(jnp.int32).reshape(-1), jnp.asarray(frequencies))
        return tuple(a.reshape(*positions.shape, -1) for a in cos_sin)

    def xla(positions):
        angles = positions.astype(jnp.float32)[..., None] * frequencies[None, None]
        return jnp.cos(angles), jnp.sin(angles)

    return kernels.on_cpu(positions.size, each, xla, positions)


def rope(x: Array, cos: Array, sin: Array) -> Array:
    """Rotate x [B, T, ..., H] by the angles of its positions (cos, sin: [B, T, H/2]), halves layout."""
    x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = (jnp.expand_dims(a, range(2, x.ndim - 1)) for a in (cos, sin))
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)


def attention(
    q: Array,
    k: Array,
    v: Array,
    mask: Array,
    cached: tuple[Array, Array] | None = None,
    length: Array | None = None,
    oldest: Array | None = None,
) -> Array:
    """Grouped-query attention of queries over the keys of their own call and over a cache.

    q [B, T, K, G, H]; k, v [B, K, U, H]; mask bool [1 or B, T, U]; cached k, v [B, K, S, H], valid below
    length [B], and from slot oldest [B, T] on for each query (None: from the first). Returns [B, T, N, H]. The two
    score blocks share one softmax without being joined, and the sum of values is divided last: at S = 512 on CPU
    that takes 0.65 of the time of a concatenation.
    """
    B, T, K, G, H = q.shape
    dot = partial(
        jax.lax.dot_general,
        precision=HIGHEST if q.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
    scores_of = partial(dot, dimension_numbers=(((3,), (3,)), ((0, 1), (0, 1))))
    values_of = partial(dot, dimension_numbers=(((3,), (2,)), ((0, 1), (0, 1))))

    # Rows of one kv head: its G query heads for each of the T tokens. [B, K, T*G, H]
    rows = (q * H**-0.5).transpose(0, 2, 1, 3, 4).reshape(B, K, T * G, H)
    mask = jnp.repeat(mask, G, axis=1)[:, None]
    scores = jnp.where(mask, scores_of(rows, k), MASKED)
    top = scores.max(axis=-1, keepdims=True)
    if cached is not None:
        slots = jnp.arange(cached[0].shape[2])[None, None, None]
        valid = slots < length[:, None, None, None]
        if oldest is not None:
            valid &= slots >= jnp.repeat(oldest, G, axis=1)[:, None, :, None]
        past = jnp.where(valid, scores_of(rows, cached[0].astype(q.dtype)), MASKED)
        top = jnp.maximum(top, past.max(axis=-1, keepdims=True))
    top = jax.lax.stop_gradient(top)  # it cancels out
    weights = jnp.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True)
    out = values_of(weights.astype(v.dtype), v)
    if cached is not None:
        weights = jnp.exp(past - top)
        total = total + weights.sum(axis=-1, keepdims=True)
        out = out + values_of(weights.astype(v.dtype), cached[1].astype(v.dtype))
    out = (out / total).astype(q.dtype).reshape(B, K, T, G, H)
    return out.transpose(0, 2, 1, 3, 4).reshape(B, T, K * G, H)


def attention_over_cache(
    q: Array,
    k: Array,
    v: Array,
    mask: Array,
    *,
    cached: tuple[Array, Array],
    length: Array,
    oldest: Array | None,
) -> Array:
    """`attention` in float32 [B, T, N, H], on a CPU over no more of the cache than is filled."""
    B, T, K, G, H = q.shape

    def filled(name, q, k, v, mask, cached, length, oldest):
        cached = jax.tree.map(lambda a: a.astype(q.dtype), cached)
        return kernels.attention(name, q, k, v, mask, cached, length, oldest).reshape(B, T, K * G, H)

    def xla(*args):
        return attention(*args).astype(jnp.float32)

    return kernels.on_cpu(B * T, filled, xla, q, k, v, mask, cached, length, oldest)


def causal_attention(q: Array, k: Array, v: Array, segments: Array | None, window: int | None = None) -> Array:
    """Attention of each token over itself and those before it in its segment. Shapes as in `attention`, T = U.

    Rows go in four blocks or more, each over the keys up to its end: no T x T scores exist at one time, and those
    with what comes later are never computed (0.55 of the time at T = 512 on CPU), nor those with blocks that lie
    before every query's window.
    """
    if flash.serves(q):
        return flash.attention(q, k, v, segments, window)
    T = q.shape[1]
    at = jnp.arange(T)
    size = min(max(T // 4, QUERY_BLOCK[0]), QUERY_BLOCK[1])

    def rows(start: int, end: int) -> Array:
        # Whole blocks of keys, so that the slice stays aligned.
        first = 0 if window is None else max(start - window + 1, 0) // QUERY_BLOCK[0] * QUERY_BLOCK[0]
        mask = (at[start:end, None] >= at[None, first:end])[None]
        if window is not None:
            mask &= (at[start:end, None] - at[None, first:end] < window)[None]
        if segments is not None:
            mask &= segments[:, start:end, None] == segments[:, None, first:end]
        return attend(q[:, start:end], k[:, :, first:end], v[:, :, first:end], mask)

    attend = attention if T <= size else jax.checkpoint(attention)
    blocks = [rows(start, min(start + size, T)) for start in range(0, T, size)]
    return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=1)


def block(
    cfg: ModelConfig,
    layer: Layer,
    x: Array,
    cos: Array,
    sin: Array,
    attend: Callable,
    adapter: Layer | None = None,
    last: int | None = None,
    entry: Array | None = None,
) -> tuple[Array, tuple]:
    """One decoder layer: x [B, T, D] -> (x, (k, v)) with this call's k, v [B, K, T, H].

    attend: (q, k, v) -> [B, T, N, H], who sees whom. adapter: a Layer of LowRank or None by linear map; last: see
    `adapted`. entry [B, T, ...]: what queries, keys and values are made of; None: x behind its norm.
    """
    part = lambda name: getattr(adapter, name, None)
    with jax.named_scope("attention"):
        h = norm(x, layer.attn_norm, layer.attn_norm_bias, cfg.norm_eps) if entry is None else entry
        qkv = adapted(h, layer.qkv, layer.qkv_bias, part("qkv"), last)
        qk = qkv[..., :-1, :]
        if cfg.qk_norm:
            scale = jnp.stack([layer.q_norm] * cfg.group + [layer.k_norm])
            qk = norm(qk, scale, None, cfg.norm_eps)
        qk = rope(qk, cos, sin)
        q, k, v = qk[..., :-1, :], qk[..., -1, :].transpose(0, 2, 1, 3), qkv[..., -1, :].transpose(0, 2, 1, 3)
        q, k, v = (rows.astype(layer.qkv.dtype) for rows in (q, k, v))
        a = attend(q, k, v).astype(x.dtype)
        x = x + constrain(adapted(a, layer.o, layer.o_bias, part("o"), last, in_dims=2), "batch", None, None)
    with jax.named_scope("mlp"):
        h = norm(x, layer.mlp_norm, layer.mlp_norm_bias, cfg.norm_eps)
        gate_up = adapted(h, layer.gate_up, layer.gate_up_bias, part("gate_up"), last)
        if cfg.activation == "swiglu":
            h = jax.nn.silu(gate_up[..., 0, :]) * gate_up[..., 1, :]
        else:
            h = jax.nn.gelu(gate_up, approximate=True)  # by tanh
        x = x + constrain(adapted(h, layer.down, layer.down_bias, part("down"), last), "batch", None, None)
    return x, (k, v)


def causal_mask(T: int) -> Array:
    """Each of this call's tokens sees itself and those before it. bool[T, T]"""
    return jnp.tril(jnp.ones((T, T), bool))


def forward(
    params: Params,
    cfg: ModelConfig,
    tokens: Array,
    positions: Array,
    mask: Array | None = None,
    cache: KVCache | None = None,
    *,
    segments: Array | None = None,
    adapter: tuple[Layer, ...] | Layer | DraftAdapter | None = None,
    noise_depth: np.ndarray | None = None,
    marks: tuple[Array, Array] | None = None,
    remat: str = "none",
    dtype=None,
    taps: tuple[int, ...] = (),
) -> tuple[Array, ...]:
    """Run the decoder over tokens [B, T] at positions [B, T].

    mask: which of this call's tokens each one sees, bool [T, T] or [B, T, T]; None is causal, and inside its own
    segment where `segments` int32[B, T] are given. Everything in `cache` below its length is seen as well. What
    stands cfg.sliding_window positions or more before a token is hidden from it: by `positions` where there is a
    mask or a cache, by index where there is neither. The cache is only read: the k, v [B, K, T, H] of this call come
    back, a pair for each layer (of stacked layers one pair [L, B, K, T, H]), and `write_cache` stores what is to be
    kept.
    adapter: LowRank matrices in place of a Layer's linear maps (see adapters.py). noise_depth int[T], static: 0, but 1
    to J for the last tokens, which are noise; the adapter then acts on them alone, and a DraftAdapter gives them their
    embeddings.
    marks: (embeddings [J, D], depth int32[B, T]): what enters where depth is above 0, in place of the token's.
    remat: what the backward pass of stacked layers recomputes, see TrainConfig.
    dtype: of what stands between products, the residual stream; None: that of the weights.
    taps: layers whose input is wanted too, L for what leaves the last one.

    Returns (hidden [B, T, D] after the final norm, new k, v); `unembed` turns hidden rows into logits. With taps a
    third: what enters these layers, side by side [B, T, len(taps) * D].
    Raises InputError for an argument of another shape.
    """
    keys = f"float[B, {cfg.kv_heads}, S, {cfg.head_dim}]"
    check_shapes(
        tokens=(tokens, "int[B, T]"),
        positions=(positions, "int[1 or B, T]"),
        mask=(mask, "bool[T, T]" if np.ndim(mask) == 2 else "bool[1 or B, T, T]"),
        segments=(segments, "int[B, T]"),
        **({} if cache is None else {"cache.k[0]": (cache.k[0], keys), "cache.length": (cache.length, "int[B]")}),
    )
    cos, sin = rope_angles(cfg, positions)
    x = embed(params, tokens)
    if marks is not None:
        rows, depth = marks
        x = jnp.where(depth[..., None] > 0, rows.astype(x.dtype)[jnp.maximum(depth - 1, 0)], x)
    x = x.astype(dtype or params.embed.dtype)
    last = None if noise_depth is None else int((noise_depth > 0).sum())
    if last is not None and not (noise_depth[len(noise_depth) - last :] > 0).all():
        raise ValueError(f"noise_depth {noise_depth}: noise must come last")
    if last == 0:  # nothing for it to act on
        adapter, last = None, None
    if isinstance(adapter, DraftAdapter):
        noise = adapter.noise_embed.astype(x.dtype)[noise_depth[-last:] - 1]
        x = jnp.concatenate([x[:, :-last], jnp.broadcast_to(noise, (len(x), *noise.shape))], axis=1)
        adapter = adapter.layers
    window, oldest = cfg.sliding_window, None
    if mask is None and cache is None:
        attend = partial(causal_attention, segments=segments, window=window)
    else:
        mask = causal_mask(tokens.shape[1]) if mask is None else jnp.asarray(mask)
        mask = mask if mask.ndim == 3 else mask[None]
        if window is not None:
            # Positions, not indices: those of a tree's nodes are their depths.
            oldest = jnp.broadcast_to(positions, tokens.shape) - (window - 1)
            mask &= positions[:, None, :] >= oldest[:, :, None]
        attend = partial(attention if cache is None else attention_over_cache, mask=mask)

    if isinstance(params.layers, Layer):
        if cache is not None:
            raise ValueError("stacked layers run without a cache; unstack_layers gives the form for decoding")

        def scanned(carry, of_layer):
            (x, tapped), (layer, layer_adapter, i) = carry, of_layer
            tapped = tuple(jnp.where(i == tap, x, old) for tap, old in zip(taps, tapped, strict=True))
            x, kv = block(cfg, layer, x, cos, sin, attend, layer_adapter, last)
            return (x, tapped), kv

        start, layers = (x, (x,) * len(taps)), (params.layers, adapter, jnp.arange(cfg.layers))
        (x, tapped), new = jax.lax.scan(REMAT[remat](scanned), start, layers)
        tapped = [x if tap == cfg.layers else kept for tap, kept in zip(taps, tapped, strict=True)]
        return final_norm(params, cfg, x), new, *_joined(tapped)

    new, entered = [], []
    for i, layer in enumerate(params.layers):
        entered.append(x)
        past = {} if cache is None else {"cached": (cache.k[i], cache.v[i]), "length": cache.length, "oldest": oldest}
        x, kv = block(cfg, layer, x, cos, sin, partial(attend, **past), adapter and adapter[i], last)
        new.append(kv)
    entered.append(x)
    return final_norm(params, cfg, x), tuple(new), *_joined([entered[tap] for tap in taps])


def _joined(tapped: list[Array]) -> list[Array]:
    return [jnp.concatenate(tapped, axis=-1)] if tapped else []


@jax.named_scope("unembed")
def unembed(params: Params, cfg: ModelConfig, hidden: Array) -> Array:
    """Logits [..., V] in float32 of hidden rows [..., D]."""
    check_shapes(hidden=(hidden, f"float[..., {cfg.embed}]"))
    table = params.embed if cfg.tie_embeddings else params.unembed
    return linear(hidden, table, dtype=jnp.float32)


def best_token(logits: Array) -> Array:
    """int32 [...]: the first of the largest of logits float32 [..., V]."""

    def each(name, logits):
        return kernels.best(name, logits.reshape(-1, logits.shape[-1])).reshape(logits.shape[:-1])

    def xla(logits):
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    return kernels.on_cpu(logits.size // logits.shape[-1], each, xla, logits)
