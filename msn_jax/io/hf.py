"""Hugging Face layout: the table of tensor names, and weights read one tensor at a time."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open

from msn_jax.config import InputError, ModelConfig
from msn_jax.model import ArraySpec, Layer, Params, declare
from msn_jax.sharding import sharding

# Our field -> the modules whose `weight` it holds, joined along the axis that follows.
LAYER_NAMES = {
    "attn_norm": (("input_layernorm",), 0),
    "qkv": (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), 1),
    "o": (("self_attn.o_proj",), 0),
    "mlp_norm": (("post_attention_layernorm",), 0),
    "gate_up": (("mlp.gate_proj", "mlp.up_proj"), 0),
    "down": (("mlp.down_proj",), 0),
}
TOP_NAMES = {"embed": "model.embed_tokens", "final_norm": "model.norm", "unembed": "lm_head"}


class TensorSource(Protocol):
    """A file of weights under Hugging Face names."""

    name: str
    shapes: dict[str, tuple[int, ...]]

    def read(self, tensor: str) -> np.ndarray: ...


def part_shapes(cfg: ModelConfig) -> dict[str, list[tuple[int, ...]]]:
    """How each of a field's parts is shaped before they are joined; a stored weight is [out, in] of the same size."""
    D, K, G, H, F = cfg.embed, cfg.kv_heads, cfg.group, cfg.head_dim, cfg.mlp
    return {"qkv": [(K, G, H, D), (K, 1, H, D), (K, 1, H, D)], "gate_up": [(1, F, D), (1, F, D)]}


def tensors(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of this model stores."""
    top, layer = declare(cfg), declare(cfg).layers[0]
    out = {f"{module}.weight": spec.shape for f, module in TOP_NAMES.items() if (spec := getattr(top, f))}
    for field, (modules, _) in LAYER_NAMES.items():
        parts = part_shapes(cfg).get(field, [getattr(layer, field).shape])
        for module, shape in zip(modules, parts, strict=True):
            # Inputs are one axis there: all but the first of o, the last of the others.
            ins = 1 if len(shape) == 1 else math.prod(shape[1:]) if field == "o" else shape[-1]
            stored = shape if len(shape) == 1 else (math.prod(shape) // ins, ins)
            out |= {f"model.layers.{i}.{module}.weight": stored for i in range(cfg.layers)}
    return out


def check(cfg: ModelConfig, source: TensorSource) -> None:
    """Compare names and shapes before any weight is read. Raises InputError naming the tensor."""
    expected = tensors(cfg)
    for name, shape in expected.items():
        if name not in source.shapes:
            raise InputError(f"{source.name}: the tensor {name} is missing")
        if source.shapes[name] != shape:
            raise InputError(
                f"{source.name}: {name} has the shape {list(source.shapes[name])}; its config asks for {list(shape)}"
            )
    for name in source.shapes:
        # A tied head may be stored twice; old files carry their rope frequencies, which follow from the config.
        if name not in expected and not (cfg.tie_embeddings and name == "lm_head.weight") and "inv_freq" not in name:
            raise InputError(f"{source.name}: the tensor {name} is not part of this model")


def load_params(
    cfg: ModelConfig, source: TensorSource, dtype=jnp.float32, mesh: Mesh | None = None, stacked: bool = False
) -> Params:
    """Read all weights, one array at a time, each straight to its place on `mesh` (or the default device).

    stacked: the form for training, where one array is a field of all layers.
    """
    check(cfg, source)
    specs, shapes = declare(cfg, stacked), part_shapes(cfg)
    place = partial(_place, dtype=dtype, mesh=mesh)

    def read(i: int, field: str, shape: tuple[int, ...]) -> np.ndarray:
        modules, axis = LAYER_NAMES[field]
        parts = [
            source.read(f"model.layers.{i}.{module}.weight").reshape(part)
            for module, part in zip(modules, shapes.get(field, [shape]), strict=True)
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis)

    def stacked_field(field: str) -> jax.Array:
        spec = getattr(specs.layers, field)
        value = np.empty(spec.shape, dtype)
        for i in range(cfg.layers):
            value[i] = read(i, field, spec.shape[1:])
        return place(value, spec)

    def layer_field(i: int, field: str) -> jax.Array:
        spec = getattr(specs.layers[i], field)
        return place(read(i, field, spec.shape), spec)

    if stacked:
        layers = Layer(**{field: stacked_field(field) for field in LAYER_NAMES})
    else:
        layers = tuple(Layer(**{field: layer_field(i, field) for field in LAYER_NAMES}) for i in range(cfg.layers))
    return Params(
        layers=layers,
        **{
            field: None if spec is None else place(source.read(f"{module}.weight"), spec)
            for field, module in TOP_NAMES.items()
            for spec in [getattr(specs, field)]
        },
    )


def place_params(cfg: ModelConfig, params: Params, dtype, mesh: Mesh | None) -> Params:
    """NumPy weights of the form for decoding, each to its place as in `load_params`."""
    return jax.tree.map(partial(_place, dtype=dtype, mesh=mesh), params, declare(cfg))


def _place(value: np.ndarray, spec: ArraySpec, dtype, mesh: Mesh | None) -> jax.Array:
    value = value.astype(dtype, copy=False)
    if mesh is None:
        return jax.device_put(value)
    # By callback, since in a run of several processes each one has only some of the devices.
    return jax.make_array_from_callback(value.shape, sharding(spec.axes, spec.shape, mesh), lambda at: value[at])


class SafetensorsSource:
    """`model.safetensors`, or the shards that `model.safetensors.index.json` lists."""

    def __init__(self, folder: Path):
        self.name = str(folder)
        index = folder / "model.safetensors.index.json"
        if index.exists():
            shards = read_json(index).get("weight_map")
            if not isinstance(shards, dict):
                raise InputError(f"{index}: no `weight_map` in it")
            files = sorted(set(shards.values()))
        else:
            files = ["model.safetensors"]
        self._file, self.shapes = {}, {}
        for file in files:
            try:
                handle = safe_open(folder / file, framework="numpy")
            except FileNotFoundError:
                raise InputError(f"{folder}: the weights file {file} is missing") from None
            except (SafetensorError, OSError) as e:
                raise InputError(f"{folder / file}: not a whole safetensors file ({e})") from None
            for tensor in handle.keys():
                self._file[tensor] = handle
                self.shapes[tensor] = tuple(handle.get_slice(tensor).get_shape())

    def read(self, tensor: str) -> np.ndarray:
        return self._file[tensor].get_tensor(tensor)


def read_json(path: Path) -> dict:
    """A JSON object. Raises InputError where the file cannot be read or holds something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from None
    except (ValueError, RecursionError) as e:
        raise InputError(f"{path}: not valid JSON ({e})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: not a JSON object")
    return value


def read_config(folder: Path) -> ModelConfig:
    """The ModelConfig of a Hugging Face directory."""
    return ModelConfig.from_hf(read_json(folder / "config.json"))


def stop_ids(folder: Path) -> set[int]:
    """Every end-of-text id that the directory's config and generation config name."""
    ids = set()
    for file in ("config.json", "generation_config.json"):
        if (folder / file).exists():
            eos = read_json(folder / file).get("eos_token_id")
            eos = eos if isinstance(eos, list) else [] if eos is None else [eos]
            if not all(isinstance(i, int) for i in eos):
                raise InputError(f"{folder / file}: eos_token_id = {eos!r}; accepted: a token id or a list of them")
            ids |= set(eos)
    return ids
