"""The parameters of a decoder, each tensor declared once: initialisation, sharding and import follow from that.

Shape key: D embed, N query heads, K kv heads, G = N/K, H head_dim, F mlp, V vocab, L layers.

Weights are stored [out, in], as Hugging Face stores them, but q, k and v are one matrix, and so are gate and up:
at one token a pass on CPU that takes 0.9 of the time.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array
from jax.sharding import Mesh

from msn_jax.linear import Int8Weight, round_int8
from msn_jax.model_config import ModelConfig
from msn_jax.sharding import sharding


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """One tensor: its shape, logical axes (None: never split), and how it starts."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: str = "normal"  # normal, zeros, ones
    ins: int = 1  # how many last axes are its input; only what multiplies has some, which starts as normal


@struct.dataclass
class Layer:
    attn_norm: Array  # [D]
    qkv: Array  # [K, G+2, H, D]: by kv head its query heads, its key, its value, so that it splits over K
    o: Array  # [D, N, H]
    mlp_norm: Array  # [D]
    gate_up: Array  # [2, F, D]; without a gate [F, D]
    down: Array  # [D, F]
    # What only some families have; None elsewhere.
    attn_norm_bias: Array | None = None  # [D]
    qkv_bias: Array | None = None  # [K, G+2, H]
    q_norm: Array | None = None  # [H]
    k_norm: Array | None = None  # [H]
    o_bias: Array | None = None  # [D]
    mlp_norm_bias: Array | None = None  # [D]
    gate_up_bias: Array | None = None  # [2, F] or [F]
    down_bias: Array | None = None  # [D]


@struct.dataclass
class Params:
    embed: Array  # [V, D]
    # To decode, a tuple of L layers: a scan over stacked weights would copy each layer's on CPU. To train, one Layer of
    # arrays [L, ...]: the program does not grow with the depth, and each layer's activations can be recomputed.
    layers: tuple[Layer, ...] | Layer
    final_norm: Array  # [D]
    unembed: Array | None  # [V, D]; None where it is tied to embed
    final_norm_bias: Array | None = None  # [D]


@struct.dataclass
class DraftAdapter:
    """An adapter for noise positions alone: everywhere else the model stays what it is, to the last bit."""

    layers: tuple[Layer, ...] | Layer  # of LowRank
    noise_embed: Array  # [J, D]: what enters at noise of depth 1..J, in place of a token's embedding


@struct.dataclass
class DraftLayers:
    """An adapter of the first layers alone, which with the model's norm and head become a smaller one that drafts."""

    layers: Layer  # of LowRank, stacked: as many as draft


def declare(cfg: ModelConfig, stacked: bool = False) -> Params:
    """Params with an ArraySpec for every tensor; stacked as for training, or one Layer after the other."""
    D, N, K, H, F, V = cfg.embed, cfg.heads, cfg.kv_heads, cfg.head_dim, cfg.mlp, cfg.vocab_size
    maps, split = ((2,), (None,)) if cfg.activation == "swiglu" else ((), ())  # gate and up, or up alone
    scale, head_scale = ArraySpec((D,), (None,), "ones"), ArraySpec((H,), (None,), "ones")
    bias = lambda wanted, shape=(D,), axes=(None,): ArraySpec(shape, axes, "zeros") if wanted else None
    layer = Layer(
        attn_norm=scale,
        qkv=ArraySpec((K, cfg.group + 2, H, D), ("kv_heads", None, None, "embed")),
        o=ArraySpec((D, N, H), ("embed", "heads", None), ins=2),
        mlp_norm=scale,
        gate_up=ArraySpec((*maps, F, D), (*split, "mlp", "embed")),
        down=ArraySpec((D, F), ("embed", "mlp")),
        attn_norm_bias=bias(cfg.norm == "layer"),
        qkv_bias=bias(cfg.qkv_bias, (K, cfg.group + 2, H), ("kv_heads", None, None)),
        q_norm=head_scale if cfg.qk_norm else None,
        k_norm=head_scale if cfg.qk_norm else None,
        o_bias=bias(cfg.o_bias),
        mlp_norm_bias=bias(cfg.norm == "layer"),
        gate_up_bias=bias(cfg.mlp_bias, (*maps, F), (*split, "mlp")),
        down_bias=bias(cfg.mlp_bias),
    )
    vocab = ArraySpec((V, D), ("vocab", "embed"))
    stack = lambda s: dataclasses.replace(s, shape=(cfg.layers, *s.shape), axes=(None, *s.axes))
    return Params(
        embed=vocab,
        layers=jax.tree.map(stack, layer) if stacked else (layer,) * cfg.layers,
        final_norm=scale,
        unembed=None if cfg.tie_embeddings else vocab,
        final_norm_bias=bias(cfg.norm == "layer"),
    )


def shaped(specs, mesh: Mesh, dtype):
    """ShapeDtypeStructs, placed on the mesh, for a tree of ArraySpecs; for int8 see `round_params`."""

    def one(shape, axes, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding(axes, shape, mesh))

    def weight(s: ArraySpec):
        if jnp.dtype(dtype) != jnp.int8:
            return one(s.shape, s.axes, dtype)
        if s.init != "normal":
            return one(s.shape, s.axes, jnp.float32)
        outs = len(s.shape) - s.ins
        return Int8Weight(one(s.shape, s.axes, dtype), one(s.shape[:outs], s.axes[:outs], jnp.float32))

    return jax.tree.map(weight, specs)


def round_params(params: Params, specs: Params) -> Params:
    """Every weight that multiplies as an Int8Weight, the others in float32. specs: see `declare`."""
    rounded = jax.jit(round_int8, static_argnums=1)
    one = lambda w, spec: rounded(w, spec.ins) if spec.init == "normal" else w.astype(jnp.float32)
    return jax.tree.map(one, params, specs)


def parameter_count(specs) -> int:
    """Numbers in a tree of ArraySpecs, or of anything with a shape."""
    return sum(math.prod(s.shape) for s in jax.tree.leaves(specs))


def init(key: Array, cfg: ModelConfig, dtype=jnp.float32) -> Params:
    """Random weights: norms at one, biases at zero, the rest normal with standard deviation 1/sqrt(fan in)."""
    leaves, treedef = jax.tree.flatten(declare(cfg))

    def one(key, spec: ArraySpec):
        if spec.init != "normal":
            return jnp.full(spec.shape, spec.init == "ones", dtype)
        std = 1 / math.sqrt(math.prod(spec.shape) / spec.shape[0] if spec.axes[0] == "embed" else cfg.embed)
        return (std * jax.random.normal(key, spec.shape)).astype(dtype)

    return jax.tree.unflatten(treedef, [one(k, s) for k, s in zip(jax.random.split(key, len(leaves)), leaves)])


def stack_layers(params: Params) -> Params:
    """The form for training; each array [L, ...]."""
    return params.replace(layers=jax.tree.map(lambda *arrays: jnp.stack(arrays), *params.layers))


def unstack_layers(params: Params) -> Params:
    """The form for decoding: a tuple of layers."""
    return params.replace(layers=unstack(params.layers))


def unstack(layers: Layer) -> tuple[Layer, ...]:
    """One Layer of arrays [L, ...], weights or an adapter, as L of them."""
    fields, treedef = jax.tree.flatten(layers)
    return tuple(jax.tree.unflatten(treedef, layer) for layer in zip(*map(list, fields), strict=True))
