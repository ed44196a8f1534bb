"""The products of the model, each the fast form of its backend and number of rows, and what an adapter adds to them."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

LEFT_ROWS = 256  # rows up to which the weight stands on the left on CPU
HIGHEST = jax.lax.Precision.HIGHEST  # float32 means float32: TPUs and GPUs would round operands otherwise


@struct.dataclass
class LowRank:
    """What an adapter adds to a linear map: scale * b @ a @ x (Hu et al. 2021)."""

    a: Array  # [r, *in]
    b: Array  # [*out, r]
    scale: float = struct.field(pytree_node=False)


def activation_dtype(dtype, backend: str):
    """What decoding computes in between products of `dtype`. XLA:CPU has fast products of bfloat16 only with float32
    results, and computes all else in float32 anyway."""
    return jnp.dtype("float32" if backend == "cpu" else dtype)


def linear(x: Array, w: Array, in_dims: int = 1, dtype=None) -> Array:
    """x [..., *in] times w [*out, *in] -> [..., *out] in `dtype` (None: x's), contracting the last `in_dims` axes.

    The product is one of w's dtype: activations in float32 are rounded for weights in bfloat16.
    """
    product = _product if x.dtype == w.dtype else _rounded
    return product(x, w, in_dims, dtype or x.dtype)


def _product(x: Array, w: Array, in_dims: int, dtype) -> Array:
    rows, outs = x.ndim - in_dims, w.ndim - in_dims
    x_ins, w_ins = tuple(range(rows, x.ndim)), tuple(range(outs, w.ndim))
    precision = HIGHEST if w.dtype == jnp.float32 else None

    def weight_right(x, w):
        return jax.lax.dot_general(x.astype(w.dtype), w, ((x_ins, w_ins), ((), ())), precision, dtype)

    def weight_left(x, w):
        count = math.prod(x.shape[:rows])
        flat = x.astype(w.dtype).reshape(count, *x.shape[rows:])
        flat = jnp.pad(flat, ((0, _fast_rows(count, w.dtype) - count),) + ((0, 0),) * in_dims)
        y = jax.lax.dot_general(w, flat, ((w_ins, tuple(range(1, flat.ndim))), ((), ())), precision, dtype)
        y = jax.lax.optimization_barrier(y)  # or XLA turns the dot around again to spare the transpose
        return jnp.moveaxis(y[..., :count], -1, 0).reshape(*x.shape[:rows], *w.shape[:outs])

    # XLA:CPU repacks the right operand of a dot on each call, or transposes it first: over SmolLM2's matrices the
    # weight on the left takes 0.58 of the time at 8 rows, a prefill of 64 half (LOG.md).
    if math.prod(x.shape[:rows]) > LEFT_ROWS:
        return weight_right(x, w)
    return jax.lax.platform_dependent(x, w, cpu=weight_left, default=weight_right)


def _fast_rows(count: int, dtype) -> int:
    """The least number of rows, `count` or more, that XLA:CPU multiplies with no loss.

    Its products come in tiles of 8 and of 16 rows: in float32 13 take 1.3 of the time of 16, and 6 take 1.2 of 8. For
    one row of bfloat16 it widens the whole matrix first, which takes five times as long as two.
    """
    if count <= 4:
        return 2 if count == 1 and dtype == jnp.bfloat16 else count
    return 8 if count <= 8 else -(-count // 16) * 16


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _rounded(x: Array, w: Array, in_dims: int, dtype) -> Array:
    """`_product` of float32 rows; its gradients too are products in w's dtype, which autodiff would widen."""
    return _product(x, w, in_dims, dtype)


def _rounded_forward(x, w, in_dims, dtype):
    x = x.astype(w.dtype)
    return _product(x, w, in_dims, dtype), (x, w)


def _rounded_backward(in_dims, dtype, saved, y_bar):
    x, w = saved
    y_bar, rows, outs = y_bar.astype(w.dtype), tuple(range(x.ndim - in_dims)), w.ndim - in_dims
    over_out = tuple(range(len(rows), y_bar.ndim)), tuple(range(outs))
    x_bar = jax.lax.dot_general(y_bar, w, (over_out, ((), ())), preferred_element_type=jnp.float32)
    w_bar = jax.lax.dot_general(y_bar, x, ((rows, rows), ((), ())), preferred_element_type=jnp.float32)
    return x_bar, w_bar.astype(w.dtype)


_rounded.defvjp(_rounded_forward, _rounded_backward)


def adapted(
    x: Array, w: Array, bias: Array | None, low_rank: LowRank | None, last: int | None, in_dims: int = 1
) -> Array:
    """`linear` with its bias, and with what an adapter adds to the `last` of T tokens (None: to all)."""
    y = linear(x, w, in_dims)
    if bias is not None:
        y = y + jnp.broadcast_to(bias.astype(y.dtype), y.shape)
    if low_rank is None:
        return y
    x = x if last is None else x[:, -last:]
    hidden = linear(x, low_rank.a.astype(w.dtype), in_dims) * jnp.asarray(low_rank.scale, x.dtype)
    delta = linear(hidden, low_rank.b.astype(w.dtype))
    return y + jnp.pad(delta, ((0, 0), (y.shape[1] - delta.shape[1], 0)) + ((0, 0),) * (y.ndim - 2))
