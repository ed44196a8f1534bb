"""Random shapes and lengths through the custom calls, against NumPy; with --sanitize under gcc's sanitizers.

    python tests/fuzz_kernels.py --cases 10000
    python tests/fuzz_kernels.py --cases 500 --sanitize

The second builds each instruction set once more, with -fsanitize=address,undefined, and runs this file again in it.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import ml_dtypes
import numpy as np
from test_kernels import adapter_agrees, attention_case, multiplied, numpy_attention, weights

from msn_jax import kernels
from msn_jax.kernels.build import compile_library

SANITIZE = ("-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def product(rng, name):
    rows, ins, out = (int(n) for n in rng.integers(1, (65, 200, 100)))
    dtype = ["float32", ml_dtypes.bfloat16, "int8"][rng.integers(3)]
    x = rng.normal(size=(rows, ins)).astype(np.float32)
    w, scale, exact = weights(rng, out, ins, dtype)
    y = np.asarray(kernels.product(name, x, w, scale))
    rounded = multiplied(x, dtype)
    return np.abs(y - rounded @ exact.T) <= 3e-7 * ins**0.5 * (np.abs(rounded) @ np.abs(exact).T) + 1e-30


def adapter(rng, name):
    tokens = int(rng.integers(1, 17))
    groups, last, ins, out, rank = (int(n) for n in rng.integers((1, 0, 1, 1, 1), (4, tokens + 1, 200, 100, 80)))
    dtype = ["float32", ml_dtypes.bfloat16, "int8"][rng.integers(3)]
    return adapter_agrees(rng, name, groups, tokens, last, ins, out, rank, dtype)


def attention(rng, name):
    case = [int(n) for n in rng.integers((1, 1, 1, 1, 1, 0), (4, 65, 4, 5, 130, 300))]
    if np.prod(case[:4]) > 200:
        return attention(rng, name)  # the reference goes one query at a time
    dtype = ["float32", ml_dtypes.bfloat16][rng.integers(2)]
    q, k, v, mask, past_k, past_v, length, oldest = attention_case(rng, *case, rng.random() < 0.5, dtype)
    y = kernels.attention(name, q, k, v, mask, (past_k, past_v), length, oldest)
    wide = [a.astype(np.float64) for a in (q, k, v, past_k, past_v)]
    want = numpy_attention(*wide[:3], mask, *wide[3:], length, oldest)
    return np.isclose(np.asarray(y), want, rtol=1e-5, atol=3e-6)


def norm(rng, name):
    rows, D, M = (int(n) for n in rng.integers(1, (65, 200, 6)))
    dtype, biased = ["float32", ml_dtypes.bfloat16][rng.integers(2)], rng.random() < 0.5
    x = rng.normal(size=(rows, D)).astype(np.float32)
    scale, bias = (rng.normal(size=(M, D)).astype(dtype) for _ in range(2))
    y = kernels.norm(name, x, scale, bias if biased else None, 1e-3)
    wide, by = x.astype(np.float64), np.arange(rows) % M
    wide = wide - wide.mean(1, keepdims=True) if biased else wide
    want = wide / np.sqrt((wide**2).mean(1, keepdims=True) + 1e-3) * scale[by].astype(float)
    return np.isclose(np.asarray(y), want + (bias[by].astype(float) if biased else 0), rtol=1e-5, atol=1e-5)


def best(rng, name):
    logits = rng.integers(0, 50, rng.integers(1, (65, 300))).astype(np.float32)
    return np.asarray(kernels.best(name, logits)) == logits.argmax(1)


def store(rng, name):
    B, K, S, E, H = (int(n) for n in rng.integers(1, (4, 4, 90, 70, 70)))
    dtype = ["float32", ml_dtypes.bfloat16][rng.integers(2)]
    cache, rows = (rng.normal(size=(B, K, n, H)).astype(dtype) for n in (S + E, E))
    at = rng.integers(0, S + 1, B).astype(np.int32)
    want = cache.copy()
    for b in range(B):
        want[b, :, at[b] : at[b] + E] = rows[b]
    return np.asarray(kernels.store_rows(name, cache, rows, at)) == want


def run(name: str, cases: int) -> None:
    os.environ[kernels.VARIABLE] = name
    assert kernels.instruction_set() == name
    for seed in range(cases):
        rng = np.random.default_rng(seed)
        kind = [product, adapter, attention, attention, norm, best, store][seed % 7]
        if not kind(rng, name).all():
            sys.exit(f"{name}: {kind.__name__} differs from NumPy at seed {seed}")
        if seed % 500 == 499:
            jax.clear_caches()  # each case is a program of its own
    print(f"{name}: {cases} cases agree")


def sanitized(name: str, cases: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "kernels.so")
        compile_library(name, library, SANITIZE)
        # The second too, or the sanitizer looks for what throws in it before Python has loaded it.
        names = ("libasan.so", "libstdc++.so.6")
        place = lambda n: subprocess.check_output(["g++", f"-print-file-name={n}"], text=True).strip()
        env = os.environ | {"LD_PRELOAD": " ".join(map(place, names)), "ASAN_OPTIONS": "detect_leaks=0"}
        again = [sys.executable, __file__, "--cases", str(cases), "--names", name, "--library", str(library)]
        subprocess.run(again, env=env, check=True)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--cases", type=int, default=10000, help="of each instruction set")
    p.add_argument("--names", default=",".join(kernels.available()), help="instruction sets")
    p.add_argument("--sanitize", action="store_true")
    p.add_argument("--library", help="in place of the built one")
    args = p.parse_args()
    if args.library:
        kernels._library = lambda name: ctypes.CDLL(args.library)
    for name in args.names.split(","):
        (sanitized if args.sanitize else run)(name, args.cases)


if __name__ == "__main__":
    main()
