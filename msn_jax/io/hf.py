"""Hugging Face layout: the table of tensor names, and weights read one tensor at a time."""

from __future__ import annotations

import dataclasses
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

from msn_jax.errors import InputError, warn
from msn_jax.io.published_config import config_from_hf
from msn_jax.linear import Int8Weight, round_int8
from msn_jax.model_config import ModelConfig
from msn_jax.params import ArraySpec, Layer, Params, declare
from msn_jax.sharding import sharding

# Our field -> the tensors that it holds, joined along the axis that follows. A family has those of its config.
LAYER_NAMES = {
    "attn_norm": (("input_layernorm.weight",), 0),
    "attn_norm_bias": (("input_layernorm.bias",), 0),
    "qkv": (("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"), 1),
    "qkv_bias": (("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"), 1),
    "q_norm": (("self_attn.q_norm.weight",), 0),
    "k_norm": (("self_attn.k_norm.weight",), 0),
    "o": (("self_attn.o_proj.weight",), 0),
    "o_bias": (("self_attn.o_proj.bias",), 0),
    "mlp_norm": (("post_attention_layernorm.weight",), 0),
    "mlp_norm_bias": (("post_attention_layernorm.bias",), 0),
    "gate_up": (("mlp.gate_proj.weight", "mlp.up_proj.weight"), 0),
    "gate_up_bias": (("mlp.gate_proj.bias", "mlp.up_proj.bias"), 0),
    "down": (("mlp.down_proj.weight",), 0),
    "down_bias": (("mlp.down_proj.bias",), 0),
}
# StarCoder2's, where they differ.
PLAIN_MLP_NAMES = {
    "gate_up": (("mlp.c_fc.weight",), 0),
    "gate_up_bias": (("mlp.c_fc.bias",), 0),
    "down": (("mlp.c_proj.weight",), 0),
    "down_bias": (("mlp.c_proj.bias",), 0),
}
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TOP_NAMES = {
    "embed": EMBED,
    "final_norm": "model.norm.weight",
    "final_norm_bias": "model.norm.bias",
    "unembed": HEAD,
}
DTYPES = ("F64", "F32", "F16", "BF16")  # of stored weights, as safetensors calls them


class TensorSource(Protocol):
    """A file of weights under Hugging Face names."""

    name: str
    shapes: dict[str, tuple[int, ...]]

    def read(self, tensor: str) -> np.ndarray: ...


def layer_names(cfg: ModelConfig) -> dict[str, tuple[tuple[str, ...], int]]:
    """The rows of the tables above that this model has."""
    layer = declare(cfg).layers[0]
    names = LAYER_NAMES if cfg.activation == "swiglu" else LAYER_NAMES | PLAIN_MLP_NAMES
    return {field: row for field, row in names.items() if getattr(layer, field) is not None}


def part_shapes(cfg: ModelConfig) -> dict[str, list[tuple[int, ...]]]:
    """How each of a field's parts is shaped before they are joined; a stored weight is [out, in] of the same size."""
    D, K, G, H, F = cfg.embed, cfg.kv_heads, cfg.group, cfg.head_dim, cfg.mlp
    qkv = {"qkv": [(K, G, H, D), (K, 1, H, D), (K, 1, H, D)], "qkv_bias": [(K, G, H), (K, 1, H), (K, 1, H)]}
    return qkv | ({"gate_up": [(1, F, D)] * 2, "gate_up_bias": [(1, F)] * 2} if cfg.activation == "swiglu" else {})


