"""The part of a model that is trained: all weights, or a low-rank adapter (Hu et al. 2021) beside frozen ones. Pytrees.

An adapter is a Layer of LowRank or None by linear map: stacked ([L, ...]) in training, a tuple of layers in decoding,
as the weights themselves.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from msn_jax.config import LINEAR_MAPS, HeadsConfig, LoraConfig, NoiseConfig
from msn_jax.eagle import EagleHead, declare_eagle, init_eagle
from msn_jax.errors import InputError
from msn_jax.heads import MedusaHeads, declare_heads, init_heads
from msn_jax.linear import HIGHEST, LowRank
from msn_jax.model_config import ModelConfig
from msn_jax.params import ArraySpec, DraftAdapter, DraftLayers, Layer, Params, declare, init, stack_layers


@struct.dataclass
class Marked:
    """What is trained where noise is marked: weights, and an embedding that stands at noise in place of a token's."""

    weights: Params | Layer  # all weights, or an adapter
    noise_embed: Array  # [J, D], by depth


class Parts(NamedTuple):
    """The model as a loss uses it: what it computes with, whichever of it is trained."""

    weights: Params
    adapter: Layer | None  # of LowRank
    noise_embed: Array | None  # [J, D]
    heads: MedusaHeads | EagleHead | None = None


Trained = Params | Layer | DraftAdapter | DraftLayers | Marked | MedusaHeads | EagleHead


def declare_adapter(cfg: ModelConfig, lora: LoraConfig) -> Layer:
    """A stacked adapter with an ArraySpec for every tensor; None for maps that are not in lora.targets.

    Raises InputError for more lora.draft_layers than the model has layers.
    """
    count = lora.draft_layers or cfg.layers
    if count > cfg.layers:
        raise InputError(
            f"lora.draft_layers = {count} is not possible; accepted: up to {cfg.layers}, the model's layers"
        )
    layer = declare(dataclasses.replace(cfg, layers=count), stacked=True).layers

    def one(name: str) -> LowRank | None:
        if name not in lora.targets:
            return None
        spec = getattr(layer, name)
        outs = len(spec.shape) - spec.ins
        return LowRank(
            a=ArraySpec((count, lora.rank, *spec.shape[outs:]), (None, None, *spec.axes[outs:])),
            b=ArraySpec((*spec.shape[:outs], lora.rank), (*spec.axes[:outs], None)),
            scale=lora.alpha / lora.rank,
        )

    return Layer(attn_norm=None, mlp_norm=None, **{name: one(name) for name in LINEAR_MAPS})


def init_adapter(key: Array, cfg: ModelConfig, lora: LoraConfig) -> Layer:
    """A stacked float32 adapter that changes nothing yet: `a` normal with deviation 1/sqrt(fan in), `b` zero."""
    layer = declare_adapter(cfg, lora)

    def one(key: Array, name: str) -> LowRank | None:
        spec = getattr(layer, name)
        if spec is None:
            return None
        std = math.prod(spec.a.shape[2:]) ** -0.5
        return spec.replace(a=std * jax.random.normal(key, spec.a.shape), b=jnp.zeros(spec.b.shape))

    keys = jax.random.split(key, len(LINEAR_MAPS))
    return layer.replace(**{name: one(key, name) for key, name in zip(keys, LINEAR_MAPS, strict=True)})


def declare_trained(
    cfg: ModelConfig, lora: LoraConfig, noise: NoiseConfig, heads: HeadsConfig | None = None
) -> Trained:
    """What a run trains, with an ArraySpec for every tensor."""
    if heads and heads.kind:
        eagle = heads.kind == "eagle"
        return declare_eagle(cfg, heads.vocabulary) if eagle else declare_heads(cfg, heads.count)
    layers = declare_adapter(cfg, lora) if lora.rank else declare(cfg, stacked=True)
    embed = ArraySpec((noise.length, cfg.embed), (None, "embed"))
    return _with_embeddings(layers, embed, lora, noise)


def init_trained(
    key: Array,
    cfg: ModelConfig,
    lora: LoraConfig,
    noise: NoiseConfig,
    params: Params | None = None,
    heads: HeadsConfig | None = None,
) -> Trained:
    """What a run trains before its first step, float32. params: stacked weights to start from; None: random ones.

    Embeddings of noise are normal with deviation 0.02.
    """
    if heads and heads.kind:
        eagle = heads.kind == "eagle"
        return init_eagle(key, cfg, heads.vocabulary) if eagle else init_heads(cfg, heads.count)
    if lora.rank:
        start = init_adapter(key, cfg, lora)
    else:
        start = stack_layers(init(key, cfg)) if params is None else params
    embed = 0.02 * jax.random.normal(jax.random.fold_in(key, 1), (noise.length, cfg.embed))
    return _with_embeddings(start, embed, lora, noise)


def _with_embeddings(start: Any, embed: Any, lora: LoraConfig, noise: NoiseConfig) -> Any:
    if lora.draft_only:
        return DraftAdapter(start, embed)
    if lora.draft_layers:
        return DraftLayers(start)
    return Marked(start, embed) if noise.mark else start


def parts_of(trained: Trained, frozen: Params | None) -> Parts:
    """The model that `trained` makes, with the stacked weights `frozen` where it stands beside them."""
    match trained:
        case Marked(weights, noise_embed):
            return parts_of(weights, frozen)._replace(noise_embed=noise_embed)
        case DraftAdapter(layers, noise_embed):
            return Parts(frozen, layers, noise_embed)
        case DraftLayers(layers):
            return Parts(frozen, layers, None)
        case Layer():
            return Parts(frozen, trained, None)
        case MedusaHeads() | EagleHead():
            return Parts(frozen, None, None, trained)
    return Parts(trained, None, None)


def merge(params: Params, adapter: Layer | tuple[Layer, ...]) -> Params:
    """The weights with the adapter added to them, in the form (stacked or not) and dtype that both have."""

    def add(w: jax.Array, low_rank: LowRank) -> jax.Array:
        outs = low_rank.b.ndim - 1
        a, b = low_rank.a.astype(jnp.float32), low_rank.b.astype(jnp.float32)
        delta = jax.lax.dot_general(b, a, (((outs,), (0,)), ((), ())), precision=HIGHEST)
        return (w.astype(jnp.float32) + low_rank.scale * delta).astype(w.dtype)

    def one(layer: Layer, low: Layer) -> Layer:
        maps = {name: getattr(low, name) for name in LINEAR_MAPS if getattr(low, name) is not None}
        return layer.replace(**{name: add(getattr(layer, name), low_rank) for name, low_rank in maps.items()})

    if isinstance(params.layers, Layer):
        return params.replace(layers=jax.vmap(one)(params.layers, adapter))
    return params.replace(layers=tuple(one(layer, low) for layer, low in zip(params.layers, adapter, strict=True)))
