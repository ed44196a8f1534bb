"""Low-rank adapters (Hu et al. 2021) as a pytree beside the frozen weights: a Layer of LowRank or None by linear map.

Stacked ([L, ...]) in training, a tuple of layers in decoding, as the weights themselves.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from msn_jax.config import LINEAR_MAPS, LoraConfig
from msn_jax.errors import InputError
from msn_jax.linear import HIGHEST, LowRank
from msn_jax.model_config import ModelConfig
from msn_jax.params import ArraySpec, DraftAdapter, Layer, Params, declare

CONFIG, WEIGHTS = "adapter_config.json", "adapter.safetensors"
_INPUTS = {"qkv": 1, "o": 2, "gate_up": 1, "down": 1}  # last axes of each map's weight that are its input


def declare_adapter(cfg: ModelConfig, lora: LoraConfig, noise_length: int = 0) -> Layer | DraftAdapter:
    """A stacked adapter with an ArraySpec for every tensor; None for maps that are not in lora.targets.

    noise_length: of a draft-only adapter, how many noise tokens in a row it has embeddings for.
    """
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

    layers = Layer(attn_norm=None, mlp_norm=None, **{name: one(name) for name in LINEAR_MAPS})
    if not lora.draft_only:
        return layers
    return DraftAdapter(layers=layers, noise_embed=ArraySpec((noise_length, cfg.embed), (None, "embed")))


def init_adapter(key: jax.Array, cfg: ModelConfig, lora: LoraConfig, noise_length: int = 0) -> Layer | DraftAdapter:
    """A stacked float32 adapter that changes nothing yet: `a` normal with deviation 1/sqrt(fan in), `b` zero.

    Embeddings of noise are normal with deviation 0.02.
    """
    declared = declare_adapter(cfg, lora, noise_length)
    layer = declared.layers if lora.draft_only else declared

    def one(key: jax.Array, name: str) -> LowRank | None:
        spec = getattr(layer, name)
        if spec is None:
            return None
        std = math.prod(spec.a.shape[2:]) ** -0.5
        return spec.replace(a=std * jax.random.normal(key, spec.a.shape), b=jnp.zeros(spec.b.shape))

    keys = jax.random.split(key, len(LINEAR_MAPS))
    layers = layer.replace(**{name: one(key, name) for key, name in zip(keys, LINEAR_MAPS, strict=True)})
    if not lora.draft_only:
        return layers
    embed = 0.02 * jax.random.normal(jax.random.fold_in(key, 1), declared.noise_embed.shape)
    return DraftAdapter(layers=layers, noise_embed=embed)


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


def save_adapter(folder: str | Path, adapter: Layer | DraftAdapter, lora: LoraConfig, base: str) -> None:
    """Write a stacked adapter: adapter_config.json (its LoraConfig, the base model) and adapter.safetensors.

    A draft-only adapter is stored in float16: what it drafts is verified, and it takes half the room.
    """
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    layers = adapter.layers if lora.draft_only else adapter
    tensors = {
        f"{name}.{part}": np.asarray(getattr(getattr(layers, name), part)) for name in lora.targets for part in "ab"
    }
    if lora.draft_only:
        tensors["noise_embed"] = np.asarray(adapter.noise_embed)
        tensors = {name: tensor.astype(np.float16) for name, tensor in tensors.items()}
    (folder / WEIGHTS).write_bytes(save(tensors))
    (folder / CONFIG).write_text(json.dumps({"base": base} | dataclasses.asdict(lora), indent=1) + "\n")


def load_adapter(folder: str | Path, cfg: ModelConfig) -> Layer | DraftAdapter:
    """Read what `save_adapter` wrote, for a model of this shape; stacked float32.

    Raises InputError for a directory that holds no adapter, or one of another shape (the tensor is named).
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        config.pop("base")
        lora = LoraConfig(**config)
        file = safe_open(folder / WEIGHTS, framework="numpy")
    except FileNotFoundError as e:
        raise InputError(f"--adapter {folder}: {Path(e.filename or WEIGHTS).name} is missing") from None
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as e:
        raise InputError(f"--adapter {folder}: cannot be read ({type(e).__name__}: {e})") from None
    shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}

    def read(key: str, spec: ArraySpec) -> jax.Array:
        if shapes.get(key) != spec.shape:
            raise InputError(
                f"--adapter {folder}: {key} has the shape {shapes.get(key)}; this model asks for {spec.shape}"
            )
        return jnp.asarray(file.get_tensor(key).astype(np.float32))

    def one(name: str, low: LowRank | None) -> LowRank | None:
        return low and low.replace(a=read(f"{name}.a", low.a), b=read(f"{name}.b", low.b))

    specs = declare_adapter(cfg, lora, shapes.get("noise_embed", (0,))[0])
    layers = specs.layers if lora.draft_only else specs
    layers = layers.replace(**{name: one(name, getattr(layers, name)) for name in LINEAR_MAPS})
    return DraftAdapter(layers, read("noise_embed", specs.noise_embed)) if lora.draft_only else layers