def tensors(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of this model stores."""
    top, layer = declare(cfg), declare(cfg).layers[0]
    out = {name: spec.shape for f, name in TOP_NAMES.items() if (spec := getattr(top, f))}
    for field, (names, _) in layer_names(cfg).items():
        parts = part_shapes(cfg).get(field, [getattr(layer, field).shape])
        for name, shape in zip(names, parts, strict=True):
            # Inputs are one axis there: all but the first of o, the last of the others. Biases have none.
            ins = math.prod(shape[1:]) if field == "o" else shape[-1]
            vector = field.endswith(("norm", "bias"))
            stored = (math.prod(shape),) if vector else (math.prod(shape) // ins, ins)
            out |= {f"model.layers.{i}.{name}": stored for i in range(cfg.layers)}
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
        if name not in expected and not (cfg.tie_embeddings and name == HEAD) and "inv_freq" not in name:
            raise InputError(f"{source.name}: the tensor {name} is not part of this model")


def settle_head(cfg: ModelConfig, source: TensorSource, tied: bool | None) -> ModelConfig:
    """The config with the head that the weights have, as transformers 5 settles it.

    tied: tie_word_embeddings of config.json. Without the field, a model without a head of its own is tied. Where the
    config ties but the stored head has other numbers than the embedding, the head counts.
    Raises InputError for a tied head of another shape.
    """
    if tied is None and HEAD not in source.shapes:
        return dataclasses.replace(cfg, tie_embeddings=True)
    if not (cfg.tie_embeddings and {HEAD, EMBED} <= source.shapes.keys()):
        return cfg
    if source.shapes[HEAD] != source.shapes[EMBED]:
        raise InputError(
            f"{source.name}: {HEAD} has the shape {list(source.shapes[HEAD])}, and its config ties it to {EMBED}, "
            f"{list(source.shapes[EMBED])}; accepted: the same, or tie_word_embeddings = false"
        )
    if np.array_equal(source.read(HEAD), source.read(EMBED)):
        return cfg
    warn(f"{source.name}: {HEAD} differs from {EMBED}, to which the config ties it; the head is used as it is stored")
    return dataclasses.replace(cfg, tie_embeddings=False)


def load_params(
    cfg: ModelConfig, source: TensorSource, dtype=jnp.float32, mesh: Mesh | None = None, stacked: bool = False
) -> Params:
    """Read all weights, one array at a time, each straight to its place on `mesh` (or the default device).

    stacked: the form for training, where one array is a field of all layers.
    """
    check(cfg, source)
    specs, shapes, table = declare(cfg, stacked), part_shapes(cfg), layer_names(cfg)
    place = partial(_place, dtype=dtype, mesh=mesh)

    def read(i: int, field: str, shape: tuple[int, ...]) -> np.ndarray:
        names, axis = table[field]
        parts = [
            source.read(f"model.layers.{i}.{name}").reshape(part)
            for name, part in zip(names, shapes.get(field, [shape]), strict=True)
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
        layers = Layer(**{field: stacked_field(field) for field in table})
    else:
        layers = tuple(Layer(**{field: layer_field(i, field) for field in table}) for i in range(cfg.layers))
    return Params(
        layers=layers,
        **{
            field: None if spec is None else place(source.read(name), spec)
            for field, name in TOP_NAMES.items()
            for spec in [getattr(specs, field)]
        },
    )


def place_params(cfg: ModelConfig, params: Params, dtype, mesh: Mesh | None) -> Params:
    """NumPy weights of the form for decoding, each to its place as in `load_params`."""
    return jax.tree.map(partial(_place, dtype=dtype, mesh=mesh), params, declare(cfg))


def _place(value: np.ndarray, spec: ArraySpec, dtype, mesh: Mesh | None) -> jax.Array | Int8Weight:
    if jnp.dtype(dtype) == jnp.int8:
        if spec.init != "normal":  # what multiplies nothing
            return _place(value, spec, jnp.float32, mesh)
        weight, outs = round_int8(value, spec.ins), len(spec.shape) - spec.ins
        of_scale = ArraySpec(spec.shape[:outs], spec.axes[:outs])
        scale = _place(weight.scale, of_scale, jnp.float32, mesh)
        return Int8Weight(_array(weight.values, spec, mesh), scale)
    return _array(value.astype(dtype, copy=False), spec, mesh)


def _array(value: np.ndarray, spec: ArraySpec, mesh: Mesh | None) -> jax.Array:
    if mesh is None:
        placed = jax.device_put(value)
    else:
        # By callback, since in a run of several processes each one has only some of the devices.
        placed = jax.make_array_from_callback(value.shape, sharding(spec.axes, spec.shape, mesh), lambda at: value[at])
    return jax.block_until_ready(placed)  # or the host's arrays pile up behind the transfers


class SafetensorsSource:
    """`model.safetensors`, or else the shards that `model.safetensors.index.json` lists, as transformers reads them.

    Names are those of the whole model, also where a file holds it without its head, whose names lack `model.`.
    Raises InputError for a file that is missing or not whole, and for a tensor in two files or of another dtype.
    """

    def __init__(self, folder: Path):
        self.name, self._folder, self._open = str(folder), folder, (None, None)
        if (folder / "adapter_config.json").exists():
            raise InputError(
                f"{folder}: adapter_config.json lies beside config.json, and PEFT would load another base for it; "
                "accepted: a checkpoint without it, or its base with --adapter"
            )
        self._stored: dict[str, tuple[str, str]] = {}  # by name: the file, and the name there
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in self._files():
            handle = self._handle(file)
            for tensor in handle.keys():
                stored = handle.get_slice(tensor)
                if tensor in self._stored:
                    raise InputError(f"{folder}: the tensor {tensor} is in {self._stored[tensor][0]} and in {file}")
                if stored.get_dtype() not in DTYPES:
                    raise InputError(
                        f"{folder}: {tensor} has the dtype {stored.get_dtype()}, not supported; accepted: "
                        f"{', '.join(DTYPES)}"
                    )
                self._stored[tensor], self.shapes[tensor] = (file, tensor), tuple(stored.get_shape())
        if not any(tensor.startswith("model.") for tensor in self.shapes):
            whole = lambda tensor: tensor if tensor == HEAD else f"model.{tensor}"
            self._stored = {whole(tensor): where for tensor, where in self._stored.items()}
            self.shapes = {whole(tensor): shape for tensor, shape in self.shapes.items()}

    def _files(self) -> list[str]:
        index = self._folder / "model.safetensors.index.json"
        if (self._folder / "model.safetensors").exists() or not index.exists():
            return ["model.safetensors"]
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise InputError(f"{index}: no `weight_map` in it")
        for file in shards.values():
            if not isinstance(file, str) or Path(file).is_absolute() or ".." in Path(file).parts:
                raise InputError(f"{index}: weight_map names {file!r}; accepted: files in its own directory")
        return sorted(set(shards.values()))

    def _handle(self, file: str):
        # One at a time: pages of a mapped file stay in memory, and count as this process's, until it is closed.
        if self._open[0] != file:
            self._open = (None, None)
            path = self._folder / file
            try:
                self._open = file, safe_open(path, framework="numpy")
            except FileNotFoundError:
                raise InputError(f"{self._folder}: the weights file {file} is missing") from None
            except (SafetensorError, OSError) as e:
                raise InputError(f"{path}: not a whole safetensors file ({e})") from e
        return self._open[1]

    def read(self, tensor: str) -> np.ndarray:
        file, name = self._stored[tensor]
        return self._handle(file).get_tensor(name)


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
    return config_from_hf(read_json(folder / "config.json"))


def open_folder(folder: Path) -> tuple[ModelConfig, SafetensorsSource]:
    """The ModelConfig of a Hugging Face directory, with the head that its weights have, and those weights, not read."""
    cfg, source = read_config(folder), SafetensorsSource(folder)
    return settle_head(cfg, source, read_json(folder / "config.json").get("tie_word_embeddings")), source


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
