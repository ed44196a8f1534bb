import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDENS

import msn_jax
from msn_jax import InputError
from msn_jax.cache import init_cache, write_cache
from msn_jax.io import hf
from msn_jax.io.published_config import config_from_hf
from msn_jax.linear import linear, take_rows
from msn_jax.model import rope_frequencies

forward = jax.jit(msn_jax.forward, static_argnums=1)
unembed = jax.jit(msn_jax.unembed, static_argnums=1)
TINY = sorted(path.name for path in GOLDENS.glob("tiny_*"))


def logits_of(params, cfg, ids):
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    return np.asarray(unembed(params, cfg, forward(params, cfg, jnp.asarray(ids), positions)[0]))


@pytest.mark.parametrize("name", TINY)
def test_tiny_models_match_torch(name):
    folder = GOLDENS / name
    cfg = hf.read_config(folder)
    params = hf.load_params(cfg, hf.SafetensorsSource(folder))
    golden = np.load(folder / "logits.npz")
    short, long = golden["ids"], golden["long_ids"]
    padded = np.pad(short, ((0, 0), (0, long.shape[1] - short.shape[1])))  # one batch, so that one program is compiled
    logits = logits_of(params, cfg, np.concatenate([padded, long]))
    np.testing.assert_allclose(logits[:2, : short.shape[1]], golden["logits"], atol=1e-4, rtol=0)
    np.testing.assert_allclose(logits[2:], golden["long_logits"], atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("text", [0, 1, 2])
def test_smollm2_matches_torch(smollm2, text):
    golden = np.load(GOLDENS / "smollm2.npz")
    logits = logits_of(smollm2.params, smollm2.cfg, golden[f"ids_{text}"][None])[0]
    ours = np.take_along_axis(logits, golden[f"cols_{text}"], axis=1)
    np.testing.assert_allclose(ours, golden[f"logits_{text}"], atol=1e-3, rtol=0)
    clear = golden[f"gap_{text}"] > 2e-3
    assert clear.sum() > 0.9 * len(clear)
    assert (logits.argmax(axis=1) == golden[f"argmax_{text}"])[clear].all()


def test_chunks_through_the_cache_equal_one_pass(tiny):
    cfg, params = tiny
    ids = jax.random.randint(jax.random.key(0), (2, 24), 0, cfg.vocab_size)
    whole = logits_of(params, cfg, ids)
    cache, hidden = init_cache(cfg, 2, 32), []
    for start in (0, 8, 16):
        starts = jnp.full(2, start)
        positions = jnp.broadcast_to(start + jnp.arange(8), (2, 8))
        h, new = forward(params, cfg, ids[:, start : start + 8], positions, None, cache.replace(length=starts))
        cache = write_cache(cache, new, starts)
        hidden.append(h)
    parts = unembed(params, cfg, jnp.concatenate(hidden, axis=1))
    np.testing.assert_allclose(parts, whole, atol=1e-4)


def test_a_token_depends_on_those_before_it_alone(tiny):
    cfg, params = tiny
    ids = jnp.arange(10)[None]
    positions = jnp.arange(10)[None]

    def row(embed, at):
        hidden, _ = forward(params.replace(embed=embed), cfg, ids, positions)
        return hidden[0, at].sum()

    # Each token occurs once, so the gradient of the embedding table tells which positions were read.
    grad = jax.jit(jax.grad(row), static_argnums=1)(params.embed, 4)
    read = np.abs(np.asarray(grad)[:10]).sum(axis=1) > 0
    assert read.tolist() == [True] * 5 + [False] * 5


def test_a_tree_node_sees_its_ancestors_alone(tiny):
    cfg, params = tiny
    #   0 - 1 - 3
    #    \- 2
    mask = jnp.array([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]], bool)
    tokens, positions = jnp.array([[5, 6, 7, 8]]), jnp.array([[0, 1, 1, 2]])
    tree, _ = forward(params, cfg, tokens, positions, mask)
    for path in ([0, 1, 3], [0, 2, 2]):  # 2 comes again so that both have one shape
        index = np.array(path)
        alone, _ = forward(params, cfg, tokens[:, index], positions[:, index])
        seen = slice(0, len(set(path)))
        np.testing.assert_allclose(tree[:, index][:, seen], alone[:, seen], atol=1e-5)


@pytest.mark.parametrize("rows", [1, 3, 8, 129])
def test_linear_contracts_the_last_axes(rows):
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((2, rows, 3, 4)), rng.standard_normal((5, 6, 3, 4))
    got = linear(jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32), in_dims=2)
    np.testing.assert_allclose(got, np.einsum("btnh,ofnh->btof", x, w), atol=1e-5)


