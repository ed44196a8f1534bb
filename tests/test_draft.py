"""The draft-only adapter: what it learns, that decoding meets it in the same place, and that replies never change."""

import dataclasses
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import decode_all
from test_ngrams import table_of
from test_source import PROMPTS

from experiments import tree_search
from msn_jax import DecodeConfig, InputError, forward, generate, unembed
from msn_jax.adapters import Parts, init_trained
from msn_jax.config import LoraConfig, NoiseConfig
from msn_jax.decode import TREE_SETS, TreeSet, init_state, prefill, step, tree_set
from msn_jax.decode.tree import EITHER, RETRIEVAL, branching, chain
from msn_jax.io.adapters import load_adapter, save_adapter
from msn_jax.objectives.draft_only import drafted, loss_sums
from msn_jax.objectives.streams import draw_anchors
from msn_jax.params import stack_layers, unstack

pytestmark = pytest.mark.slow

DEPTHS = 3
LORA, NOISE = LoraConfig(rank=2, draft_only=True), NoiseConfig(length=DEPTHS)
NOISY = TreeSet("noisy", (branching("noisy", 2, {(): 2, (0,): 1}, noise={(): 3, (0,): 1}),), (0,))


def parts(params, adapter):
    return Parts(params, adapter.layers, adapter.noise_embed)


@pytest.fixture(scope="module")
def adapter(tiny):
    """Stacked, and far from changing nothing."""
    new = init_trained(jax.random.key(0), tiny[0], LORA, NOISE)
    noise = iter(jax.random.split(jax.random.key(1), 100))
    return jax.tree.map(lambda x: x + 0.3 * jax.random.normal(next(noise), x.shape), new)


@pytest.fixture(scope="module")
def drafter(adapter):
    """In the form for decoding."""
    return adapter.replace(layers=unstack(adapter.layers))


# By hand: the token after each of these places belongs to a reply of the same example.
COUNTS = np.isin(np.arange(20), [3, 4, 5, 6, 7, 8, 12, 13, 14, 15, 16])[None]


@pytest.fixture(scope="module")
def logits_of(tiny, drafter):
    """A function: float64 logits [n + J, V] of a text of n tokens and of the noise behind it, by plain `forward`."""
    cfg, params = tiny

    at, depth = np.arange(20 + DEPTHS), np.r_[np.zeros(20, int), 1 : DEPTHS + 1]

    @jax.jit
    def run(text, n):
        # One program for all texts: the noise stands behind the padding, which nothing after it sees.
        positions = jnp.where(depth > 0, n + depth - 1, at)[None]
        mask = (at[:, None] >= at) & (((at < n) | (depth > 0))[None] | (at[:, None] < 20))
        hidden, _ = forward(params, cfg, text, positions, mask, adapter=drafter, noise_depth=depth)
        return unembed(params, cfg, hidden)[0]

    def logits(text):
        n = len(text)
        found = run(np.pad(text, (0, 20 + DEPTHS - n)).astype(np.int32)[None], n)
        return np.asarray(found, np.float64)[np.r_[:n, 20 : 20 + DEPTHS]]

    return logits


def test_loss_is_the_divergence_from_the_clean_model(tiny, adapter, logits_of, batch):
    cfg, params = tiny
    anchors = jnp.asarray([[3, 7, 12, -1, 15]])
    counts = COUNTS & (np.arange(20) != 5)  # a question between two replies, over which noise must not reach
    # Noise of anchor 3 has one reply token to predict before it, that of 7 and 15 one to the end; -1 hangs nothing.
    depths = {3: 1, 7: 1, 12: 3, 15: 1}
    log_softmax = lambda x: x - np.log(np.exp(x - x.max()).sum()) - x.max()
    expected = np.zeros((1 + DEPTHS, 4))
    for anchor, depth in depths.items():
        first, end = (0, 10) if anchor < 10 else (10, 18)
        text = batch["tokens"][0, first:end].tolist()
        hung = logits_of(text[: anchor - first + 1])
        for j in range(1, depth + 1):
            place = anchor - first + j
            p, q = (log_softmax(x) for x in (logits_of(text)[place], hung[place]))
            rank = (q > q[p.argmax()]).sum()
            expected[j] += [1, (np.exp(p) * (p - q)).sum(), rank < 1, rank < 10]
    stacked = stack_layers(params)
    for chunk in (2, 128):
        sums_of = jax.jit(partial(loss_sums, noise=NOISE, head_chunk=chunk), static_argnums=1)
        loss, (_, sums) = sums_of(parts(stacked, adapter), cfg, batch, counts, anchors)
        np.testing.assert_allclose(sums, expected, rtol=1e-4, atol=1e-4)
        assert float(loss) == pytest.approx(expected[:, 1].sum(), rel=1e-4)


def test_nothing_flows_into_the_frozen_model_or_out_of_its_example(tiny, adapter, batch):
    cfg, params = tiny
    anchors = jnp.asarray([[5, 14]])
    loss = lambda adapter, params: loss_sums(parts(params, adapter), cfg, batch, COUNTS, anchors, noise=NOISE)[0]
    gradient = jax.jit(jax.grad(loss))(adapter, stack_layers(params))
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(gradient))
    other = dict(batch, tokens=batch["tokens"].at[0, 6:10].set(1).at[0, 15:].set(2))
    rows = jax.jit(lambda batch: drafted(stack_layers(params), cfg, adapter, batch, anchors)[1])
    np.testing.assert_array_equal(rows(batch), rows(other))  # what stands behind the anchors is not seen
    other = dict(batch, tokens=batch["tokens"].at[0, 0].set(60))
    assert (rows(batch)[0, 0] != rows(other)[0, 0]).any() and (rows(batch)[0, 1] == rows(other)[0, 1]).all()


