"""What a decoder is: its sizes and what tells its family apart. No arrays, no jax."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from msn_jax.errors import InputError, check_fields
from msn_jax.settings import check_settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Rotary position scaling: `linear` (Chen et al. 2023) or `llama3` (Llama 3.1)."""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192

    def __post_init__(self):
        check_settings(self, "rope_scaling.")
        check_fields(self, "rope_scaling.", kind=(self.kind in ("linear", "llama3"), "linear, llama3"))

    def scaled(self, frequency: float) -> float:
        """A frequency, radians a position, after scaling."""
        if self.kind == "linear":
            return frequency / self.factor
        # Llama 3.1: long wavelengths are stretched, short ones kept, those between blended.
        turns = self.original_max_position * frequency / (2 * math.pi)
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = min(max(kept, 0.0), 1.0)
        return frequency * (kept + (1 - kept) / self.factor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder of the LLaMA family or one of its neighbours. Letters in comments are the shape key of README.md."""

    vocab_size: int  # V
    embed: int  # D
    layers: int  # L
    heads: int  # N
    kv_heads: int  # K
    head_dim: int  # H
    mlp: int  # F
    max_position: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False
    # What tells the families apart. The defaults are LLaMA's.
    norm: str = "rms"  # or layer: LayerNorm with a bias
    activation: str = "swiglu"  # or gelu_tanh: an MLP without a gate, GELU by its tanh approximation
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # root mean square norms of queries and keys over H
    sliding_window: int | None = None  # tokens that each one sees, itself included; None: all before it

    def __post_init__(self):
        check_settings(self, "model config: ")
        check_fields(
            self,
            "model config: ",
            norm=(self.norm in ("rms", "layer"), "rms, layer"),
            activation=(self.activation in ("swiglu", "gelu_tanh"), "swiglu, gelu_tanh"),
        )
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, (int, float)) and not isinstance(value, bool) and not 0 < value < math.inf:
                raise InputError(f"model config: {field.name} = {value} is not possible; accepted: a positive number")
        if self.heads % self.kv_heads:
            raise InputError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")
        if self.head_dim % 2:
            raise InputError(f"head_dim {self.head_dim} is odd; rotary embeddings need an even one")

    @property
    def group(self) -> int:
        """Query heads that share one kv head (G)."""
        return self.heads // self.kv_heads

    @classmethod
    def from_fields(cls, where: str, fields: dict[str, Any]) -> ModelConfig:
        """From the fields of this class, rope_scaling as a dict. Raises InputError naming `where` and the field."""
        known = {field.name: field for field in dataclasses.fields(cls)}
        for name in sorted(fields.keys() - known):
            raise InputError(f"{where}: {name} is no field of it; accepted: {', '.join(sorted(known))}")
        for name, field in known.items():
            if field.default is dataclasses.MISSING and name not in fields:
                raise InputError(f"{where}: the field {name} is missing")
        if (scaling := fields.get("rope_scaling")) is not None:
            try:
                fields = fields | {"rope_scaling": RopeScaling(**scaling)}
            except TypeError:
                raise InputError(f"{where}: rope_scaling = {scaling}; accepted: kind, factor, ...") from None
        return cls(**fields)


# What each family is, beside its sizes, by model_type of config.json; a GGUF architecture of that name is the same.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
    "starcoder2": {
        "norm": "layer",
        "activation": "gelu_tanh",
        "qkv_bias": True,
        "o_bias": True,
        "mlp_bias": True,
    },
}
