"""Low-rank adapters (Hu et al. 2021) as a pytree beside the frozen weights: a Layer of LowRank or None by linear map.

Stacked ([L, ...]) in training, a tuple of layers in decoding, as the weights themselves.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from msn_jax.config import LINEAR_MAPS, InputError, LoraConfig, ModelConfig
from msn_jax.model import HIGHEST, ArraySpec, Layer, LowRank, Params, declare

CONFIG, WEIGHTS = "adapter_config.json", "adapter.safetensors"
_INPUTS = {"qkv": 1, "o": 2, "gate_up": 1, "down": 1}  # last axes of each map's weight that are its input


def declare_adapter(cfg: ModelConfig, lora: LoraConfig) -> Layer:
    """A stacked adapter with an ArraySpec for every tensor; None for maps that are not in lora.targets."""
    layer = declare(cfg, stacked=True).layers

    def one(name: str) -> LowRank | None:
        if name not in lora.targets:
            return None
        spec = getattr(layer, name)
        outs = len(spec.shape) - _INPUTS[name]
        return LowRank(
            a=ArraySpec((cfg.layers, lora.rank, *spec.shape[outs:]), (None, None, *spec.axes[outs:])),
            b=ArraySpec((*spec.shape[:outs], lora.rank), (*spec.axes[:outs], None)),
            scale=lora.alpha / lora.rank,
        )

    return Layer(attn_norm=None, mlp_norm=None, **{name: one(name) for name in LINEAR_MAPS})


def init_adapter(key: jax.Array, cfg: ModelConfig, lora: LoraConfig) -> Layer:
    """A stacked float32 adapter that changes nothing yet: `a` normal with deviation 1/sqrt(fan in), `b` zero."""
    layer = declare_adapter(cfg, lora)

    def one(key: jax.Array, name: str) -> LowRank | None:
        spec = getattr(layer, name)
        if spec is None:
            return None
        std = math.prod(spec.a.shape[2:]) ** -0.5
        return spec.replace(a=std * jax.random.normal(key, spec.a.shape), b=jnp.zeros(spec.b.shape))

    keys = jax.random.split(key, len(LINEAR_MAPS))
    return layer.replace(**{name: one(key, name) for key, name in zip(keys, LINEAR_MAPS, strict=True)})


def merge(params: Params, adapter: Layer | tuple[Layer, ...]) -> Params:
    """The weights with the adapter added to them, in the form (stacked or not) and dtype that both have."""

    def add(w: jax.Array, low_rank: LowRank) -> jax.Array:
        outs = low_rank.b.ndim - 1
        a, b = low_rank.a.astype(jnp.float32), low_rank.b.astype(jnp.float32)
        delta = jax.lax.dot_general(b, a, (((outs,), (0,)), ((), ())), precision=HIGHEST)
        return (w.astype(jnp.float32) + low_rank.scale * delta).astype(w.dtype)

    def one(layer: Layer, low: Layer) -> Layer:
        maps = {name: getattr(low, name) for name in LINEAR_MAPS if getattr(low, name) is not None}
        return layer.replace(**{name: add(getattr(layer, name), low_rank) for name, low_rank in maps.items()})

    if isinstance(params.layers, Layer):
        return params.replace(layers=jax.vmap(one)(params.layers, adapter))
    return params.replace(layers=tuple(one(layer, low) for layer, low in zip(params.layers, adapter, strict=True)))


def save_adapter(folder: str | Path, adapter: Layer, lora: LoraConfig, base: str) -> None:
    """Write a stacked adapter: adapter_config.json (rank, alpha, targets, the base model) and adapter.safetensors."""
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{name}.{part}": np.asarray(getattr(getattr(adapter, name), part)) for name in lora.targets for part in "ab"
    }
    config = {"base": base, "rank": lora.rank, "alpha": lora.alpha, "targets": lora.targets}
    (folder / WEIGHTS).write_bytes(save(tensors))
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n")


def load_adapter(folder: str | Path, cfg: ModelConfig) -> Layer:
    """Read what `save_adapter` wrote, for a model of this shape; stacked float32.

    Raises InputError for a directory that holds no adapter, or one of another shape (the tensor is named).
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        lora = LoraConfig(rank=config["rank"], alpha=config["alpha"], targets=config["targets"])
        file = safe_open(folder / WEIGHTS, framework="numpy")
    except FileNotFoundError as e:
        raise InputError(f"--adapter {folder}: {Path(e.filename or WEIGHTS).name} is missing") from None
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as e:
        raise InputError(f"--adapter {folder}: cannot be read ({type(e).__name__}: {e})") from None
    specs = declare_adapter(cfg, lora)

    def read(name: str, part: str, spec: ArraySpec) -> jax.Array:
        key = f"{name}.{part}"
        shape = tuple(file.get_slice(key).get_shape()) if key in file.keys() else None
        if shape != spec.shape:
            raise InputError(f"--adapter {folder}: {key} has the shape {shape}; this model asks for {spec.shape}")
        return jnp.asarray(file.get_tensor(key))

    def one(name: str) -> LowRank | None:
        low = getattr(specs, name)
        return low and low.replace(a=read(name, "a", low.a), b=read(name, "b", low.b))

    return specs.replace(**{name: one(name) for name in LINEAR_MAPS})
