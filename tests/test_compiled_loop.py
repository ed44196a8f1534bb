"""What the loop is compiled to: one program for all settings, no copy of a cache or of a weight."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from conftest import decode_all
from test_loop import PROMPTS

from msn_jax import DecodeConfig
from msn_jax.decode import TREE_SETS, TreeSet, init_state, loop, prefill, run, seats
from msn_jax.decode.tree import EITHER, RETRIEVAL, chain
from msn_jax.plan import cache_copies

pytestmark = pytest.mark.slow


def traces(params, cfg, trees, prompts, **settings):
    before = loop.run._cache_size()
    decode_all(params, cfg, trees, prompts, stop_ids=settings.pop("stop_ids", ()), **settings)
    return loop.run._cache_size() - before


def test_one_trace_for_each_tree_set_bucket_and_batch(tiny):
    cfg, params = tiny
    trees = TreeSet("counted", (chain(2, RETRIEVAL), chain(3, EITHER)), (0, 2))
    assert traces(params, cfg, trees, PROMPTS[:1], max_new_tokens=3) == 1
    for change in (
        {"max_new_tokens": 9},
        {"max_new_tokens": 3, "temperature": 0.5, "seed": 7, "top_k": 3, "top_p": 0.5},
        {"max_new_tokens": 3, "stop_ids": (4, 5)},
    ):
        assert traces(params, cfg, trees, PROMPTS[2:3], **change) == 0
    assert traces(params, cfg, trees, PROMPTS[:2], max_new_tokens=3) == 1
    assert traces(params, cfg, trees, PROMPTS[:1], max_new_tokens=3, slots=512) == 1
    another = TreeSet("counted too", trees.trees[:1], (0,))
    assert traces(params, cfg, another, PROMPTS[:1], max_new_tokens=3) == 1


def test_one_trace_for_each_chunk_of_a_prefill(tiny):
    cfg, params = tiny
    before = loop.prefill_chunk._cache_size()
    for prompt in PROMPTS[1:]:  # one chunk of 12 to six of them
        state = init_state(cfg, TREE_SETS["root"], [prompt], DecodeConfig(max_new_tokens=9), (), slots=256)
        prefill(params, state, cfg=cfg, chunk=12)
    assert loop.prefill_chunk._cache_size() == before + 1


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize(
    "name, dtype",
    [("root", "float32"), ("adaptive", "bfloat16"), ("msn69", "float32")],
)
def test_the_loop_copies_no_cache(tiny, name, dtype, batch):
    cfg, params = tiny
    params = jax.tree.map(lambda a: a.astype(dtype), params)
    trees = TREE_SETS[name]
    state = init_state(cfg, trees, [[1, 2]] * batch, DecodeConfig(max_new_tokens=9), (), slots=256, dtype=dtype)
    hlo = run.lower(params, state, 5, cfg=cfg, trees=trees).compile().as_text()
    shape = (batch, cfg.kv_heads, 256, cfg.head_dim)
    of_a_cache = f"[{','.join(map(str, shape))}]"
    assert of_a_cache in hlo and cache_copies(hlo, shape) == []
    assert dtype == "float32" or "f32" + of_a_cache not in hlo
    table = f"f32[{cfg.vocab_size},{cfg.embed}]"
    assert (table in hlo) == (dtype == "float32")  # nor is a table widened


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("of_one_row", [False, True])
def test_prefill_copies_no_cache(tiny, of_one_row, dtype, batch):
    cfg, params = tiny
    params = jax.tree.map(lambda a: a.astype(dtype), params)
    state = init_state(
        cfg, TREE_SETS["root"], [[1, 2]] * batch, DecodeConfig(max_new_tokens=9), (), slots=256, dtype=dtype
    )
    place = (jnp.int32(batch - 1),) if of_one_row else ()
    chunk = seats.prefill_row if of_one_row else loop.prefill_chunk
    chunk = partial(chunk, cfg=cfg, chunk=64, dtype=state.activations)
    one = lambda i, cache: chunk(params, cache, state.tokens, *place, 64 * i)
    hlo = jax.jit(lambda cache: jax.lax.fori_loop(0, 3, one, cache)).lower(state.cache).compile().as_text()
    shape = (batch, cfg.kv_heads, 256, cfg.head_dim)
    assert f"[{','.join(map(str, shape))}]" in hlo and cache_copies(hlo, shape) == []
    assert dtype == "float32" or f"f32[{cfg.vocab_size},{cfg.embed}]" not in hlo


@pytest.mark.parametrize("name", ["root", "chain4"])
def test_bfloat16_weights_are_read_as_they_are(tiny, name, monkeypatch):
    monkeypatch.setenv("MSN_JAX_KERNELS", "off")  # XLA's own form
    jax.clear_caches()
    cfg, params = tiny
    trees = TREE_SETS[name]
    params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    state = init_state(
        cfg, trees, [[1, 2]], DecodeConfig(max_new_tokens=9), (), slots=256, dtype=jnp.bfloat16, backend="cpu"
    )
    widened = lambda loop_: f"f32[{cfg.embed},{cfg.mlp}]" in jax.jit(loop_).lower(params).compile().as_text()
    loop_ = lambda params: run(params, state, 5, cfg=cfg, trees=trees)
    assert not widened(loop_)
    # A copy in float32 would be seen.
    assert widened(
        lambda params: loop_(jax.lax.optimization_barrier(jax.tree.map(lambda a: a.astype("float32"), params)))
    )


def test_a_copied_cache_would_be_seen(tiny):
    cfg, params = tiny

    def select_between_caches(state):
        # What finished rows must not be gated by.
        old = state.cache.k[0]
        new = jnp.where(state.done[:, None, None, None], old, old + 1)
        return state.replace(
            cache=state.cache.replace(k=(jnp.concatenate([new[..., 1:], old[..., :1]], -1), *state.cache.k[1:]))
        )

    state = init_state(cfg, TREE_SETS["root"], [[1, 2]], DecodeConfig(max_new_tokens=9), (), slots=256)
    loop_ = lambda state: jax.lax.fori_loop(0, 3, lambda i, s: select_between_caches(s), state)
    hlo = jax.jit(loop_).lower(state).compile().as_text()
    assert cache_copies(hlo, (1, cfg.kv_heads, 256, cfg.head_dim))


@pytest.mark.parametrize(
    "slots, size",
    [(1, 256), (256, 256), (257, 512), (1025, 1536), (1537, 2048), (2049, 3072), (3073, 4096), (8200, 12288)],
)
def test_buckets(slots, size):
    assert loop.bucket(slots) == size
