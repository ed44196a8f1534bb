"""Every setting of the package, as frozen dataclasses. No arrays, no jax."""

from __future__ import annotations

import dataclasses
from typing import Any


class InputError(ValueError):
    """Input that cannot be honoured: one line that names what is wrong and what is accepted."""


def first_line(error: Exception) -> str:
    """What an error of another library says, short enough for an InputError of ours."""
    return (str(error).strip() or type(error).__name__).split("\n")[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Rotary position scaling: `linear` (Chen et al. 2023) or `llama3` (Llama 3.1)."""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of a LLaMA-family decoder. Letters in comments are the shape key of README.md."""

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

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            kinds = {"int": (int,), "float": (int, float), "bool": (bool,)}.get(field.type)
            if kinds is None:
                continue
            wrong = not isinstance(value, kinds) or (kinds != (bool,) and (isinstance(value, bool) or not 0 < value))
            if wrong:
                accepted = "true or false" if kinds == (bool,) else f"a positive {field.type}"
                raise InputError(f"model config: {field.name} = {value!r} is not possible; accepted: {accepted}")
        if self.heads % self.kv_heads:
            raise InputError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")
        if self.head_dim % 2:
            raise InputError(f"head_dim {self.head_dim} is odd; rotary embeddings need an even one")

    @property
    def group(self) -> int:
        """Query heads that share one kv head (G)."""
        return self.heads // self.kv_heads

    @classmethod
    def from_gguf(cls, meta: dict[str, Any], vocab_size: int, tie_embeddings: bool) -> ModelConfig:
        """Read the metadata of a GGUF file (its `general.*` and `llama.*` fields).

        Raises InputError for another architecture or a field whose value this model does not compute.
        """
        arch = meta.get("general.architecture")
        if arch != "llama":
            raise InputError(f"GGUF architecture {arch!r} is not supported; accepted: llama")
        get = lambda name, default=None: meta.get(f"{arch}.{name}", default)
        for field, accepted in {"expert_count": 0, "attention.sliding_window": 0}.items():
            if get(field, accepted) != accepted:
                raise InputError(f"GGUF field {arch}.{field} = {get(field)} is not supported; accepted: {accepted}")
        number = lambda name, default=None: _number("GGUF", meta, f"{arch}.{name}", default)
        heads, embed = number("attention.head_count"), number("embedding_length")
        head_dim = number("attention.key_length", embed // heads)
        if get("rope.dimension_count", head_dim) != head_dim or get("attention.value_length", head_dim) != head_dim:
            raise InputError(f"GGUF: rope or value dimensions other than the head's {head_dim} are not supported")
        return cls(
            vocab_size=vocab_size,
            embed=embed,
            layers=number("block_count"),
            heads=heads,
            kv_heads=number("attention.head_count_kv", heads),
            head_dim=head_dim,
            mlp=number("feed_forward_length"),
            max_position=number("context_length"),
            norm_eps=number("attention.layer_norm_rms_epsilon"),
            rope_theta=number("rope.freq_base", 10000.0),
            rope_scaling=_rope_from_gguf(get),
            tie_embeddings=tie_embeddings,
        )

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> ModelConfig:
        """Read a Hugging Face `config.json`.

        Raises InputError for a field whose value this model does not compute.
        """
        known = {"llama"}
        if hf.get("model_type") not in known:
            raise InputError(
                f"config.json: model_type {hf.get('model_type')!r} is not supported; accepted: {', '.join(known)}"
            )
        only = {
            "hidden_act": ("silu",),
            "attention_bias": (False, None),
            "mlp_bias": (False, None),
            "sliding_window": (None,),
            "partial_rotary_factor": (1.0, None),
            "pretraining_tp": (1, None),
            "quantization_config": (None,),
        }
        for field, accepted in only.items():
            if hf.get(field, accepted[0]) not in accepted:
                raise InputError(f"config.json: {field} = {hf[field]!r} is not supported; accepted: {accepted[0]!r}")
        number = lambda name: _number("config.json", hf, name)
        heads, embed = number("num_attention_heads"), number("hidden_size")
        max_position = number("max_position_embeddings")
        theta, scaling = _rope_from_hf(hf, max_position)
        return cls(
            vocab_size=number("vocab_size"),
            embed=embed,
            layers=number("num_hidden_layers"),
            heads=heads,
            kv_heads=heads if hf.get("num_key_value_heads") is None else number("num_key_value_heads"),
            head_dim=embed // heads if hf.get("head_dim") is None else number("head_dim"),
            mlp=number("intermediate_size"),
            max_position=max_position,
            norm_eps=number("rms_norm_eps"),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_embeddings=hf.get("tie_word_embeddings", False),
        )


def _number(where: str, source: dict[str, Any], name: str, default: float | None = None) -> Any:
    """A positive number. Raises InputError naming the field."""
    value = source.get(name, default)
    if value is None:
        raise InputError(f"{where}: the field {name!r} is missing")
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise InputError(f"{where}: {name} = {value!r} is not possible; accepted: a positive number")
    return value


def _rope_from_hf(hf: dict[str, Any], max_position: int) -> tuple[float, RopeScaling | None]:
    # transformers 5 writes one `rope_parameters`; older files have `rope_theta` and `rope_scaling`,
    # the oldest of which call the type `type`.
    where = "config.json, rope"
    parts = [hf.get(name) or {} for name in ("rope_scaling", "rope_parameters")]
    if not all(isinstance(part, dict) for part in parts):
        raise InputError("config.json: rope_scaling and rope_parameters must be objects")
    rope = {"rope_theta": hf.get("rope_theta", 10000.0), **parts[0], **parts[1]}
    scaling = {"low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
    for name in rope.keys() - scaling - {"rope_theta", "rope_type", "type", "factor"}:
        if (name, rope[name]) != ("partial_rotary_factor", 1.0):
            raise InputError(f"{where}: {name} = {rope[name]!r} is not supported")
    theta = _number(where, rope, "rope_theta")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling(kind="linear", factor=_number(where, rope, "factor"))
    if kind == "llama3":
        return theta, RopeScaling(
            kind="llama3",
            factor=_number(where, rope, "factor"),
            low_freq_factor=_number(where, rope, "low_freq_factor"),
            high_freq_factor=_number(where, rope, "high_freq_factor"),
            original_max_position=_number(where, rope, "original_max_position_embeddings", max_position),
        )
    raise InputError(f"config.json: rope type {kind!r} is not supported; accepted: default, linear, llama3")


def _rope_from_gguf(get) -> RopeScaling | None:
    # llama.cpp's defaults: a factor without a type is linear, and 0 is no scaling.
    kind, factor = get("rope.scaling.type", "linear"), get("rope.scaling.factor", get("rope.scale_linear", 0.0))
    if kind == "none" or factor in (0.0, 1.0):
        return None
    if kind == "linear":
        return RopeScaling(kind="linear", factor=factor)
    raise InputError(f"GGUF rope scaling type {kind!r} is not supported; accepted: none, linear")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """How to generate. All but `method`, `tree` and `batch_size` are traced: changing them compiles nothing."""

    method: str = "tr-jacobi"
    tree: str | None = None  # None: the measured default of the backend, see decode.tree.tree_set
    max_new_tokens: int = 256
    batch_size: int = 1
    temperature: float = 0.0  # 0 is greedy
    top_k: int = 0  # 0 keeps all
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        for name, bad, accepted in (
            ("max_new_tokens", self.max_new_tokens < 1, "1 or more"),
            ("batch_size", self.batch_size < 1, "1 or more"),
            ("temperature", not 0 <= self.temperature < float("inf"), "0 (greedy) or a positive number"),
            ("top_k", not 0 <= self.top_k < 2**31, "0 (all tokens) or more"),
            ("top_p", not 0 < self.top_p <= 1, "a number above 0 and up to 1"),
            ("seed", not 0 <= self.seed < 2**32, "0 to 2**32 - 1"),
        ):
            if bad:
                raise InputError(f"{name} = {getattr(self, name)} is not possible; accepted: {accepted}")


# Shapes that can be planned and sized without a checkpoint (published configs of the named models).
SHAPES = {
    "smollm2-135m": ModelConfig(
        vocab_size=49152,
        embed=576,
        layers=30,
        heads=9,
        kv_heads=3,
        head_dim=64,
        mlp=1536,
        max_position=8192,
        rope_theta=1e5,
        tie_embeddings=True,
    ),
    "llama-3-8b": ModelConfig(
        vocab_size=128256,
        embed=4096,
        layers=32,
        heads=32,
        kv_heads=8,
        head_dim=128,
        mlp=14336,
        max_position=8192,
        rope_theta=5e5,
    ),
}
