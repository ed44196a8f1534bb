"""Adapters from files: PEFT's, against weights merged matrix by matrix in NumPy; which base they belong to."""

import dataclasses
import json
import shutil

import huggingface_hub
import jax
import numpy as np
import pytest
from conftest import GOLDENS
from safetensors.numpy import load_file, save_file

from msn_jax import InputError, generate, load
from msn_jax.adapters import init_adapter
from msn_jax.config import LoraConfig
from msn_jax.io import hf
from msn_jax.io.adapters import CONFIG, check_base, find_adapter, load_adapter, save_adapter, stored_fingerprint
from msn_jax.io.loading import open_checkpoint

pytestmark = pytest.mark.slow

MODULES = [f"self_attn.{m}_proj" for m in "qkvo"] + [f"mlp.{m}_proj" for m in ("gate", "up", "down")]
SETTINGS = json.loads(
    '{"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "org/base", "r": 4, "lora_alpha": 8,'
    ' "lora_dropout": 0.05, "bias": "none", "use_rslora": false, "use_dora": false, "fan_in_fan_out": false,'
    ' "inference_mode": true, "modules_to_save": null, "rank_pattern": {}, "alpha_pattern": {}, "loftq_config": {}}'
)


@pytest.fixture
def write(tmp_path):
    """A PEFT adapter of tiny_`name` by {(layer, module): rank}, and that model's weights with it merged by hand."""

    def make(name, ranks, settings=None, scale=None):
        rng, folder = np.random.default_rng(0), tmp_path / "peft"
        base = load_file(GOLDENS / f"tiny_{name}/model.safetensors")
        merged, stored = {k: v.astype(np.float32) for k, v in base.items()}, {}
        for (layer, module), r in ranks.items():
            w = merged[f"model.layers.{layer}.{module}.weight"]
            a, b = (rng.normal(size=shape).astype(np.float32) for shape in ((r, w.shape[1]), (w.shape[0], r)))
            w += (scale(module, r) if scale else 8 / r) * b @ a
            for half, tensor in (("A", a), ("B", b)):
                stored[f"base_model.model.model.layers.{layer}.{module}.lora_{half}.weight"] = tensor
        folder.mkdir(exist_ok=True)
        save_file(stored, folder / "adapter_model.safetensors")
        (folder / CONFIG).write_text(json.dumps(SETTINGS | (settings or {})))
        shutil.rmtree(tmp_path / "merged", ignore_errors=True)
        (tmp_path / "merged").mkdir()
        save_file(merged, tmp_path / "merged/model.safetensors")
        shutil.copy(GOLDENS / f"tiny_{name}/config.json", tmp_path / "merged/config.json")
        return folder, tmp_path / "merged"

    return make


def loaded(name, adapter=None):
    """(cfg, weights) of a golden model or a folder like it, with an adapter merged as decoding does it."""
    from msn_jax.adapters import merge

    cfg, source = hf.open_folder(GOLDENS / f"tiny_{name}" if isinstance(name, str) else name)
    params = hf.load_params(cfg, source, stacked=True)
    return cfg, params if adapter is None else merge(params, load_adapter(adapter, cfg))


EVERYWHERE = {(layer, module): 4 for layer in range(3) for module in MODULES}


@pytest.mark.parametrize(
    "name, ranks, settings, scale",
    [
        ("gqa_tied", EVERYWHERE, {}, None),
        ("headdim", EVERYWHERE, {}, None),
        ("gqa_tied", {(1, "self_attn.v_proj"): 3, (1, "self_attn.q_proj"): 3, (2, "mlp.up_proj"): 3}, {}, None),
        (
            "gqa_tied",
            EVERYWHERE | {(0, "self_attn.q_proj"): 7, (2, "mlp.down_proj"): 1},
            {"rank_pattern": {"q": 7}},
            None,
        ),
        ("gqa_tied", EVERYWHERE, {"use_rslora": True}, lambda module, r: 8 / np.sqrt(r)),
        (
            "gqa_tied",
            EVERYWHERE,
            {"alpha_pattern": {"k_proj": 2, r"layers.\d+.mlp.up_proj": 1}},
            lambda module, r: {"self_attn.k_proj": 2, "mlp.up_proj": 1}.get(module, 8) / r,
        ),
        (
            "starcoder2",
            {(i, m): 2 for i in range(2) for m in (*MODULES[:4], "mlp.c_fc", "mlp.c_proj")},
            {},
            None,
        ),
    ],
)
def test_a_peft_adapter_adds_what_its_matrices_add(write, name, ranks, settings, scale):
    adapter, merged = write(name, ranks, settings, scale)
    (_, ours), (_, theirs) = loaded(name, adapter), loaded(merged)
    for path, mine in jax.tree_util.tree_flatten_with_path(ours)[0]:
        other = jax.tree_util.tree_flatten_with_path(theirs)[0]
        np.testing.assert_allclose(mine, dict(other)[path], atol=2e-5, err_msg=jax.tree_util.keystr(path))


