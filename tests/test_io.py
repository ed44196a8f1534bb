import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDENS
from safetensors.numpy import load_file, save_file

from msn_jax import InputError, load
from msn_jax.io import gguf, hf, tokenizer
from msn_jax.io.loading import resolve
from msn_jax.io.published_config import config_from_gguf
from msn_jax.io.tokenizer import TextStream, decode, encode_chat


@pytest.fixture
def checkpoint(tmp_path):
    """A copy of a golden checkpoint, to be damaged."""
    shutil.copytree(GOLDENS / "tiny_gqa_tied", tmp_path / "ckpt")
    return tmp_path / "ckpt"


def load_weights(folder, **kwargs):
    return hf.load_params(hf.read_config(folder), hf.SafetensorsSource(folder), **kwargs)


def change_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_shards_equal_one_file():
    one, many = load_weights(GOLDENS / "tiny_gqa_tied"), load_weights(GOLDENS / "tiny_sharded")
    np.testing.assert_array_equal(one.layers[2].qkv, many.layers[2].qkv)
    np.testing.assert_array_equal(one.embed, many.embed)


def test_float32_and_float16_files_load(checkpoint):
    exact = load_weights(checkpoint)
    for dtype in (np.float32, np.float16):
        change_weights(checkpoint, lambda t: t.update({k: v.astype(dtype) for k, v in t.items()}))  # noqa: B023
        got = load_weights(checkpoint)
        assert got.embed.dtype == jnp.float32
        np.testing.assert_allclose(got.layers[0].down, exact.layers[0].down, atol=1e-3)


def test_bfloat16_is_loaded_as_such(checkpoint):
    assert load_weights(checkpoint, dtype="bfloat16").layers[0].qkv.dtype == jnp.bfloat16


def test_a_missing_tensor_is_named(checkpoint):
    change_weights(checkpoint, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(InputError, match="the tensor model.layers.1.mlp.up_proj.weight is missing"):
        load_weights(checkpoint)


def test_an_extra_tensor_is_named(checkpoint):
    change_weights(checkpoint, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": np.zeros(4)}))
    with pytest.raises(InputError, match="q_proj.bias is not part of this model"):
        load_weights(checkpoint)


def test_a_wrong_shape_is_named(checkpoint):
    change_weights(checkpoint, lambda t: t.update({"model.norm.weight": np.zeros(7, np.float32)}))
    with pytest.raises(InputError, match=r"model.norm.weight has the shape \[7\]; its config asks for \[48\]"):
        load_weights(checkpoint)


def test_truncated_weights_are_refused(checkpoint):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match="not a whole safetensors file"):
        load_weights(checkpoint)


def test_a_missing_shard_is_named(tmp_path):
    shutil.copytree(GOLDENS / "tiny_sharded", tmp_path / "ckpt")
    (tmp_path / "ckpt" / "model-00002-of-00004.safetensors").unlink()
    with pytest.raises(InputError, match="model-00002-of-00004.safetensors is missing"):
        load_weights(tmp_path / "ckpt")


def test_damaged_json_is_refused(checkpoint):
    (checkpoint / "config.json").write_text("{")
    with pytest.raises(InputError, match="config.json: not valid JSON"):
        load(checkpoint)


@pytest.mark.parametrize("kept", [100, 2_000_000, 90_000_000])
def test_a_truncated_gguf_is_refused(tmp_path, kept):
    with resolve("smollm2-135m-instruct").open("rb") as whole:
        (tmp_path / "cut.gguf").write_bytes(whole.read(kept))
    with pytest.raises(InputError, match="not a whole GGUF|truncated"):
        load(tmp_path / "cut.gguf")


def test_what_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "model.bin").write_text("x")
    for name, named in (
        (tmp_path / "nothing.gguf", "no such file"),
        (tmp_path / "model.bin", "a file that is not .gguf"),
        (tmp_path, "a directory without config.json"),
        ("smollm", "no such file or directory; accepted: a Hugging Face directory"),
    ):
        with pytest.raises(InputError, match=named):
            resolve(str(name))