def test_anchors_are_places_with_something_to_predict_each_as_likely():
    able = {3, 4, 5, 6, 7, 12, 13, 14, 15}  # 8 and 16 are the last to count: noise has nothing to predict there
    draw = jax.vmap(lambda key: draw_anchors(key, jnp.asarray(COUNTS), 4)[0])
    drawn = np.asarray(draw(jax.random.split(jax.random.key(0), 3000)))
    assert all(len(set(row)) == 4 for row in drawn.tolist())
    values, counts = np.unique(drawn, return_counts=True)
    assert set(values.tolist()) == able
    # Each of 9 is drawn with probability 4/9: 1333 of 3000, deviation 27.
    assert np.abs(counts - 3000 * 4 / 9).max() < 4.5 * 27.2
    many = np.asarray(draw_anchors(jax.random.key(0), jnp.asarray(COUNTS), 30))[0]
    assert many.shape == (30,) and set(many.tolist()) == able | {-1}


def test_the_loop_drafts_what_was_trained(tiny, drafter, logits_of):
    cfg, params = tiny
    prompt = np.random.default_rng(2).integers(0, 61, 12).tolist()
    state = init_state(cfg, NOISY, [prompt], DecodeConfig(max_new_tokens=20), (), slots=256)
    state = prefill(params, state, cfg=cfg, chunk=16)
    state = jax.jit(partial(step, cfg=cfg, trees=NOISY))(params, state, drafter)
    assert int(state.forwards[0]) == 1 and state.accepted[0, 0] == 1  # nothing was drafted for the first pass
    expected = np.argsort(-logits_of(prompt)[len(prompt) :])[:, :2]
    assert np.asarray(state.drafts["jacobi"])[0].tolist() == expected[:2].tolist()


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.8, "seed": 3}], ids=["greedy", "sampled"])
def test_replies_are_those_of_the_model_alone(tiny, drafter, settings):
    cfg, params = tiny
    prompts = [np.random.default_rng(n).integers(0, 61, n).tolist() for n in (1, 9, 33)]
    settings |= {"max_new_tokens": 40}
    _, plain = decode_all(params, cfg, tree_set("ar"), prompts, **settings)
    state, drafted = decode_all(params, cfg, NOISY, prompts, drafter=drafter, **settings)
    assert drafted == plain
    without, _ = decode_all(params, cfg, NOISY, prompts, **settings)
    assert (state.accepted != without.accepted).any()  # the adapter did something


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.8, "seed": 3}], ids=["greedy", "sampled"])
def test_noise_beside_ngrams_and_retrieval_changes_no_token(tiny, drafter, settings, batch):
    cfg, params = tiny
    settings, prompts, trees = {"max_new_tokens": 40, **settings}, PROMPTS[-batch:], TREE_SETS["both"]
    _, plain = decode_all(params, cfg, TREE_SETS["root"], prompts, **settings)
    # n-grams of half of each reply.
    table = table_of([(prompt, reply[:20]) for prompt, reply in zip(prompts, plain, strict=True)], buckets=1024)
    state, drafted = decode_all(params, cfg, trees, prompts, drafter={"jacobi": drafter, "ngrams": table}, **settings)
    assert drafted == plain and state.forwards.max() < 40
    assert (state.drafts["jacobi"] >= 0).any()  # the noise had a say


def test_saved_in_half_precision_and_read_back(tiny, adapter, tmp_path):
    cfg, _ = tiny
    save_adapter(tmp_path, adapter, LORA, "base")
    read = load_adapter(tmp_path, cfg)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.float16(a), np.float16(b)), read, adapter)
    (tmp_path / "adapter_config.json").write_text('{"base": "b", "rank": 2, "colour": 1}')
    with pytest.raises(InputError, match="cannot be read.*colour"):
        load_adapter(tmp_path, cfg)


def test_a_simulated_tree_takes_the_passes_of_the_loop(tiny, adapter, drafter):
    cfg, params = tiny
    prompts = [np.random.default_rng(n).integers(0, 61, n).tolist() for n in (2, 9, 33)]
    long = chain(4, EITHER, "long", noise={0: 1, 1: 2, 4: 1})
    trees = TreeSet("two", (branching("small", 0, {(): 9, (1,): 5}, noise={(): 3, (0,): 1}), long), (0, 2))
    rank = lambda text: np.asarray(tree_search.ranks(stack_layers(params), cfg, adapter, jnp.asarray(text, jnp.int32)))
    total, most = np.zeros(2, int), trees.ask(RETRIEVAL)[0]
    for prompt in prompts:
        state, (reply,) = decode_all(params, cfg, trees, [prompt], drafter=drafter, max_new_tokens=60)
        text = prompt + reply
        known = tree_search.Reply(len(prompt) - 1, len(text) - 1, rank(text), *tree_search.retrieval(text, most))
        assert tree_search.play(trees, [known]) == (60, state.passes.tolist())
        total += state.passes
    assert total.min() > 0 and total.sum() < 150  # of 180 tokens


def test_the_shipped_adapter_saves_passes_and_no_token_changes(smollm2):
    adapter = load_adapter(Path(__file__).parent.parent / "adapters/smollm2-135m-msn", smollm2.cfg)
    lm = dataclasses.replace(smollm2, drafter=adapter.replace(layers=unstack(adapter.layers)))
    prompt = [{"role": "user", "content": "Why is the sky blue?"}]
    plain, drafted = (
        generate(model, [prompt], method=method, tree=tree, max_new_tokens=40)[0]
        for model, method, tree in ((smollm2, "ar", None), (lm, "jacobi", "ahead8"))
    )
    assert drafted.tokens == plain.tokens
    assert drafted.forwards < 0.8 * plain.forwards  # 40 of 40 without the adapter
