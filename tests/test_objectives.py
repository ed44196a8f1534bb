"""What is learnt: noise beside the text, marked noise, and the losses, each against a plain form of itself."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_train import lines

import train
from msn_jax import NoiseConfig, forward, generate, load, train_step, unembed
from msn_jax.adapters import Marked, Parts, init_adapter, init_trained, parts_of
from msn_jax.config import DataConfig, DataSource, LoraConfig, ModelStart, RunConfig, TrainConfig
from msn_jax.errors import InputError
from msn_jax.io.adapters import load_adapter, save_adapter
from msn_jax.noise import hung_tokens
from msn_jax.objectives import beside, inline, scores
from msn_jax.objectives.streams import divergence, divergence_sums, seen_by_noise, two_streams
from msn_jax.params import stack_layers
from msn_jax.sharding import make_mesh

pytestmark = pytest.mark.slow

DEPTHS = 3
BESIDE = NoiseConfig(layout="beside", length=DEPTHS, anchors=4)


def run_config(noise, lora=None, **settings):
    return RunConfig(
        model=ModelStart(ckpt="unused"),
        data=DataConfig(sources=[DataSource(path="unused")]),
        train=TrainConfig(**{"out": "unused", "steps": 9, "batch_size": 1, "learning_rate": 1e-2} | settings),
        noise=noise,
        lora=lora or LoraConfig(),
    )


def first_gradients(cfg, run, params, batch):
    """Adam's first moment after a step: a tenth of the clipped gradient."""
    frozen = params if run.lora.rank else None
    start = None if run.lora.rank else jax.tree.map(jnp.copy, params)
    state = train_step.init_state(cfg, run, make_mesh(devices=jax.devices()[:1]), start)
    state, report = jax.jit(train_step.make_train_step(cfg, run))(state, frozen, batch)
    found = jax.tree.leaves(state.opt_state, is_leaf=lambda s: hasattr(s, "mu"))
    return next(s.mu for s in found if hasattr(s, "mu")), report


def test_noise_sees_its_example_up_to_its_anchor():
    segments, anchors = jnp.asarray([[1, 1, 1, 2, 2, 2, 0]]), jnp.asarray([[1, 4]])
    seen = seen_by_noise(segments, anchors, 2)
    first, second = [1, 1, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, 0, 0]
    assert seen.astype(int).tolist() == [[[first, first], [second, second]]]
    # Noise of depth j stands j places after its anchor, and a window of 2 shows it itself and the one before.
    narrow = seen_by_noise(segments, anchors, 2, window=2)
    assert narrow.astype(int).tolist() == [[[[0, 1, 0, 0, 0, 0, 0], [0] * 7], [[0, 0, 0, 0, 1, 0, 0], [0] * 7]]]


