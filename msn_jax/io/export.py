"""Write a model in Hugging Face layout: the inverse of hf.py, from the same table of names."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from transformers import PreTrainedTokenizerBase

from msn_jax.errors import InputError, first_line
from msn_jax.io.files import is_remote
from msn_jax.io.hf import TOP_NAMES, layer_names, part_shapes, read_json, tensors
from msn_jax.io.published_config import config_from_hf
from msn_jax.io.tokenizer import save_tokenizer
from msn_jax.model_config import ModelConfig
from msn_jax.params import Params

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "starcoder2": "Starcoder2ForCausalLM",
}
_DTYPES = {"float32": "F32", "bfloat16": "BF16"}  # as safetensors calls them
_MARK = {"exported_by": "msn_jax"}  # in config.json: what `export_hf` may replace
_WRITTEN = ("config.json", "generation_config.json", "token*", "special_tokens_map.json", "*.jinja", "model*", "marks")


def hf_config(cfg: ModelConfig, stop_ids: Iterable[int] = ()) -> dict[str, Any]:
    """The config.json of a model: the inverse of config_from_hf.

    The model type is the plainest that computes it: a Mistral without a window is written as a llama, which it is.
    Rope is written twice, since transformers 5 reads `rope_parameters` and transformers 4 the two others.
    """
    scaling, stops = cfg.rope_scaling, sorted(stop_ids)
    rope: dict[str, Any] = {"rope_type": "default"}
    if scaling is not None:
        rope = {"rope_type": scaling.kind, "factor": float(scaling.factor)}
    if scaling is not None and scaling.kind == "llama3":
        rope |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position,
        }
    family = _family(cfg)
    config = {
        "architectures": [_ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.embed,
        "num_hidden_layers": cfg.layers,
        "num_attention_heads": cfg.heads,
        "num_key_value_heads": cfg.kv_heads,
        "head_dim": cfg.head_dim,
        "intermediate_size": cfg.mlp,
        "max_position_embeddings": cfg.max_position,
        "rope_theta": float(cfg.rope_theta),
        "rope_scaling": None if scaling is None else rope,
        "rope_parameters": {"rope_theta": float(cfg.rope_theta), **rope},
        "tie_word_embeddings": cfg.tie_embeddings,
        # Named even where there is none: transformers would take 1 and 2.
        "bos_token_id": None,
        "eos_token_id": stops[0] if len(stops) == 1 else stops or None,
    }
    if family == "starcoder2":
        config |= {"hidden_act": "gelu_pytorch_tanh", "norm_epsilon": cfg.norm_eps, "use_bias": cfg.mlp_bias}
    else:
        config |= {"hidden_act": "silu", "rms_norm_eps": cfg.norm_eps}
    if family == "llama":
        config |= {"attention_bias": cfg.o_bias, "mlp_bias": cfg.mlp_bias}
    elif family in ("qwen2", "qwen3"):
        windowed = cfg.sliding_window is not None
        kind = "sliding_attention" if windowed else "full_attention"
        config |= {"use_sliding_window": windowed, "max_window_layers": 0 if windowed else cfg.layers}
        config |= {"sliding_window": cfg.sliding_window, "layer_types": [kind] * cfg.layers}
    else:
        config |= {"sliding_window": cfg.sliding_window}
    if family == "qwen3":
        config |= {"attention_bias": cfg.o_bias}
    if (read := config_from_hf(config)) != cfg:
        wrong = [f.name for f in dataclasses.fields(cfg) if getattr(read, f.name) != getattr(cfg, f.name)]
        raise InputError(f"no Hugging Face model type has this combination: a {family} with another {', '.join(wrong)}")
    return config


def _family(cfg: ModelConfig) -> str:
    """The model_type of transformers that comes nearest."""
    if cfg.norm == "layer":
        return "starcoder2"
    if cfg.qk_norm:
        return "qwen3"
    if cfg.qkv_bias and not cfg.o_bias:
        return "qwen2"
    return "llama" if cfg.sliding_window is None else "mistral"


def check_export_dir(directory: str | Path) -> Path:
    """The path to export to. Raises InputError, before any work, for one that is taken or cannot be written."""
    path = Path(directory)
    accepted = "accepted: a new or empty local directory, or an earlier export"
    if is_remote(directory):
        raise InputError(f"directory {directory}: not a local path; {accepted}")
    if path.exists() and not path.is_dir():
        raise InputError(f"directory {directory}: a file; {accepted}")
    if path.is_dir() and any(path.iterdir()) and not _is_export(path):
        raise InputError(f"directory {directory}: a directory with other files in it; {accepted}")
    if path.is_dir() and (others := sorted(f.name for f in path.iterdir() if not any(map(f.match, _WRITTEN)))):
        raise InputError(f"directory {directory}: {others[0]} in it is not of an earlier export; {accepted}")
    parent = next(p for p in path.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"directory {directory}: {parent} cannot be written; {accepted}")
    return path


def _is_export(path: Path) -> bool:
    return (path / "config.json").is_file() and _MARK.items() <= read_json(path / "config.json").items()


def export_hf(
    directory: str | Path,
    cfg: ModelConfig,
    params: Params,
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: Iterable[int],
    dtype="float32",
    max_shard_bytes: int = 4 * 10**9,
) -> None:
    """Write config, generation config, tokenizer and weights in `dtype` (float32 or bfloat16), one tensor at a time.

    params: `layers` a tuple of L Layers, or one Layer whose arrays have L as their first axis.
    The directory appears when it is whole, in place of an earlier export.
    Raises InputError as `check_export_dir` does, and for a disk that fills; then an earlier export is still there.
    """
    dtype, path = jnp.dtype(dtype), check_export_dir(directory)
    if str(dtype) not in _DTYPES:
        raise InputError(f"dtype {dtype} cannot be exported; accepted: {', '.join(_DTYPES)}")
    config = hf_config(cfg, stop_ids) | {"bos_token_id": tokenizer.bos_token_id, "dtype": str(dtype), **_MARK}
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")  # another process may export there too
    try:
        for left in path.parent.glob(f".{path.name}.*.partial"):
            if not _runs(left.name.split(".")[-2]):
                shutil.rmtree(left, ignore_errors=True)
        partial.mkdir(parents=True)
        save_tokenizer(tokenizer, partial)
        _write_json(partial / "config.json", config)
        ids = {name: config[name] for name in ("bos_token_id", "eos_token_id")}
        _write_json(partial / "generation_config.json", {"_from_model_config": False, **ids})
        _write_weights(partial, cfg, params, dtype, max_shard_bytes)
        _put_in_place(partial, path)
    except OSError as e:
        shutil.rmtree(partial, ignore_errors=True)
        raise InputError(f"directory {directory}: cannot be written ({e.strerror or first_line(e)})") from e


def _stored(cfg: ModelConfig, params: Params) -> Iterator[tuple[str, np.ndarray]]:
    """Each tensor as it is stored, [out, in], by name: the inverse of hf.load_params. One field is on the host."""
    shapes, stored, table = part_shapes(cfg), tensors(cfg), layer_names(cfg)
    for field, name in TOP_NAMES.items():
        if name in stored:
            yield name, np.asarray(getattr(params, field))
    for i in range(cfg.layers):
        for field, (names, axis) in table.items():
            layers = params.layers
            value = np.asarray(getattr(layers[i], field) if isinstance(layers, tuple) else getattr(layers, field)[i])
            sizes = [shape[axis] for shape in shapes.get(field, [value.shape])]
            for part_name, part in zip(names, np.split(value, np.cumsum(sizes)[:-1], axis), strict=True):
                name = f"model.layers.{i}.{part_name}"
                yield name, part.reshape(stored[name])


def _names(cfg: ModelConfig) -> list[str]:
    """The order in which `_stored` gives the tensors."""
    layer = [name for names, _ in layer_names(cfg).values() for name in names]
    names = [*TOP_NAMES.values(), *(f"model.layers.{i}.{name}" for i in range(cfg.layers) for name in layer)]
    return [name for name in names if name in tensors(cfg)]


def _write_weights(folder: Path, cfg: ModelConfig, params: Params, dtype: np.dtype, max_shard_bytes: int) -> None:
    """model.safetensors, or shards and their index. Not safetensors' save_file: it takes all of a file's tensors."""
    nbytes = {name: math.prod(shape) * dtype.itemsize for name, shape in tensors(cfg).items()}
    shards: list[list[str]] = [[]]
    for name in _names(cfg):
        if shards[-1] and sum(nbytes[n] for n in shards[-1]) + nbytes[name] > max_shard_bytes:
            shards.append([])
        shards[-1].append(name)
    files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    files = files if len(shards) > 1 else ["model.safetensors"]
    stream = _stored(cfg, params)
    for file, names in zip(files, shards):
        with (folder / file).open("wb") as f:
            f.write(_header(names, tensors(cfg), nbytes, _DTYPES[str(dtype)]))
            for name in names:
                got, value = next(stream)
                assert got == name
                f.write(np.ascontiguousarray(value, dtype))
            f.flush()
            os.fsync(f.fileno())
    if len(shards) > 1:
        where = {name: file for file, names in zip(files, shards) for name in names}
        index = {"metadata": {"total_size": sum(nbytes.values())}, "weight_map": where}
        _write_json(folder / "model.safetensors.index.json", index)


def _header(names: list[str], shapes: dict[str, tuple[int, ...]], nbytes: dict[str, int], dtype: str) -> bytes:
    """The head of a safetensors file: its length in 8 bytes, then where each tensor lies in what follows."""
    head, at = {"__metadata__": {"format": "pt"}}, 0  # transformers asks for the format
    for name in names:
        head[name] = {"dtype": dtype, "shape": shapes[name], "data_offsets": [at, at := at + nbytes[name]]}
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _runs(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:  # it is somebody else's
        pass
    return True


def _put_in_place(partial: Path, path: Path) -> None:
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    if path.exists():
        path.rename(old)
    partial.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
