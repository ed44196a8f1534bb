"""GGUF files in parts, under other names, with keys that are absent or damaged: what llama.cpp makes of them."""

import gguf
import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from test_gguf import byte_fallback, byte_level, splits, write

from msn_jax import InputError
from msn_jax.io import hf
from msn_jax.io.gguf import GGUFSource
from msn_jax.io.loading import resolve
from msn_jax.io.published_config import config_from_gguf
from msn_jax.io.tokenizer import encode_text

# Tokenizers.

LLAMA3 = {"ggml.bos_token_id": 255}


@pytest.mark.parametrize("pre", ["llama-bpe", "llama3", "llama-v3"])
def test_llama3_begins_with_bos_unless_the_file_says_no(pre):
    first = lambda **more: byte_level(pre, **LLAMA3, **more)[0].encode("ab")
    assert first() == first(**{"ggml.add_bos_token": True}) and first()[0] == 255 and len(first()) == 3
    assert first(**{"ggml.add_bos_token": False}) == first()[1:]
    assert 255 not in byte_level(pre, **LLAMA3)[0].encode("ab", add_special_tokens=False)
    assert byte_level("qwen2", **LLAMA3)[0].encode("ab") == first()[1:]
    with pytest.raises(InputError, match="tokenizer.ggml.bos_token_id is missing"):
        byte_level(pre)


@pytest.mark.parametrize(
    "name, same",
    [
        ("llama-v3", "llama-bpe"),
        ("deepseek-r1-qwen", "qwen2"),
        ("starcoder", "smollm"),
        ("phi-2", "gpt-2"),
        (None, "default"),
    ],
)
def test_names_of_the_same_splitting(name, same, capsys):
    text = "It's 12345  apples\n\n\tfoo_bar+=x; ünïcode 3.14!! \r\n  end"
    assert splits(byte_level(name, **LLAMA3)[0], text) == splits(byte_level(same, **LLAMA3)[0], text)
    warned = capsys.readouterr().err
    assert warned == "" if name else "no tokenizer.ggml.pre; text is split as for 'default'" in warned


def test_a_sentencepiece_vocabulary_has_ids_by_default(capsys):
    absent = {f"ggml.{key}": None for key in ("eos_token_id", "unknown_token_id", "add_bos_token")}
    tok, stops = byte_fallback(**absent)
    assert (tok.bos_token_id, tok.eos_token_id, tok.unk_token_id, stops) == (1, 2, 0, {2}) and tok.encode("a")[0] == 1
    assert tok.encode("a") == [1, *byte_fallback()[0].encode("a")] and capsys.readouterr().err == ""
    tok, _ = byte_fallback(**{"ggml.bos_token_id": 10**6})
    assert tok.bos_token_id == 1 and "bos_token_id = 1000000 is no token" in capsys.readouterr().err
    assert byte_fallback(**{"ggml.eot_token_id": 10**6, "ggml.eom_token_id": "x"})[1] == {2}


def test_without_types_and_scores_all_tokens_are_alike():
    # Those that end a reply are told by their names, whatever their type.
    tok, stops = byte_level("qwen2", **{"ggml.token_type": None, "ggml.eos_token_id": None})
    assert stops == {256} and tok.encode("a<|endoftext|>")[-1] == 256
    assert byte_fallback(**{"ggml.scores": None})[0].encode("a", add_special_tokens=False)


@pytest.mark.parametrize(
    "more, named",
    [
        ({"ggml.tokens": None}, "the field 'tokenizer.ggml.tokens' is missing"),
        ({"ggml.merges": None}, "the field 'tokenizer.ggml.merges' is missing"),
        ({"ggml.tokens": []}, "tokenizer.ggml.tokens is empty"),
        ({"chat_template": 7}, "tokenizer.chat_template no text"),
        ({"ggml.tokens": 7}, "tokenizer.ggml.tokens is not a list"),
        ({"ggml.token_type": ["a"] * 257}, "tokenizer.ggml.token_type is not a list"),
        ({"ggml.token_type": [1] * 9}, "tokenizer.ggml.token_type has 9 entries for 257 tokens"),
        ({"ggml.tokens": ["a"] * 257}, "the token 'a' is in tokenizer.ggml.tokens twice"),
        ({"ggml.merges": ["a"]}, "tokenizer.ggml.merges has an entry"),
        ({"ggml.merges": ["a b"]}, "tokenizer.ggml.merges has an entry"),
        ({"ggml.add_eos_token": True}, "add_eos_token = True is not supported"),
        ({"ggml.model": "t5"}, "tokenizer model 't5' is not supported"),
    ],
)
def test_damaged_tokenizer_fields_are_named(more, named):
    with pytest.raises(InputError, match=named):
        byte_level("qwen2", **more)


def test_an_empty_token_has_a_name_of_its_own():
    tokens = [chr(33 + i) for i in range(90)] + [""]
    kinds = {"ggml.token_type": [1] * 91, "ggml.eos_token_id": 1}
    tok, _ = byte_level("qwen2", **{"ggml.tokens": tokens, **kinds})
    assert tok.convert_ids_to_tokens(90) == "[EMPTY_90]" and encode_text(tok, "ab") == [64, 65]


# Files.


