"""The door of the public functions: an array of a wrong shape or kind is one line that names the argument."""

from __future__ import annotations

from typing import Any

import numpy as np

from msn_jax.errors import InputError

_KINDS = {"int": "iu", "bool": "b"}  # of NumPy's dtype.kind; float takes what is neither, bfloat16 and float8 too


def check_shapes(**arguments: tuple[Any, str]) -> None:
    """Raise InputError for the first argument that is not what its docstring says: name=(array, "int[B, T]").

    Kinds: int, bool, float. A number is that size, a letter the size that it first has among the arguments, `1 or B`
    either of both, and ... any leading axes. None passes. Arrays may be traced: shapes and dtypes are static.
    """
    sizes: dict[str, int] = {}
    for name, (array, accepted) in arguments.items():
        if array is None:
            continue
        array = array if hasattr(array, "shape") else np.asarray(array)
        kind, _, letters = accepted.removesuffix("]").partition("[")
        wanted, shape = letters.split(", ") if letters else [], tuple(array.shape)
        if wanted[:1] == ["..."]:
            wanted = wanted[1:]
            shape = shape[max(len(shape) - len(wanted), 0) :]
        right_kind = array.dtype.kind in _KINDS[kind] if kind in _KINDS else array.dtype.kind not in "iub"
        sized = len(shape) == len(wanted) and all(_fits(*pair, sizes) for pair in zip(wanted, shape, strict=True))
        if not (right_kind and sized):
            got = f"{array.dtype}[{', '.join(map(str, array.shape))}]"
            letters = dict.fromkeys(part for axis in wanted for part in axis.split(" or "))
            known = ", ".join(f"{letter} = {sizes[letter]}" for letter in letters if letter in sizes)
            fixed = f" with {known}" if known and len(shape) == len(wanted) else ""
            raise InputError(f"{name} is {got}; accepted: {accepted}{fixed}")


def _fits(axis: str, size: int, sizes: dict[str, int]) -> bool:
    """Whether `size` is what an axis takes; a letter without a size gets this one."""
    return any(size == (int(part) if part.isdecimal() else sizes.setdefault(part, size)) for part in axis.split(" or "))
