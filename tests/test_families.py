"""The neighbours of LLaMA: against torch (goldens, one and each switch of a family in it), and against `ar`."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDENS, decode_all
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

import msn_jax
from msn_jax import InputError, model, train_step
from msn_jax.adapters import Parts, init_adapter, merge
from msn_jax.cache import init_cache, write_cache
from msn_jax.config import LINEAR_MAPS, LoraConfig, NoiseConfig, TrainConfig
from msn_jax.decode import tree_set
from msn_jax.io import hf
from msn_jax.io.export import export_hf, hf_config
from msn_jax.io.published_config import config_from_hf
from msn_jax.objectives import inline
from msn_jax.params import declare, parameter_count, stack_layers
from msn_jax.shapes import SHAPES

forward = jax.jit(msn_jax.forward, static_argnums=1)
unembed = jax.jit(msn_jax.unembed, static_argnums=1)
NEIGHBOURS = ["llama_bias", "mistral", "qwen2", "qwen3", "starcoder2"]


@pytest.fixture(scope="module")
def golden():
    """By name: (cfg, params, goldens)."""
    loaded = {}
    for name in NEIGHBOURS:
        folder = GOLDENS / f"tiny_{name}"
        cfg = hf.read_config(folder)
        loaded[name] = cfg, hf.load_params(cfg, hf.SafetensorsSource(folder)), np.load(folder / "logits.npz")
    return loaded


# Forward passes. (One pass over the whole text is in test_model.py.)


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_cached_decoding_matches_torch(golden, name):
    cfg, params, data = golden[name]
    ids, hidden = jnp.asarray(data["long_ids"]), []
    cache = init_cache(cfg, 1, 40)
    for start in range(0, 40, 5):  # passes that end inside the window and past it
        at = jnp.array([start])
        h, new = forward(
            params, cfg, ids[:, start : start + 5], start + jnp.arange(5)[None], None, cache.replace(length=at)
        )
        cache = write_cache(cache, new, at)
        hidden.append(h)
    logits = unembed(params, cfg, jnp.concatenate(hidden, axis=1))
    np.testing.assert_allclose(logits, data["cached_logits"], atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3", "starcoder2"])
def test_bfloat16_weights_between_float32_activations_stay_near_torch(golden, name):
    cfg, params, data = golden[name]
    params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    ids = jnp.asarray(data["long_ids"])
    apart = {}
    for dtype in ("bfloat16", "float32"):
        hidden, _ = msn_jax.forward(params, cfg, ids, jnp.arange(ids.shape[1])[None], dtype=dtype)
        assert hidden.dtype == dtype
        apart[dtype] = np.abs(unembed(params, cfg, hidden) - data["cached_logits"]).mean()
    assert 0 < apart["float32"] < apart["bfloat16"] < 0.1 * np.abs(data["cached_logits"]).mean()


def test_packed_rows_in_blocks_match_torch(golden, monkeypatch):
    cfg, params, data = golden["mistral"]
    monkeypatch.setattr(model, "QUERY_BLOCK", (4, 4))
    widths, attend = [], model.attention
    monkeypatch.setattr(model, "attention", lambda q, k, v, mask: widths.append(k.shape[2]) or attend(q, k, v, mask))
    ids = jnp.asarray(data["ids"].reshape(1, 48))
    segments, positions = jnp.repeat(jnp.array([[1, 2]]), 24, axis=1), jnp.tile(jnp.arange(24), 2)[None]
    packed = jax.jit(partial(msn_jax.forward, segments=segments), static_argnums=1)
    logits = unembed(params, cfg, packed(params, cfg, ids, positions)[0])
    np.testing.assert_allclose(logits[0], data["logits"].reshape(48, -1), atol=1e-4, rtol=0)
    # A window of 8 before each of the 4 queries of a block: at most 4 + 8 keys, whatever the length.
    assert set(widths) == {4, 8, 12}


# Decoding.


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mistral", "qwen2", "qwen3", "starcoder2"])
def test_trees_emit_what_plain_decoding_emits_past_the_window(golden, name):
    cfg, params, data = golden[name]
    # Of one layer and a window of 4, the last 4 tokens alone decide what comes next: after a text, what came of it,
    # and its last 4 tokens, it comes again. Paths that long are accepted whole, if no node sees past the window.
    cfg = dataclasses.replace(cfg, sliding_window=4, layers=1)
    params = params.replace(layers=params.layers[:1])
    texts = [data["ids"][b, at : at + n].tolist() for b, at, n in ((0, 0, 20), (1, 0, 7), (0, 20, 4), (1, 5, 13))]
    run = partial(decode_all, params, cfg, max_new_tokens=24, chunk=8, slots=96)
    _, first = run(tree_set("ar"), texts)
    prompts = [text + new + text[-4:] for text, new in zip(texts, first, strict=True)]
    _, plain = run(tree_set("ar"), prompts)
    assert plain == first and all(len(tokens) == 24 for tokens in plain)
    state, fast = run(tree_set("tr-jacobi", "chain8"), prompts)
    assert fast == plain and state.forwards.min() == 3 and state.forwards.max() <= 5
    if name == "starcoder2":
        assert run(tree_set("jacobi", "chain4"), prompts[:1])[1] == plain[:1]
    if name == "mistral":  # the loop against the whole text again for each token
        text = list(texts[0])
        for _ in range(24):
            padded = jnp.asarray([text + [0] * (48 - len(text))])
            hidden, _ = forward(params, cfg, padded, jnp.arange(48)[None])
            text.append(int(unembed(params, cfg, hidden[0, len(text) - 1]).argmax()))
        assert text[20:] == plain[0]


# Training.


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3", "starcoder2"])
def test_gradients_reach_every_tensor_and_every_adapter(golden, name):
    cfg, params, data = golden[name]
    tokens = jnp.asarray(data["ids"])
    ones = jnp.ones_like(tokens)
    positions = jnp.broadcast_to(jnp.arange(24), tokens.shape)
    batch = {"tokens": tokens, "segment_ids": ones, "positions": positions, "response": ones > 0}
    frozen = stack_layers(params)
    # Not the same in every direction: LayerNorm would see nothing of that.
    noise = lambda a: a + 0.02 * jax.random.normal(jax.random.key(1), a.shape)
    adapter = jax.tree.map(noise, init_adapter(jax.random.key(0), cfg, LoraConfig(rank=2)))

    def loss(params, adapter):
        parts = Parts(params, adapter, None)
        return inline.loss_sums(parts, cfg, batch, tokens, 0 * tokens, noise=NoiseConfig(length=1))

    grads, _ = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(frozen, adapter)
    assert len(jax.tree.leaves(grads[1])) == 2 * len(LINEAR_MAPS)
    for path, grad in jax.tree_util.tree_flatten_with_path(grads)[0]:
        # Layer by layer; of a bias head by head, and keys have next to none (rope alone keeps it from cancelling).
        parts = np.abs(np.asarray(grad)).reshape(grad.shape[0], -1).max(axis=1)
        assert (parts > 1e-5).all() or "embed" in jax.tree_util.keystr(path), path
    low, merged = adapter.gate_up, merge(frozen, adapter).layers.gate_up
    added = low.scale * np.einsum("l...r,lrd->l...d", low.b, low.a)
    np.testing.assert_allclose(merged, frozen.layers.gate_up + added, atol=1e-5)


def test_biases_and_norms_do_not_decay(golden):
    params = stack_layers(golden["starcoder2"][1])
    optimizer = train_step.make_optimizer(TrainConfig(out="x", steps=1, learning_rate=0.1, weight_decay=0.5))
    with jax.numpy_dtype_promotion("standard"):
        still = jax.tree.map(jnp.zeros_like, params)
        updates, _ = jax.jit(lambda g, p: optimizer.update(g, optimizer.init(p), p))(still, params)
    moved = {f.name for f in dataclasses.fields(params.layers) if np.any(getattr(updates.layers, f.name))}
    assert moved == set(LINEAR_MAPS)
    assert not np.any(updates.embed) and not np.any(updates.final_norm_bias)


# Files.


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_an_export_is_read_back(golden, name, tmp_path):
    cfg, params, _ = golden[name]
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"t": 0}, unk_token="t")))
    export_hf(tmp_path / "out", cfg, params, words, {1})
    assert hf.read_config(tmp_path / "out") == cfg
    written = hf.load_params(cfg, hf.SafetensorsSource(tmp_path / "out"))
    assert jax.tree.structure(written) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, written, params)
    first, stored = hf.SafetensorsSource(GOLDENS / f"tiny_{name}"), hf.SafetensorsSource(tmp_path / "out")
    assert first.shapes == stored.shapes
    for tensor in first.shapes:
        np.testing.assert_array_equal(stored.read(tensor), first.read(tensor).astype(np.float32))


def test_configs_survive_the_round_trip(golden):
    cfgs = [cfg for cfg, _, _ in golden.values()] + list(SHAPES.values())
    cfgs += [dataclasses.replace(cfg, sliding_window=None) for cfg in cfgs]
    cfgs += [dataclasses.replace(SHAPES["qwen3-0.6b"], qkv_bias=True, o_bias=True)]
    for cfg in cfgs:
        assert config_from_hf(json.loads(json.dumps(hf_config(cfg)))) == cfg
    types = {name: hf_config(golden[name][0])["model_type"] for name in NEIGHBOURS}
    assert types == {name: name.removesuffix("_bias") for name in NEIGHBOURS}


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"norm": "layer"}, "a starcoder2 with another activation"),
        ({"qkv_bias": True, "sliding_window": 8, "o_bias": True}, "a mistral with another qkv_bias, o_bias"),
        ({"activation": "gelu_tanh"}, "a llama with another activation"),
    ],
)
def test_what_no_model_type_is_cannot_be_exported(changes, named):
    with pytest.raises(InputError, match=named):
        hf_config(dataclasses.replace(SHAPES["1b"], **changes))


def config_of(name, **changes):
    return {**json.loads((GOLDENS / f"tiny_{name}" / "config.json").read_text()), **changes}


@pytest.mark.parametrize(
    "name, changes, named",
    [
        ("mistral", {"sliding_window": "8"}, "sliding_window = '8' is not possible"),
        ("mistral", {"sliding_window": 0}, "sliding_window = 0 is not possible"),
        ("mistral", {"layer_types": ["full_attention"] * 2}, "layer_types is not supported in a mistral"),
        ("mistral", {"attention_bias": True}, "attention_bias = True"),
        ("mistral", {"num_key_value_heads": None}, "'num_key_value_heads' is missing"),
        ("qwen2", {"attention_bias": False}, "attention_bias = False"),
        ("qwen2", {"layer_types": None, "max_window_layers": 1}, "max_window_layers = 1 is not supported"),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is not supported"),
        ("qwen2", {"use_sliding_window": False}, "layer_types is not supported with use_sliding_window = False"),
        ("qwen3", {"head_dim": None}, "'head_dim' is missing"),
        ("qwen3", {"mlp_bias": True}, "mlp_bias = True"),
        ("starcoder2", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ("starcoder2", {"norm_type": "rms_norm"}, "norm_type = 'rms_norm'"),
        ("starcoder2", {"mlp_type": "gated"}, "mlp_type = 'gated'"),
        ("starcoder2", {"norm_epsilon": None}, "'norm_epsilon' is missing"),
        ("llama_bias", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
    ],
)
def test_an_unsupported_field_of_a_family_is_refused_by_name(name, changes, named):
    with pytest.raises(InputError, match=named):
        config_from_hf(config_of(name, **changes))


def test_windows_of_qwen_need_their_flag():
    plain = {"layer_types": None, "use_sliding_window": False}
    assert config_from_hf(config_of("qwen2", **plain)).sliding_window is None
    assert config_from_hf(config_of("qwen2", layer_types=None)).sliding_window == 8
    full = {"layer_types": None, "max_window_layers": 2}
    assert config_from_hf(config_of("qwen2", **full)).sliding_window is None


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda shapes: shapes.pop("model.layers.1.mlp.c_fc.bias"), "model.layers.1.mlp.c_fc.bias is missing"),
        (lambda shapes: shapes.pop("model.norm.bias"), "model.norm.bias is missing"),
        (lambda shapes: shapes.update({"model.layers.0.self_attn.q_norm.weight": (8,)}), "q_norm.weight is not part"),
        (lambda shapes: shapes.update({"model.layers.0.self_attn.k_proj.bias": (5,)}), r"the shape \[5\]; its config"),
        (lambda shapes: shapes.update({"model.embed_tokens.weight": (98, 32)}), r"embed_tokens.weight has the shape"),
    ],
)
def test_a_wrong_tensor_is_named_before_any_is_read(golden, change, named):
    source = hf.SafetensorsSource(GOLDENS / "tiny_starcoder2")
    source.read = None
    change(source.shapes)
    with pytest.raises(InputError, match=named):
        hf.load_params(golden["starcoder2"][0], source)


# Published sizes: the parameter counts that the models' pages on the Hugging Face hub state.
PUBLISHED = {
    "smollm2-135m": 134_515_008,
    "llama-3-8b": 8_030_261_248,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "deepseek-coder-6.7b": 6_740_512_768,
    "starcoder2-3b": 3_030_371_328,
    "starcoder2-7b": 7_173_923_840,
    "starcoder2-15b": 15_957_889_024,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
}


def test_published_parameter_counts():
    assert PUBLISHED.keys() == SHAPES.keys() - {"1b"}
    assert {name: parameter_count(declare(SHAPES[name])) for name in PUBLISHED} == PUBLISHED


@pytest.mark.parametrize(
    "name", ["llama-3.2-1b", "deepseek-coder-6.7b", "mistral-7b", "qwen2.5-7b", "qwen3-8b", "starcoder2-15b"]
)
def test_real_configs_trace(name):
    """Every family at its real size, prefill and a tree pass, without weights: the shapes alone."""
    cfg, spec = SHAPES[name], lambda s: jax.ShapeDtypeStruct(s.shape, jnp.bfloat16)
    params = jax.tree.map(spec, declare(cfg, stacked=True))
    made = jax.eval_shape(lambda: stack_layers(msn_jax.init(jax.random.key(0), cfg, jnp.bfloat16)))
    assert jax.tree.map(lambda a: a.shape, made) == jax.tree.map(lambda a: a.shape, params)
    tokens = jax.ShapeDtypeStruct((2, 8192), jnp.int32)
    hidden, (k, _) = jax.eval_shape(lambda p, t: msn_jax.forward(p, cfg, t, t, segments=t), params, tokens)
    assert hidden.shape == (2, 8192, cfg.embed) and k.shape == (cfg.layers, 2, cfg.kv_heads, 8192, cfg.head_dim)
    logits = jax.eval_shape(lambda p, h: unembed(p, cfg, h), params, hidden)
    assert logits.shape == (2, 8192, cfg.vocab_size)


@pytest.mark.parametrize("field, value", [("norm", "batch"), ("activation", "relu"), ("sliding_window", 0)])
def test_an_impossible_switch_is_named(field, value):
    with pytest.raises(InputError, match=f"model config: {field} = {value} is not possible; accepted:"):
        dataclasses.replace(SHAPES["1b"], **{field: value})
