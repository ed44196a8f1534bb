"""The custom calls of msn_jax/kernels against NumPy and XLA: every instruction set of this machine, and equal bits."""

import os
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest

from msn_jax import InputError, kernels
from msn_jax.kernels.build import library_path

NAMES = kernels.available()
pytestmark = pytest.mark.skipif(not NAMES, reason="the kernels are not built")
each_set = pytest.mark.parametrize("name", NAMES)


@pytest.fixture
def forced(name, monkeypatch):
    monkeypatch.setenv(kernels.VARIABLE, name)
    assert kernels.instruction_set() == name
    return name


def bfloat16(x):
    return x.astype(ml_dtypes.bfloat16)


def multiplied(x, dtype):
    """x float32 [rows, in] in float64, as the product rounds it beside weights of dtype."""
    if dtype == "float32":
        return x.astype(np.float64)
    if dtype != "int8":
        return bfloat16(x).astype(np.float64)
    top = np.abs(x).max(1, keepdims=True)
    return np.rint(x * (np.float32(8191) / top)) * (top / np.float32(8191)).astype(np.float64)


def weights(rng, out, ins, dtype):
    """(w [out, ins], scale or None, what they stand for in float64)."""
    if dtype == "int8":
        w, scale = rng.integers(-127, 128, (out, ins)).astype(np.int8), rng.uniform(0.1, 2, out).astype(np.float32)
        return w, scale, w * scale[:, None].astype(np.float64)
    w = rng.normal(size=(out, ins)).astype(dtype)
    return w, None, w.astype(np.float64)


@each_set
@pytest.mark.parametrize("dtype", ["float32", ml_dtypes.bfloat16, "int8"], ids=str)
def test_product(name, dtype, forced):
    # Inner and outer sizes that no vector divides, and row counts of every tile.
    rng = np.random.default_rng(0)
    for rows, ins, out in [(1, 64, 16), (2, 33, 17), (3, 70, 5), (5, 9, 40), (8, 1, 1), (64, 96, 24), (66, 40, 3)]:
        x = rng.normal(size=(rows, ins)).astype(np.float32)
        w, scale, exact = weights(rng, out, ins, dtype)
        y = np.asarray(kernels.product(name, x, w, scale))
        rounded = multiplied(x, dtype)
        bound = np.abs(rounded) @ np.abs(exact).T
        assert (np.abs(y - rounded @ exact.T) <= 3e-7 * ins**0.5 * bound + 1e-30).all()
        alone = [np.asarray(kernels.product(name, x[i : i + 1], w, scale)) for i in (0, rows - 1)]
        assert (y[0] == alone[0][0]).all() and (y[-1] == alone[1][0]).all()


@each_set
def test_int8_of_no_numbers_of_none_and_of_the_largest_sums(name, forced):
    x = np.zeros((4, 700), np.float32)
    x[1, 699], x[2, 3], x[3] = np.nan, np.inf, 1e-38
    w, ones = np.full((2, 700), 127, np.int8), np.ones(2, np.float32)
    y = np.asarray(kernels.product(name, x, w, ones))
    assert (y[[0, 3]] == 0).all() and np.isnan(y[1:3]).all()
    x, w = np.ones((1, 5000), np.float32), np.full((1, 5000), 127, np.int8)
    for sign in (1, -1):
        y = np.asarray(kernels.product(name, sign * x, w, ones[:1]))
        np.testing.assert_allclose(y, sign * 127 * 5000, rtol=1e-6)


