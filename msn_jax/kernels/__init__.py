"""Custom calls for the passes of decoding on a CPU, in C++, each beside the XLA form that it stands for.

They are faster there than what XLA makes of the same maths for a few rows, and add every sum in one order: not a bit
of a token's hidden state depends on how many tokens its pass had, nor on the batch. What XLA computes stays: on other
devices, on several CPU devices, in gradients, and where no library was built. MSN_JAX_KERNELS=off turns the custom
calls off, and MSN_JAX_KERNELS=avx2 (or another of INSTRUCTION_SETS) forces one form of them.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.custom_derivatives import SymbolicZero

from msn_jax.errors import InputError

VARIABLE = "MSN_JAX_KERNELS"
INSTRUCTION_SETS = ("avx512bf16", "avx512", "avx2", "portable")  # each processor that has one has those after it
CALLS = ("product", "attention", "norm", "angles", "best", "store_rows")
MAX_ROWS = 2048  # rows of a pass, batch times tokens: more are training's, or as fast in XLA's forms


def instruction_set() -> str | None:
    """The form of the custom calls that programs traced now will use; None: XLA's own forms.

    Raises InputError where MSN_JAX_KERNELS asks for what there is not.
    """
    return _choose(os.environ.get(VARIABLE, ""))[0]


def describe() -> str:
    """What runs on the CPU, in a few words."""
    name, why_not = _choose(os.environ.get(VARIABLE, ""))
    return f"C++ kernels for {name}" if name else f"XLA, no C++ kernels ({why_not})"


def available() -> tuple[str, ...]:
    """The instruction sets of this machine that are built, the fastest first."""
    portable = _library("portable")
    if portable is None:
        return ()
    portable.msn_jax_machine.restype = ctypes.c_char_p
    machine = portable.msn_jax_machine().decode()
    return tuple(name for name in INSTRUCTION_SETS[INSTRUCTION_SETS.index(machine) :] if _library(name))


@cache
def _choose(wanted: str) -> tuple[str | None, str]:
    """(instruction set, "") or (None, why none runs)."""
    if wanted not in ("", "off", *INSTRUCTION_SETS):
        raise InputError(f"{VARIABLE}={wanted}: accepted: off, {', '.join(INSTRUCTION_SETS)}")
    if wanted == "off":
        return None, f"{VARIABLE}=off"
    there = available()
    if wanted and wanted not in there:
        accepted = ", ".join(("off", *there))
        raise InputError(f"{VARIABLE}={wanted}: not built, or not of this machine; accepted: {accepted}")
    if not there:
        why = "not built for this jax, or not from these sources"
        return None, f"{why}: python -m msn_jax.kernels.build does it, with a C++ compiler"
    try:
        devices = jax.local_device_count("cpu")
    except RuntimeError:  # JAX_PLATFORMS names others
        return None, "no CPU device"
    if devices > 1:
        return None, "several CPU devices"
    name = wanted or there[0]
    for call in CALLS:
        function = getattr(_library(name), f"msn_jax_{call}")
        jax.ffi.register_ffi_target(f"msn_jax_{call}_{name}", jax.ffi.pycapsule(function), platform="cpu")
    return name, ""


@cache
def _library(name: str) -> ctypes.CDLL | None:
    from msn_jax.kernels.build import library_path  # which runs as a module of its own

    try:
        library = ctypes.CDLL(str(library_path(name)))
    except OSError:  # not there, or of another system
        return None
    current = all(hasattr(library, f"msn_jax_{call}") for call in CALLS)
    return library if current else None  # built from earlier sources


def on_cpu(rows: int, kernel: Callable, xla: Callable, *args):
    """kernel(name of the instruction set, *args) on a CPU whose custom calls run, else xla(*args).

    rows: of the pass; above MAX_ROWS, and wherever it is differentiated, `xla` runs. Both give the same shapes and
    dtypes.
    """
    name = instruction_set() if rows <= MAX_ROWS else None
    if name is None:
        return xla(*args)
    leaves, treedef = jax.tree.flatten(args)

    @jax.custom_jvp
    def call(*leaves):
        return kernel(name, *jax.tree.unflatten(treedef, leaves))

    def derivative(primals, tangents):
        moving = [i for i, t in enumerate(tangents) if not isinstance(t, SymbolicZero)]

        def of_moving(*some):
            given = dict(zip(moving, some, strict=True))
            return xla(*jax.tree.unflatten(treedef, [given.get(i, x) for i, x in enumerate(primals)]))

        return jax.jvp(of_moving, [primals[i] for i in moving], [tangents[i] for i in moving])

    # Symbolic zeros: without them an adapter's training would multiply with the zero tangents of frozen weights.
    call.defjvp(derivative, symbolic_zeros=True)
    flat_xla = lambda *leaves: xla(*jax.tree.unflatten(treedef, leaves))
    return jax.lax.platform_dependent(*leaves, cpu=call, default=flat_xla)


def _call(call: str, name: str, out, *args, aliases: dict[int, int] | None = None, **attributes):
    # Under vmap the calls run one after the other: the bits stay.
    target = f"msn_jax_{call}_{name}"
    return jax.ffi.ffi_call(target, out, vmap_method="sequential", input_output_aliases=aliases)(*args, **attributes)


def product(
    name: str,
    x: Array,
    w: Array,
    scale: Array | None = None,
    low_rank: tuple[Array, Array, float] | None = None,
    last: int = 1,
    tokens: int = 1,
) -> Array:
    """float32 [rows, out] of x float32 [rows, in] and w [out, in] in float32, bfloat16 or int8.

    x is rounded to bfloat16 for weights of bfloat16, and for int8, to which scale float32[out] belongs, to integers of
    14 bits by the largest number of each row.
    low_rank: (a [r, in], b [out, r], s) of w's dtype (bfloat16 beside int8); s * b @ a @ x is added to the `last` of
    each `tokens` rows, in the same call.
    """
    kind = jnp.bfloat16 if w.dtype == jnp.int8 else w.dtype
    none = jnp.zeros((0, x.shape[1]), kind), jnp.zeros((w.shape[0], 0), kind), 0.0
    a, b, s = low_rank or none
    scale = jnp.zeros(0, jnp.float32) if scale is None else scale
    out = jax.ShapeDtypeStruct((x.shape[0], w.shape[0]), jnp.float32)
    attributes = {"low_rank_scale": np.float32(s), "last": np.int64(last), "tokens": np.int64(tokens)}
    return _call("product", name, out, x, w, scale, a, b, **attributes)


def attention(
    name: str,
    q: Array,
    k: Array,
    v: Array,
    mask: Array,
    cached: tuple[Array, Array],
    length: Array,
    oldest: Array | None,
) -> Array:
    """float32 [B, T, K, G, H]. Arguments as of model.attention, all but mask, length and oldest of one dtype."""
    oldest = jnp.zeros(0, jnp.int32) if oldest is None else oldest
    return _call("attention", name, jax.ShapeDtypeStruct(q.shape, jnp.float32), q, k, v, mask, *cached, length, oldest)


def norm(name: str, x: Array, scale: Array, bias: Array | None, eps: float) -> Array:
    """float32 [rows, D] of x float32 [rows, D]; row i is scaled (and shifted) by row i % M of scale (bias) [M, D]."""
    bias = jnp.zeros(0, scale.dtype) if bias is None else bias
    return _call("norm", name, jax.ShapeDtypeStruct(x.shape, jnp.float32), x, scale, bias, eps=np.float32(eps))


def angles(name: str, positions: Array, frequencies: Array) -> tuple[Array, Array]:
    """Cosine and sine, float32 [n, half], of positions int32[n] times frequencies float32[half]."""
    out = jax.ShapeDtypeStruct((positions.shape[0], frequencies.shape[0]), jnp.float32)
    return tuple(_call("angles", name, (out, out), positions, frequencies))


def best(name: str, rows: Array) -> Array:
    """int32 [n]: the first place of the largest number in each row of float32 [n, V]."""
    return _call("best", name, jax.ShapeDtypeStruct(rows.shape[:1], jnp.int32), rows)


def store_rows(name: str, cache: Array, rows: Array, at: Array) -> Array:
    """cache [B, K, S, H] with rows [B, K, E, H] of its dtype at slots at[b] .. at[b] + E - 1, in its own memory."""
    return _call("store_rows", name, jax.ShapeDtypeStruct(cache.shape, cache.dtype), cache, rows, at, aliases={0: 0})
