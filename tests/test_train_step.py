"""The step against a float64 NumPy model that has no scan, no chunks and no packing tricks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msn_jax import NoiseConfig, forward, train_step
from msn_jax.adapters import init_adapter, merge, parts_of
from msn_jax.config import DataConfig, DataSource, LoraConfig, ModelStart, RunConfig, TrainConfig
from msn_jax.model import rope_frequencies
from msn_jax.objectives import inline, scores
from msn_jax.params import stack_layers, unstack_layers
from msn_jax.sharding import make_mesh

pytestmark = pytest.mark.slow

NO_NOISE = NoiseConfig(kind="none")


def run_config(noise=NO_NOISE, lora=None, **train):
    return RunConfig(
        model=ModelStart(ckpt="unused"),
        data=DataConfig(sources=[DataSource(path="unused")]),
        train=TrainConfig(**{"out": "unused", "steps": 10, "batch_size": 4, "learning_rate": 1e-2} | train),
        noise=noise,
        lora=lora or LoraConfig(),
    )


@pytest.fixture(scope="module")
def batch():
    """Four rows of 24: two examples in each, a prompt and a reply, the last row half empty."""
    rng = np.random.default_rng(0)
    rows = [[(3, 9), (4, 8)], [(2, 10), (5, 7)], [(6, 6), (3, 9)], [(2, 9)]]
    out = {name: np.zeros((4, 24), np.int32) for name in ("tokens", "segment_ids", "positions")}
    out["response"] = np.zeros((4, 24), bool)
    for b, row in enumerate(rows):
        at = 0
        for i, (prompt, reply) in enumerate(row):
            n = prompt + reply
            part = slice(at, at + n)
            out["tokens"][b, part] = rng.integers(0, 61, n)
            out["segment_ids"][b, part], out["positions"][b, part] = i + 1, np.arange(n)
            out["response"][b, at + prompt : at + n] = True
            at += n
    return {name: jnp.asarray(value) for name, value in out.items()}


def reference_loss(cfg, params, batch, inputs):
    """Mean loss over reply tokens, one example at a time, in float64. params: a tuple of layers, as NumPy."""

    def norm(x, w):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + cfg.norm_eps) * w

    def rotate(x):
        angles = np.arange(len(x))[:, None, None] * rope_frequencies(cfg).astype(np.float64)
        a, b = x[..., : cfg.head_dim // 2], x[..., cfg.head_dim // 2 :]
        cos, sin = np.cos(angles), np.sin(angles)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    losses = []
    for b in range(len(inputs)):
        for example in range(1, batch["segment_ids"][b].max() + 1):
            at = np.flatnonzero(batch["segment_ids"][b] == example)
            x = params.embed[inputs[b, at]]
            for layer in params.layers:
                h = norm(x, layer.attn_norm)
                heads = []
                for kv_head in range(cfg.kv_heads):
                    w = layer.qkv[kv_head]
                    k, v = rotate((h @ w[-2].T)[:, None])[:, 0], h @ w[-1].T
                    for q in range(cfg.group):
                        scores = rotate((h @ w[q].T)[:, None])[:, 0] @ k.T / np.sqrt(cfg.head_dim)
                        scores = np.where(np.tri(len(at), dtype=bool), scores, -np.inf)
                        weights = np.exp(scores - scores.max(-1, keepdims=True))
                        heads.append(weights / weights.sum(-1, keepdims=True) @ v)
                x = x + np.einsum("nth,dnh->td", np.stack(heads), layer.o)
                h = norm(x, layer.mlp_norm)
                gate, up = h @ layer.gate_up[0].T, h @ layer.gate_up[1].T
                x = x + (gate / (1 + np.exp(-gate)) * up) @ layer.down.T
            logits = norm(x, params.final_norm) @ params.embed.T
            for i, t in enumerate(at[:-1]):
                if batch["response"][b, t + 1]:
                    row = logits[i]
                    label = batch["tokens"][b, t + 1]
                    losses.append(np.log(np.exp(row - row.max()).sum()) + row.max() - row[label])
    return np.mean(losses)


@pytest.mark.parametrize("settings", [{"head_chunk": 7, "remat": "full"}, {"head_chunk": 512, "remat": "none"}])
def test_loss_and_gradients_equal_a_plain_float64_reference(tiny, batch, settings):
    cfg, params = tiny
    noise = NoiseConfig(length=3, segments=2)
    inputs, depth = inline.draw(jax.random.key(3), batch, noise, 0)
    assert (depth > 0).sum() >= 6 * 3

    def loss(params):
        parts = parts_of(params, None)
        total, (count, _) = inline.loss_sums(parts, cfg, batch, inputs, depth, noise=noise, **settings)
        return total / count

    stacked = stack_layers(params)
    value, grads = jax.jit(jax.value_and_grad(loss))(stacked)
    exact = jax.tree.map(lambda w: np.asarray(w, np.float64), unstack_layers(stacked))
    host, inputs = jax.tree.map(np.asarray, batch), np.asarray(inputs)
    assert abs(float(value) - reference_loss(cfg, exact, host, inputs)) < 1e-6

    # Along a random direction of each kind of tensor, against a central difference.
    rng = np.random.default_rng(1)
    grads = jax.tree.map(np.asarray, unstack_layers(grads))
    leaves, treedef = jax.tree.flatten(exact)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(exact)[0]]
    for i, (leaf, grad, path) in enumerate(zip(leaves, jax.tree.leaves(grads), paths, strict=True)):
        direction = rng.normal(size=leaf.shape)
        direction /= np.linalg.norm(direction)
        at = lambda step: reference_loss(
            cfg,
            jax.tree.unflatten(treedef, [*leaves[:i], leaf + step * direction, *leaves[i + 1 :]]),  # noqa: B023
            host,
            inputs,
        )
        slope = (at(1e-5) - at(-1e-5)) / 2e-5
        assert abs(slope - (grad * direction).sum()) < 2e-6, path


def test_masks_of_a_case_by_hand(tiny):
    cfg, params = tiny
    #           example 1: p p r r r | example 2: p r r | padding
    batch = {
        "tokens": jnp.array([[10, 11, 12, 13, 14, 20, 21, 22, 0, 0]]),
        "segment_ids": jnp.array([[1, 1, 1, 1, 1, 2, 2, 2, 0, 0]]),
        "positions": jnp.array([[0, 1, 2, 3, 4, 0, 1, 2, 0, 1]]),
        "response": jnp.array([[False, False, True, True, True, False, True, True, False, False]]),
    }
    labels, counts = scores.next_labels(batch)
    assert counts[0].tolist() == [False, True, True, True, False, True, True, False, False, False]
    assert labels[0, jnp.array([1, 2, 3, 5, 6])].tolist() == [12, 13, 14, 21, 22]
    depth = jnp.array([[0, 0, 1, 2, 0, 0, 0, 0, 0, 0]])
    parts, noise = parts_of(stack_layers(params), None), NoiseConfig(length=2)
    _, (_, sums) = inline.loss_sums(parts, cfg, batch, batch["tokens"], depth, noise=noise)
    assert sums[:, scores.COUNT].tolist() == [3, 1, 1]


def test_scores_are_those_of_a_sort(tiny):
    cfg, params = tiny
    hidden = jax.random.normal(jax.random.key(0), (2, 10, cfg.embed))
    labels = jax.random.randint(jax.random.key(1), (2, 10), 0, cfg.vocab_size)
    counts = jax.random.bernoulli(jax.random.key(2), 0.4, (2, 10))
    nll, rank = scores.token_scores(params, cfg, hidden, labels, counts, chunk=3)
    assert 0 < counts.sum() < 18  # the last chunk of 3 is left out
    logits = np.asarray(hidden, np.float64) @ np.asarray(params.embed, np.float64).T
    order = np.argsort(-logits, axis=-1)
    expected = [[list(order[b, t]).index(int(labels[b, t])) for t in range(10)] for b in range(2)]
    assert (rank == np.where(counts, expected, 0)).all()
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p = np.take_along_axis(p / p.sum(-1, keepdims=True), np.asarray(labels)[..., None], -1)[..., 0]
    np.testing.assert_allclose(nll, np.where(counts, -np.log(p), 0), atol=1e-5)


def one_step(cfg, run, params, batch, frozen=None):
    mesh = make_mesh(devices=jax.devices()[:1])
    state = train_step.init_state(cfg, run, mesh, params)
    return jax.jit(train_step.make_train_step(cfg, run))(state, frozen, batch)


def first_moment(state):
    """Adam's, after one step a tenth of the clipped gradient."""
    return next(s.mu for s in jax.tree.leaves(state.opt_state, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu"))


def test_accumulated_parts_are_one_batch(tiny, batch):
    cfg, params = tiny
    noise = NoiseConfig(length=3)
    whole, a = one_step(cfg, run_config(noise), stack_layers(params), batch)
    parts, b = one_step(cfg, run_config(noise, accumulate=2), stack_layers(params), batch)
    np.testing.assert_allclose(a["by_depth"], b["by_depth"], rtol=1e-5)
    same = lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6)
    jax.tree.map(same, first_moment(whole), first_moment(parts))


def test_the_optimiser_is_clipped_adamw_with_decay_on_matrices(tiny, batch):
    cfg, params = tiny
    run = run_config(clip_norm=0.5, weight_decay=0.1)
    start = stack_layers(params)
    after, report = one_step(cfg, run, start, batch)
    norm = np.sqrt(sum((np.asarray(m) ** 2).sum() for m in jax.tree.leaves(first_moment(after))))
    assert report["grad_norm"] > 0.5 and norm == pytest.approx(0.1 * 0.5, rel=1e-4)
    # At its first step Adam moves every weight by the learning rate, whatever the size of its gradient.
    moved = lambda name: np.asarray(getattr(after.params.layers, name) - getattr(start.layers, name))
    rate = float(report["learning_rate"])
    assert rate == pytest.approx(1e-2, rel=0.03)
    np.testing.assert_allclose(np.median(np.abs(moved("attn_norm"))), rate, rtol=1e-3)
    undecayed = moved("qkv") + rate * 0.1 * np.asarray(start.layers.qkv)
    assert (np.abs(np.abs(undecayed) - rate) < 1e-4).mean() > 0.99
    assert (np.abs(np.abs(moved("qkv")) - rate) < 1e-4).mean() < 0.7
    schedule = train_step.learning_rate(run_config(steps=100, warmup_steps=10, final_learning_rate=0.1).train)
    with jax.numpy_dtype_promotion("standard"):
        np.testing.assert_allclose([schedule(s) for s in (0, 4, 9, 99)], [1e-3, 5e-3, 1e-2, 1e-3], rtol=1e-5)


def test_noise_follows_the_seed_and_the_step(tiny, batch):
    noise = NoiseConfig(length=3)
    at = lambda seed, step: np.asarray(
        inline.draw(jax.random.fold_in(jax.random.key(seed), step), batch, noise, step)[0]
    )
    assert (at(0, 4) == at(0, 4)).all() and not (at(0, 4) == at(0, 5)).all() and not (at(0, 4) == at(1, 4)).all()


def test_training_learns_and_compiles_once(tiny, batch):
    cfg, params = tiny
    run = run_config(NoiseConfig(length=3), steps=40)
    mesh = make_mesh(devices=jax.devices()[:1])
    traces = []

    def counted(*args):
        traces.append(1)
        return train_step.make_train_step(cfg, run)(*args)

    places = jax.tree.map(lambda s: s.sharding, train_step.state_shapes(cfg, run, mesh))
    step = jax.jit(counted, donate_argnums=0, out_shardings=(places, None))
    state = train_step.init_state(cfg, run, mesh, jax.tree.map(jnp.copy, stack_layers(params)))
    losses = []
    for _ in range(40):
        state, report = step(state, None, batch)
        losses.append(scores.metrics_of(np.asarray(report["by_depth"]))["loss"])
    assert losses[-1] < 0.5 * losses[0]
    assert len(traces) == 1 and step._cache_size() == 1


def test_bfloat16_computes_near_float32_and_keeps_float32_weights(tiny, batch):
    cfg, params = tiny
    a, exact = one_step(cfg, run_config(), stack_layers(params), batch)
    b, near = one_step(cfg, run_config(dtype="bfloat16"), stack_layers(params), batch)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(b.params))
    loss = lambda r: scores.metrics_of(np.asarray(r["by_depth"]))["loss"]
    assert 0 < abs(loss(exact) - loss(near)) < 0.02
    wide = run_config(dtype="bfloat16", activation_dtype="float32")
    assert 0 < abs(loss(exact) - loss(one_step(cfg, wide, stack_layers(params), batch)[1])) < 0.005


