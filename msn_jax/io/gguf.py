"""GGUF files (llama.cpp): metadata, and weights dequantized one tensor at a time under Hugging Face names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGUFReader, ReaderTensor, dequantize

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
    """Reads the strings of the vocabulary through a plain array: through np.memmap it takes twice as long."""

    def _get(self, *args, **kwargs):
        if isinstance(self.data, np.memmap):
            self.data = self.data.view(np.ndarray)
        return super()._get(*args, **kwargs)


class GGUFSource:
    """A GGUF file, with the other parts of one that gguf-split cut.

    Raises InputError where it is none, or not whole, and for a tensor of a type that is not supported.
    """

    def __init__(self, path: Path):
        self.name = str(path)
        self.meta, tensors = _read(path)
        for part in _other_parts(path, self.meta):
            tensors += _read(part)[1]
        architecture = self.meta.get("general.architecture")
        self._tensors = {_hf_name(t.name, architecture): t for t in tensors}
        if len(self._tensors) < len(tensors) or self.meta.get("split.tensors.count", len(tensors)) != len(tensors):
            raise InputError(f"{path}: {len(tensors)} tensors, not as many as its metadata and their names say")
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


def is_gguf(path: Path) -> bool:
    """Whether a file is meant to be one: by its name, or by how it begins, since some stores name it by its hash."""
    if path.suffix.lower() == ".gguf":
        return path.is_file()
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False


def _read(path: Path) -> tuple[dict, list[ReaderTensor]]:
    """(metadata, tensors) of one file."""
    try:
        reader = _Reader(path)
        meta = {key: field.contents() for key, field in reader.fields.items()}
        end = max((t.data_offset + t.n_bytes for t in reader.tensors), default=0)
    except (OSError, ValueError, LookupError, TypeError, ArithmeticError, AttributeError, AssertionError) as e:
        # What the parsing of damaged bytes runs into: gguf checks little of them.
        raise InputError(f"{path}: not a whole GGUF file ({type(e).__name__}: {e})") from e
    if end > path.stat().st_size:
        raise InputError(f"{path}: truncated, {path.stat().st_size} bytes of at least {end}")
    return meta, list(reader.tensors)


def _other_parts(path: Path, meta: dict) -> list[Path]:
    """The files that gguf-split wrote after the first. Raises InputError for another part, or one that is missing."""
    number, count = meta.get("split.no", 0), meta.get("split.count", 0)
    if not isinstance(count, int) or count < 2:
        return []
    name = lambda i: f"-{i + 1:05}-of-{count:05}.gguf"
    stem = path.name[: -len(name(0))]
    if path.name.lower() != (stem + name(number)).lower():
        raise InputError(
            f"{path}: part {number + 1} of {count} of a split GGUF; accepted: names as gguf-split gives them"
        )
    suffix = path.name[-5:]
    parts = [path.with_name(stem + name(i)[:-5] + suffix) for i in range(count)]
    if number:
        raise InputError(f"{path}: part {number + 1} of {count} of a split GGUF; accepted: the first, {parts[0].name}")
    for part in parts[1:]:
        if not part.is_file():
            raise InputError(f"{path}: its part {part.name} is missing; accepted: all {count} parts in one directory")
    return parts[1:]


def _check_type(file: str, name: str, tensor) -> None:
    try:
        # One row, so that a type that cannot be read is known before any memory is spent.
        dequantize(tensor.data.reshape(-1, tensor.data.shape[-1])[:1], tensor.tensor_type)
    except NotImplementedError:
        raise InputError(f"{file}: {name} has the type {tensor.tensor_type.name}, not supported") from None
