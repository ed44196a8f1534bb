"""Fine-tune LLaMA-style models with noise, and decode them several tokens a forward pass (EMNLP 2024)."""

from msn_jax.config import DecodeConfig, InputError, ModelConfig
from msn_jax.decode.generate import Result, generate
from msn_jax.io.checkpoint import LM, load
from msn_jax.model import KVCache, Params, forward, init, unembed

__all__ = [
    "LM",
    "DecodeConfig",
    "InputError",
    "KVCache",
    "ModelConfig",
    "Params",
    "Result",
    "forward",
    "generate",
    "init",
    "load",
    "unembed",
]