def adapter_agrees(rng, name, groups, tokens, last, ins, out, rank, dtype):
    """By number: is a product with an adapter at the last tokens of each group right, elsewhere to the bit?"""
    x = rng.normal(size=(groups * tokens, ins)).astype(np.float32)
    w, scale, _ = weights(rng, out, ins, dtype)
    kind = ml_dtypes.bfloat16 if dtype == "int8" else dtype
    a, b = (rng.normal(size=s).astype(kind) for s in ((rank, ins), (out, rank)))
    plain = np.asarray(kernels.product(name, x, w, scale))
    added = np.asarray(kernels.product(name, x, w, scale, (a, b, 0.5), last, tokens)) - plain
    rounded = (lambda n: n) if dtype == "float32" else bfloat16
    hidden = rounded(0.5 * (rounded(x).astype(np.float64) @ a.astype(np.float64).T)).astype(np.float64)
    bound = np.abs(hidden) @ np.abs(b.astype(np.float64)).T + 0.01 * np.abs(plain)
    # In bfloat16 the sums between may round the other way.
    near = np.abs(added - hidden @ b.astype(np.float64).T) <= (1e-4 if dtype == "float32" else 6e-3) * bound
    return np.where((np.arange(len(x)) % tokens >= tokens - last)[:, None], near, added == 0)


@each_set
@pytest.mark.parametrize("dtype", ["float32", ml_dtypes.bfloat16, "int8"], ids=str)
def test_what_an_adapter_adds(name, dtype, forced):
    # Ranks that no vector divides, and one that is several.
    rng = np.random.default_rng(5)
    for case in [(1, 8, 3, 40, 50, 28), (2, 5, 5, 33, 17, 3), (3, 4, 1, 64, 16, 70), (2, 3, 0, 9, 20, 4)]:
        assert adapter_agrees(rng, name, *case, dtype).all()


def numpy_attention(q, k, v, mask, past_k, past_v, length, oldest):
    """[B, T, K, G, H] in float64, one query at a time."""
    B, T, K, G, H = q.shape
    out = np.zeros(q.shape)
    for b, t, head, g in np.ndindex(B, T, K, G):
        first = max(oldest[b, t], 0) if oldest is not None else 0
        seen = mask[b % len(mask), t]
        keys = np.concatenate([past_k[b, head, first : length[b]], k[b, head, seen]])
        values = np.concatenate([past_v[b, head, first : length[b]], v[b, head, seen]])
        scores = keys @ q[b, t, head, g] * H**-0.5
        weight = np.exp(scores - scores.max())
        out[b, t, head, g] = weight @ values / weight.sum()
    return out


def attention_case(rng, B, T, K, G, H, S, window, dtype):
    draw = lambda *shape: rng.normal(size=shape).astype(dtype)
    mask = np.tril(rng.random((rng.choice([1, B]), T, T)) < 0.5) | np.eye(T, dtype=bool)
    length = rng.integers(0, S + 1, B).astype(np.int32)
    oldest = (length[:, None] + np.arange(T) - rng.integers(1, S + 4)).astype(np.int32) if window else None
    cache = draw(B, K, S, H), draw(B, K, S, H)
    for past in cache:
        for b in range(B):
            past[b, :, length[b] :] = np.nan  # never read
    return draw(B, T, K, G, H), draw(B, K, T, H), draw(B, K, T, H), mask, *cache, length, oldest


@each_set
@pytest.mark.parametrize("dtype", ["float32", ml_dtypes.bfloat16], ids=str)
def test_attention(name, dtype, forced):
    rng = np.random.default_rng(1)
    small = [(1, 1, 1, 1, 2, 5), (2, 3, 2, 3, 10, 40), (1, 9, 2, 1, 36, 0)]
    for case in [*small, (1, 16, 3, 3, 64, 70), (2, 20, 1, 2, 96, 7)]:
        for window in (False, True):
            q, k, v, mask, past_k, past_v, length, oldest = attention_case(rng, *case, window, dtype)
            y = kernels.attention(name, q, k, v, mask, (past_k, past_v), length, oldest)
            wide = [a.astype(np.float64) for a in (q, k, v, past_k, past_v)]
            want = numpy_attention(*wide[:3], mask, *wide[3:], length, oldest)
            np.testing.assert_allclose(np.asarray(y), want, rtol=1e-5, atol=2e-6)


