"""Settings: every field says what it is for, and refuses what is not of its kind."""

import dataclasses
import re

import numpy as np
import pytest

from msn_jax import DecodeConfig, InputError, ModelConfig, NoiseConfig
from msn_jax.config import SECTIONS, LoraConfig
from msn_jax.settings import check_settings, describe, setting


@pytest.mark.parametrize("section", SECTIONS)
def test_every_setting_of_a_run_says_what_it_is_for(section):
    for field in dataclasses.fields(SECTIONS[section]):
        assert len(field.metadata["about"]) > 5, field.name


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"max_new_tokens": 2.5}, "max_new_tokens = 2.5 is not possible; accepted: a whole number: 1 or more"),
        ({"max_new_tokens": True}, "max_new_tokens = True is not possible; accepted: a whole number"),
        ({"max_new_tokens": 0}, "max_new_tokens = 0 is not possible; accepted: 1 or more"),
        ({"max_new_tokens": None}, "max_new_tokens = None"),
        ({"temperature": "0.5"}, "temperature = '0.5' is not possible; accepted: a number: 0 .greedy. or above"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"temperature": float("inf")}, "temperature = inf"),
        ({"top_k": 2.5}, "top_k = 2.5"),
        ({"top_p": [0.5]}, "top_p = .0.5."),
        ({"top_p": float("nan")}, "top_p = nan"),
        ({"seed": 1.5}, "seed = 1.5"),
        ({"seed": None}, "seed = None"),
        ({"seed": -1}, "seed = -1"),
        ({"batch_size": 2.0}, "batch_size = 2.0"),
        ({"method": None}, "method = None is not possible; accepted: a text"),
        ({"tree": 3}, "tree = 3 is not possible; accepted: a text or null"),
    ],
)
def test_settings_of_another_kind_are_refused(fields, message):
    with pytest.raises(InputError, match=f"^{message}"):
        DecodeConfig(**fields)


def test_numbers_of_numpy_are_numbers():
    config = DecodeConfig(max_new_tokens=np.int64(3), temperature=np.float32(0.5), top_p=1)
    assert (config.max_new_tokens, config.temperature, config.top_p) == (3, 0.5, 1)


def test_the_other_settings_are_checked_alike():
    with pytest.raises(InputError, match="noise.length = 2.5 is not possible; accepted: a whole number: 1 or more"):
        NoiseConfig(length=2.5)
    with pytest.raises(InputError, match="lora.targets = qkv is not possible|lora.targets = 'qkv'"):
        LoraConfig(targets="qkv")


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"vocab_size": "8"}, "model config: vocab_size = '8' is not possible; accepted: a whole number"),
        ({"layers": 2.5}, "model config: layers = 2.5 is not possible; accepted: a whole number"),
        ({"tie_embeddings": 1}, "model config: tie_embeddings = 1 is not possible; accepted: true or false"),
        ({"rope_scaling": {}}, "model config: rope_scaling = {} is not possible; accepted: a RopeScaling or null"),
        ({"sliding_window": 0}, "model config: sliding_window = 0 is not possible; accepted: a positive number"),
    ],
)
def test_fields_of_a_model_are_of_their_kind(fields, message):
    sizes = dict(vocab_size=8, embed=8, layers=1, heads=2, kv_heads=1, head_dim=4, mlp=8, max_position=8)
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        ModelConfig(**sizes | fields)


def test_bounds_in_words_and_at_their_ends():
    @dataclasses.dataclass
    class Both:
        share: float = setting(0.5, "a share", above=0, most=1)

    assert describe(dataclasses.fields(Both)[0]) == "a share [a number above 0 and up to 1]"
    check_settings(Both(1), "")
    for value in (0, 1.01):
        with pytest.raises(InputError, match=f"both.share = {value} is not possible; accepted: a number above 0"):
            check_settings(Both(value), "both.")