def test_a_peft_adapter_is_named_by_its_folder_its_file_or_a_hub_id(write, monkeypatch):
    adapter, _ = write("gqa_tied", EVERYWHERE)
    cfg = hf.read_config(GOLDENS / "tiny_gqa_tied")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns: str(adapter))
    first = load_adapter(adapter, cfg)
    for name in (adapter / "adapter_model.safetensors", "org/adapter"):
        jax.tree.map(np.testing.assert_array_equal, load_adapter(name, cfg), first)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    for name, named in (
        (adapter, "adapter_model.safetensors is missing"),
        (adapter / "adapter_model.bin", "a file that is not .safetensors; accepted: a directory with adapter_config"),
        (adapter / "none", "no such file or directory"),
        (adapter.parent, "adapter_config.json is missing"),
    ):
        with pytest.raises(InputError, match=named):
            load_adapter(name, cfg)


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"peft_type": "IA3"}, "peft_type = 'IA3' is not supported; accepted: 'LORA'"),
        ({"use_dora": True}, "use_dora = True"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"lora_bias": True}, "lora_bias = True"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save = \['lm_head'\]"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"task_type": "SEQ_CLS"}, "task_type = 'SEQ_CLS'"),
        ({"peft_type": ...}, "has neither `base` nor `peft_type`"),
    ],
)
def test_what_is_more_than_low_rank_matrices_is_refused(write, settings, named, monkeypatch):
    adapter, _ = write("gqa_tied", {(0, "self_attn.q_proj"): 2})
    made = {k: v for k, v in (SETTINGS | settings).items() if v is not ...}
    (adapter / CONFIG).write_text(json.dumps(made))
    (adapter / "adapter_model.safetensors").write_bytes(b"")  # nothing of it is looked at
    with pytest.raises(InputError, match=named):
        load_adapter(adapter, hf.read_config(GOLDENS / "tiny_gqa_tied"))


PRE = "base_model.model.model.layers."


@pytest.mark.parametrize(
    "change, named",
    [
        (
            lambda t: t.update({"base_model.model.lm_head.lora_A.weight": np.zeros((2, 48))}),
            "lm_head.lora_A.weight has no",
        ),
        (
            lambda t: t.update({f"{PRE}9.self_attn.q_proj.lora_A.weight": np.zeros((2, 48))}),
            "has no place in this model of",
        ),
        (lambda t: t.pop(f"{PRE}0.self_attn.q_proj.lora_B.weight"), "lora_A.weight has no other half"),
        (lambda t: t.update({f"{PRE}0.self_attn.q_proj.lora_A.weight": np.zeros((2, 47))}), r"the shape \[2, 47\] and"),
        (lambda t: t.update({f"{PRE}0.self_attn.q_proj.lora_A.weight": np.zeros((3, 48))}), r"the shape \[3, 48\] and"),
        (lambda t: t.update({f"{PRE}0.self_attn.q_proj.lora_A.weight": np.zeros((2, 48), np.int8)}), "the dtype I8"),
        (lambda t: t.clear(), "holds no tensor"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(write, change, named):
    adapter, _ = write("gqa_tied", {(0, "self_attn.q_proj"): 2})
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(InputError, match=named):
        load_adapter(adapter, hf.read_config(GOLDENS / "tiny_gqa_tied"))


# The base of an adapter.


def test_an_adapter_on_other_weights_is_warned_of(smollm2, tmp_path, capsys):
    lora = LoraConfig(rank=2, targets=["o"])
    adapter = init_adapter(jax.random.key(0), smollm2.cfg, lora)
    opened = open_checkpoint("smollm2-135m-instruct")
    mine = stored_fingerprint(opened.cfg, opened.source)
    noise = np.random.default_rng(0).normal(size=64) * 0.05 * np.std(mine["base_sample"])
    variants = {
        "mine": mine,
        "quantised": mine | {"base_sample": (np.array(mine["base_sample"]) + noise).tolist()},
        "tuned": mine | {"base_norms": mine["base_norms"][::-1]},
        "other": mine | {"base_sample": mine["base_sample"][::-1]},
        "untied": mine | {"base_sample": mine["base_sample"] * 2},
        "unsaid": None,
    }
    for name, trained_on in variants.items():
        save_adapter(tmp_path / name, adapter, lora, "other-135m", trained_on)
        for params in (smollm2.params, jax.tree.map(lambda a: a.astype("bfloat16"), smollm2.params)):
            check_base(find_adapter(tmp_path / name), params, "this")
        warned = f"{name} was trained on other-135m; this has other weights" in capsys.readouterr().err
        assert warned == (name in ("tuned", "other", "untied"))
    wider = dataclasses.replace(smollm2.cfg, embed=640, heads=10, kv_heads=5)
    with pytest.raises(InputError, match=r"o.a has the shape .* asks for .*; it was trained on other-135m"):
        load_adapter(tmp_path / "other", wider)


def test_the_shipped_adapter_knows_its_base(capsys):
    lm = load("smollm2-135m-instruct", GOLDENS.parent.parent / "adapters/smollm2-135m-msn", "bfloat16")
    assert lm.drafter is not None and capsys.readouterr().err == ""
    first = lambda part: part.replace(layers=part.layers[:2])  # of 30 layers, which take long to compile
    cfg = dataclasses.replace(lm.cfg, layers=2)
    lm = dataclasses.replace(lm, cfg=cfg, params=first(lm.params), drafter=first(lm.drafter))
    assert len(generate(lm, ["hi"], max_new_tokens=2)[0].tokens) == 2
