"""Folders that say a thing twice, or not at all: the weights, config and ids of transformers, or a refusal."""

import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from conftest import GOLDENS
from safetensors.numpy import load_file, save_file
from test_cli import write_rows
from test_conversations import messages
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from msn_jax import InputError, data, generate, load
from msn_jax.config import DataConfig, DataSource
from msn_jax.io import hf
from msn_jax.io.export import hf_config
from msn_jax.io.loading import open_checkpoint
from msn_jax.io.published_config import config_from_hf

HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"
TIED = json.loads((GOLDENS / "tiny_gqa_tied" / "config.json").read_text())
LETTERS = {chr(33 + i): i for i in range(90)}


@pytest.fixture
def make(tmp_path):
    """Write a variant of tiny_gqa_tied: fields of its config (... takes one out), tensors, a tokenizer's vocabulary."""

    def write(config=None, tensors=None, vocab=LETTERS, added=(), rename=lambda name: name):
        folder = tmp_path / "ckpt"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        fields = {k: v for k, v in (TIED | (config or {})).items() if v is not ...}
        (folder / "config.json").write_text(json.dumps(fields))
        stored = load_file(GOLDENS / "tiny_gqa_tied/model.safetensors") | (tensors or {})
        save_file({rename(name): tensor for name, tensor in stored.items()}, folder / "model.safetensors")
        bpe = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="!"))
        bpe.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        bpe.add_tokens([AddedToken(token, special=True, normalized=False) for token in added])
        PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="z").save_pretrained(folder)
        return folder

    return write


def head_of(seed=0):
    embed = load_file(GOLDENS / "tiny_gqa_tied/model.safetensors")[EMBED].astype(np.float32)
    return (embed + np.random.default_rng(seed).normal(size=embed.shape)).astype(ml_dtypes.bfloat16)


# The head.


def test_a_head_that_differs_from_a_tied_embedding_counts(make, capsys):
    head = head_of()
    lm = load(make(tensors={HEAD: head}))
    assert not lm.cfg.tie_embeddings and "lm_head.weight differs" in capsys.readouterr().err
    np.testing.assert_array_equal(lm.params.unembed, head.astype(np.float32))
    assert hf_config(open_checkpoint(lm.name).cfg)["tie_word_embeddings"] is False  # what a run of it is written with
    assert "lm_head.weight differs" in capsys.readouterr().err
    untied = load(make({"tie_word_embeddings": False}, {HEAD: head}))
    assert untied.cfg == lm.cfg and capsys.readouterr().err == ""
    jax.tree.map(np.testing.assert_array_equal, untied.params, lm.params)


def test_an_equal_head_is_tied_and_another_shape_refused(make):
    embed = load_file(GOLDENS / "tiny_gqa_tied/model.safetensors")[EMBED]
    assert load(make(tensors={HEAD: embed})).params.unembed is None
    with pytest.raises(InputError, match=r"lm_head.weight has the shape \[50, 48\], and its config ties it"):
        load(make(tensors={HEAD: embed[:50]}))


@pytest.mark.parametrize("tied", [..., None])
def test_without_the_field_the_weights_tell_whether_a_model_is_tied(make, tied):
    assert load(make({"tie_word_embeddings": tied})).cfg.tie_embeddings
    assert not load(make({"tie_word_embeddings": tied}, {HEAD: head_of()})).cfg.tie_embeddings
    with pytest.raises(InputError, match="lm_head.weight is missing"):
        load(make({"tie_word_embeddings": False}))


def test_weights_of_the_model_without_its_head_lack_a_prefix(make):
    bare = load(make(rename=lambda name: name.removeprefix("model.")))
    np.testing.assert_array_equal(bare.params.layers[1].down, load(make()).params.layers[1].down)
    with pytest.raises(InputError, match="lm_head.weight is missing"):
        load(make({"tie_word_embeddings": False}, rename=lambda name: name.removeprefix("model.")))


# Which file wins.


def test_one_file_wins_over_an_index(make):
    folder = make()
    whole = load(folder).params
    save_file({"model.norm.weight": np.zeros(48, np.float32)}, folder / "old-00001-of-00001.safetensors")
    index = {"weight_map": {"model.norm.weight": "old-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    np.testing.assert_array_equal(load(folder).params.final_norm, whole.final_norm)


@pytest.mark.parametrize("file", ["../model.safetensors", "/model.safetensors", ["a"], 3, None])
def test_an_index_names_files_of_its_own_folder(make, file):
    folder = make()
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": file}}))
    with pytest.raises(InputError, match="accepted: files in its own directory"):
        load(folder)


def test_a_tensor_in_two_shards_is_refused(make):
    folder = make()
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "a.safetensors")
    save_file({EMBED: tensors[EMBED]}, folder / "b.safetensors")
    where = dict.fromkeys(tensors, "a.safetensors") | {EMBED: "b.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    with pytest.raises(InputError, match="embed_tokens.weight is in a.safetensors and in b.safetensors"):
        load(folder)


def test_what_would_make_transformers_read_other_files_is_refused(make):
    for field, value in (("transformers_weights", "other.safetensors"), ("configuration_files", ["config.4.0.0.json"])):
        with pytest.raises(InputError, match=f"config.json: {field} = .* is not supported"):
            load(make({field: value}))
    folder = make()
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="adapter_config.json lies beside config.json"):
        load(folder)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.bool_, ml_dtypes.float8_e4m3fn])
def test_a_dtype_that_is_not_supported_is_named_before_weights_are_read(make, dtype, monkeypatch):
    folder = make(tensors={"model.norm.weight": np.zeros(48, dtype)})
    monkeypatch.setattr(hf.SafetensorsSource, "read", None)
    with pytest.raises(InputError, match=r"model.norm.weight has the dtype \w+, not supported; accepted: F64, F32"):
        load(folder)


