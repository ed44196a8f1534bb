"""EAGLE's head: its loss and its drafts in NumPy, float64, and a run from train.py to its file."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import train
from msn_jax import InputError, NoiseConfig, forward, load, unembed
from msn_jax.adapters import Parts
from msn_jax.config import LoraConfig
from msn_jax.eagle import init_eagle, taps, usual_tokens
from msn_jax.io.adapters import load_adapter, save_adapter
from msn_jax.objectives import eagle
from msn_jax.params import stack_layers

SIZE, STEPS = 40, 3


def random_head(cfg):
    """Far from where training starts, so that every part of it counts."""
    rng = np.random.default_rng(0)
    shaken = lambda w: w + 0.3 * rng.standard_normal(w.shape, np.float32)
    ids = np.sort(rng.permutation(cfg.vocab_size)[:SIZE]).astype(np.float32)
    return jax.tree.map(shaken, init_eagle(jax.random.key(3), cfg, SIZE)).replace(vocabulary=jnp.asarray(ids))


@pytest.fixture(scope="module")
def head(tiny):
    return random_head(tiny[0])


def rms(x, scale, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * np.float64(scale)


def turned(x, position, cfg):
    """Rotary embeddings of x [..., H], halves side by side."""
    angle = position * cfg.rope_theta ** -(np.arange(0, cfg.head_dim, 2) / cfg.head_dim)
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], axis=-1)


def entry64(head, cfg, params, token, x, position, seen):
    """One entry: (output [D], its key and value [K, H]); seen: the keys and values of the entries that it sees."""
    w = {name: np.float64(array) for name, array in vars(head).items()}
    inner = np.concatenate(
        [rms(np.float64(params.embed[token]), w["token_norm"], cfg.norm_eps), rms(x, w["attn_norm"], cfg.norm_eps)]
    )
    qkv = w["qkv"] @ inner  # [K, G + 2, H]
    q, k, v = turned(qkv[:, :-2], position, cfg), turned(qkv[:, -2], position, cfg), qkv[:, -1]
    keys, values = (np.stack(rows) for rows in zip(*seen, (k, v)))
    scores = np.einsum("kgh,ukh->kgu", q, keys) / np.sqrt(cfg.head_dim)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = np.einsum("kgu,ukh->kgh", weights / weights.sum(-1, keepdims=True), values)
    x = x + np.einsum("dnh,nh->d", w["o"], mixed.reshape(-1, cfg.head_dim))
    gate, up = w["gate_up"] @ rms(x, w["mlp_norm"], cfg.norm_eps)
    return x + w["down"] @ (gate / (1 + np.exp(-gate)) * up), (k, v)


def joined64(head, cfg, features):
    """The residual stream of features [..., 3D], each of the three normed."""
    parts = features.reshape(*features.shape[:-1], 3, -1)
    return rms(parts, 1.0, cfg.norm_eps).reshape(features.shape) @ np.float64(head.fc).T


def logits64(head, cfg, params, out):
    """Of the draft vocabulary [U]."""
    return np.float64(params.embed)[np.int64(head.vocabulary)] @ rms(out, params.final_norm, cfg.norm_eps)


def test_taps_are_what_enters_the_layers(tiny, batch):
    cfg, params = tiny
    row = batch["tokens"], batch["positions"]
    through = lambda layers: forward(params.replace(layers=params.layers[:layers]), cfg, *row, taps=(layers,))[2]
    hidden, _, tapped = forward(params, cfg, *row, taps=(2, 0, 1))
    np.testing.assert_array_equal(tapped, jnp.concatenate([through(2), params.embed[row[0]], through(1)], axis=-1))
    np.testing.assert_allclose(rms(np.float64(tapped[..., : cfg.embed]), params.final_norm, cfg.norm_eps), hidden, 1e-4)
    stacked = forward(stack_layers(params), cfg, *row, taps=(2, 0, 1))[2]
    np.testing.assert_allclose(stacked, tapped, atol=1e-5)
    deep = type("", (), {"layers": 30})
    assert taps(deep) == (2, 15, 27) and taps(cfg) == (2, 1, 1)


@pytest.mark.slow
def test_the_loss_is_the_cross_entropy_of_each_step_against_the_model(tiny, batch, head):
    cfg, params = tiny
    row = batch["tokens"], batch["positions"]
    hidden, _, features = forward(params, cfg, *row, segments=batch["segment_ids"], taps=taps(cfg))
    of_model = np.float64(unembed(params, cfg, hidden)[0])
    tokens, positions, segments, response = (np.asarray(x)[0] for x in (*row, batch["segment_ids"], batch["response"]))
    x0 = joined64(head, cfg, np.float64(features[0]))
    expected, ids = np.zeros((1 + STEPS, 4)), np.int64(head.vocabulary).tolist()
    seen, inside = [], 0
    for t in range(len(tokens) - 1):
        seen = [] if t == 0 or segments[t] != segments[t - 1] else seen
        out, own = x0[t], []
        for j in range(STEPS):
            at = t + 1 + j  # the step reads this token, and is asked for the one after it
            if at + 1 >= len(tokens) or segments[at + 1] != segments[t] or not segments[t]:
                break
            out, kv = entry64(head, cfg, params, tokens[at], out, positions[t] + j, [*seen, *own])
            (seen if j == 0 else own).append(kv)
            if not response[t + 2 : at + 2].all():
                break
            expected[j + 1, 0] += 1
            best = of_model[at].argmax()
            if best in ids:
                inside += 1
                logits, target = logits64(head, cfg, params, out), of_model[at][ids]
                log = lambda x: x - np.log(np.exp(x).sum())
                rank = (logits > logits[ids.index(best)]).sum()
                expected[j + 1, 1:] += [-np.exp(log(target)) @ log(logits), rank < 1, rank < 10]
    parts, noise = Parts(stack_layers(params), None, None, head), NoiseConfig(kind="none", decay=0.8)
    for chunk in (512, 7):
        loss, (divisor, sums) = eagle.loss_sums(parts, cfg, batch, noise=noise, steps=STEPS, head_chunk=chunk)
        np.testing.assert_allclose(sums, expected, rtol=2e-5)
        np.testing.assert_allclose(loss, expected[1:, 1] @ [1, 0.8, 0.64], rtol=2e-5)
    assert expected[:, 0].tolist() == [0, 11, 9, 7] and divisor == 27
    assert 0 < inside < 27 and expected[1:, 3].all()


def test_a_head_drafts_the_usual_tokens():
    replies = [np.array([5, 5, 2, 9]), np.array([2, 5, 7])]
    assert usual_tokens(replies, 12, 2).tolist() == [2, 5] and usual_tokens(replies, 12, 3).tolist() == [2, 5, 7]


@pytest.mark.slow
def test_a_head_is_stored_and_belongs_to_a_shape(tmp_path, tiny, head, smollm2):
    large = head.replace(vocabulary=head.vocabulary + 2**15 + 1)  # ids that float16 does not hold
    save_adapter(tmp_path / "other", large, LoraConfig(), "base")
    with pytest.raises(InputError, match="drafts tokens beyond this model's vocabulary of 61"):
        load_adapter(tmp_path / "other", tiny[0])
    save_adapter(tmp_path / "head", head, LoraConfig(), "base")
    back = load_adapter(tmp_path / "head", tiny[0])
    for name, tensor in vars(head).items():
        exact = tensor if name == "vocabulary" else np.float16(tensor)
        np.testing.assert_array_equal(getattr(back, name), exact, err_msg=name)
    with pytest.raises(InputError, match=r"fc has the shape \(32, 96\); this model asks for \(576, 1728\)"):
        load_adapter(tmp_path / "head", smollm2.cfg)


@pytest.mark.slow
def test_a_run_trains_a_head(config, tmp_path, tiny_ckpt):
    sections = {
        "model": {"scratch": None, "ckpt": str(tiny_ckpt)},
        "noise": {"kind": "none", "decay": 0.8},
        "heads": {"kind": "eagle", "count": 2, "vocabulary": 9},
        "train": {"steps": 8, "save_every": 4},
        "data": {"held_out": 4, "max_tokens": 128, "chat_template": "plain"},
    }
    train.main(["--config", config(**sections)])
    logged = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert logged[-1]["loss"] < logged[0]["loss"] and "top1_depth2" in logged[-1]
    for ckpt, adapter in ((str(tmp_path / "run"), None), (str(tiny_ckpt), str(tmp_path / "run/adapter"))):
        lm = load(ckpt, adapter=adapter)
        assert lm.eagle.head.o.any() and "an EAGLE head" in repr(lm)
        # The replies are numbers: digits, the space between, the end.
        said = {lm.tokenizer.convert_ids_to_tokens(int(i)) for i in lm.eagle.head.vocabulary}
        assert len(said) == 9 and {"1", "2", "\u0120"} < said
        np.testing.assert_array_equal(lm.eagle.rows, lm.params.embed[lm.eagle.head.vocabulary])