@pytest.mark.parametrize("window", [None, 4])
def test_noise_beside_is_text_that_ends_in_noise(tiny, batch, window):
    """Each chain against `forward` over its example, cut behind the anchor, with the noise put there as text."""
    cfg, params = tiny
    cfg = dataclasses.replace(cfg, sliding_window=window)
    anchors = jnp.asarray([[3, 7, 12, -1, 15]])
    tokens = hung_tokens(jax.random.key(0), batch["tokens"], batch["segment_ids"], anchors, BESIDE)
    stacked = stack_layers(params)
    adapter = jax.tree.map(lambda x: x + 0.05, init_adapter(jax.random.key(0), cfg, LoraConfig(rank=2)))
    noise = dataclasses.replace(BESIDE, decay=0.5, weight=2.0, anchors=5)
    share = jnp.full(1, 0.25)
    loss = partial(beside.loss_sums, Parts(stacked, adapter, None), cfg, batch, anchors, tokens, share)
    value, (divisor, sums) = jax.jit(partial(loss, noise=noise, head_chunk=4))()

    expected = np.zeros((1 + DEPTHS, 4))
    text, chains = np.asarray(batch["tokens"])[0], np.asarray(tokens).reshape(5, DEPTHS)

    @jax.jit
    def logits_of(ids):
        rows, _ = forward(stacked, cfg, ids[None], jnp.arange(len(ids))[None], adapter=adapter)
        return unembed(params, cfg, rows)[0]

    def score(logits, label):
        nll = np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[label]
        rank = (logits > logits[label]).sum()
        return np.array([1, nll, rank < 1, rank < 10])

    for first, end, reply in ((0, 10, 4), (10, 18, 13)):
        logits = np.asarray(logits_of(jnp.asarray(text[first:end])), np.float64)
        for at in range(reply - 1, end - 1):
            expected[0] += score(logits[at - first], text[at + 1])
        for anchor, chain in zip(anchors[0].tolist(), chains, strict=True):
            if not first <= anchor < end:
                continue
            hung = np.asarray(logits_of(jnp.asarray(np.r_[text[first : anchor + 1], chain])), np.float64)
            for j in range(1, DEPTHS + 1):
                if anchor + j + 1 < end:  # the label of depth j is the token j + 1 places after the anchor
                    expected[j] += score(hung[anchor - first + j], text[anchor + j + 1])
    np.testing.assert_allclose(sums, expected, rtol=1e-4, atol=1e-4)
    assert float(divisor) == expected[0, 0] == 11
    of_noise = expected[1:, 1] @ [1, 0.5, 0.25]
    assert float(value) == pytest.approx(expected[0, 1] + 2.0 * 0.25 * of_noise, rel=1e-4)


def test_noise_is_drawn_from_its_example_up_to_the_anchor(batch):
    anchors = jnp.asarray([[3, 12]])
    draw = lambda key: hung_tokens(key, batch["tokens"], batch["segment_ids"], anchors, BESIDE)
    drawn = np.asarray(jax.vmap(draw)(jax.random.split(jax.random.key(0), 300))).reshape(300, 2, DEPTHS)
    text = np.asarray(batch["tokens"])[0]
    assert set(drawn[:, 0].ravel()) == set(text[:4]) and set(drawn[:, 1].ravel()) == set(text[10:13])


def test_the_clean_text_is_untouched_by_noise(tiny, batch):
    cfg, params = tiny
    anchors, stacked = jnp.asarray([[5, 14]]), stack_layers(params)
    noise = jax.random.normal(jax.random.key(0), (1, 2, DEPTHS, cfg.embed))
    clean = lambda noise: two_streams(stacked, cfg, batch, anchors, noise)[0]
    rows, gradient = jax.value_and_grad(lambda noise: clean(noise).sum())(noise)
    assert (gradient == 0).all()
    alone, _ = forward(stacked, cfg, batch["tokens"], batch["positions"], segments=batch["segment_ids"])
    np.testing.assert_allclose(clean(noise), alone, atol=1e-6)


def test_beside_with_weight_0_is_plain_tuning_to_the_last_bit(one_layer, batch):
    cfg, params = one_layer
    stacked = stack_layers(params)
    plain, _ = first_gradients(cfg, run_config(NoiseConfig(kind="none")), stacked, batch)
    silent, report = first_gradients(cfg, run_config(dataclasses.replace(BESIDE, weight=0.0)), stacked, batch)
    jax.tree.map(np.testing.assert_array_equal, plain, silent)
    assert (report["by_depth"][:, 0] > 0).all()
    loud, _ = first_gradients(cfg, run_config(BESIDE), stacked, batch)
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(loud), strict=True))


def test_accumulated_parts_are_one_batch_beside_the_text(tiny, batch):
    cfg, params = tiny
    rows = jax.tree.map(lambda x: jnp.concatenate([x, x]), batch)
    rows["response"] = rows["response"].at[1, :12].set(False)  # so that parts have other shares of noise
    noise = dataclasses.replace(BESIDE, mark=True, target="model")
    whole, a = first_gradients(cfg, run_config(noise, batch_size=2), stack_layers(params), rows)
    parts, b = first_gradients(cfg, run_config(noise, batch_size=2, accumulate=2), stack_layers(params), rows)
    np.testing.assert_allclose(a["by_depth"], b["by_depth"], rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), whole, parts)