# Fields of the config.

LINEAR, LLAMA3 = (
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
)
DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 5e5},
        {"rope_parameters": {"rope_theta": 5e5}},
        {"rope_parameters": {**LINEAR, "rope_theta": 5e5}},
        {"rope_parameters": LINEAR, "rope_theta": 5e5},
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 5e5},
        {"rope_scaling": {**LINEAR, "type": "linear"}},
        {"rope_scaling": LLAMA3, "rope_theta": 5e5},
        {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 32}},
        {"rope_scaling": LINEAR, "rope_parameters": {**LINEAR, "rope_theta": 10000.0}},
        {"rope_scaling": None, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
        {"rope_scaling": {}, "rope_theta": 5e5},
    ],
)
def test_rope_is_what_transformers_reads(fields):
    cfg = config_from_hf({k: v for k, v in TIED.items() if "rope" not in k} | fields)
    # It changes the dicts that it is given.
    fields = json.loads(json.dumps({k: v for k, v in TIED.items() if "rope" not in k} | fields))
    theirs = LlamaConfig(**fields).rope_parameters
    assert (cfg.rope_theta, cfg.rope_scaling and cfg.rope_scaling.kind) == (
        theirs["rope_theta"],
        None if theirs["rope_type"] == "default" else theirs["rope_type"],
    )
    if cfg.rope_scaling is not None:
        assert cfg.rope_scaling.factor == theirs["factor"]
    if theirs["rope_type"] == "llama3":
        assert cfg.rope_scaling.original_max_position == theirs["original_max_position_embeddings"]


@pytest.mark.parametrize(
    "fields, named",
    [
        ({"rope_parameters": DEFAULT, "rope_scaling": LINEAR}, "disagree; accepted: one of them, or both alike"),
        ({"rope_parameters": DEFAULT, "rope_scaling": {"type": "linear", "factor": 2.0}}, "disagree"),
        ({"rope_parameters": DEFAULT, "rope_scaling": LLAMA3}, "disagree"),
        ({"rope_parameters": LINEAR, "rope_scaling": {**LINEAR, "factor": 4.0}}, "disagree"),
        # Version 5 would take the theta of neither.
        ({"rope_parameters": {**LINEAR, "rope_theta": 5e5}, "rope_scaling": LINEAR}, "disagree"),
        ({"rope_parameters": DEFAULT, "rope_theta": 5e5}, "rope_theta = 10000.0 and beside it rope_theta = 500000.0"),
        ({"rope_scaling": {**LINEAR, "type": "dynamic"}}, "rope_type = 'linear' and type = 'dynamic'"),
        ({"rope_scaling": {"factor": 2.0}}, "factor = 2.0 without a rope_type"),
        (
            {"rope_scaling": {"rope_type": "default", "factor": 2.0}},
            "factor = 2.0 is not supported with rope type 'default",
        ),
        ({"rope_scaling": {**LINEAR, "low_freq_factor": 1.0}}, "low_freq_factor = 1.0 is not supported with rope type"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": None}}, "'low_freq_factor' is missing"),
        ({"rope_scaling": [LINEAR]}, "must be objects"),
    ],
)
def test_rope_fields_that_contradict_are_refused(fields, named):
    with pytest.raises(InputError, match=named):
        config_from_hf({k: v for k, v in TIED.items() if "rope" not in k} | fields)


@pytest.mark.parametrize(
    "fields",
    [{"pretraining_tp": 2}, {"hidden_act": "swish"}, {"layer_types": ["full_attention"] * TIED["num_hidden_layers"]}],
)
def test_another_spelling_of_the_same_maths_loads(fields):
    assert config_from_hf(TIED | fields) == config_from_hf(TIED)


def test_layers_of_another_kind_are_refused():
    with pytest.raises(InputError, match="layer_types is not supported in a llama"):
        config_from_hf(TIED | {"layer_types": ["full_attention", "sliding_attention", "full_attention"]})


# Ids beyond the embedding, which has 97 rows.


def test_an_id_without_an_embedding_is_refused(make):
    for beyond in (97, 150):
        with pytest.raises(InputError, match=f"the model 97 embeddings; 'q' has the id {beyond}"):
            open_checkpoint(str(make(vocab=LETTERS | {"q": beyond})))


@pytest.mark.slow
def test_spare_tokens_load_and_are_refused_in_a_prompt(make, capsys, tmp_path, monkeypatch):
    # A row of letters that nothing merges, and an added token: no text has the first, and only its own name the other.
    full = {chr(33 + i): i for i in range(93)} | {chr(161 + i): 93 + i for i in range(4)}
    lm = load(make(vocab=full | {"qqq": 97}, added=["<pad>"]))
    assert len(lm.tokenizer) == 99 and "no embedding for '<pad>'" in capsys.readouterr().err
    assert len(generate(lm, ["abqqqc"], max_new_tokens=2)[0].tokens) == 2
    with pytest.raises(InputError, match="a prompt has .*token id"):
        generate(lm, ["ab<pad>"], max_new_tokens=2)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"messages": messages("a", "b")}, {"messages": messages("a", "<pad>")}]
    config = DataConfig(sources=[DataSource(path=str(write_rows(tmp_path / "a.jsonl", rows)))], chat_template="plain")
    corpus = data.load_examples(config, lm.tokenizer, lm.tokenizer.encode("z"), lm.cfg.vocab_size)
    assert list(corpus.skipped.values()) == [{"a token that the model has no embedding for": 1}]