def test_gguf_and_its_unsupported_fields(smollm2_text):
    meta = gguf.GGUFSource(resolve("smollm2-135m-instruct")).meta
    assert config_from_gguf(meta, 49152, True) == smollm2_text.cfg
    for field, value, named in (
        ("general.architecture", "gpt2", "architecture 'gpt2'"),
        ("llama.expert_count", 8, "expert_count = 8"),
        ("llama.rope.scaling.type", "yarn", "rope scaling type 'yarn'"),
    ):
        changed = {**meta, "llama.rope.scaling.factor": 2.0, field: value}
        with pytest.raises(InputError, match=named):
            config_from_gguf(changed, 49152, True)
    linear = config_from_gguf({**meta, "llama.rope.scale_linear": 4.0}, 49152, True).rope_scaling
    assert (linear.kind, linear.factor) == ("linear", 4.0)
    with pytest.raises(InputError, match="pre-tokenizer 'viking'"):
        tokenizer.from_gguf({**meta, "tokenizer.ggml.pre": "viking"})


def test_the_alias_has_its_stop_ids(smollm2_text):
    names = smollm2_text.tokenizer.convert_ids_to_tokens(list(smollm2_text.stop_ids))
    assert names == ["<|endoftext|>", "<|im_end|>"]


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "PreTrainedTokenizerFast"])
def test_a_folder_is_split_as_its_tokenizer_json_says(smollm2_text, checkpoint, name):
    smollm2_text.tokenizer.save_pretrained(checkpoint)
    settings = json.loads((checkpoint / "tokenizer_config.json").read_text())
    (checkpoint / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": name}))
    rebuilt, stops = tokenizer.from_folder(checkpoint)
    assert stops == set(smollm2_text.stop_ids) and rebuilt.chat_template == smollm2_text.tokenizer.chat_template
    for golden in GOLDEN_TEXTS["encode"]:
        assert rebuilt.encode(golden["text"], add_special_tokens=False) == golden["ids"]


def test_a_tokenizer_larger_than_the_model_is_refused(smollm2_text, checkpoint):
    smollm2_text.tokenizer.save_pretrained(checkpoint)
    with pytest.raises(InputError, match="the tokenizer has 49152 tokens, the model 97"):
        load(checkpoint)


GOLDEN_TEXTS = json.loads((GOLDENS / "smollm2_tokenizer.json").read_text())


@pytest.mark.parametrize("golden", GOLDEN_TEXTS["encode"], ids=lambda golden: repr(golden["text"][:20]))
def test_the_rebuilt_tokenizer_matches(smollm2_text, golden):
    assert smollm2_text.tokenizer.encode(golden["text"], add_special_tokens=False) == golden["ids"]


@pytest.mark.parametrize("golden", GOLDEN_TEXTS["chat"])
def test_the_chat_template_matches(smollm2_text, golden):
    ids = encode_chat(smollm2_text.tokenizer, golden["messages"])
    assert ids == smollm2_text.tokenizer.encode(golden["text"], add_special_tokens=False)


@pytest.mark.slow
def test_a_model_without_a_template_says_so(smollm2_text):
    meta = gguf.GGUFSource(resolve("smollm2-135m-instruct")).meta
    bare, _ = tokenizer.from_gguf({k: v for k, v in meta.items() if k != "tokenizer.chat_template"})
    with pytest.raises(InputError, match="no chat template"):
        encode_chat(bare, [{"role": "user", "content": "hi"}])


@pytest.mark.parametrize("size", [1, 2, 5])
def test_streamed_text_is_whole_characters(smollm2_text, size):
    text = "Schnee ❄️ 雪が降る 👩‍👩‍👧 naïve\n\tend 12"
    ids = smollm2_text.tokenizer.encode(text)
    stream = TextStream(smollm2_text.tokenizer)
    pieces = [stream.add(ids[at : at + size]) for at in range(0, len(ids), size)]
    assert all("\ufffd" not in piece for piece in pieces)
    assert "".join(pieces) + stream.flush() == decode(smollm2_text.tokenizer, ids) == text


def test_a_stream_that_ends_inside_a_character(smollm2_text):
    ids = smollm2_text.tokenizer.encode("ok 雪")[:-1]
    stream = TextStream(smollm2_text.tokenizer)
    assert stream.add(ids) == "ok "
    assert stream.flush() == "\ufffd"
