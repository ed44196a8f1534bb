"""The one-layer head of EAGLE-3 (Li et al. 2025), which drafts from what the model made of each token, as pytrees.

Entry t of a head joins the token at t + 1 with the model's features of the token at t, and predicts the token at t + 2.
The head's own output takes the place of features where the model has not been yet: under drafts.

Shape key as in params.py, and U: tokens of the draft vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from msn_jax.linear import Int8Weight, linear, take_rows
from msn_jax.model import block, norm, rope_angles
from msn_jax.model_config import ModelConfig
from msn_jax.params import ArraySpec, Layer, Params, declare


@struct.dataclass
class EagleHead:
    """What is trained. Behind it stand the model's final norm and the rows of its head for the draft vocabulary, both
    frozen. (Published heads have a norm and rows of their own.)"""

    fc: Array  # [D, 3D]: features to the residual stream of the one layer
    token_norm: Array  # [D]: of the token's embedding
    attn_norm: Array  # [D]: of the residual stream
    qkv: Array  # [K, G+2, H, 2D]: reads both, side by side
    o: Array  # [D, N, H]
    mlp_norm: Array  # [D]
    gate_up: Array  # [2, F, D]
    down: Array  # [D, F]
    # Ids of the tokens that it may draft, [U]. In training float32, as all that an optimiser holds; no gradient reaches
    # them, and they stay to the last bit.
    vocabulary: Array

    @property
    def layer(self) -> Layer:
        return Layer(self.attn_norm, self.qkv, self.o, self.mlp_norm, self.gate_up, self.down)

    @property
    def ids(self) -> Array:
        """int32[U]"""
        return jax.lax.stop_gradient(self.vocabulary).astype(jnp.int32)

    def cast(self, dtype) -> EagleHead:
        """The same with all weights in another dtype, and ids as int32."""
        return jax.tree.map(lambda w: w.astype(dtype), self).replace(vocabulary=self.ids)


@struct.dataclass
class EagleDrafter:
    """A head as it decodes."""

    head: EagleHead
    rows: Array | Int8Weight  # [U, D]: of the model's head


def taps(cfg: ModelConfig) -> tuple[int, int, int]:
    """The features of a token are what enters these layers of the model (L: what leaves the last): early, middle, late.

    They are those of EAGLE-3; a model of few layers has some twice.
    """
    return tuple(min(max(i, 1), cfg.layers) for i in (2, cfg.layers // 2, cfg.layers - 3))


def layer_config(cfg: ModelConfig) -> ModelConfig:
    """Of the head's one layer: LLaMA's, in the model's sizes."""
    plain = dict(norm="rms", activation="swiglu", qkv_bias=False, o_bias=False, mlp_bias=False, qk_norm=False)
    return dataclasses.replace(cfg, layers=1, sliding_window=None, **plain)


def declare_eagle(cfg: ModelConfig, vocabulary: int) -> EagleHead:
    """A head with an ArraySpec for every tensor."""
    layer = declare(layer_config(cfg)).layers[0]
    maps = {name: getattr(layer, name) for name in ("attn_norm", "o", "mlp_norm", "gate_up", "down")}
    return EagleHead(
        fc=ArraySpec((cfg.embed, 3 * cfg.embed), (None, "embed")),
        token_norm=layer.attn_norm,
        qkv=dataclasses.replace(layer.qkv, shape=(*layer.qkv.shape[:-1], 2 * cfg.embed)),
        vocabulary=ArraySpec((min(vocabulary, cfg.vocab_size),), (None,), "zeros"),
        **maps,
    )


def init_eagle(key: Array, cfg: ModelConfig, vocabulary: int) -> EagleHead:
    """A float32 head whose layer hands on the last of the features as they are. Its vocabulary: the first ids."""
    specs = declare_eagle(cfg, vocabulary)
    keys = dict(zip(("qkv", "gate_up"), jax.random.split(key)))
    random = {
        name: getattr(specs, name).shape[-1] ** -0.5 * jax.random.normal(keys[name], getattr(specs, name).shape)
        for name in keys
    }
    D = cfg.embed
    return EagleHead(
        fc=jnp.concatenate([jnp.zeros((D, 2 * D)), jnp.eye(D)], axis=1),
        o=jnp.zeros(specs.o.shape),
        down=jnp.zeros(specs.down.shape),
        vocabulary=jnp.arange(specs.vocabulary.shape[0], dtype=jnp.float32),
        **{name: jnp.ones(D) for name in ("token_norm", "attn_norm", "mlp_norm")},
        **random,
    )


def usual_tokens(replies: list[np.ndarray], vocab_size: int, count: int) -> np.ndarray:
    """The `count` ids that are most frequent in replies, int[n] each, in ascending order. float32[count]"""
    often = sum(np.bincount(reply, minlength=vocab_size) for reply in replies)
    return np.sort(np.argsort(-often, kind="stable")[:count]).astype(np.float32)


def with_vocabulary(head: EagleHead, replies: list[np.ndarray], vocab_size: int) -> EagleHead:
    """The head that drafts the most frequent tokens of replies, int[n] each."""
    old = head.vocabulary
    return head.replace(vocabulary=jax.device_put(usual_tokens(replies, vocab_size, len(old)), old.sharding))


def drafter_of(head: EagleHead, params: Params, cfg: ModelConfig, dtype) -> EagleDrafter:
    """A head as it decodes with a model."""
    head = jax.tree.map(jnp.asarray, head).cast(dtype)
    return EagleDrafter(head, rows_of(params, cfg, head.ids))


def rows_of(params: Params, cfg: ModelConfig, ids: Array) -> Array | Int8Weight:
    """Rows [U, D] of the model's head."""
    table = params.embed if cfg.tie_embeddings else params.unembed
    return jax.tree.map(lambda a: a[ids], table) if isinstance(table, Int8Weight) else take_rows(table, ids)


def joined(head: EagleHead, cfg: ModelConfig, features: Array) -> Array:
    """The residual stream [B, T, D] that features [B, T, 3D] begin, each of the three behind a norm without a scale.

    Published heads take them as they are; with it the layer's own part counts from the first steps on.
    """
    parts = features.reshape(*features.shape[:-1], 3, cfg.embed)
    scale = jnp.ones(cfg.embed, features.dtype)
    return linear(norm(parts, scale, None, cfg.norm_eps).reshape(features.shape), head.fc)


def run_eagle(
    head: EagleHead, cfg: ModelConfig, tokens: Array, x: Array, positions: Array, attend: Callable
) -> tuple[Array, tuple[Array, Array]]:
    """One pass of the head's layer: (what it makes of each entry [B, T, D], its keys and values [B, K, T, H]).

    tokens [B, T, D]: the model's embeddings; x [B, T, D]: `joined` features, or the output of the entry above;
    positions int32[B, T]; attend: see model.block. The head was cast to the dtype of products.
    """
    own = layer_config(cfg)
    entry = [norm(rows, scale, None, cfg.norm_eps) for rows, scale in ((tokens, head.token_norm), (x, head.attn_norm))]
    return block(own, head.layer, x, *rope_angles(own, positions), attend, entry=jnp.concatenate(entry, axis=-1))