@pytest.mark.parametrize(("batch", "rows"), [(1, 1), (1, 13), (2, 8), (2, 129)])
def test_bfloat16_weights_round_float32_rows_and_their_gradients(batch, rows):
    rng = np.random.default_rng(0)
    x, w, y_bar = (rng.standard_normal(shape) for shape in ((batch, rows, 3, 4), (5, 6, 3, 4), (batch, rows, 5, 6)))
    rounded = lambda a: np.asarray(jnp.asarray(a, jnp.bfloat16), np.float64)
    product = lambda x, w: linear(x, w, in_dims=2)
    args = jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.bfloat16)
    y, back = jax.vjp(product, *args)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, np.einsum("btnh,ofnh->btof", rounded(x), rounded(w)), atol=1e-4)
    x_bar, w_bar = back(jnp.asarray(y_bar, jnp.float32))
    np.testing.assert_allclose(x_bar, np.einsum("btof,ofnh->btnh", rounded(y_bar), rounded(w)), atol=1e-4)
    exact = np.einsum("btof,btnh->ofnh", rounded(y_bar), rounded(x))
    np.testing.assert_allclose(w_bar.astype(jnp.float32), exact, rtol=2**-8, atol=1e-4)
    assert x_bar.dtype == jnp.float32 and w_bar.dtype == jnp.bfloat16


@pytest.mark.parametrize("w_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("x_dtype", ["float32", "bfloat16"])
def test_products_and_their_gradients_are_no_narrower_than_what_they_are_of(x_dtype, w_dtype):
    # cuBLAS has none of those: a program with one does not compile for a GPU.
    x, w = jnp.ones((2, 80, 4), x_dtype), jnp.ones((5, 6, 4), w_dtype)
    product = jax.value_and_grad(lambda x, w: linear(x, w).astype(jnp.float32).sum(), (0, 1))
    kind = r"tensor<[^>]*?(b?f\d+)>"
    types = re.findall(rf"dot_general.*: \({kind}, {kind}\) -> {kind}", jax.jit(product).lower(x, w).as_text())
    assert len(types) >= 3
    assert not [found for found in types if found[2] == "bf16" and "f32" in found[:2]]


def test_bfloat16_is_close(tiny):
    cfg, params = tiny
    ids = jnp.arange(20)[None]
    exact = logits_of(params, cfg, ids)
    rounded = logits_of(jax.tree.map(lambda a: a.astype(jnp.bfloat16), params), cfg, ids)
    assert rounded.dtype == np.float32
    assert (
        rounded != np.asarray(jnp.asarray(rounded, jnp.bfloat16), np.float32)
    ).mean() > 0.9  # not rounded at the end
    assert 1e-4 < np.abs(rounded - exact).mean() < 0.05 * np.abs(exact).mean()


def hf_config(**changes):
    base = json.loads((GOLDENS / "tiny_mha" / "config.json").read_text())
    return {**base, **changes}


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2'"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"attention_bias": "yes"}, "attention_bias = 'yes'"),
        ({"mlp_bias": 2}, "mlp_bias = 2"),
        ({"sliding_window": 128}, "sliding_window = 128"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "rope type 'yarn'"),
        ({"num_key_value_heads": 4}, "heads 6 is not a multiple of kv_heads 4"),
        ({"num_attention_heads": "6"}, "num_attention_heads = '6' is not possible"),
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0 is not possible"),
        ({"tie_word_embeddings": "false"}, "tie_embeddings = 'false' is not possible"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0}}, "factor = 0 is not possible"),
    ],
)
def test_an_unsupported_field_is_refused_by_name(changes, named):
    with pytest.raises(InputError, match=named.replace("(", r"\(")):
        config_from_hf(hf_config(**changes))


def test_a_missing_field_is_named():
    config = hf_config()
    del config["hidden_size"]
    with pytest.raises(InputError, match="'hidden_size' is missing"):
        config_from_hf(config)


def test_llama3_scaling_keeps_short_and_stretches_long_wavelengths():
    cfg = config_from_hf(
        hf_config(
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
            head_dim=128,
        )
    )
    plain = 5e5 ** -(np.arange(0, 128, 2) / 128)
    ratio = rope_frequencies(cfg) / plain
    wavelength = 2 * np.pi / plain
    np.testing.assert_allclose(ratio[wavelength < 8192 / 4], 1, rtol=1e-6)
    np.testing.assert_allclose(ratio[wavelength > 8192], 1 / 8, rtol=1e-6)


def test_a_profile_shows_the_parts(tiny):
    cfg, params = tiny
    logits = lambda tokens: unembed(params, cfg, msn_jax.forward(params, cfg, tokens, tokens)[0])
    text = jax.jit(logits).lower(np.zeros((1, 4), np.int32)).compile().as_text()
    for scope in ("embed/", "attention/norm/", "attention/", "mlp/norm/", "mlp/", "unembed/"):
        assert f"/{scope}" in text, scope


def test_rows_of_a_table_and_their_gradient():
    rng = np.random.default_rng(0)
    table, rows = rng.standard_normal((7, 3)).astype(jnp.bfloat16), np.array([[5, 0, 5], [2, 5, 6]])
    weight = rng.integers(-3, 4, (2, 3, 3)).astype(np.float32)
    loss = lambda w: jnp.sum(take_rows(w, rows).astype(jnp.float32) * weight)
    expected = np.zeros((7, 3), np.float32)
    np.add.at(expected, rows, weight)
    np.testing.assert_array_equal(jax.jit(take_rows)(table, rows), table[rows])
    found = jax.jit(jax.grad(loss))(jnp.asarray(table))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found.astype(jnp.float32), expected)
