"""First layers trained to draft: their loss in NumPy, their files, and a run from train.py to decoding."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import decode
import train
from msn_jax import InputError, NoiseConfig, forward, generate, load, unembed
from msn_jax.adapters import Parts, init_adapter, init_trained, merge
from msn_jax.config import LoraConfig
from msn_jax.io.adapters import load_adapter, save_adapter
from msn_jax.objectives import draft_layers
from msn_jax.params import DraftLayers, stack_layers, unstack

pytestmark = pytest.mark.slow

LORA = LoraConfig(rank=2, alpha=2.0, draft_layers=1)


@pytest.mark.parametrize("loss", ["kl", "l1"])
def test_the_loss_is_the_divergence_from_the_whole_model(tiny, batch, loss):
    cfg, params = tiny
    adapter = jax.tree.map(lambda x: x + 0.05, init_adapter(jax.random.key(0), cfg, LORA))
    first = merge(params.replace(layers=params.layers[:1]), unstack(adapter))
    text = batch["tokens"], batch["positions"]
    read = lambda model, count: forward(
        model, dataclasses.replace(cfg, layers=count), *text, segments=batch["segment_ids"]
    )[0]
    said = [np.float64(unembed(params, cfg, read(model, count)[0])) for model, count in ((params, 2), (first, 1))]
    p, q = (np.exp(x) / np.exp(x).sum(axis=-1, keepdims=True) for x in said)
    response, segments = np.asarray(batch["response"])[0], np.asarray(batch["segment_ids"])[0]
    expected = np.zeros(4)
    for t in range(len(response) - 1):
        if response[t + 1] and segments[t + 1] == segments[t]:
            best = p[t].argmax()
            far = (p[t] * np.log(p[t] / q[t])).sum()
            if loss == "l1":
                far = 0.9 * np.abs(p[t] - q[t]).sum() - 0.1 * np.log(q[t, best])
            rank = (q[t] > q[t, best]).sum()
            expected += [1, far, rank < 1, rank < 10]
    noise = NoiseConfig(kind="none", loss=loss)
    value, (divisor, sums) = draft_layers.loss_sums(
        Parts(stack_layers(params), adapter, None), cfg, batch, noise=noise, head_chunk=4
    )
    np.testing.assert_allclose(sums, [np.zeros(4), expected], rtol=1e-5)
    np.testing.assert_allclose([value, divisor], [expected[1], 11], rtol=1e-5)


def test_layers_are_stored_and_draft_for_their_model(tmp_path, tiny_ckpt, capsys):
    cfg = load(tiny_ckpt).cfg
    new = init_trained(jax.random.key(0), cfg, LORA, NoiseConfig(kind="none"))
    assert isinstance(new, DraftLayers) and new.layers.qkv.a.shape[0] == 1
    trained = jax.tree.map(lambda x: x + 0.02, new)
    save_adapter(tmp_path / "a", trained, dataclasses.replace(LORA, store="int8"), str(tiny_ckpt))
    back = load_adapter(tmp_path / "a", cfg)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), back, trained)
    asked = dict(method="draft-model", max_new_tokens=12)
    for dtype in ("float32", "bfloat16", "int8"):
        lm, bare = load(tiny_ckpt, tmp_path / "a", dtype), load(tiny_ckpt, dtype=dtype, draft=1)
        assert len(lm.draft.params.layers) == lm.draft.cfg.layers == 1 and "its first 1 layers" in repr(lm)
        assert lm.draft.params.embed is lm.params.embed
        changed = jax.tree.map(lambda a, b: bool((a != b).any()), lm.draft.params.layers, bare.draft.params.layers)
        assert changed[0].qkv and not changed[0].attn_norm if dtype != "int8" else changed[0].qkv.values
        jax.tree.map(np.testing.assert_array_equal, lm.params, bare.params)  # the model itself stays
    lm = load(tiny_ckpt, tmp_path / "a")
    plain = generate(lm, ["Count.", "Go on."], method="ar", max_new_tokens=12)
    drafted = generate(lm, ["Count.", "Go on."], **asked)
    assert [r.tokens for r in drafted] == [r.tokens for r in plain]
    with pytest.raises(InputError, match="draft 1: an adapter brings layers that draft; accepted: one of both"):
        load(tiny_ckpt, tmp_path / "a", draft=1)
    flags = ["--ckpt", str(tiny_ckpt), "--prompt", "ab", "--max_new_tokens", "9", "--adapter", str(tmp_path / "a")]
    decode.main([*flags, "--method", "draft-model", "--compare"])
    assert "tokens identical: yes" in capsys.readouterr().out
    with pytest.raises(InputError, match="lora.draft_layers = 9 is not possible; accepted: up to 3, the"):
        init_trained(jax.random.key(0), cfg, dataclasses.replace(LORA, draft_layers=9), NoiseConfig(kind="none"))


def test_a_run_trains_layers_that_decoding_takes(config, tmp_path, tiny_ckpt):
    sections = {
        "model": {"scratch": None, "ckpt": str(tiny_ckpt)},
        "noise": {"kind": "none", "loss": "l1"},
        "lora": {"rank": 4, "draft_layers": 1},
        "train": {"steps": 8},
        "data": {"held_out": 4, "max_tokens": 128, "chat_template": "plain"},
    }
    train.main(["--config", config(**sections)])
    logged = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert logged[-1]["loss"] < logged[0]["loss"] and "top1_depth1" in logged[-1]
    runs = load(tmp_path / "run"), load(tiny_ckpt, tmp_path / "run/adapter")
    for lm in runs:
        assert lm.draft.cfg.layers == 1
    near = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3)  # one is stored in float16
    jax.tree.map(near, *(lm.draft.params for lm in runs))
    for override, said in (
        (["--noise.kind", "ahead"], "lora.draft_layers = 1: a model that drafts learns clean text; accepted"),
        (["--lora.draft_only", "true"], "lora.draft_layers = 1 is not possible; accepted: .*without lora.draft_only"),
        (["--lora.rank", "0"], "lora.draft_layers = 1 is not possible; accepted: above 0 with lora.rank above 0"),
        (["--export", str(tmp_path / "export")], "--export: a draft-only adapter changes no weights"),
    ):
        with pytest.raises(InputError, match=said):
            train.main(["--config", config(**sections), *override])
