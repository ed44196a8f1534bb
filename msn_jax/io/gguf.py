"""GGUF files (llama.cpp): metadata, and weights dequantized one tensor at a time under Hugging Face names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGUFReader, dequantize

from msn_jax.config import InputError, ModelConfig

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _hf_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem.startswith("blk."):
        _, layer, part = stem.split(".", 2)
        if part in _LAYER:
            return f"model.layers.{layer}.{_LAYER[part]}.{kind}"
    return f"{_TOP[stem]}.{kind}" if stem in _TOP else name


class GGUFSource:
    """One GGUF file. Raises InputError where it is not one, or not whole."""

    def __init__(self, path: Path):
        self.name = str(path)
        try:
            reader = GGUFReader(path)
            self.meta = {key: field.contents() for key, field in reader.fields.items()}
            end = max(t.data_offset + t.n_bytes for t in reader.tensors)
        except Exception as e:  # gguf raises whatever its parsing of damaged bytes runs into
            raise InputError(f"{path}: not a whole GGUF file ({type(e).__name__}: {e})") from None
        if end > path.stat().st_size:
            raise InputError(f"{path}: truncated, {path.stat().st_size} bytes of at least {end}")
        self._tensors = {_hf_name(t.name): t for t in reader.tensors}
        # GGUF lists the fastest axis first.
        self.shapes = {name: tuple(int(n) for n in t.shape[::-1]) for name, t in self._tensors.items()}
        if "model.embed_tokens.weight" not in self.shapes:
            raise InputError(f"{path}: the tensor token_embd.weight is missing")
        self.config = ModelConfig.from_gguf(
            self.meta, self.shapes["model.embed_tokens.weight"][0], "lm_head.weight" not in self.shapes
        )

    def read(self, tensor: str) -> np.ndarray:
        t = self._tensors[tensor]
        try:
            weight = dequantize(t.data, t.tensor_type).reshape(self.shapes[tensor])
        except NotImplementedError:
            raise InputError(f"{self.name}: {tensor} has the type {t.tensor_type.name}, not supported") from None
        if ".q_proj." in tensor or ".k_proj." in tensor:
            # llama.cpp stores the rows of each head with rotary pairs side by side; put the halves back.
            half = self.config.head_dim // 2
            weight = weight.reshape(-1, half, 2, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)
        return weight
