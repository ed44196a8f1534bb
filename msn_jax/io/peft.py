"""LoRA adapters of the PEFT library: adapter_config.json with a `peft_type`, and adapter_model.safetensors."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from msn_jax.config import LINEAR_MAPS
from msn_jax.errors import InputError
from msn_jax.io.hf import DTYPES, layer_names, part_shapes
from msn_jax.linear import LowRank
from msn_jax.model_config import ModelConfig
from msn_jax.params import Layer, declare

WEIGHTS = "adapter_model.safetensors"
_NAME = re.compile(r"(?:base_model\.model\.)?(?:model\.)?layers\.(\d+)\.(.+)\.lora_([AB])(?:\.default)?\.weight")

# Settings that change what is computed, and the values at which they do not.
_ONLY: dict[str, tuple] = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", None),
    "bias": ("none",),
    "lora_bias": (False, None),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    # PEFT's other kinds of init change the base weights when they begin.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}


def read_peft(file: Path, settings: dict[str, Any], cfg: ModelConfig) -> Layer:
    """An adapter for a model of this shape, stacked float32: a Layer of LowRank, or None for maps without one.

    q, k and v are one matrix here, as are gate and up, so their adapters become one: `a` has theirs one below the
    other, `b` theirs as blocks, each with its own outputs and its own rows of `a`. What scales them is part of `b`.
    Raises InputError, before any weight is read, for what is no such adapter or does not fit the model, by name.
    """
    for field, accepted in _ONLY.items():
        if settings.get(field, accepted[0]) not in accepted:
            names = " or ".join(map(repr, accepted))
            raise InputError(
                f"adapter {file.parent}: {field} = {settings[field]!r} is not supported; accepted: {names}"
            )
    try:
        with safe_open(file, framework="numpy") as stored:
            parts = _parts(file, stored, cfg)
            fields = {field: _field(file, stored, field, parts, settings, cfg) for field in LINEAR_MAPS}
    except FileNotFoundError:
        raise InputError(f"adapter {file.parent}: {file.name} is missing") from None
    except (SafetensorError, OSError) as e:
        raise InputError(f"adapter {file}: not a whole safetensors file ({e})") from e
    return Layer(attn_norm=None, mlp_norm=None, **fields)


def _parts(file: Path, stored, cfg: ModelConfig) -> dict[tuple[int, str, str], str]:
    """(layer, module, A or B) -> the tensor's name there. Raises InputError for a tensor that has no place."""
    modules = {name.removesuffix(".weight") for field in LINEAR_MAPS for name in layer_names(cfg)[field][0]}
    parts = {}
    for name in stored.keys():
        match = _NAME.fullmatch(name)
        if match is None or match[2] not in modules or int(match[1]) >= cfg.layers:
            raise InputError(
                f"adapter {file.parent}: {name} has no place in this model of {cfg.layers} layers; accepted: lora_A "
                f"and lora_B of {', '.join(sorted(modules))}"
            )
        if (dtype := stored.get_slice(name).get_dtype()) not in DTYPES:
            raise InputError(f"adapter {file.parent}: {name} has the dtype {dtype}; accepted: {', '.join(DTYPES)}")
        parts[int(match[1]), match[2], match[3]] = name
    if not parts:
        raise InputError(f"adapter {file.parent}: {file.name} holds no tensor")
    return parts


def _field(file: Path, stored, field: str, parts: dict, settings: dict[str, Any], cfg: ModelConfig) -> LowRank | None:
    """The adapter of one of our maps, all layers. Ranks that differ by layer are filled up with zeros."""
    names, axis = layer_names(cfg)[field]
    modules = [name.removesuffix(".weight") for name in names]
    spec = getattr(declare(cfg).layers[0], field)
    shapes = part_shapes(cfg).get(field, [spec.shape])
    ranks = np.zeros((cfg.layers, len(modules)), int)
    for i in range(cfg.layers):
        for j, (module, shape) in enumerate(zip(modules, shapes, strict=True)):
            ranks[i, j] = _rank(file, stored, parts, (i, module), shape, spec.ins)
    if not ranks.any():
        return None
    begins = np.concatenate([[0], np.cumsum(ranks.max(axis=0))])  # each part's rows of `a`
    ins = spec.shape[len(spec.shape) - spec.ins :]
    a = np.zeros((cfg.layers, begins[-1], *ins), np.float32)
    b = []
    for j, (module, shape) in enumerate(zip(modules, shapes, strict=True)):
        outs = shape[: len(shape) - spec.ins]
        block = np.zeros((cfg.layers, *outs, begins[-1]), np.float32)
        for i in np.flatnonzero(ranks[:, j]):
            rows = slice(begins[j], begins[j] + ranks[i, j])
            low, high = (stored.get_tensor(parts[i, module, half]).astype(np.float32) for half in "AB")
            a[i, rows] = low.reshape(-1, *ins)
            block[i, ..., rows] = _scale(settings, f"model.layers.{i}.{module}", ranks[i, j]) * high.reshape(*outs, -1)
        b.append(block)
    return LowRank(a=jnp.asarray(a), b=jnp.asarray(np.concatenate(b, axis + 1)), scale=1.0)


def _rank(file: Path, stored, parts: dict, place: tuple[int, str], shape: tuple[int, ...], inputs: int) -> int:
    """The rank in one module; 0 where the adapter leaves it alone. Raises InputError for a half, or another shape."""
    names = [parts.get((*place, half)) for half in "AB"]
    if names == [None, None]:
        return 0
    if None in names:
        raise InputError(f"adapter {file.parent}: {names[0] or names[1]} has no other half")
    (r, ins), (outs, same) = (tuple(stored.get_slice(name).get_shape()) for name in names)
    asked = math.prod(shape[len(shape) - inputs :]), math.prod(shape[: len(shape) - inputs])
    if (ins, outs) != asked or r != same:
        raise InputError(
            f"adapter {file.parent}: {names[0]} has the shape {[r, ins]} and lora_B {[outs, same]}; this model asks "
            f"for {[r, asked[0]]} and {[asked[1], r]}"
        )
    return r


def _scale(settings: dict[str, Any], module: str, rank: int) -> float:
    alpha = settings.get("lora_alpha", 8)
    for pattern, other in (settings.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = other
            break
    return alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank
