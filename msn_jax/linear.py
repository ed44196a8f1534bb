"""The products of the model, each the fast form of its backend and number of rows, and what an adapter adds to them."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from msn_jax import kernels

LEFT_ROWS = 256  # up to so many rows XLA:CPU gets a float32 weight as the left operand
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


@struct.dataclass
class Int8Weight:
    """A weight rounded to int8, a scale for each of its outputs.

    XLA multiplies it as bfloat16, in which it is exact; the custom calls with integers of 14 bits, see kernels.product.
    """

    values: Array  # int8[*out, *in]
    scale: Array  # float32[*out]

    dtype = jnp.dtype(jnp.bfloat16)
    shape = property(lambda self: self.values.shape)
    ndim = property(lambda self: self.values.ndim)


def round_int8(w, in_dims: int) -> Int8Weight:
    """w [*out, *in], of NumPy or JAX, by the scale of each output's largest weight."""
    xp = w.__array_namespace__()
    w = w.astype(jnp.float32)
    ins = tuple(range(w.ndim - in_dims, w.ndim))
    largest = xp.max(xp.abs(w), axis=ins, keepdims=True)
    scale = xp.where(largest == 0, xp.ones_like(largest), largest / 127)  # nan and infinity stay, to be found
    return Int8Weight(xp.round(w / scale).astype(jnp.int8), xp.squeeze(scale, axis=ins))


def widened(w: Array | Int8Weight) -> Array:
    """w as an array; an Int8Weight in float32."""
    if not isinstance(w, Int8Weight):
        return w
    ins = tuple(range(w.scale.ndim, w.ndim))
    return w.values.astype(jnp.float32) * jnp.expand_dims(w.scale, ins)


def take_rows(w: Array | Int8Weight, rows: Array) -> Array:
    """Rows of a table w [V, D]; those of an Int8Weight in float32."""
    if isinstance(w, Int8Weight):
        return w.values[rows].astype(jnp.float32) * w.scale[rows][..., None]
    return _taken(w, rows) if w.dtype == jnp.bfloat16 else w[rows]


@jax.custom_vjp
def _taken(w: Array, rows: Array) -> Array:
    """w[rows], of bfloat16. XLA:CPU would widen the whole table first, each time that a program is called."""

    def as_integers(w, rows):
        return jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(w, jnp.uint16)[rows], w.dtype)

    return jax.lax.platform_dependent(w, rows, cpu=as_integers, default=lambda w, rows: w[rows])


def _taken_backward(saved, y_bar):
    w, rows = saved
    return jax.vjp(lambda w: w[rows], w)[1](y_bar)[0], None


_taken.defvjp(lambda w, rows: (_taken(w, rows), (w, rows)), _taken_backward)


def linear(x: Array, w: Array | Int8Weight, in_dims: int = 1, dtype=None) -> Array:
    """x [..., *in] times w [*out, *in] -> [..., *out] in `dtype` (None: x's), contracting the last `in_dims` axes.

    The product is one of w's dtype: activations in float32 are rounded for weights in bfloat16 or int8.
    """
    product = _product if x.dtype == w.dtype or isinstance(w, Int8Weight) else _rounded
    return product(x, w, in_dims, dtype or x.dtype)


def _product(x: Array, w: Array | Int8Weight, in_dims: int, dtype) -> Array:
    of = partial(_narrow, in_dims=in_dims, dtype=dtype), partial(_xla_product, in_dims=in_dims, dtype=dtype)
    return kernels.on_cpu(math.prod(x.shape[: x.ndim - in_dims]), *of, x, w)


def _narrow(name: str, x: Array, w: Array | Int8Weight, in_dims: int, dtype, **low_rank) -> Array:
    rows, outs = x.shape[: x.ndim - in_dims], w.shape[: w.ndim - in_dims]
    values, scale = (w.values, w.scale.reshape(-1)) if isinstance(w, Int8Weight) else (w, None)
    flat = x.astype(jnp.float32).reshape(math.prod(rows), -1)
    y = kernels.product(name, flat, values.reshape(math.prod(outs), -1), scale, **low_rank)
    return y.reshape(*rows, *outs).astype(dtype)


