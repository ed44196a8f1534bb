"""Medusa's heads: their loss in NumPy, their drafts by the published rule, and a run from train.py to decoding."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import decode_all
from test_source import PROMPTS

import train
from msn_jax import InputError, NoiseConfig, forward, generate, load, unembed
from msn_jax.adapters import Parts
from msn_jax.config import LoraConfig
from msn_jax.decode import TREE_SETS, TreeSet, tree_set
from msn_jax.decode.tree import branching
from msn_jax.heads import MedusaHeads, ahead, init_heads
from msn_jax.io.adapters import load_adapter, save_adapter
from msn_jax.objectives import medusa
from msn_jax.params import stack_layers

HEADS, NEW = 3, 40
TREE = branching("medusa", 0, {(): 3, (0,): 2, (1,): 1, (0, 0): 2}, kind="medusa")
TREES = TreeSet("medusa", (TREE,), (0,))


@pytest.fixture(scope="module")
def heads(tiny):
    cfg, _ = tiny
    draw = lambda i, *shape: 0.3 * jax.random.normal(jax.random.key(i), shape)
    return MedusaHeads(weight=draw(0, HEADS, cfg.embed, cfg.embed), bias=draw(1, HEADS, cfg.embed))


def logits_ahead(heads, hidden, table):
    """Of a hidden row [D] the logits [K, V] of all heads, in float64."""
    hidden, table = np.float64(hidden), np.float64(table)
    x = np.float64(heads.weight) @ hidden + np.float64(heads.bias)
    return (hidden + x / (1 + np.exp(-x))) @ table.T


@pytest.mark.slow
def test_the_loss_is_the_cross_entropy_of_what_stands_further_ahead(tiny, batch, heads):
    cfg, params = tiny
    hidden, _ = forward(params, cfg, batch["tokens"], batch["positions"], segments=batch["segment_ids"])
    tokens, segments, response = (np.asarray(batch[k])[0] for k in ("tokens", "segment_ids", "response"))
    expected = np.zeros((1 + HEADS, 4))
    for t in range(len(tokens)):
        for k in range(HEADS):
            at = t + 2 + k  # the token that the head is asked for; the one after t must be a reply's too
            if at >= len(tokens) or not (response[t + 1] and response[at]) or len(set(segments[t : at + 1])) > 1:
                continue
            logits = logits_ahead(heads, hidden[0, t], params.embed)[k]
            rank = (logits > logits[tokens[at]]).sum()
            nll = np.log(np.exp(logits).sum()) - logits[tokens[at]]
            expected[k + 1] += [1, nll, rank < 1, rank < 10]
    parts = Parts(stack_layers(params), None, None, heads)
    loss, (divisor, sums) = medusa.loss_sums(parts, cfg, batch, noise=NoiseConfig(kind="none", decay=0.8))
    np.testing.assert_allclose(sums, expected, rtol=1e-5)
    assert expected[:, 0].tolist() == [0, 9, 7, 5] and divisor == 21
    np.testing.assert_allclose(loss, expected[1:, 1] @ [1, 0.8, 0.64], rtol=1e-5)


def test_new_heads_say_what_the_model_says(tiny):
    cfg, _ = tiny
    hidden = jax.random.normal(jax.random.key(2), (2, 5, cfg.embed))
    rows = ahead(init_heads(cfg, HEADS), hidden)
    assert rows.shape == (2, 5, HEADS, cfg.embed) and (rows == hidden[:, :, None]).all()


@pytest.mark.slow
def test_drafts_are_the_best_of_each_head(tiny, heads):
    """Medusa's rule over whole texts: each pass drafts what the heads said at the last accepted token."""
    cfg, params = tiny

    @jax.jit
    def run(tokens, last):
        hidden, _ = forward(params, cfg, tokens, jnp.arange(tokens.shape[1])[None])
        return hidden[0, last], jnp.argmax(unembed(params, cfg, hidden)[0, last])

    def model(text):
        hidden, best = run(jnp.asarray([text + [0] * (160 - len(text))], jnp.int32), len(text) - 1)
        return np.asarray(hidden), int(best)

    for prompt in PROMPTS[1:3]:
        text, count, accepted, top = prompt, NEW, [], None
        while count:
            paths = {0: []}
            for node in range(1, TREE.size):
                parent, depth, rank = TREE.parents[node], TREE.depth[node], TREE.wants[node][0][1]
                if top is not None and parent in paths and top[depth - 1][rank] == model(text + paths[parent])[1]:
                    paths[node] = [*paths[parent], int(top[depth - 1][rank])]
            hit = max(paths.values(), key=len)
            hidden, last = model(text + hit)
            top = np.argsort(-logits_ahead(heads, hidden, params.embed), axis=1, kind="stable")
            emitted = [*hit, last][:count]
            accepted.append(len(emitted))
            text, count = text + emitted, count - len(emitted)
        state, _ = decode_all(params, cfg, TREES, [prompt], drafter={"medusa": heads}, max_new_tokens=NEW)
        assert state.accepted[0, : int(state.forwards[0])].tolist() == accepted
        assert len(accepted) < NEW


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.8, "seed": 3}], ids=["greedy", "sampled"])
def test_heads_change_no_token(tiny, heads, settings, batch):
    cfg, params = tiny
    settings, prompts = {"max_new_tokens": NEW, **settings}, PROMPTS[-batch:]
    plain = decode_all(params, cfg, TREE_SETS["root"], prompts, **settings)[1]
    # Its fourth level has no head here, and stays without drafts.
    trees = tree_set("medusa", "medusa64")
    assert decode_all(params, cfg, trees, prompts, drafter={"medusa": heads}, **settings)[1] == plain