def test_marked_noise_is_a_token_of_its_own(tiny, batch):
    """Against a model whose vocabulary has the marks as further tokens."""
    cfg, params = tiny
    marks = jax.random.normal(jax.random.key(0), (DEPTHS, cfg.embed))
    depth = jnp.asarray([[0] * 5 + [1, 2, 3] + [0] * 6 + [1, 2, 3] + [0] * 3])
    longer = params.replace(embed=jnp.concatenate([params.embed, marks]))
    see = partial(forward, cfg=cfg, positions=batch["positions"], segments=batch["segment_ids"])
    expected, _ = see(longer, tokens=jnp.where(depth > 0, 60 + depth, batch["tokens"]))
    found, _ = see(params, tokens=batch["tokens"], marks=(marks, depth))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("noise", [NoiseConfig(length=DEPTHS), BESIDE], ids=["inline", "beside"])
def test_marks_learn_and_tokens_under_them_do_not_matter(tiny, batch, noise):
    cfg, params = tiny
    noise, objective = dataclasses.replace(noise, mark=True), beside if noise.layout == "beside" else inline
    trained = init_trained(jax.random.key(0), cfg, LoraConfig(), noise, stack_layers(params))
    drawn = objective.draw(jax.random.key(1), batch, noise, 0)

    @jax.jit
    def loss(trained, drawn):
        return objective.loss_sums(parts_of(trained, None), cfg, batch, *drawn, noise=noise)[0]

    gradient = jax.grad(loss)(trained, drawn)
    assert isinstance(trained, Marked) and (np.abs(gradient.noise_embed).max(axis=1) > 0).all()
    if objective is beside:
        anchors, tokens, share = drawn
        others = anchors, 60 - tokens, share
    else:
        inputs, depth = drawn
        others = jnp.where(depth > 0, 60 - inputs, inputs), depth
    assert loss(trained, others) == loss(trained, drawn)


def test_divergences_are_those_of_the_formulas():
    rng = np.random.default_rng(0)
    p, q = (x / x.sum(-1, keepdims=True) for x in rng.random((2, 5, 7)))
    expected = {
        "kl": (p * np.log(p / q)).sum(-1),
        "l1": 0.9 * np.abs(p - q).sum(-1) - 0.1 * np.log(q[np.arange(5), p.argmax(-1)]),
        "overlap": -np.log(np.minimum(p, q).sum(-1)),
    }
    for loss, values in expected.items():
        found = divergence(loss, jnp.log(jnp.asarray(p, jnp.float32)), jnp.log(jnp.asarray(q, jnp.float32)))
        np.testing.assert_allclose(found, values, rtol=1e-5)


def test_no_gradient_reaches_a_target_that_the_model_gives(tiny):
    cfg, params = tiny
    clean, noise = jax.random.normal(jax.random.key(0), (1, 6, 32)), jax.random.normal(jax.random.key(1), (1, 1, 2, 32))
    counts, anchors = jnp.ones((1, 6), bool), jnp.asarray([[1]])
    target = jax.nn.log_softmax(unembed(params, cfg, clean[:, None, 2:4]))

    def loss(params, clean):
        return divergence_sums(params, cfg, clean, noise, counts, anchors, "kl", 8)[:, scores.LOSS].sum()

    def plain(params):
        return divergence("kl", target, jax.nn.log_softmax(unembed(params, cfg, noise))).sum()

    of_head, of_clean = jax.grad(loss, argnums=(0, 1))(params, clean)
    assert (of_clean == 0).all()
    np.testing.assert_allclose(of_head.embed, jax.grad(plain)(params).embed, atol=1e-5)