@each_set
def test_norm_and_angles_and_best(name, forced):
    rng = np.random.default_rng(2)
    for rows, D, M in [(1, 7, 1), (6, 24, 3), (5, 100, 1)]:
        x, scale, bias = (rng.normal(size=s).astype(np.float32) for s in ((rows, D), (M, D), (M, D)))
        y, wide, by = np.asarray(kernels.norm(name, x, scale, None, 1e-5)), x.astype(np.float64), np.arange(rows) % M
        want = wide / np.sqrt((wide**2).mean(1, keepdims=True) + 1e-5) * scale[by]
        np.testing.assert_allclose(y, want, rtol=2e-6, atol=1e-6)
        y = np.asarray(kernels.norm(name, x, bfloat16(scale), bfloat16(bias), 1e-5))
        wide -= wide.mean(1, keepdims=True)
        want = wide / np.sqrt((wide**2).mean(1, keepdims=True) + 1e-5)
        want = want * bfloat16(scale)[by].astype(float) + bfloat16(bias)[by].astype(float)
        np.testing.assert_allclose(y, want, rtol=2e-6, atol=2e-6)
    positions, frequencies = np.arange(9, dtype=np.int32) * 1000, np.float32([1, 0.3, 1e-4])
    cos, sin = kernels.angles(name, positions, frequencies)
    angle = (positions[:, None].astype(np.float32) * frequencies).astype(np.float64)
    np.testing.assert_allclose(np.asarray(cos), np.cos(angle), atol=1e-7)
    np.testing.assert_allclose(np.asarray(sin), np.sin(angle), atol=1e-7)
    for V in (1, 5, 33, 200):
        logits = rng.integers(0, 9, (7, V)).astype(np.float32)  # most maxima stand there twice
        assert (np.asarray(kernels.best(name, logits)) == logits.argmax(1)).all()
    assert int(kernels.best(name, np.full((1, 40), -np.inf, np.float32))[0]) == 0


@each_set
@pytest.mark.parametrize("dtype", ["float32", ml_dtypes.bfloat16], ids=str)
def test_store(name, dtype, forced):
    rng = np.random.default_rng(6)
    cache, rows = (rng.normal(size=(2, 3, n, 5)).astype(dtype) for n in (11, 4))
    at = np.int32([2, 9])  # the second would pass the end: XLA moves it back
    y = np.asarray(jax.jit(lambda *a: kernels.store_rows(name, *a))(cache, rows, at))
    want = cache.copy()
    want[0, :, 2:6], want[1, :, 7:] = rows[0], rows[1]
    assert y.dtype == want.dtype and (y == want).all()


