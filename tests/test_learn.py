"""What experiments.learn adds to train.py: packed rows, arms by name, and many steps in one dispatch."""

import argparse
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.arm_training import Programs, Trainer, cosine, parse_arm
from experiments.packed import pack
from msn_jax import InputError, train_step
from msn_jax.config import TrainConfig
from msn_jax.io.adapters import load_adapter
from msn_jax.params import stack_layers
from msn_jax.sharding import make_mesh

pytestmark = pytest.mark.slow


def test_rows_hold_every_example_once_and_whole():
    lengths = [5, 3, 8, 2, 6]
    examples = [(np.arange(n, dtype=np.int32) + 10 * i, np.arange(n) >= n // 2) for i, n in enumerate(lengths)]
    rows = pack(examples, 8, bins=2)
    # 5 and 3 fill a row, 8 one; 2 opens the third, where 6 still fits.
    assert rows["segment_ids"].tolist() == [[1] * 5 + [2] * 3, [1] * 8, [1] * 2 + [2] * 6]
    assert rows["tokens"][2].tolist() == [30, 31, 40, 41, 42, 43, 44, 45]
    assert rows["positions"][2].tolist() == [0, 1, 0, 1, 2, 3, 4, 5]
    assert rows["response"][0].astype(int).tolist() == [0, 0, 1, 1, 1, 0, 1, 1]
    assert pack(examples[:1], 7)["segment_ids"].tolist() == [[1, 1, 1, 1, 1, 0, 0]]


def test_the_schedule_is_that_of_train_py():
    train = TrainConfig(out="x", steps=100, learning_rate=1e-3, warmup_steps=10)
    ours = jax.vmap(lambda step: cosine(step, train, 100.0))(jnp.arange(100))
    with jax.numpy_dtype_promotion("standard"):
        theirs = [float(train_step.learning_rate(train)(step)) for step in range(100)]
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)


def test_arms_by_name():
    marked = parse_arm("beside-marked-model@240x16", rows=32)
    assert (marked.steps, marked.rows, marked.noise.mark, marked.noise.target) == (240, 16, True, "model")
    draft = parse_arm("draft-r48-int8-overlap-n5", rows=32)
    assert (draft.lora.rank, draft.lora.store, draft.noise.loss, draft.noise.length) == (48, "int8", "overlap", 5)
    assert (draft.steps, draft.rows) == (None, 32) and parse_arm("plain", 32).rows == 8
    heads = parse_arm("medusa-4", rows=32)
    assert heads.drafts and (heads.heads.count, heads.noise.kind, heads.lora.rank) == (4, "none", 0)
    heads = parse_arm("eagle-16384@40x8", rows=32)
    assert heads.drafts and (heads.heads.kind, heads.heads.vocabulary, heads.steps) == ("eagle", 16384, 40)
    assert parse_arm("eagle", 32).heads.vocabulary == 8192
    with pytest.raises(InputError, match="--arms sideways: accepted"):
        parse_arm("sideways", 32)


@pytest.mark.parametrize("name", ["beside-marked@4x2", "draft-r2@4x2", "medusa-3@4x2", "eagle-20@4x2"])
def test_a_dispatch_is_so_many_steps(one_layer, tmp_path, name):
    cfg, params = one_layer
    rng = np.random.default_rng(0)
    examples = [(rng.integers(0, 61, 30).astype(np.int32), np.arange(30) >= 5) for _ in range(12)]
    rows = jax.device_put(pack(examples, 64))
    held = {name: x[None, :2] for name, x in rows.items()}
    settings = {"dtype": "float32", "activations": None, "remat": "none", "tokens": 64, "dispatch": 2}
    args = argparse.Namespace(cfg=cfg, ckpt="base", base="base", trained_on=None, **settings)
    arm, frozen = parse_arm(name, 2), stack_layers(params)
    arm = dataclasses.replace(arm, noise=dataclasses.replace(arm.noise, anchors=8))
    # Rows past the count are there for the shape alone: none of them is learnt.
    longer = {name: jnp.pad(x, ((0, 2), (0, 0)), constant_values=1) for name, x in rows.items()}
    trainer = Trainer(arm, Programs(arm, args, frozen, longer, held), longer, held, len(rows["tokens"]))
    trained, figures = trainer.train(3, 1e9, tmp_path)
    assert figures["steps"] == 4 and "top10_depth1" in trainer.held_out(trained)

    run = trainer.programs.run
    run = dataclasses.replace(run, train=dataclasses.replace(run.train, seed=3, steps=4, warmup_steps=0))
    schedule = lambda step: cosine(step, trainer.programs.run.train, 4.0)
    step = jax.jit(train_step.make_train_step(cfg, run, schedule=schedule))
    state = train_step.init_state(cfg, run, make_mesh(devices=jax.devices()[:1]))
    if arm.heads.kind == "eagle":
        replies = np.concatenate([tokens[reply] for tokens, reply in examples])
        counts = np.bincount(replies, minlength=61)
        assert counts[np.int64(trained.vocabulary)].sum() == np.sort(counts)[-20:].sum()
        state = state.replace(params=state.params.replace(vocabulary=trained.vocabulary))
    order = np.concatenate([picks.permutation(6) for picks in [np.random.default_rng(3)] * 2])[:8].reshape(4, 2)
    for picked in order:
        state, _ = step(state, frozen, {name: x[picked] for name, x in rows.items()})
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), trained, state.params)
    saved = load_adapter(tmp_path, cfg)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), saved, trained)