@pytest.mark.parametrize("targets", [["qkv"], ["o", "down"], ["qkv", "o", "gate_up", "down"]])
def test_adapters_are_trained_alone_and_merge(tiny, batch, targets):
    cfg, params = tiny
    lora = LoraConfig(rank=2, alpha=4.0, targets=targets)
    frozen = stack_layers(params)
    state, _ = one_step(cfg, run_config(lora=lora), None, batch, frozen)
    assert {name for name in ("qkv", "o", "gate_up", "down") if getattr(state.params, name)} == set(targets)
    tokens, positions = batch["tokens"], batch["positions"]
    # b starts at zero, so give it something to do.
    adapter = jax.tree.map(lambda x: x + 0.05, state.params)
    apart, _ = forward(frozen, cfg, tokens, positions, adapter=adapter)
    merged, _ = forward(unstack_layers(merge(frozen, adapter)), cfg, tokens, positions)
    plain, _ = forward(frozen, cfg, tokens, positions)
    np.testing.assert_allclose(apart, merged, atol=1e-5)
    assert np.abs(np.asarray(apart - plain)).max() > 0.01


def test_a_new_adapter_changes_nothing_and_acts_on_noise_alone(tiny, batch):
    cfg, params = tiny
    frozen, new = stack_layers(params), init_adapter(jax.random.key(0), cfg, LoraConfig(rank=2))
    tokens, positions = batch["tokens"], batch["positions"]
    plain, _ = forward(frozen, cfg, tokens, positions)
    assert (forward(frozen, cfg, tokens, positions, adapter=new)[0] == plain).all()
    adapter = jax.tree.map(lambda x: x + 0.05, new)
    noise_depth = np.maximum(np.arange(24) - 19, 0)
    noisy, _ = forward(frozen, cfg, tokens, positions, adapter=adapter, noise_depth=noise_depth)
    assert (noisy[:, :20] == plain[:, :20]).all() and (noisy[:, 20:] != plain[:, 20:]).all()
    none, _ = forward(frozen, cfg, tokens, positions, adapter=adapter, noise_depth=np.zeros(24, int))
    assert (none == plain).all()
    with pytest.raises(ValueError, match="noise must come last"):
        forward(frozen, cfg, tokens, positions, adapter=adapter, noise_depth=noise_depth[::-1])


