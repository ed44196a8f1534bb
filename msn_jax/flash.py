"""Attention of training on NVIDIA GPUs, by cuDNN's fused kernel: the scores of T x T tokens never reach memory."""

from __future__ import annotations

import os

import jax
import jax.numpy as jnp
from jax import Array


def serves(q: Array) -> bool:
    """Whether the kernel takes queries [B, T, K, G, H] here. MSN_JAX_FLASH=on asks for it."""
    if os.environ.get("MSN_JAX_FLASH") != "on" or jax.default_backend() != "gpu":
        return False
    return q.dtype == jnp.bfloat16 and q.shape[1] % 64 == 0 and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128


def attention(q: Array, k: Array, v: Array, segments: Array | None, window: int | None = None) -> Array:
    """The result of model.causal_attention, for the inputs that `serves` accepts."""
    B, T, K, G, H = q.shape
    same = None if segments is None else (segments[:, None, :, None] == segments[:, None, None, :])
    return jax.nn.dot_product_attention(
        q.reshape(B, T, K * G, H),
        k.transpose(0, 2, 1, 3),
        v.transpose(0, 2, 1, 3),
        mask=same,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )
