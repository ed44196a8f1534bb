"""Files of an adapter: adapter_config.json (its LoraConfig, the base model) and adapter.safetensors."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from msn_jax.adapters import Marked, declare_adapter
from msn_jax.config import LINEAR_MAPS, LoraConfig
from msn_jax.errors import InputError
from msn_jax.linear import LowRank
from msn_jax.model_config import ModelConfig
from msn_jax.params import ArraySpec, DraftAdapter, Layer

CONFIG, WEIGHTS = "adapter_config.json", "adapter.safetensors"
_SCALE = ".scale"  # of a tensor stored in int8: what a row's numbers are multiplied with


def save_adapter(folder: str | Path, adapter: Layer | DraftAdapter | Marked, lora: LoraConfig, base: str) -> None:
    """Write a stacked adapter, or embeddings of noise alone (a DraftAdapter without layers), in lora.stored_dtype."""
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    layers, noise_embed = adapter, None
    if isinstance(adapter, DraftAdapter | Marked):
        layers = adapter.weights if isinstance(adapter, Marked) else adapter.layers
        noise_embed = np.asarray(adapter.noise_embed)
    tensors = {}
    for name in lora.targets if layers is not None else ():
        low_rank = getattr(layers, name)
        tensors |= _stored(f"{name}.a", np.asarray(low_rank.a), 2, lora.stored_dtype)
        tensors |= _stored(f"{name}.b", np.asarray(low_rank.b), low_rank.b.ndim - 1, lora.stored_dtype)
    if noise_embed is not None:
        tensors["noise_embed"] = noise_embed.astype(np.float32 if lora.stored_dtype == "float32" else np.float16)
    (folder / WEIGHTS).write_bytes(save(tensors))
    (folder / CONFIG).write_text(json.dumps({"base": base} | dataclasses.asdict(lora), indent=1) + "\n")


def _stored(name: str, tensor: np.ndarray, lead: int, dtype: str) -> dict[str, np.ndarray]:
    """A tensor by name as it is stored; in int8 with a float16 for each row, the axes from `lead` on."""
    if dtype != "int8":
        return {name: tensor.astype(dtype)}
    most = np.abs(tensor).max(axis=tuple(range(lead, tensor.ndim)), keepdims=True)
    scale = np.where(most > 0, most / 127, 1).astype(np.float16)
    # A scale that float16 has rounded down would lead beyond 127.
    whole = np.clip(np.rint(tensor / scale.astype(np.float32)), -127, 127).astype(np.int8)
    return {name: whole, name + _SCALE: scale}


def load_adapter(folder: str | Path, cfg: ModelConfig) -> Layer | DraftAdapter | Marked:
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
        tensor = file.get_tensor(key).astype(np.float32)
        return jnp.asarray(tensor * file.get_tensor(key + _SCALE) if key + _SCALE in shapes else tensor)

    def one(name: str, low: LowRank | None) -> LowRank | None:
        return low and low.replace(a=read(f"{name}.a", low.a), b=read(f"{name}.b", low.b))

    noise_embed = None
    if "noise_embed" in shapes or lora.draft_only or not lora.rank:
        depths = shapes.get("noise_embed", (0,))[0]
        noise_embed = read("noise_embed", ArraySpec((depths, cfg.embed), (None, "embed")))
    if not lora.rank:
        return DraftAdapter(None, noise_embed)
    specs = declare_adapter(cfg, lora)
    layers = specs.replace(**{name: one(name, getattr(specs, name)) for name in LINEAR_MAPS})
    if lora.draft_only:
        return DraftAdapter(layers, noise_embed)
    return layers if noise_embed is None else Marked(layers, noise_embed)