def test_long_rows_attend_in_blocks(tiny, batch, monkeypatch):
    cfg, params = tiny
    see = lambda: forward(params, cfg, batch["tokens"], batch["positions"], segments=batch["segment_ids"])[0]
    whole = see()
    monkeypatch.setattr("msn_jax.model.QUERY_BLOCK", (7, 7))
    np.testing.assert_allclose(see(), whole, atol=1e-5)


def test_evaluation_is_the_same_for_every_noise_kind(tiny, batch):
    cfg, params = tiny
    found = []
    for kind in ("ahead", "none"):
        evaluate = jax.jit(train_step.make_eval_step(cfg, run_config(NoiseConfig(kind=kind, length=3))))
        found.append(evaluate(stack_layers(params), None, batch, 0))
    jax.tree.map(np.testing.assert_array_equal, *found)
    clean, noisy = found[0]
    assert clean[1:].sum() == 0 and (noisy[1:, scores.COUNT] == 7).all()  # one segment in each of 7 examples


def test_scan_and_loop_run_the_same_model(tiny, batch):
    cfg, params = tiny
    tokens, positions, segments = batch["tokens"], batch["positions"], batch["segment_ids"]
    loop, new = forward(params, cfg, tokens, positions, segments=segments)
    scan, stacked = forward(stack_layers(params), cfg, tokens, positions, segments=segments)
    np.testing.assert_allclose(loop, scan, atol=1e-5)
    np.testing.assert_allclose(new[1][0], stacked[0][1], atol=1e-5)


def test_peaks_are_known_for_accelerators_in_bfloat16_alone():
    assert train_step.peak_flops("NVIDIA H100 80GB HBM3", "bfloat16") == 989e12
    assert train_step.peak_flops("TPU v5 lite", "bfloat16") == 197e12
    assert train_step.peak_flops("TPU v5p", "bfloat16") == 459e12
    assert train_step.peak_flops("NVIDIA A100-SXM4-80GB", "bfloat16") == 312e12
    assert train_step.peak_flops("NVIDIA H100 PCIe", "bfloat16") == 756e12
    assert train_step.peak_flops("cpu", "bfloat16") is None
    assert train_step.peak_flops("TPU v4", "float32") is None


def test_metrics_leave_out_what_did_not_occur():
    sums = np.zeros((3, 4))
    sums[0], sums[2] = [10, 20, 5, 8], [2, 8, 1, 1]
    metrics = scores.metrics_of(sums)
    assert metrics["loss"] == pytest.approx(28 / 12) and metrics["loss_noisy"] == 4
    assert metrics["top1_clean"] == 0.5 and metrics["top1_depth2"] == 0.5 and "top1_depth1" not in metrics
    assert metrics["response_tokens"] == 12
