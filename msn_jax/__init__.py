"""Fine-tune LLaMA-style models with noise, and decode them several tokens a forward pass (EMNLP 2024).

Each name is imported when it is first asked for, and what it needs with it: transformers, orbax and datasets take
seconds.
"""

import importlib
import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from msn_jax.cache import KVCache
    from msn_jax.config import DecodeConfig, NoiseConfig
    from msn_jax.decode.generate import Stream, generate, stream
    from msn_jax.decode.request import Result
    from msn_jax.errors import InputError
    from msn_jax.io.loading import LM, load
    from msn_jax.model import forward, unembed
    from msn_jax.model_config import ModelConfig
    from msn_jax.noise import add_noise
    from msn_jax.params import Params, init
    from msn_jax.sharding import make_mesh
    from msn_jax.train_step import make_train_step

__version__ = "0.1.0"

_HOMES = {
    "msn_jax.cache": ("KVCache",),
    "msn_jax.config": ("DecodeConfig", "NoiseConfig"),
    "msn_jax.decode.request": ("Result",),
    "msn_jax.decode.generate": ("Stream", "generate", "stream"),
    "msn_jax.errors": ("InputError",),
    "msn_jax.io.loading": ("LM", "load"),
    "msn_jax.model": ("forward", "unembed"),
    "msn_jax.model_config": ("ModelConfig",),
    "msn_jax.noise": ("add_noise",),
    "msn_jax.params": ("Params", "init"),
    "msn_jax.sharding": ("make_mesh",),
    "msn_jax.train_step": ("make_train_step",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "LM",
    "DecodeConfig",
    "InputError",
    "KVCache",
    "ModelConfig",
    "NoiseConfig",
    "Params",
    "Result",
    "Stream",
    "add_noise",
    "forward",
    "generate",
    "init",
    "load",
    "make_mesh",
    "make_train_step",
    "stream",
    "unembed",
]

# It would warn on every start that torch is missing, which nothing here needs.
logging.getLogger("transformers").addFilter(lambda record: "PyTorch was not found" not in record.getMessage())


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(globals() | _HOME)