def _xla_product(x: Array, w: Array | Int8Weight, in_dims: int, dtype) -> Array:
    if isinstance(w, Int8Weight):
        y = _xla_product(x, w.values.astype(w.dtype), in_dims, jnp.float32)
        return (y * jnp.broadcast_to(w.scale, y.shape)).astype(dtype)
    rows, outs = x.ndim - in_dims, w.ndim - in_dims
    x_ins, w_ins = tuple(range(rows, x.ndim)), tuple(range(outs, w.ndim))
    precision = HIGHEST if w.dtype == jnp.float32 else None
    count = math.prod(x.shape[:rows])
    wide = jnp.float32 if w.dtype == jnp.float32 else dtype  # cuBLAS makes no narrow products of wide factors

    def weight_right(x, w):
        return jax.lax.dot_general(x.astype(w.dtype), w, ((x_ins, w_ins), ((), ())), precision, wide).astype(dtype)

    def two_rows(x, w):
        # For one row of bfloat16 XLA:CPU widens the whole matrix first, which takes five times as long as two. XLA:TPU
        # leaves one row to the vector unit, by its own estimates at six times the cycles of two on the matrix unit.
        flat = x.reshape(1, *x.shape[rows:])
        pair = _xla_product(jnp.concatenate([flat, flat]), w, in_dims, dtype)
        return pair[0].reshape(*x.shape[:rows], *w.shape[:outs])

    def weight_left(x, w):
        flat = x.reshape(count, *x.shape[rows:])
        flat = jnp.pad(flat, ((0, _fast_rows(count) - count),) + ((0, 0),) * in_dims)
        y = jax.lax.dot_general(w, flat, ((w_ins, tuple(range(1, flat.ndim))), ((), ())), precision, wide)
        y = jax.lax.optimization_barrier(y).astype(dtype)  # or XLA turns the dot around again to spare the transpose
        return jnp.moveaxis(y[..., :count], -1, 0).reshape(*x.shape[:rows], *w.shape[:outs])

    # XLA:CPU repacks the right operand of a float32 dot on each call, or transposes it first: over SmolLM2's matrices
    # the weight on the left takes 0.58 of the time at 8 rows, a prefill of 64 half (LOG.md).
    if count > LEFT_ROWS:
        return weight_right(x, w)
    if w.dtype == jnp.float32:
        on_cpu = weight_left
    else:
        on_cpu = two_rows if count == 1 else weight_right
    on_tpu = two_rows if count == 1 and w.dtype != jnp.float32 else weight_right
    return jax.lax.platform_dependent(x, w, cpu=on_cpu, tpu=on_tpu, default=weight_right)


def _fast_rows(count: int) -> int:
    """The least number of rows, `count` or more, that XLA:CPU multiplies with no loss in float32.

    Its products come in tiles of 8 and of 16 rows: 13 take 1.3 of the time of 16, and 6 take 1.2 of 8.
    """
    if count <= 4:
        return count
    return 8 if count <= 8 else -(-count // 16) * 16


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _rounded(x: Array, w: Array, in_dims: int, dtype) -> Array:
    """`_product` of float32 rows; its gradients too are products in w's dtype, which autodiff would widen."""
    return _product(x, w, in_dims, dtype)


def _rounded_forward(x, w, in_dims, dtype):
    x = x.astype(w.dtype)
    return _xla_product(x, w, in_dims, dtype), (x, w)


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
    """`linear` with its bias, and with what an adapter adds to the `last` of T tokens (None: to all).

    x [B, T, *in].
    """
    if low_rank is None:
        y = linear(x, w, in_dims)
    elif last is None:
        y = _low_rank_added(x, w, low_rank, x.shape[1], in_dims)
    else:
        fused = partial(_fused, last=last, in_dims=in_dims)
        apart = partial(_low_rank_added, last=last, in_dims=in_dims)
        y = kernels.on_cpu(x.shape[0] * x.shape[1], fused, apart, x, w, low_rank)
    return y if bias is None else y + jnp.broadcast_to(bias.astype(y.dtype), y.shape)


def _low_rank_added(x: Array, w: Array, low_rank: LowRank, last: int, in_dims: int) -> Array:
    y, x = linear(x, w, in_dims), x[:, -last:]
    hidden = linear(x, low_rank.a.astype(w.dtype), in_dims) * jnp.asarray(low_rank.scale, x.dtype)
    delta = linear(hidden, low_rank.b.astype(w.dtype))
    return y + jnp.pad(delta, ((0, 0), (y.shape[1] - last, 0)) + ((0, 0),) * (y.ndim - 2))


def _fused(name: str, x: Array, w: Array, low_rank: LowRank, last: int, in_dims: int) -> Array:
    """`_low_rank_added` in one call."""
    a, b = low_rank.a.astype(w.dtype), low_rank.b.astype(w.dtype)
    matrices = a.reshape(len(a), -1), b.reshape(-1, len(a)), low_rank.scale
    return _narrow(name, x, w, in_dims, x.dtype, low_rank=matrices, last=last, tokens=x.shape[1])
