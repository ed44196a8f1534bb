"""The keys and values of the tokens so far.

Shape key: B batch, S cache slots, E tokens to store, K kv heads, H head_dim, L layers.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from msn_jax import kernels
from msn_jax.model_config import ModelConfig
from msn_jax.params import ArraySpec
from msn_jax.sharding import constrain


@struct.dataclass
class KVCache:
    """Keys (after rope) and values of the tokens so far. Slot i of a row holds its token at position i."""

    k: tuple[Array, ...]  # L arrays of [B, K, S, H]
    v: tuple[Array, ...]  # L arrays of [B, K, S, H]
    length: Array  # int32[B]: slots at and above it are unspecified and never read
    # What entered the layers `taps` at each token (see model.forward), where a source of drafts reads it; F their sum.
    features: Array | None = None  # [B, 1, S, F]
    taps: tuple[int, ...] = struct.field(default=(), pytree_node=False)


def cache_spec(cfg: ModelConfig, batch: int, slots: int) -> KVCache:
    """KVCache with an ArraySpec for every array."""
    kv = ArraySpec((batch, cfg.kv_heads, slots, cfg.head_dim), ("batch", "kv_heads", None, None))
    return KVCache(k=(kv,) * cfg.layers, v=(kv,) * cfg.layers, length=ArraySpec((batch,), ("batch",)))


def init_cache(cfg: ModelConfig, batch: int, slots: int, dtype=jnp.float32, taps: tuple[int, ...] = ()) -> KVCache:
    """An empty cache. taps: layers whose inputs it keeps too."""
    shape = (batch, cfg.kv_heads, slots, cfg.head_dim)
    kv = lambda: tuple(constrain(jnp.zeros(shape, dtype), "batch", "kv_heads", None, None) for _ in range(cfg.layers))
    features = None
    if taps:
        features = constrain(jnp.zeros((batch, 1, slots, len(taps) * cfg.embed), dtype), "batch", None, None, None)
    return KVCache(k=kv(), v=kv(), length=jnp.zeros(batch, jnp.int32), features=features, taps=taps)


def write_cache(
    cache: KVCache, new: tuple[tuple[Array, Array], ...], length: Array, features: Array | None = None
) -> KVCache:
    """Store `new` (per layer k, v [B, K, E, H]) and features [B, E, F] at slots length[b] .. length[b] + E - 1; lengths
    stay.

    The slots must exist: an update that would pass the end is moved back by XLA, over earlier tokens.
    """

    def write(old, kv, length):
        if old.shape[0] == 1:
            return jax.lax.dynamic_update_slice(old, kv, (0, 0, length[0], 0))
        return jax.vmap(lambda o, n, at: jax.lax.dynamic_update_slice(o, n, (0, at, 0)))(old, kv, length)

    def write_bits(old, kv, length):
        # XLA:CPU would widen a whole cache of bfloat16 for it, and round it again.
        bits = partial(jax.lax.bitcast_convert_type, new_dtype=jnp.uint16)
        return jax.lax.bitcast_convert_type(write(bits(old), bits(kv), length), jnp.bfloat16)

    def xla(old, kv, length):
        # On a CPU it copies the whole of a cache in bfloat16, where the custom call writes what is new.
        on_cpu = write_bits if old.dtype == jnp.bfloat16 else write
        return jax.lax.platform_dependent(old, kv, length, cpu=on_cpu, default=write)

    def store(old, kv):
        rows = kv.shape[0] * kv.shape[2]
        return kernels.on_cpu(rows, kernels.store_rows, xla, old, kv.astype(old.dtype), length)

    k, v = zip(*new, strict=True)
    kept = cache.features if features is None else store(cache.features, features[:, None])
    return cache.replace(k=jax.tree.map(store, cache.k, k), v=jax.tree.map(store, cache.v, v), features=kept)


def waiting_for(value: Array, slots: Array) -> Array:
    """`slots` int32[B], which XLA can compute only after `value` [B]: something the pass makes last.

    A write into these slots then comes after the pass has read the cache to its end, and goes into the cache's own
    memory. Without it XLA may order the write first, and copies the cache of every layer. An optimisation barrier
    does not help: XLA removes it before it decides on copies.
    """
    number = value.astype(jnp.float32)
    return slots + (number != number).astype(jnp.int32)  # no number differs from itself, but XLA cannot rule out nan
