"""The custom calls of msn_jax/kernels against NumPy and XLA: every instruction set of this machine, and equal bits."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import decode_all

from msn_jax import InputError, ModelConfig, forward, init, kernels, unembed
from msn_jax.adapters import init_adapter
from msn_jax.cache import init_cache, write_cache
from msn_jax.config import LoraConfig
from msn_jax.decode import tree_set
from msn_jax.kernels.build import library_path
from msn_jax.linear import linear, round_int8
from msn_jax.params import DraftAdapter, declare, round_params, unstack

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


MODELS = {
    "llama": dict(heads=4, kv_heads=2, head_dim=10),
    "window": dict(heads=3, kv_heads=3, head_dim=8, sliding_window=7),
    "biases": dict(
        heads=6, kv_heads=2, head_dim=6, norm="layer", activation="gelu_tanh", qkv_bias=True, o_bias=True, mlp_bias=True
    ),
    "qk_norm": dict(heads=4, kv_heads=1, head_dim=36, qk_norm=True, tie_embeddings=True),
}


@functools.cache
def tiny_model(family, dtype):
    cfg = ModelConfig(vocab_size=67, embed=40, layers=2, mlp=72, max_position=96, **MODELS[family])
    draw = lambda key: init(key, cfg, jnp.float32 if dtype == "int8" else dtype)
    params = jax.jit(lambda key: jax.tree.map(lambda a: a + 0.01, draw(key)))(jax.random.key(3))  # no bias is zero
    return cfg, round_params(params, declare(cfg)) if dtype == "int8" else params


def hidden_states(cfg, params, tokens, width):
    """Hidden states of tokens [B, T] in passes of `width`, which divides T."""
    B, T = tokens.shape

    @jax.jit
    def run(params, part, start, cache):
        at = jnp.broadcast_to(start + jnp.arange(width), part.shape)
        hidden, new = forward(params, cfg, part, at, None, cache, dtype=jnp.float32)
        length = jnp.full(B, start, jnp.int32)
        return hidden, write_cache(cache, new, length).replace(length=length + width)

    cache, out = init_cache(cfg, B, T, params.embed.dtype), []
    for start in range(0, T, width):
        hidden, cache = run(params, tokens[:, start : start + width], start, cache)
        out.append(np.asarray(hidden))
    return np.concatenate(out, axis=1)


DTYPES = ("float32", "bfloat16", "int8")
# Each family with each dtype, each dtype with each set. The quick tier has each once.
CASES = [
    pytest.param(family, dtype, NAMES[i % len(NAMES)], marks=() if i % 3 == j else pytest.mark.slow)
    for i, family in enumerate(MODELS)
    for j, dtype in enumerate(DTYPES)
    if NAMES
]


@pytest.mark.parametrize("family, dtype, name", CASES)
def test_bits_do_not_depend_on_width_or_batch(family, dtype, name, forced):
    cfg, params = tiny_model(family, dtype)
    tokens = jax.random.randint(jax.random.key(0), (3, 32), 0, cfg.vocab_size)
    one = hidden_states(cfg, params, tokens[:1], 1)
    for B, width in [(1, 32), (3, 2)]:
        assert (hidden_states(cfg, params, tokens[:B], width)[0] == one[0]).all()


def tiny_drafter(cfg, dtype):
    lora = LoraConfig(rank=5, alpha=5.0)
    layers = init_adapter(jax.random.key(1), cfg, lora)
    layers = jax.tree.map(lambda a: jax.random.normal(jax.random.key(2), a.shape) / 4, layers)
    embed = jax.random.normal(jax.random.key(4), (4, cfg.embed))
    return jax.tree.map(lambda a: a.astype(dtype), DraftAdapter(unstack(layers), embed))


@pytest.mark.slow
@pytest.mark.parametrize("family, dtype", [*zip(MODELS, (*DTYPES, "bfloat16"), strict=True)])
def test_an_adapter_leaves_the_bits_of_all_but_noise(family, dtype, monkeypatch):
    cfg, params = tiny_model(family, dtype)
    drafter = tiny_drafter(cfg, params.embed.dtype)
    tree = tree_set("tr-jacobi", draft_only=True).trees[0]
    tokens = jax.random.randint(jax.random.key(0), (2, tree.size), 0, cfg.vocab_size)

    def hidden(**added):
        cache = init_cache(cfg, 2, 32, params.embed.dtype)
        at = jnp.broadcast_to(tree.depth, tokens.shape)
        run = jax.jit(lambda p: forward(p, cfg, tokens, at, tree.ancestors, cache, dtype=jnp.float32, **added)[0])
        return np.asarray(run(params))

    kept = tree.noise_depth == 0
    plain, noisy = hidden(), hidden(adapter=drafter, noise_depth=tree.noise_depth)
    assert (noisy[:, kept] == plain[:, kept]).all() and (noisy[:, ~kept] != plain[:, ~kept]).any(-1).all()
    monkeypatch.setenv(kernels.VARIABLE, "off")
    xla = hidden(adapter=drafter, noise_depth=tree.noise_depth)
    np.testing.assert_allclose(noisy, xla, atol=1e-4 if dtype == "float32" else 0.15)


@pytest.mark.parametrize(
    "family, dtype",
    [
        ("biases", "float32"),
        ("llama", "bfloat16"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [("llama", "float32"), ("window", "float32"), ("qk_norm", "float32"), ("llama", "int8")]
        ),
    ],
)
def test_the_same_as_xla(family, dtype, monkeypatch):
    cfg, params = tiny_model(family, dtype)
    tokens = jax.random.randint(jax.random.key(0), (2, 16), 0, cfg.vocab_size)
    ours = hidden_states(cfg, params, tokens, 8)
    monkeypatch.setenv(kernels.VARIABLE, "off")
    theirs = hidden_states(cfg, params, tokens, 8)
    assert (ours != theirs).any()  # or the kernels did not run
    atol = 1e-5 if dtype == "float32" else 0.06
    np.testing.assert_allclose(ours, theirs, atol=atol)


# How tokens are chosen does not ask what the weights are, so one dtype is decoded greedily and the other sampled.
@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype, settings",
    [("bfloat16", {}), ("int8", {"temperature": 0.8, "top_k": 20, "top_p": 0.9})],
    ids=["bfloat16-greedy", "int8-sampled"],
)
@pytest.mark.parametrize(
    "method, rows, adapted", [("lookup", 4, False), ("tr-jacobi", 1, False), ("tr-jacobi", 4, True)]
)
def test_every_method_gives_the_tokens_of_ar(dtype, settings, method, rows, adapted):
    cfg, params = tiny_model("llama", dtype)
    prompts = [[1, 2, 3, 4, 2, 3], [5, 6, 7], [9], [8, 8, 8, 8]]
    given = settings | {"max_new_tokens": 40, "dtype": params.embed.dtype}
    drafter = tiny_drafter(cfg, params.embed.dtype) if adapted else None
    trees = tree_set(method, draft_only=adapted)
    drafted = decode_all(params, cfg, trees, prompts[:rows], drafter=drafter, **given)[1]
    assert drafted == decode_all(params, cfg, tree_set("ar"), prompts, **given)[1][:rows]


def test_gradients_and_maps_are_those_of_xla(one_layer, monkeypatch):
    cfg, params = one_layer
    tokens, positions = jnp.array([[3, 1, 4, 1]]), jnp.arange(4)[None]
    loss = lambda p: unembed(p, cfg, forward(p, cfg, tokens, positions)[0]).sum()
    ours = jax.tree.leaves(jax.jit(jax.grad(loss))(params))
    one = jax.jit(lambda row: unembed(params, cfg, forward(params, cfg, row[None], positions)[0]))
    rows = jnp.array([[3, 1, 4, 1], [5, 9, 2, 6]])
    mapped, alone = jax.vmap(one)(rows), [one(row) for row in rows]
    assert (np.asarray(mapped) == np.asarray(alone)).all()
    monkeypatch.setenv(kernels.VARIABLE, "off")
    theirs = jax.tree.leaves(jax.jit(jax.grad(loss))(params))
    for a, b in zip(ours, theirs):  # the angles, of which there is no gradient, are still those of the kernel
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-4, atol=1e-5)


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


def test_several_devices_run_xla():
    code = "from msn_jax import kernels; print(kernels.describe())"
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "XLA, no C++ kernels (several CPU devices)"


def test_int8_rounds_each_output_by_its_largest_weight():
    rng = np.random.default_rng(4)
    w = rng.normal(size=(3, 2, 5)).astype(np.float32)
    w[1] = 0
    rounded = round_int8(w, 2)
    assert rounded.values.dtype == np.int8 and rounded.scale.shape == (3,)
    np.testing.assert_allclose(rounded.scale[[0, 2]], np.abs(w[[0, 2]]).max((1, 2)) / 127, rtol=1e-6)
    back = rounded.values * rounded.scale[:, None, None]
    assert np.abs(back - w).max() <= rounded.scale.max() / 2 * 1.001
    x = rng.normal(size=(4, 2, 5)).astype(np.float32)
    y = np.asarray(linear(jnp.asarray(x), jax.tree.map(jnp.asarray, rounded), in_dims=2))
    exact = multiplied(x.reshape(4, -1), "int8") @ back.reshape(3, -1).T
    np.testing.assert_allclose(y, exact, atol=1e-4)


def test_a_library_is_of_one_ffi_version(tmp_path, monkeypatch):
    header = tmp_path / "xla" / "ffi" / "api" / "c_api.h"
    header.parent.mkdir(parents=True)
    header.write_text("#define XLA_FFI_API_MAJOR 0\n#define XLA_FFI_API_MINOR 99\n")
    built_here = library_path("portable")
    monkeypatch.setattr(jax.ffi, "include_dir", lambda: str(tmp_path))
    other = library_path.__wrapped__("portable")
    assert other.name == "_portable.ffi0_99.so" and other != built_here and not other.exists()
