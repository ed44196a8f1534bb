"""Heads that draft from the last hidden state, in the form of Medusa (Cai et al. 2024), as pytrees.

Shape key: K heads, D embed.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from msn_jax.linear import linear
from msn_jax.model_config import ModelConfig
from msn_jax.params import ArraySpec


@struct.dataclass
class MedusaHeads:
    """Head k predicts, from the hidden state of a token, the one k + 2 places on: the model's own head has the next.

    Its hidden state is h + silu(W_k h + b_k), from which the model's own head, frozen, makes logits. (Published heads
    each have a copy of that head, which is trained too.)
    """

    weight: Array  # [K, D, D]
    bias: Array  # [K, D]


def declare_heads(cfg: ModelConfig, count: int) -> MedusaHeads:
    """Heads with an ArraySpec for every tensor."""
    return MedusaHeads(
        weight=ArraySpec((count, cfg.embed, cfg.embed), (None, None, "embed"), "zeros"),
        bias=ArraySpec((count, cfg.embed), (None, None), "zeros"),
    )


def init_heads(cfg: ModelConfig, count: int) -> MedusaHeads:
    """Float32 heads that say what the model's own head says."""
    return jax.tree.map(lambda spec: jnp.zeros(spec.shape), declare_heads(cfg, count))


def ahead(heads: MedusaHeads, hidden: Array) -> Array:
    """The hidden states [..., K, D] of the heads, of hidden [..., D] after the final norm."""
    added = linear(hidden, heads.weight)
    return hidden[..., None, :] + jax.nn.silu(added + jnp.broadcast_to(heads.bias, added.shape).astype(added.dtype))