def parts_of(path, count, empty_first=False):
    """A file cut by its tensors as gguf-split does it: the metadata are in the first part."""
    whole = GGUFReader(path)
    tensors = np.array_split(np.arange(len(whole.tensors)), count - empty_first)
    tensors = [[], *tensors] if empty_first else tensors
    paths = [path.with_name(f"cut-{i + 1:05}-of-{count:05}.gguf") for i in range(count)]
    for number, (part, held) in enumerate(zip(paths, tensors, strict=True)):
        writer = GGUFWriter(part, whole.fields["general.architecture"].contents())
        for key, field in whole.fields.items() if number == 0 else ():
            if not key.startswith(("GGUF.", "general.architecture")):
                writer.add_key_value(key, field.contents(), field.types[0], field.types[-1])
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", len(whole.tensors))
        for i in held:
            writer.add_tensor(whole.tensors[i].name, np.asarray(whole.tensors[i].data))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return paths


@pytest.mark.parametrize("empty_first", [False, True])
def test_all_parts_of_a_split_file_are_read(tmp_path, empty_first):
    whole = GGUFSource(write(tmp_path / "x.gguf", "qwen2"))
    first, second, third = parts_of(tmp_path / "x.gguf", 3, empty_first)
    source = GGUFSource(first)
    assert (source.config, source.shapes) == (whole.config, whole.shapes)
    hf.check(source.config, source)
    for tensor in whole.shapes:
        np.testing.assert_array_equal(source.read(tensor), whole.read(tensor))
    with pytest.raises(InputError, match="part 2 of 3 of a split GGUF; accepted: the first, cut-00001-of-00003.gguf"):
        GGUFSource(second)
    other = first.with_name("renamed.gguf")
    other.write_bytes(first.read_bytes())
    with pytest.raises(InputError, match="part 1 of 3 of a split GGUF; accepted: names as gguf-split gives them"):
        GGUFSource(other)
    third.write_bytes(second.read_bytes())
    with pytest.raises(InputError, match="not as many as its metadata"):
        GGUFSource(first)
    third.unlink()
    with pytest.raises(InputError, match="its part cut-00003-of-00003.gguf is missing; accepted: all 3 parts"):
        GGUFSource(first)


def test_a_file_is_known_by_its_beginning(tmp_path):
    made = write(tmp_path / "x.gguf", "qwen2").read_bytes()
    for name in ("X.GGUF", "sha256-0a1b", "model.bin"):
        (tmp_path / name).write_bytes(made)
        assert resolve(str(tmp_path / name)) == tmp_path / name
        assert GGUFSource(tmp_path / name).config.layers == 2
    (tmp_path / "other").write_bytes(b"gguf")
    with pytest.raises(InputError, match="a file that is not .gguf"):
        resolve(str(tmp_path / "other"))
    with pytest.raises(InputError, match="no such file or directory"):
        resolve("org/missing.GGUF")


META = {
    "general.architecture": "llama",
    "llama.context_length": 64,
    "llama.embedding_length": 32,
    "llama.block_count": 1,
    "llama.attention.head_count": 4,
    "llama.feed_forward_length": 48,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}


def test_absent_fields_of_the_model_are_llama_cpps():
    cfg = config_from_gguf(META, 97, False)
    assert (cfg.kv_heads, cfg.head_dim, cfg.rope_theta, cfg.rope_scaling, cfg.sliding_window) == (4, 8, 1e4, None, None)
    none = {"llama.rope.scaling.type": "linear", "llama.attention.causal": True, "llama.logit_scale": 0.0}
    assert config_from_gguf(META | none, 97, False) == cfg


@pytest.mark.parametrize(
    "field, value, named",
    [
        ("general.type", "adapter", "general.type = 'adapter' is not supported"),
        ("llama.attention.causal", False, "llama.attention.causal = False is not supported"),
        ("llama.attention.clamp_kqv", 8.0, "clamp_kqv = 8.0"),
        ("llama.embedding_scale", 12.0, "embedding_scale = 12.0"),
        ("llama.final_logit_softcapping", 30.0, "final_logit_softcapping = 30.0"),
        ("llama.rope.scaling.attn_factor", 2.0, "rope.scaling.attn_factor = 2.0"),
        ("llama.rope.scaling.factor", "4", "rope.scaling.factor = '4' is not possible"),
        ("llama.rope.scaling.factor", -4.0, "rope.scaling.factor = -4.0 is not possible"),
        ("llama.rope.scaling.type", "longrope", "rope scaling type 'longrope'"),
        ("llama.attention.head_count", [4], r"head_count = \[4\] is not possible"),
        ("llama.feed_forward_length", float("nan"), "feed_forward_length = nan"),
        ("llama.block_count", None, "'llama.block_count' is missing"),
    ],
)
def test_a_field_that_is_not_computed_is_refused_by_name(field, value, named):
    with pytest.raises(InputError, match=named):
        config_from_gguf({**META, field: value}, 97, False)


@pytest.mark.parametrize("kind", [gguf.GGMLQuantizationType.I32, gguf.GGMLQuantizationType.F64])
def test_a_type_that_is_not_supported_is_named_before_weights_are_read(tmp_path, kind):
    dtype = np.int32 if kind.name == "I32" else np.float64
    change = lambda tensors: tensors.update({"model.norm.weight": np.ones(32, dtype)})
    path = write(tmp_path / "x.gguf", "qwen2", change=change)
    with pytest.raises(InputError, match=f"model.norm.weight has the type {kind.name}, not supported"):
        GGUFSource(path)
