"""GGUF files as llama.cpp writes them, made here from the torch goldens; and the tokenizers in them."""

import json

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDENS
from gguf import GGMLQuantizationType, GGUFWriter
from transformers import Qwen2Tokenizer

from msn_jax import InputError, forward, unembed
from msn_jax.io import hf, tokenizer
from msn_jax.io.gguf import GGUFSource
from msn_jax.io.tokenizer import TextStream, decode, encode_chat


def pairs(weight, head_dim):
    """Rows of each head with rotary pairs side by side: what convert_hf_to_gguf.py does to a llama's q and k."""
    half = head_dim // 2
    return weight.reshape(-1, 2, half, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def write(path, name, quantised=None, fields=(), change=None):
    """The golden tiny_`name` as a GGUF file. quantised: the type of those matrices whose rows allow it."""
    source = hf.SafetensorsSource(GOLDENS / f"tiny_{name}")
    cfg, kind = hf.read_config(GOLDENS / f"tiny_{name}"), name.split("_")[0]
    kind = kind if kind in ("qwen2", "qwen3", "starcoder2") else "llama"
    # llama.cpp's names by its own map, not by our table.
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, kind.upper()), cfg.layers)
    writer = GGUFWriter(path, kind)
    writer.add_context_length(cfg.max_position)
    writer.add_embedding_length(cfg.embed)
    writer.add_block_count(cfg.layers)
    writer.add_feed_forward_length(cfg.mlp)
    writer.add_head_count(cfg.heads)
    writer.add_head_count_kv(cfg.kv_heads)
    writer.add_rope_freq_base(cfg.rope_theta)
    writer.add_key_length(cfg.head_dim)
    writer.add_value_length(cfg.head_dim)
    if cfg.norm == "layer":
        writer.add_layer_norm_eps(cfg.norm_eps)
    else:
        writer.add_layer_norm_rms_eps(cfg.norm_eps)
    if cfg.sliding_window:
        writer.add_sliding_window(cfg.sliding_window)
    for add, value in fields:
        getattr(writer, add)(value)
    tensors = {tensor: source.read(tensor).astype(np.float32) for tensor in source.shapes}
    if change:
        change(tensors)
    for tensor, value in tensors.items():
        if kind == "llama" and (".q_proj." in tensor or ".k_proj." in tensor):
            value = pairs(value, cfg.head_dim)
        stored = names.get_name(tensor, try_suffixes=(".weight", ".bias")) or tensor
        if quantised and value.ndim == 2 and value.shape[1] % 32 == 0:
            writer.add_tensor(stored, gguf.quants.quantize(value, quantised), raw_dtype=quantised)
        else:
            writer.add_tensor(stored, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linear", "qwen2", "qwen3", "starcoder2"])
def test_every_architecture_equals_its_torch_golden(tmp_path, name):
    linear = [("add_rope_scaling_type", gguf.RopeScalingType.LINEAR), ("add_rope_scaling_factor", 4.0)]
    source = GGUFSource(write(tmp_path / "x.gguf", name, fields=linear if name == "linear" else ()))
    cfg = hf.read_config(GOLDENS / f"tiny_{name}")
    assert source.config.sliding_window == cfg.sliding_window and source.config.rope_scaling == cfg.rope_scaling
    params = hf.load_params(source.config, source)
    data = np.load(GOLDENS / f"tiny_{name}" / "logits.npz")
    ids = jnp.asarray(data["ids"][:1])
    hidden, _ = forward(params, source.config, ids, jnp.arange(ids.shape[1])[None])
    np.testing.assert_allclose(unembed(params, source.config, hidden), data["logits"][:1], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "kind, steps",
    [("F16", 2048), ("BF16", 256), ("Q8_0", 254), ("Q5_0", 31), ("Q5_1", 31), ("Q4_0", 15), ("Q4_1", 15)],
)
def test_quantised_weights_are_near(tmp_path, kind, steps):
    source = GGUFSource(write(tmp_path / "x.gguf", "qwen2", GGMLQuantizationType[kind]))
    exact = hf.SafetensorsSource(GOLDENS / "tiny_qwen2")
    for tensor in ("model.embed_tokens.weight", "model.layers.1.self_attn.k_proj.weight"):
        blocks = exact.read(tensor).astype(np.float32)  # rows of 32, one block each
        spread = 2 * np.abs(blocks).max(axis=1, keepdims=True)
        off = np.abs(source.read(tensor) - blocks)
        assert (off <= 1.1 * spread / steps).all() and (off.max() > 0) == kind.startswith("Q")


def q4_k(block):
    """256 weights from their 144 bytes, as ggml-quants.c does it, one at a time."""
    d, dmin = (float(x) for x in block[:4].view(np.float16))
    scales, quants, out = block[4:16].astype(int), block[16:], []
    for j in range(8):
        if j < 4:
            scale, low = scales[j] & 63, scales[j + 4] & 63
        else:
            scale = (scales[j + 4] & 15) | (scales[j - 4] >> 6) << 4
            low = (scales[j + 4] >> 4) | (scales[j] >> 6) << 4
        part = quants[32 * (j // 2) : 32 * (j // 2) + 32].astype(int)
        out += [d * scale * (q >> 4 if j % 2 else q & 15) - dmin * low for q in part]
    return np.array(out)


def q6_k(block):
    """256 weights from their 210 bytes."""
    low, high, scales = block[:128].astype(int), block[128:192].astype(int), block[192:208].view(np.int8).astype(int)
    d, out = float(block[208:].view(np.float16)[0]), np.zeros(256)
    for i in range(256):
        half, part, at = i // 128, i % 128 // 32, i % 32
        nibble = low[64 * half + 32 * (part % 2) + at] >> 4 * (part // 2) & 15
        quant = nibble | (high[32 * half + at] >> 2 * part & 3) << 4
        out[i] = d * scales[i // 16] * (quant - 32)
    return out


@pytest.mark.parametrize("kind, size, plain", [("Q4_K", 144, q4_k), ("Q6_K", 210, q6_k)])
def test_k_quants_are_those_of_a_plain_reading(tmp_path, kind, size, plain):
    blocks = np.random.default_rng(0).integers(0, 256, (3, size), dtype=np.uint8)
    at = slice(0, 4) if kind == "Q4_K" else slice(208, 210)
    blocks[:, at] = np.array([0.01, 0.02], np.float16).view(np.uint8)[: at.stop - at.start]
    writer = GGUFWriter(tmp_path / "x.gguf", "llama")
    for name, value in {"context_length": 64, "embedding_length": 256, "block_count": 1, "head_count": 2}.items():
        getattr(writer, f"add_{name}")(value)
    writer.add_feed_forward_length(256)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tensor("token_embd.weight", blocks, raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = GGUFSource(tmp_path / "x.gguf").read("model.embed_tokens.weight")
    np.testing.assert_allclose(read, [plain(block) for block in blocks], rtol=1e-5, atol=1e-6)


def llama3_factors(theta, head_dim, factor=8.0, original=32, high=4.0):
    """As convert_hf_to_gguf.py makes them, by wavelength."""
    factors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * np.pi * theta ** (i / head_dim)
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original:
            factors.append(factor)
        else:
            smooth = (original / wavelength - 1) / (high - 1)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


def test_rope_factors_are_the_llama3_scaling(tmp_path):
    cfg = hf.read_config(GOLDENS / "tiny_llama3")
    original = [("add_rope_scaling_orig_ctx_len", 32)]
    factors = llama3_factors(100.0, 8)
    add = lambda factors: lambda tensors: tensors.update({"rope_freqs.weight": factors})
    source = GGUFSource(write(tmp_path / "x.gguf", "llama3", fields=original, change=add(factors)))
    assert source.config.rope_scaling == cfg.rope_scaling
    hf.check(source.config, source)
    wrong = llama3_factors(100.0, 8, high=2.0)
    with pytest.raises(InputError, match="does not hold the factors of a llama3 scaling"):
        GGUFSource(write(tmp_path / "y.gguf", "llama3", fields=original, change=add(wrong)))


YARN = [("add_rope_scaling_type", gguf.RopeScalingType.YARN), ("add_rope_scaling_factor", 4.0)]
NORM, Q_BIAS = "model.norm.bias", "model.layers.0.self_attn.q_proj.bias"


@pytest.mark.parametrize(
    "name, fields, change, named",
    [
        ("qwen2", YARN, None, "rope scaling type 'yarn'"),
        ("qwen3", [("add_expert_count", 8)], None, "qwen3.expert_count = 8"),
        ("qwen2", [], lambda t: t.pop(Q_BIAS), f"{Q_BIAS} is missing"),
        ("linear", [], lambda t: t.update({Q_BIAS: np.zeros(48, np.float32)}), f"{Q_BIAS} is not part"),
        ("starcoder2", [], lambda t: t.update({NORM: np.zeros(3, np.float32)}), rf"{NORM} has the shape \[3\]"),
    ],
)
def test_what_a_gguf_lacks_or_has_too_much_is_named(tmp_path, name, fields, change, named):
    with pytest.raises(InputError, match=named):
        source = GGUFSource(write(tmp_path / "x.gguf", name, fields=fields, change=change))
        hf.check(source.config, source)


# Tokenizers.

BYTES = tokenizer.pre_tokenizers.ByteLevel.alphabet()


def byte_level(pre, **more):
    """Bytes and nothing else: what is left of a text is how it was split."""
    tokens = sorted(BYTES) + ["<|endoftext|>"]
    meta = {"ggml.model": "gpt2", "ggml.pre": pre, "ggml.tokens": tokens, "ggml.merges": []}
    meta |= {"ggml.token_type": [1] * 256 + [3], "ggml.eos_token_id": 256}
    return tokenizer.from_gguf({f"tokenizer.{k}": v for k, v in (meta | more).items()})


SENTENCEPIECE = json.loads((GOLDENS / "sentencepiece.json").read_text())


def byte_fallback(**more):
    meta = {f"ggml.{name}": SENTENCEPIECE[name] for name in ("tokens", "scores", "token_type")}
    meta |= {"ggml.model": "llama", "ggml.add_bos_token": False, "ggml.eos_token_id": 2, "ggml.unknown_token_id": 0}
    return tokenizer.from_gguf({f"tokenizer.{k}": v for k, v in (meta | more).items()})


@pytest.mark.parametrize("golden", SENTENCEPIECE["encode"], ids=lambda golden: repr(golden["text"][:20]))
def test_a_sentencepiece_vocabulary_encodes_as_sentencepiece(golden):
    tok, stops = byte_fallback()
    assert tok.encode(golden["text"], add_special_tokens=False) == golden["ids"] and stops == {2}
    assert decode(tok, golden["ids"]) == golden["text"]
    # Cut anywhere but inside a character: the text behind the cut is what is left of the whole.
    for at in range(1, len(golden["ids"])):
        head, tail = golden["ids"][:at], golden["ids"][at:]
        if golden["text"].startswith(before := decode(tok, head)):
            assert before + decode(tok, tail, after=head) == golden["text"]
            stream = TextStream(tok, after=head)
            assert stream.add(tail) + stream.flush() == golden["text"][len(before) :]


def test_a_sentencepiece_vocabulary_starts_with_its_bos():
    tok, _ = byte_fallback(**{"ggml.add_bos_token": True, "ggml.bos_token_id": 1})
    assert tok.encode("a")[0] == 1 and tok.encode("a")[1:] == tok.encode("a", add_special_tokens=False)


def splits(tok, text):
    return [text[a:b] for _, (a, b) in tok.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)]


MIXED = "It's 12345  apples\n\n\tfoo_bar+=x; 你好ab ünïcode 3.14!! \r\n  end"


def test_texts_are_split_as_their_models_do():
    vocab = {token: i for i, token in enumerate(sorted(BYTES))}
    assert splits(byte_level("qwen2")[0], MIXED) == splits(Qwen2Tokenizer(vocab=vocab, merges=[]), MIXED)
    # By hand, from the patterns in the models' tokenizer.json.
    assert splits(byte_level("starcoder")[0], "x12 = 3") == ["x", "1", "2", " =", " ", "3"]
    code = byte_level("deepseek-coder")[0]
    assert splits(code, "def f(x1):\n  é你好12") == [
        "def",
        " f",
        "(",
        "x",
        "1",
        "):",
        "\n",
        " ",
        " é",
        "你好",
        "1",
        "2",
    ]
    assert splits(byte_level("default")[0], "a+=1234; b") == ["a", "+=", "123", "4", ";", " b"]
    with pytest.raises(InputError, match="pre-tokenizer 'tekken' is not supported; accepted: gpt-2, smollm"):
        byte_level("tekken")


@pytest.mark.parametrize("make", [byte_fallback, lambda: byte_level("qwen2")], ids=["byte fallback", "byte level"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_both_kinds_stream_whole_characters(make, size):
    tok, _ = make()
    text = "naïve 雪が降る 👩‍👩‍👧 end\n  12"
    ids = tok.encode(text, add_special_tokens=False)
    assert len(ids) > len(text)
    stream = TextStream(tok)
    parts = [stream.add(ids[at : at + size]) for at in range(0, len(ids), size)]
    assert all("\ufffd" not in part for part in parts) and sum(map(bool, parts)) > 5
    assert "".join(parts) + stream.flush() == decode(tok, ids) == text
    # Cut off inside a character.
    stream, at = TextStream(tok), tok.encode("a 雪", add_special_tokens=False)[:-1]
    assert stream.add(at) == "a " and set(stream.flush()) == {"\ufffd"}


TEMPLATE = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}[{{ m.role }}{% if m.tool_calls %} calls {{ m.tool_calls[0].function.name }}{% endif %}]"
    "{{ m.content or '' }}{% endfor %}[assistant]"
)


def test_chat_templates_decide_over_roles():
    tok, _ = byte_level("qwen2", chat_template=TEMPLATE)
    with pytest.raises(InputError, match="^the chat template refuses these messages: System role not supported$"):
        encode_chat(tok, [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}])
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {}}}]}
    ids = encode_chat(tok, [{"role": "user", "content": "1+1"}, call, {"role": "tool", "content": "2"}])
    assert tok.decode(ids) == "[user]1+1[assistant calls add][tool]2[assistant]"
    with pytest.raises(InputError, match=r"no chat template; accepted: raw prompts, as texts"):
        encode_chat(byte_level("qwen2")[0], [{"role": "user", "content": "x"}])
