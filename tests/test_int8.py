"""Weights rounded to int8: how, from every kind of file, and spread over devices."""

import os
import subprocess
import sys

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_gguf import write
from test_kernels import multiplied

from msn_jax import kernels
from msn_jax.io import hf
from msn_jax.io.gguf import GGUFSource
from msn_jax.linear import Int8Weight, linear, round_int8, widened

is_rounded = lambda w: isinstance(w, Int8Weight)


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
    as_read = multiplied(x.reshape(4, -1), "int8" if kernels.instruction_set() else "bfloat16")
    np.testing.assert_allclose(y, as_read @ back.reshape(3, -1).T, atol=1e-4)


def test_a_gguf_file_is_rounded_as_it_is_read(tmp_path):
    source = GGUFSource(write(tmp_path / "x.gguf", "qwen2", gguf.GGMLQuantizationType.Q5_0))
    exact, rounded = (hf.load_params(source.config, source, dtype) for dtype in ("float32", "int8"))
    found = jax.tree.leaves(rounded, is_leaf=is_rounded)
    assert sum(map(is_rounded, found)) == 4 * source.config.layers + 1 + (not source.config.tie_embeddings)
    for was, now in zip(jax.tree.leaves(exact), found, strict=True):
        if is_rounded(now):
            half = jnp.expand_dims(now.scale, tuple(range(now.scale.ndim, now.ndim))) * 0.5001
            assert (jnp.abs(widened(now) - was) <= half).all() and now.values.dtype == jnp.int8
        else:
            assert now.dtype == jnp.float32 and (now == was).all()


SPREAD = """
import jax, numpy as np
from msn_jax import ModelConfig, forward, init
from msn_jax.cache import init_cache
from msn_jax.io.hf import place_params
from msn_jax.sharding import make_mesh
cfg = ModelConfig(vocab_size=64, embed=32, layers=2, mlp=64, max_position=64, heads=8, kv_heads=4, head_dim=8)
params = jax.device_get(init(jax.random.key(0), cfg))
tokens, at = jax.random.randint(jax.random.key(1), (2, 6), 0, 64), np.arange(6)[None]
run = jax.jit(lambda p: forward(p, cfg, tokens, at, None, init_cache(cfg, 2, 16, "bfloat16"), dtype="float32")[0])
one = run(place_params(cfg, params, "int8", None))
mesh = make_mesh(data=2, tensor=4)
with jax.set_mesh(mesh):
    spread = place_params(cfg, params, "int8", mesh)
    qkv = spread.layers[0].qkv
    assert qkv.values.dtype == "int8" and len(qkv.values.sharding.device_set) == 8
    assert qkv.values.addressable_shards[0].data.size == qkv.values.size // 4
    assert qkv.scale.addressable_shards[0].data.size == qkv.scale.size // 4
    np.testing.assert_allclose(run(spread), one, atol=2e-2)
"""


@pytest.mark.slow
def test_eight_devices_hold_a_part_each():
    env = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count=8 {os.environ['XLA_FLAGS']}"}
    done = subprocess.run([sys.executable, "-c", SPREAD], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1500:]
