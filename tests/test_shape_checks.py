"""A wrong array at a public function is one line that names the argument."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msn_jax import DecodeConfig, InputError, NoiseConfig, add_noise, forward, make_train_step, unembed
from msn_jax.cache import init_cache
from msn_jax.config import DataConfig, DataSource, ModelStart, RunConfig, TrainConfig
from msn_jax.decode import TREE_SETS, init_state, step
from msn_jax.shape_checks import check_shapes

TOKENS = np.zeros((2, 5), np.int32)
MASK = np.ones((5, 5), bool)


@pytest.mark.parametrize(
    "arguments, line",
    [
        ({"tokens": (np.zeros(3), "int[B, T]")}, "tokens is float64[3]; accepted: int[B, T]"),
        (
            {"tokens": (TOKENS.astype(float), "int[B, T]")},
            "tokens is float64[2, 5]; accepted: int[B, T] with B = 2, T = 5",
        ),
        ({"mask": (TOKENS, "bool[B, T]")}, "mask is int32[2, 5]; accepted: bool[B, T] with B = 2, T = 5"),
        ({"hidden": (np.zeros((2, 3)), "float[..., 4]")}, "hidden is float64[2, 3]; accepted: float[..., 4]"),
        ({"hidden": (np.float32(1), "float[..., 4]")}, "hidden is float32[]; accepted: float[..., 4]"),
        ({"x": (TOKENS, "float[B, T]")}, "x is int32[2, 5]; accepted: float[B, T] with B = 2, T = 5"),
        (
            {"a": (TOKENS, "int[B, T]"), "b": (TOKENS[:, :4], "int[B, T]")},
            "b is int32[2, 4]; accepted: int[B, T] with B = 2, T = 5",
        ),
        (
            {"a": (TOKENS, "int[B, T]"), "b": (np.zeros((3, 5), int), "int[1 or B, T]")},
            "b is int64[3, 5]; accepted: int[1 or B, T] with B = 2, T = 5",
        ),
        ({"square": (np.ones((3, 4)), "float[T, T]")}, "square is float64[3, 4]; accepted: float[T, T] with T = 3"),
    ],
)
def test_one_line_names_the_argument(arguments, line):
    with pytest.raises(InputError) as e:
        check_shapes(**arguments)
    assert str(e.value) == line


def test_what_is_accepted():
    check_shapes(
        tokens=(TOKENS, "int[B, T]"),
        ids=([[1] * 5] * 2, "int[B, T]"),
        one=(TOKENS[:1], "int[1 or B, T]"),
        all=(TOKENS, "int[1 or B, T]"),
        none=(None, "bool[B]"),
        rows=(jnp.zeros((2, 5, 4), jnp.bfloat16), "float[..., T, 4]"),
        row=(np.zeros(4), "float[..., 4]"),
        scalar=(np.int8(1), "int[]"),
    )


def cached(cfg, batch=2, slots=8, **changes):
    return init_cache(dataclasses.replace(cfg, **changes), batch, slots)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"tokens": TOKENS[0]}, "tokens is int32[5]; accepted: int[B, T]"),
        ({"positions": TOKENS[:, :4]}, "positions is int32[2, 4]; accepted: int[1 or B, T]"),
        ({"positions": np.zeros((2, 5))}, "positions is float64[2, 5]; accepted: int[1 or B, T]"),
        ({"mask": np.ones((5, 4), bool)}, "mask is bool[5, 4]; accepted: bool[T, T] with T = 5"),
        ({"mask": np.ones((5, 5), int)}, "mask is int64[5, 5]; accepted: bool[T, T]"),
        ({"mask": np.ones((3, 5, 5), bool)}, "mask is bool[3, 5, 5]; accepted: bool[1 or B, T, T] with B = 2, T = 5"),
        ({"segments": TOKENS[:1]}, "segments is int32[1, 5]; accepted: int[B, T] with B = 2, T = 5"),
        ({"cache": {"batch": 3}}, "cache.k[0] is float32[3, 2, 8, 8]; accepted: float[B, 2, S, 8] with B = 2"),
        ({"cache": {"kv_heads": 1}}, "cache.k[0] is float32[2, 1, 8, 8]; accepted: float[B, 2, S, 8]"),
    ],
)
def test_forward(tiny, change, words):
    cfg, params = tiny
    arguments = {"tokens": TOKENS, "positions": TOKENS, "mask": MASK} | change
    if "cache" in change:
        arguments["cache"] = cached(cfg, **change["cache"])
    with pytest.raises(InputError, match=re.escape(words)):
        jax.eval_shape(lambda params: forward(params, cfg, **arguments), params)


def test_unembed_and_noise(tiny):
    cfg, params = tiny
    with pytest.raises(InputError, match=re.escape("hidden is float32[2, 31]; accepted: float[..., 32]")):
        unembed(params, cfg, jnp.zeros((2, 31)))
    key, ok = jax.random.key(0), TOKENS > 0
    with pytest.raises(InputError, match=re.escape("response_mask is int32[2, 5]; accepted: bool[B, T]")):
        add_noise(key, TOKENS, TOKENS, TOKENS, NoiseConfig())
    with pytest.raises(InputError, match=re.escape("segment_ids is int32[2, 4]; accepted: int[B, T] with B = 2")):
        add_noise(key, TOKENS, ok, TOKENS[:, :4], NoiseConfig())


def test_decoding(tiny):
    cfg, params = tiny
    for prompts in ([], [[1], []]):
        with pytest.raises(InputError, match="prompts without a token; accepted: one row or more of one token or more"):
            init_state(cfg, TREE_SETS["root"], prompts, DecodeConfig(), (), slots=512)
    state = init_state(cfg, TREE_SETS["chain4"], [[1]], DecodeConfig(), (), slots=512)
    with pytest.raises(InputError, match=re.escape("state.tokens is int32[512]; accepted: int[B, S]")):
        step(params, state.replace(tokens=state.tokens[0]), cfg=cfg, trees=TREE_SETS["chain4"])
    with pytest.raises(
        InputError, match=re.escape("state.cache.k[0] is float32[1, 2, 256, 8]; accepted: float[B, 2, S, 8]")
    ):
        smaller = init_cache(cfg, 1, 256)
        step(params, state.replace(cache=smaller), cfg=cfg, trees=TREE_SETS["chain4"])


def test_a_batch_to_train_on(tiny):
    cfg, params = tiny
    run = RunConfig(
        model=ModelStart(ckpt="unused"),
        data=DataConfig(sources=[DataSource(path="unused")]),
        train=TrainConfig(out="unused", steps=1),
    )
    take = make_train_step(cfg, run)
    batch = {"tokens": TOKENS, "segment_ids": TOKENS, "positions": TOKENS, "response": TOKENS > 0}
    with pytest.raises(InputError, match="batch: response missing; accepted: tokens, segment_ids, positions, response"):
        take(None, None, {name: batch[name] for name in batch if name != "response"})
    with pytest.raises(InputError, match=re.escape("batch response is int32[2, 5]; accepted: bool[B, T]")):
        take(None, None, batch | {"response": TOKENS})
    with pytest.raises(InputError, match=re.escape("batch positions is int32[2, 3]; accepted: int[B, T]")):
        take(None, None, batch | {"positions": TOKENS[:, :3]})