@pytest.mark.parametrize("draft_only", [True, False])
def test_int8_keeps_each_row_within_half_a_step(tiny, tmp_path, draft_only):
    cfg, _ = tiny
    lora = LoraConfig(rank=2, draft_only=draft_only, store="int8")
    noise = NoiseConfig(length=DEPTHS, mark=not draft_only)
    trained = init_trained(jax.random.key(0), cfg, lora, noise)
    keys = iter(jax.random.split(jax.random.key(1), 99))
    trained = jax.tree.map(lambda x: x + jax.random.normal(next(keys), x.shape), trained)
    save_adapter(tmp_path, trained, lora, "base")
    read = load_adapter(tmp_path, cfg)
    assert type(read) is type(trained)
    layers = lambda a: a.layers if draft_only else a.weights
    for name in lora.targets:
        old, new = (np.asarray(getattr(layers(a), name).b) for a in (trained, read))
        step = np.abs(old).max(axis=-1, keepdims=True) / 127
        assert (np.abs(old - new) <= 0.51 * step).all() and (old != new).any()
        old, new = (np.asarray(getattr(layers(a), name).a).reshape(cfg.layers, 2, -1) for a in (trained, read))
        assert (np.abs(old - new) <= 0.51 * np.abs(old).max(axis=-1, keepdims=True) / 127).all()
    np.testing.assert_array_equal(np.float16(trained.noise_embed), np.float16(read.noise_embed))


def test_marked_runs_resume_export_and_decode_with_marks(config, tmp_path):
    noise = {"layout": "beside", "mark": True, "anchors": 6}
    path = config(noise=noise, data={"held_out": 5}, train={"steps": 6, "save_every": 3, "eval_every": 3})
    train.main(["--config", path, "--export", str(tmp_path / "hf")])
    whole, before = lines(tmp_path / "run"), load(tmp_path / "run")
    assert {"loss_clean", "loss_noisy", "top10_depth3", "eval_loss", "eval_top1_depth1"} <= whole[-1].keys()
    (tmp_path / "run" / "checkpoints" / "6" / "commit_success.txt").unlink()
    train.main(["--config", path])
    speed = ("tokens_per_s",)
    bare = lambda rows: [{k: v for k, v in row.items() if k not in speed} for row in rows]
    assert bare(lines(tmp_path / "run")) == bare(whole)
    after = load(tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, (after.params, after.drafter), (before.params, before.drafter))
    assert after.drafter.layers is None

    exported = load(tmp_path / "hf", adapter=tmp_path / "hf" / "marks")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), exported.params, after.params)
    np.testing.assert_array_equal(exported.drafter.noise_embed, after.drafter.noise_embed)
    lora = config(
        "lora.yaml",
        model={"scratch": None, "ckpt": str(tmp_path / "hf")},
        noise={"mark": True},
        lora={"rank": 2},
        train={"out": str(tmp_path / "lora"), "steps": 2},
    )
    train.main(["--config", lora])
    merged = load(tmp_path / "hf", adapter=tmp_path / "lora" / "adapter")
    run = load(tmp_path / "lora")
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6)
    jax.tree.map(close, (merged.params, merged.drafter), (run.params, run.drafter))
    chat = [[{"role": "user", "content": "Count from 3 by 2."}]]
    for lm in (exported, merged):
        plain, drafted = (
            generate(lm, chat, method=method, tree=tree, max_new_tokens=20)[0]
            for method, tree in (("ar", None), ("jacobi", "ahead8"))
        )
        assert drafted.tokens == plain.tokens


@pytest.mark.parametrize(
    "noise, lora, message",
    [
        ({"layout": "under"}, {}, "noise.layout = under is not possible; accepted: inline, beside"),
        ({"layout": "beside", "kind": "none"}, {}, "noise.layout = beside is not possible"),
        ({"mark": True, "kind": "none"}, {}, "noise.mark = True is not possible"),
        ({"mark": True}, {"rank": 2, "draft_only": True}, "noise.mark = True: noise of a draft-only adapter"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(noise, lora, message):
    with pytest.raises(InputError, match=message):
        run_config(NoiseConfig(**noise), LoraConfig(**lora))
