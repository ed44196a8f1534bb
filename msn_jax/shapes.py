"""Shapes that can be planned and sized without a checkpoint: the published configs of the named models."""

from __future__ import annotations

from msn_jax.model_config import FAMILIES, ModelConfig, RopeScaling


def _shape(V: int, D: int, L: int, N: int, K: int, H: int, F: int, context: int, **other) -> ModelConfig:
    sizes = {"vocab_size": V, "embed": D, "layers": L, "heads": N, "kv_heads": K, "head_dim": H, "mlp": F}
    return ModelConfig(**sizes, max_position=context, **other)


_LLAMA31 = {"rope_theta": 5e5, "rope_scaling": RopeScaling(kind="llama3", factor=8.0)}
_LLAMA32 = {"rope_theta": 5e5, "rope_scaling": RopeScaling(kind="llama3", factor=32.0), "tie_embeddings": True}
_DEEPSEEK = {"norm_eps": 1e-6, "rope_theta": 1e5, "rope_scaling": RopeScaling(kind="linear", factor=4.0)}
_QWEN2 = FAMILIES["qwen2"] | {"norm_eps": 1e-6, "rope_theta": 1e6}
_QWEN3 = FAMILIES["qwen3"] | {"norm_eps": 1e-6, "rope_theta": 1e6}
_STARCODER2 = FAMILIES["starcoder2"] | {"sliding_window": 4096}

# fmt: off
SHAPES = {
    #                               V      D   L   N   K    H      F  context
    "smollm2-135m":        _shape(49152,  576, 30,  9,  3,  64,  1536,   8192, rope_theta=1e5, tie_embeddings=True),
    "llama-3-8b":          _shape(128256, 4096, 32, 32,  8, 128, 14336,   8192, rope_theta=5e5),
    "llama-3.1-8b":        _shape(128256, 4096, 32, 32,  8, 128, 14336, 131072, **_LLAMA31),
    "llama-3.2-1b":        _shape(128256, 2048, 16, 32,  8,  64,  8192, 131072, **_LLAMA32),
    "deepseek-coder-6.7b": _shape(32256, 4096, 32, 32, 32, 128, 11008,  16384, **_DEEPSEEK),
    "starcoder2-3b":       _shape(49152, 3072, 30, 24,  2, 128, 12288,  16384, **_STARCODER2, tie_embeddings=True,
                                  rope_theta=999999.4420358813),
    "starcoder2-7b":       _shape(49152, 4608, 32, 36,  4, 128, 18432,  16384, **_STARCODER2, tie_embeddings=True,
                                  rope_theta=1e6),
    "starcoder2-15b":      _shape(49152, 6144, 40, 48,  4, 128, 24576,  16384, **_STARCODER2, rope_theta=1e5),
    "mistral-7b":          _shape(32000, 4096, 32, 32,  8, 128, 14336,  32768, sliding_window=4096),  # v0.1
    "qwen2.5-0.5b":        _shape(151936,  896, 24, 14,  2,  64,  4864,  32768, **_QWEN2, tie_embeddings=True),
    "qwen2.5-7b":          _shape(152064, 3584, 28, 28,  4, 128, 18944, 131072, **_QWEN2),
    "qwen3-0.6b":          _shape(151936, 1024, 28, 16,  8, 128,  3072,  40960, **_QWEN3, tie_embeddings=True),
    "qwen3-8b":            _shape(151936, 4096, 36, 32,  8, 128, 12288,  40960, **_QWEN3),
    "1b":                  _shape(32768, 2048, 16, 32,  8,  64,  8192,   8192),
}
# fmt: on
