"""Passes of whole models through the custom calls: equal bits at any width and batch, and what XLA gives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import decode_all
from test_kernels import NAMES

from msn_jax import ModelConfig, forward, init, kernels, unembed
from msn_jax.adapters import init_adapter
from msn_jax.cache import init_cache, write_cache
from msn_jax.config import LoraConfig
from msn_jax.decode import tree_set
from msn_jax.params import DraftAdapter, declare, round_params, unstack

pytestmark = pytest.mark.skipif(not NAMES, reason="the kernels are not built")

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
def test_bits_do_not_depend_on_width_or_batch(family, dtype, name, monkeypatch):
    monkeypatch.setenv(kernels.VARIABLE, name)
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
@pytest.mark.parametrize("rows, adapted", [(1, False), (4, True)])
def test_drafts_change_no_token(dtype, settings, rows, adapted):
    cfg, params = tiny_model("llama", dtype)
    prompts = [[1, 2, 3, 4, 2, 3], [5, 6, 7], [9], [8, 8, 8, 8]]
    given = settings | {"max_new_tokens": 40, "dtype": params.embed.dtype}
    drafter = tiny_drafter(cfg, params.embed.dtype) if adapted else None
    trees = tree_set("tr-jacobi", draft_only=adapted)
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