def test_wrong_shapes_and_dtypes_are_refused(monkeypatch):
    f32, name = np.float32, NAMES[-1]
    monkeypatch.setenv(kernels.VARIABLE, name)
    assert kernels.instruction_set() == name
    x, w = np.zeros((2, 8), f32), np.zeros((4, 8), f32)
    call = lambda what, out, *args, **attributes: jax.block_until_ready(
        kernels._call(what, name, jax.ShapeDtypeStruct(*out), *args, **attributes)
    )
    none, a, b = np.zeros(0, f32), np.zeros((3, 8), f32), np.zeros((4, 3), f32)
    for args, out, last, tokens in [
        ((x, w[:, :7], none, a, b), (2, 4), 1, 2),
        ((x, w, none, a, b), (2, 5), 1, 2),
        ((x.astype(np.float16), w, none, a, b), (2, 4), 1, 2),
        ((x, w.astype(np.int16), none, a, b), (2, 4), 1, 2),
        ((x, w.astype(np.int8), none, a, b), (2, 4), 1, 2),
        ((x[0], w, none, a, b), (2, 4), 1, 2),
        ((x, w, none, a[:, :7], b), (2, 4), 1, 2),
        ((x, w, none, a, b[:3]), (2, 4), 1, 2),
        ((x, w, none, a[:2], b), (2, 4), 1, 2),
        ((x, w, none, bfloat16(a), bfloat16(b)), (2, 4), 1, 2),
        ((x, w.astype(np.int8), np.ones(4, f32), a, b), (2, 4), 1, 2),
        ((x, w, none, a, b), (2, 4), 3, 2),
        ((x, w, none, a, b), (2, 4), -1, 2),
        ((x, w, none, a, b), (2, 4), 1, 3),
        ((x, w, none, a, b), (2, 4), 0, 0),
    ]:
        rows = {"low_rank_scale": f32(1), "last": np.int64(last), "tokens": np.int64(tokens)}
        with pytest.raises(Exception, match="product: "):
            call("product", (out, f32), *args, **rows)
    rng = np.random.default_rng(0)
    q, k, v, mask, past_k, past_v, length, _ = attention_case(rng, 2, 3, 2, 2, 8, 6, False, "float32")
    good = [q, k, v, mask, past_k, past_v, length, np.zeros(0, np.int32)]
    for i, bad in [(1, k[:, :1]), (2, v.astype(np.int32)), (3, mask[:, :2]), (5, past_v[:, :, :4]), (6, length[:1])]:
        with pytest.raises(Exception, match="attention: "):
            call("attention", (q.shape, f32), *good[:i], bad, *good[i + 1 :])
    with pytest.raises(Exception, match="norm: "):
        call("norm", ((2, 8), f32), x, w[:1, :7], none, eps=f32(1e-5))
    with pytest.raises(Exception, match="angles: "):
        kernels.angles(name, np.zeros((2, 2), np.int32), np.zeros(3, f32))
    with pytest.raises(Exception, match="best: "):
        kernels.best(name, np.zeros((2, 0), f32))
    for rows, at in [
        (k, length[:1]),
        (k.astype(np.float16), length),
        (k[:, :1], length),
        (past_k[:, :, :1], length + 0.5),
    ]:
        with pytest.raises(Exception, match="store_rows: "):
            kernels.store_rows(name, past_k, rows, at)


def test_what_runs_is_told_and_refused(monkeypatch):
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    assert kernels.describe() == f"C++ kernels for {NAMES[0]}"
    monkeypatch.setenv(kernels.VARIABLE, "off")
    assert kernels.instruction_set() is None and "MSN_JAX_KERNELS=off" in kernels.describe()
    monkeypatch.setenv(kernels.VARIABLE, "sse9")
    with pytest.raises(InputError, match="MSN_JAX_KERNELS=sse9: accepted: off, avx512bf16"):
        kernels.describe()


def test_a_library_of_earlier_sources_is_not_used(monkeypatch):
    """A pull brings sources with a call that the built libraries lack."""
    monkeypatch.setattr(kernels, "CALLS", (*kernels.CALLS, "of_tomorrow"))
    monkeypatch.setattr(kernels, "_library", kernels._library.__wrapped__)
    assert kernels.available() == ()
    name, why = kernels._choose.__wrapped__("")
    assert name is None and "not from these sources: python -m msn_jax.kernels.build does it" in why


def test_several_devices_run_xla():
    code = "from msn_jax import kernels; print(kernels.describe())"
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "XLA, no C++ kernels (several CPU devices)"


def test_a_library_is_of_one_ffi_version(tmp_path, monkeypatch):
    header = tmp_path / "xla" / "ffi" / "api" / "c_api.h"
    header.parent.mkdir(parents=True)
    header.write_text("#define XLA_FFI_API_MAJOR 0\n#define XLA_FFI_API_MINOR 99\n")
    built_here = library_path("portable")
    monkeypatch.setattr(jax.ffi, "include_dir", lambda: str(tmp_path))
    other = library_path.__wrapped__("portable")
    assert other.name == "_portable.ffi0_99.so" and other != built_here and not other.exists()
