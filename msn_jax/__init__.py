"""Fine-tune LLaMA-style models with noise, and decode them several tokens a forward pass (EMNLP 2024)."""

from msn_jax.cache import KVCache
from msn_jax.config import DecodeConfig, NoiseConfig
from msn_jax.decode.generate import Result, generate
from msn_jax.errors import InputError
from msn_jax.io.loading import LM, load
from msn_jax.model import forward, unembed
from msn_jax.model_config import ModelConfig
from msn_jax.noise import add_noise
from msn_jax.params import Params, init
from msn_jax.train_step import make_train_step

__all__ = [
    "LM",
    "DecodeConfig",
    "InputError",
    "KVCache",
    "ModelConfig",
    "NoiseConfig",
    "Params",
    "Result",
    "add_noise",
    "forward",
    "generate",
    "init",
    "load",
    "make_train_step",
    "unembed",
]