@pytest.mark.slow
def test_heads_are_stored_and_belong_to_a_shape(tmp_path, tiny, heads, smollm2):
    save_adapter(tmp_path / "heads", heads, LoraConfig(), "base")
    back = load_adapter(tmp_path / "heads", tiny[0])
    for name in ("weight", "bias"):
        np.testing.assert_array_equal(getattr(back, name), np.float16(getattr(heads, name)))
    with pytest.raises(InputError, match=r"weight has the shape \(3, 32, 32\); this model asks for \(3, 576, 576\)"):
        load_adapter(tmp_path / "heads", smollm2.cfg)
    path = tmp_path / "heads/adapter_config.json"
    path.write_text(json.dumps({"base": "base", "kind": "hydra"}))
    with pytest.raises(InputError, match="is of the kind 'hydra'; accepted: medusa, eagle, ngrams"):
        load_adapter(tmp_path / "heads", tiny[0])


@pytest.mark.slow
def test_a_run_trains_heads_that_decoding_takes(config, tmp_path, tiny_ckpt, capsys):
    sections = {
        "model": {"scratch": None, "ckpt": str(tiny_ckpt)},
        "noise": {"kind": "none", "decay": 0.8},
        "heads": {"kind": "medusa", "count": 2},
        "train": {"steps": 8},
        "data": {"held_out": 4, "max_tokens": 128, "chat_template": "plain"},
    }
    train.main(["--config", config(**sections)])
    logged = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert logged[-1]["loss"] < logged[0]["loss"] and "top1_depth2" in logged[-1]
    for ckpt, adapter in ((str(tmp_path / "run"), None), (str(tiny_ckpt), str(tmp_path / "run/adapter"))):
        lm = load(ckpt, adapter=adapter)
        assert lm.heads.bias.shape == (2, lm.cfg.embed) and lm.heads.weight.any() and "Medusa heads" in repr(lm)
        trees = dict(method="medusa", max_new_tokens=12)
        with pytest.raises(InputError, match="'medusa8' asks for 3 Medusa heads; .* has 2; accepted: --adapter"):
            generate(lm, ["Count."], **trees)
    with pytest.raises(InputError, match="has 0; accepted"):
        generate(load(tiny_ckpt), ["Count."], **trees)
    for override in (["--noise.kind", "ahead"], ["--lora.rank", "2"]):
        with pytest.raises(InputError, match="heads.kind = medusa: heads learn clean text beside a frozen model"):
            train.main(["--config", config(**sections), *override])
    with pytest.raises(InputError, match="heads.kind: heads need weights to work on; accepted: model.ckpt"):
        scratch = sections | {"model": {}, "train": {"steps": 8, "out": str(tmp_path / "other")}}
        train.main(["--config", config(**scratch)])
    with pytest.raises(InputError, match="--export: heads change no weights"):
        train.main(["--config", config(**sections), "--export", str(tmp_path / "export")])
