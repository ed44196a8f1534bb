"""GGUF files (llama.cpp): metadata, and weights dequantized one tensor at a time under Hugging Face names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGUFReader, dequantize

from msn_jax.errors import InputError
from msn_jax.io.published_config import config_from_gguf

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_STARCODER2 = {"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}
ROPE_FACTORS = "rope_freqs.weight"  # of llama3 scaling: what each frequency is divided by


def _hf_name(name: str, architecture: str | None) -> str:
    stem, _, kind = name.rpartition(".")
    if stem.startswith("blk."):
        _, layer, part = stem.split(".", 2)
        names = _LAYER | _STARCODER2 if architecture == "starcoder2" else _LAYER
        if part in names:
            return f"model.layers.{layer}.{names[part]}.{kind}"
    return f"{_TOP[stem]}.{kind}" if stem in _TOP else name


class _Reader(GGUFReader):
    """Reads each string of the vocabulary through a plain array: by way of np.memmap that takes twice as long."""

    def _get(self, *args, **kwargs):
        if isinstance(self.data, np.memmap):
            self.data = self.data.view(np.ndarray)
        return super()._get(*args, **kwargs)


class GGUFSource:
    """One GGUF file. Raises InputError where it is not one, or not whole."""

    def __init__(self, path: Path):
        self.name = str(path)
        try:
            reader = _Reader(path)
            self.meta = {key: field.contents() for key, field in reader.fields.items()}
            end = max(t.data_offset + t.n_bytes for t in reader.tensors)
        except Exception as e:  # gguf raises whatever its parsing of damaged bytes runs into
            raise InputError(f"{path}: not a whole GGUF file ({type(e).__name__}: {e})") from None
        if end > path.stat().st_size:
            raise InputError(f"{path}: truncated, {path.stat().st_size} bytes of at least {end}")
        architecture = self.meta.get("general.architecture")
        self._tensors = {_hf_name(t.name, architecture): t for t in reader.tensors}
        # llama.cpp stores the rows of a llama's heads with rotary pairs side by side; its other families' as they are.
        self._pairs = architecture == "llama"
        # GGUF lists the fastest axis first.
        self.shapes = {name: tuple(int(n) for n in t.shape[::-1]) for name, t in self._tensors.items()}
        if "model.embed_tokens.weight" not in self.shapes:
            raise InputError(f"{path}: the tensor token_embd.weight is missing")
        factors = None
        if self._pairs and ROPE_FACTORS in self.shapes:
            factors = self._dequantized(ROPE_FACTORS).tolist()
            del self.shapes[ROPE_FACTORS]
        self.config = config_from_gguf(
            self.meta, self.shapes["model.embed_tokens.weight"][0], "lm_head.weight" not in self.shapes, factors
        )
        for name in self.shapes:
            _check_type(self.name, name, self._tensors[name])

    def read(self, tensor: str) -> np.ndarray:
        weight = self._dequantized(tensor)
        if self._pairs and (".q_proj." in tensor or ".k_proj." in tensor):
            half = self.config.head_dim // 2
            weight = weight.reshape(-1, half, 2, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)
        return weight

    def _dequantized(self, tensor: str) -> np.ndarray:
        t = self._tensors[tensor]
        return dequantize(t.data, t.tensor_type).reshape(self.shapes[tensor])


def _check_type(file: str, name: str, tensor) -> None:
    try:
        # One row, so that a type that cannot be read is known before any memory is spent.
        dequantize(tensor.data.reshape(-1, tensor.data.shape[-1])[:1], tensor.tensor_type)
    except NotImplementedError:
        raise InputError(f"{file}: {name} has the type {tensor.tensor_type.name}, not supported") from None
