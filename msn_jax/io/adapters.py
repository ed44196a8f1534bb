"""Files of an adapter or of heads: adapter_config.json (how it is made, the base model) and adapter.safetensors."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from msn_jax.adapters import Marked, declare_adapter
from msn_jax.config import LINEAR_MAPS, LoraConfig
from msn_jax.eagle import EagleHead, declare_eagle
from msn_jax.errors import InputError, warn
from msn_jax.heads import MedusaHeads, declare_heads
from msn_jax.io import peft
from msn_jax.io.files import download, is_hub_id
from msn_jax.io.hf import EMBED, HEAD, TensorSource, layer_names, read_json
from msn_jax.linear import LowRank, widened
from msn_jax.model_config import ModelConfig
from msn_jax.ngrams import NgramTable
from msn_jax.params import ArraySpec, DraftAdapter, DraftLayers, Layer, Params

CONFIG, WEIGHTS = "adapter_config.json", "adapter.safetensors"
_KINDS = {"medusa": MedusaHeads, "eagle": EagleHead, "ngrams": NgramTable}
_SCALE = ".scale"  # of a tensor stored in int8: what a row's numbers are multiplied with


def save_adapter(
    folder: str | Path,
    adapter: Layer | DraftAdapter | DraftLayers | Marked | MedusaHeads | EagleHead | NgramTable,
    lora: LoraConfig,
    base: str,
    trained_on: dict[str, Any] | None = None,
) -> None:
    """Write a stacked adapter, or embeddings of noise alone (a DraftAdapter without layers), in lora.stored_dtype; or
    heads, in float16.

    base: the checkpoint that it was trained on. trained_on: the `fingerprint` of that.
    """
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(adapter, EagleHead):
        adapter = adapter.replace(vocabulary=adapter.ids)
    if kind := next((name for name, of in _KINDS.items() if isinstance(adapter, of)), None):
        stored = lambda x: x.astype(np.float16) if x.dtype == np.float32 else x
        tensors = {name: stored(np.asarray(tensor)) for name, tensor in vars(adapter).items()}
        return _write(folder, tensors, {"base": base, "kind": kind} | (trained_on or {}))
    layers, noise_embed = adapter, None
    if isinstance(adapter, DraftLayers):
        layers = adapter.layers
    elif isinstance(adapter, DraftAdapter | Marked):
        layers = adapter.weights if isinstance(adapter, Marked) else adapter.layers
        noise_embed = np.asarray(adapter.noise_embed)
    tensors = {}
    for name in lora.targets if layers is not None else ():
        low_rank = getattr(layers, name)
        tensors |= _stored(f"{name}.a", np.asarray(low_rank.a), 2, lora.stored_dtype)
        tensors |= _stored(f"{name}.b", np.asarray(low_rank.b), low_rank.b.ndim - 1, lora.stored_dtype)
    if noise_embed is not None:
        tensors["noise_embed"] = noise_embed.astype(np.float32 if lora.stored_dtype == "float32" else np.float16)
    _write(folder, tensors, {"base": base} | (trained_on or {}) | dataclasses.asdict(lora))


def _write(folder: epath.Path, tensors: dict[str, np.ndarray], settings: dict[str, Any]) -> None:
    (folder / WEIGHTS).write_bytes(save(tensors))
    (folder / CONFIG).write_text(json.dumps(settings, indent=1) + "\n")


def _stored(name: str, tensor: np.ndarray, lead: int, dtype: str) -> dict[str, np.ndarray]:
    """A tensor by name as it is stored; in int8 with a float16 for each row, the axes from `lead` on."""
    if dtype != "int8":
        return {name: tensor.astype(dtype)}
    most = np.abs(tensor).max(axis=tuple(range(lead, tensor.ndim)), keepdims=True)
    scale = np.where(most > 0, most / 127, 1).astype(np.float16)
    # A scale that float16 has rounded down would lead beyond 127.
    whole = np.clip(np.rint(tensor / scale.astype(np.float32)), -127, 127).astype(np.int8)
    return {name: whole, name + _SCALE: scale}


def find_adapter(adapter: str | Path) -> Path:
    """The .safetensors file of an adapter: of its directory, of a hub id (downloaded), or that file itself.

    Raises InputError where there is none with an adapter_config.json beside it.
    """
    path = Path(adapter)
    if not path.exists() and is_hub_id(str(adapter)):
        path = download("adapter", str(adapter), [CONFIG, "*.safetensors"])
    if path.is_dir():
        there = (path / CONFIG).exists()
        path /= peft.WEIGHTS if there and "peft_type" in _settings(path / WEIGHTS) else WEIGHTS
    elif path.suffix != ".safetensors":
        what = "a file that is not .safetensors" if path.exists() else "no such file or directory"
        raise InputError(f"adapter {adapter}: {what}; accepted: a directory with {CONFIG}, its .safetensors, a hub id")
    for file in (path.with_name(CONFIG), path):
        if not file.exists():
            raise InputError(f"adapter {adapter}: {file.name} is missing")
    return path


def fingerprint(norms: Iterable[np.ndarray], matrices: Iterable[np.ndarray]) -> dict[str, Any]:
    """What an adapter notes of the weights that it was trained on.

    base_norms: sha256 of the norms (the final one and, layer by layer, those before attention and before the MLP),
    which are the same in a quantised file; rounded to bfloat16, so that the dtype they were loaded in does not matter.
    base_sample: 32 numbers of each matrix (embedding, the last layer's down, the head where it is not tied).
    """
    parts = (np.asarray(norm).astype(np.float32).astype(ml_dtypes.bfloat16).tobytes() for norm in norms)
    digest = hashlib.sha256(b"".join(parts)).hexdigest()
    few = (np.asarray(m.reshape(-1)[:: max(math.prod(m.shape) // 32, 1)][:32]).astype(np.float32) for m in matrices)
    return {"base_norms": digest, "base_sample": [float(f"{x:.4g}") for x in np.concatenate(list(few))]}


def stored_fingerprint(cfg: ModelConfig, source: TensorSource) -> dict[str, Any]:
    """`fingerprint` of a checkpoint whose other weights are not read."""
    layer = "model.layers.{}.{}".format
    norms = [
        layer(i, f"{n}.weight") for i in range(cfg.layers) for n in ("input_layernorm", "post_attention_layernorm")
    ]
    matrices = [EMBED, layer(cfg.layers - 1, layer_names(cfg)["down"][0][0]), *[HEAD] * (not cfg.tie_embeddings)]
    return fingerprint(map(source.read, ["model.norm.weight", *norms]), map(source.read, matrices))


def loaded_fingerprint(params: Params) -> dict[str, Any]:
    """`fingerprint` of weights in the form for decoding."""
    layers = params.layers
    norms = (params.final_norm, *(norm for layer in layers for norm in (layer.attn_norm, layer.mlp_norm)))
    head = () if params.unembed is None else (params.unembed,)
    return fingerprint(norms, map(widened, (params.embed, layers[-1].down, *head)))


def check_base(adapter: Path, params: Params, name: str) -> None:
    """Warn where an adapter was trained on other weights than `params`, those of `name`, as far as it says."""
    settings = _settings(adapter)
    if "base_norms" not in settings:
        return
    here, noted = loaded_fingerprint(params), settings["base_sample"]
    a, b = np.array(here["base_sample"]), np.array(noted)
    # Four bits a weight leave a cosine of 0.99; that of two models is near 0.
    alike = len(a) == len(b) and a @ b > 0.9 * np.linalg.norm(a) * np.linalg.norm(b)
    if here["base_norms"] != settings["base_norms"] or not alike:
        warn(f"adapter {adapter.parent} was trained on {settings.get('base')}; {name} has other weights")


def _settings(adapter: Path) -> dict[str, Any]:
    settings = read_json(adapter.with_name(CONFIG))
    if "base" not in settings and "peft_type" not in settings:
        raise InputError(f"adapter {adapter.parent}: cannot be read: {CONFIG} has neither `base` nor `peft_type`")
    return settings


def load_adapter(
    adapter: str | Path, cfg: ModelConfig
) -> Layer | DraftAdapter | DraftLayers | Marked | MedusaHeads | EagleHead | NgramTable:
    """Read what `save_adapter` or PEFT wrote, for a model of this shape; stacked float32.

    Raises InputError for what holds no adapter, or one of another shape (the tensor is named).
    """
    path = find_adapter(adapter)
    folder, settings = path.parent, _settings(path)
    if "peft_type" in settings:
        return peft.read_peft(path, settings, cfg)
    base = settings.pop("base")
    for name in ("base_norms", "base_sample"):
        settings.pop(name, None)
    kind = settings.pop("kind", None)
    if kind not in (None, *_KINDS):
        raise InputError(f"adapter {folder}: is of the kind {kind!r}; accepted: {', '.join(_KINDS)}, none for noise")
    try:
        lora = LoraConfig(**({} if kind else settings))
        file = safe_open(path, framework="numpy")
    except InputError:
        raise
    except (OSError, ValueError, TypeError, SafetensorError) as e:
        raise InputError(f"adapter {folder}: cannot be read ({type(e).__name__}: {e})") from e
    shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}

    def read(key: str, spec: ArraySpec) -> jax.Array:
        if shapes.get(key) != spec.shape:
            raise InputError(
                f"adapter {folder}: {key} has the shape {shapes.get(key)}; this model asks for {spec.shape}; "
                f"it was trained on {base}"
            )
        tensor = file.get_tensor(key).astype(np.float32)
        return jnp.asarray(tensor * file.get_tensor(key + _SCALE) if key + _SCALE in shapes else tensor)

    if kind == "ngrams":
        keys, ranked = (file.get_tensor(name) for name in ("keys", "ranked"))
        if ranked.shape[:2] != keys.shape or ranked.max() >= cfg.vocab_size:
            raise InputError(
                f"adapter {folder}: n-grams of another vocabulary than this model's {cfg.vocab_size} tokens"
            )
        return NgramTable(jnp.asarray(keys), jnp.asarray(ranked))
    if kind == "eagle":
        specs = declare_eagle(cfg, shapes.get("vocabulary", (0,))[0])
        head = EagleHead(**{name: read(name, spec) for name, spec in vars(specs).items()})
        if len(head.ids) and not 0 <= head.ids.min() <= head.ids.max() < cfg.vocab_size:
            raise InputError(f"adapter {folder}: drafts tokens beyond this model's vocabulary of {cfg.vocab_size}")
        return head
    if kind:
        specs = declare_heads(cfg, shapes.get("bias", (0,))[0])
        return MedusaHeads(weight=read("weight", specs.weight), bias=read("bias", specs.bias))

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
    if lora.draft_layers:
        return DraftLayers(layers)
    return layers if noise_embed is None else Marked(layers, noise_embed)
