"""What config.json or the metadata of a GGUF file say of a model, as a ModelConfig; the rest is refused by name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from msn_jax.errors import InputError
from msn_jax.model_config import FAMILIES, ModelConfig, RopeScaling

# Fields of config.json and the values that this model computes; the first is what a missing field stands for.
_ONLY = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1.0, None),
    "quantization_config": (None,),
    # transformers then reads other files than those of the usual names.
    "transformers_weights": (None,),
    "configuration_files": (None,),
}
_ONLY_OF = {
    "llama": {"attention_bias": (False, True, None), "mlp_bias": (False, True, None), "sliding_window": (None,)},
    "mistral": {},
    "qwen2": {"attention_bias": (True, None)},
    "qwen3": {"attention_bias": (False, True, None)},
    "starcoder2": {
        "hidden_act": ("gelu_pytorch_tanh",),
        "activation_function": ("gelu_pytorch_tanh", None),
        "norm_type": ("layer_norm",),
        "mlp_type": ("default",),
        "use_bias": (True, False),
        "scale_attn_weights": (True,),
    },
}


# Fields of a GGUF that change what is computed, and the value at which they change nothing.
_GGUF_PLAIN = {
    "expert_count": 0,
    "attention.sliding_window_pattern": 0,
    "attention.causal": True,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "attention.scale": 0.0,
    "attention.temperature_scale": 0.0,
    "attn_logit_softcapping": 0.0,
    "final_logit_softcapping": 0.0,
    "embedding_scale": 0.0,
    "residual_scale": 0.0,
    "logit_scale": 0.0,
    "use_parallel_residual": False,
    "tensor_data_layout": None,
    "rope.scaling.attn_factor": 1.0,
}


def config_from_gguf(
    meta: dict[str, Any],
    vocab_size: int,
    tie_embeddings: bool,
    rope_factors: Sequence[float] | None = None,
) -> ModelConfig:
    """Read the metadata of a GGUF file (its `general.*` and, of a llama, `llama.*` fields).

    rope_factors: what the tensor rope_freqs.weight divides each frequency by, where the file has one.
    Raises InputError for another architecture or a field whose value this model does not compute.
    """
    arch, where = meta.get("general.architecture"), "GGUF"
    if arch not in (known := ("llama", "qwen2", "qwen3", "starcoder2")):
        raise InputError(f"GGUF architecture {arch!r} is not supported; accepted: {', '.join(known)}")
    if (kind := meta.get("general.type", "model")) != "model":
        raise InputError(f"GGUF: general.type = {kind!r} is not supported; accepted: model")
    get = lambda name, default=None: meta.get(f"{arch}.{name}", default)
    for field, plain in _GGUF_PLAIN.items():
        if get(field, plain) != plain:
            raise InputError(f"GGUF field {arch}.{field} = {get(field)} is not supported; accepted: none")
    number = lambda name, default=None: _number(where, meta, f"{arch}.{name}", default)
    heads, embed = number("attention.head_count"), number("embedding_length")
    head_dim = number("attention.key_length", embed // heads)
    if get("rope.dimension_count", head_dim) != head_dim or get("attention.value_length", head_dim) != head_dim:
        raise InputError(f"GGUF: rope or value dimensions other than the head's {head_dim} are not supported")
    theta = number("rope.freq_base", 10000.0)
    scaling = _rope_from_gguf(get, number)
    if rope_factors is not None:
        if scaling is not None:
            raise InputError("GGUF: both rope scaling fields and rope_freqs.weight; accepted: one of them")
        scaling = _llama3_from_factors(rope_factors, theta, get("rope.scaling.original_context_length", 8192))
    return ModelConfig(
        vocab_size=vocab_size,
        embed=embed,
        layers=number("block_count"),
        heads=heads,
        kv_heads=number("attention.head_count_kv", heads),
        head_dim=head_dim,
        mlp=number("feed_forward_length"),
        max_position=number("context_length"),
        norm_eps=number("attention.layer_norm_epsilon" if arch == "starcoder2" else "attention.layer_norm_rms_epsilon"),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_embeddings=tie_embeddings,
        sliding_window=get("attention.sliding_window") or None,
        **FAMILIES[arch],
    )


def config_from_hf(hf: dict[str, Any]) -> ModelConfig:
    """Read a Hugging Face `config.json`.

    Raises InputError for a field whose value this model does not compute.
    """
    family = hf.get("model_type")
    if family not in FAMILIES:
        raise InputError(f"config.json: model_type {family!r} is not supported; accepted: {', '.join(FAMILIES)}")
    for field, accepted in (_ONLY | _ONLY_OF[family]).items():
        if hf.get(field, accepted[0]) not in accepted:
            names = " or ".join(map(repr, accepted))
            raise InputError(f"config.json: {field} = {hf[field]!r} is not supported; accepted: {names}")
    number = lambda name, default=None: _number("config.json", hf, name, default)
    heads, embed = number("num_attention_heads"), number("hidden_size")
    max_position = number("max_position_embeddings")
    theta, scaling = _rope_from_hf(hf, max_position)
    # Where a field is not there, transformers has a default of its own for each family: none of them is guessed,
    # but for LLaMA's, which older files leave out.
    llama, tied = family == "llama", hf.get("tie_word_embeddings")
    bias = hf.get("use_bias", True) if family == "starcoder2" else hf.get("attention_bias") or False
    biases = {
        "qkv_bias": family == "qwen2" or bias,
        "o_bias": family != "qwen2" and bias,
        "mlp_bias": bias if family == "starcoder2" else hf.get("mlp_bias") or False,
    }
    return ModelConfig(
        vocab_size=number("vocab_size"),
        embed=embed,
        layers=number("num_hidden_layers"),
        heads=heads,
        kv_heads=number("num_key_value_heads", heads if llama else None),
        head_dim=number("head_dim", None if family == "qwen3" else embed // heads),
        mlp=number("intermediate_size"),
        max_position=max_position,
        norm_eps=number("norm_epsilon" if family == "starcoder2" else "rms_norm_eps"),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_embeddings=family == "starcoder2" if tied is None else tied,
        sliding_window=_window_from_hf(hf, family),
        **FAMILIES[family] | biases,
    )


def _number(where: str, source: dict[str, Any], name: str, default: float | None = None) -> Any:
    """A positive number; null is as good as nothing. Raises InputError naming the field."""
    value = default if source.get(name) is None else source[name]
    if value is None:
        raise InputError(f"{where}: the field {name!r} is missing")
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise InputError(f"{where}: {name} = {value!r} is not possible; accepted: a positive number")
    return value


def _window_from_hf(hf: dict[str, Any], family: str) -> int | None:
    # Qwen turns it on by a flag, for the layers from `max_window_layers` on; newer files list every layer's kind.
    if family in ("qwen2", "qwen3"):
        if hf.get("use_sliding_window", False) not in (False, True):
            raise InputError(f"config.json: use_sliding_window = {hf['use_sliding_window']!r}; accepted: true or false")
        layers = _number("config.json", hf, "num_hidden_layers")
        windowed = hf.get("use_sliding_window", False) and hf.get("sliding_window") is not None
        kinds = hf.get("layer_types")
        if kinds is None:
            full = hf.get("max_window_layers", 28) if windowed else layers
            kinds = ["full_attention" if i < full else "sliding_attention" for i in range(layers)]
            named = f"max_window_layers = {full}"
        else:
            named = "layer_types"
        if kinds == ["full_attention"] * layers:
            return None
        if kinds != ["sliding_attention"] * layers or not windowed:
            raise InputError(
                f"config.json: {named} is not supported with use_sliding_window = {hf.get('use_sliding_window')!r}; "
                "accepted: one kind of attention in all layers"
            )
    # transformers gives a Mistral without the field this window.
    window = hf.get("sliding_window", 4096 if family == "mistral" else None)
    if family not in ("qwen2", "qwen3") and hf.get("layer_types") is not None:
        full = ["full_attention"] * _number("config.json", hf, "num_hidden_layers")
        if window is not None or hf["layer_types"] != full:
            raise InputError(
                f"config.json: layer_types is not supported in a {family}; accepted: full_attention in all layers"
            )
    if window is None:
        return None
    return _number("config.json", {"sliding_window": window}, "sliding_window")


# Fields of a rope type beside its theta.
_ROPE_FIELDS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}


def _rope_from_hf(hf: dict[str, Any], max_position: int) -> tuple[float, RopeScaling | None]:
    """(theta, scaling). transformers 5 writes one `rope_parameters`, transformers 4 `rope_theta` and `rope_scaling`.

    Version 5 takes rope_scaling alone where it is there, version 4 never looks at rope_parameters: both must be alike.
    """
    given = {name: hf[name] for name in ("rope_scaling", "rope_parameters") if hf.get(name)}
    if not all(isinstance(part, dict) for part in given.values()):
        raise InputError("config.json: rope_scaling and rope_parameters must be objects")
    read = {name: _rope(name, part, hf, max_position) for name, part in given.items()}
    if len(set(read.values())) > 1:
        raise InputError(
            f"config.json: rope_scaling = {hf['rope_scaling']} and rope_parameters = {hf['rope_parameters']} disagree; "
            "accepted: one of them, or both alike"
        )
    return next(iter(read.values())) if read else (_number("config.json", hf, "rope_theta", 10000.0), None)


def _rope(name: str, part: dict[str, Any], hf: dict[str, Any], max_position: int) -> tuple[float, RopeScaling | None]:
    """What one of the two says."""
    where = f"config.json, {name}"
    for field in ("rope_theta", "original_max_position_embeddings"):
        here, top = part.get(field), hf.get(field)
        if None not in (here, top) and here != top:
            raise InputError(f"{where}: {field} = {here} and beside it {field} = {top}; accepted: one of them")
    if {"rope_type", "type"} <= part.keys() and part["rope_type"] != part["type"]:
        raise InputError(
            f"{where}: rope_type = {part['rope_type']!r} and type = {part['type']!r}; accepted: one of them"
        )
    kind = part.get("rope_type", part.get("type"))
    if kind is None and "factor" in part:
        raise InputError(f"{where}: factor = {part['factor']!r} without a rope_type; accepted: linear, llama3")
    kind = "default" if kind is None else kind
    if kind not in _ROPE_FIELDS:
        raise InputError(f"config.json: rope type {kind!r} is not supported; accepted: {', '.join(_ROPE_FIELDS)}")
    harmless = {("partial_rotary_factor", 1.0), ("partial_rotary_factor", None), ("factor", 1.0)}
    for field in (
        part.keys() - _ROPE_FIELDS[kind] - {"rope_theta", "rope_type", "type", "original_max_position_embeddings"}
    ):
        if isinstance(part[field], dict | list) or (field, part[field]) not in harmless:
            raise InputError(f"{where}: {field} = {part[field]!r} is not supported with rope type {kind!r}")
    theta = _number(where, part, "rope_theta", _number("config.json", hf, "rope_theta", 10000.0))
    if kind == "default":
        return theta, None
    factor = _number(where, part, "factor")
    if kind == "linear":
        return theta, RopeScaling(kind="linear", factor=factor)
    original = hf.get("original_max_position_embeddings") or max_position
    return theta, RopeScaling(
        kind="llama3",
        factor=factor,
        low_freq_factor=_number(where, part, "low_freq_factor"),
        high_freq_factor=_number(where, part, "high_freq_factor"),
        original_max_position=_number(where, part, "original_max_position_embeddings", original),
    )


def _rope_from_gguf(get, number) -> RopeScaling | None:
    # llama.cpp's defaults: a factor without a type is linear, and 0 is no scaling.
    kind = get("rope.scaling.type", "linear")
    field = next((f for f in ("rope.scaling.factor", "rope.scale_linear") if get(f) not in (None, 0.0)), None)
    factor = 1.0 if field is None else number(field)
    if kind == "none" or (factor == 1.0 and kind == "linear"):
        return None
    if kind == "linear":
        return RopeScaling(kind="linear", factor=factor)
    raise InputError(f"GGUF rope scaling type {kind!r} is not supported; accepted: none, linear")


def _llama3_from_factors(factors: Sequence[float], theta: float, original: int) -> RopeScaling:
    # A GGUF has no fields for the llama3 scaling, but what it comes to, frequency by frequency. The largest is the
    # factor; the rest tells whether the other three numbers are those of every published model.
    made = RopeScaling(kind="llama3", factor=float(max(factors)), original_max_position=int(original))
    plain = [theta ** -(i / len(factors)) for i in range(len(factors))]
    found = [math.inf if f == 0 else f for f in factors]
    if any(abs(p / made.scaled(p) - f) > 1e-3 * f for p, f in zip(plain, found)):
        raise InputError(
            "GGUF: rope_freqs.weight does not hold the factors of a llama3 scaling; accepted: those of "
            f"low_freq_factor 1, high_freq_factor 4, original length {original}"
        )
    return made
