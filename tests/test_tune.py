"""Trees by measurement: the survey against the loop, and what is kept in the end."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import decode_all
from test_grow import CYCLES

from msn_jax import InputError
from msn_jax.decode import tree_file, tree_set, tune
from msn_jax.decode.grow import Cycles, build, cut_out, tokens_of
from msn_jax.decode.tree import (
    DRAFT_MODEL,
    EAGLE,
    JACOBI,
    LONGEST_MATCH,
    MEDUSA,
    NGRAMS,
    NOISE,
    RECYCLING,
    RETRIEVAL,
    ROOT,
    TreeSet,
    TreeSpec,
    chain,
)
from msn_jax.decode.tree_sets import TREE_SETS
from msn_jax.eagle import drafter_of, init_eagle
from msn_jax.heads import init_heads
from msn_jax.records import machine

PROMPTS = [np.random.default_rng(n).integers(0, 61, n).tolist() for n in (3, 9, 30)]


@pytest.fixture
def lm(tiny):
    cfg, params = tiny
    nothing = {"drafter": None, "heads": None, "eagle": None, "ngrams": None, "draft": None}
    return SimpleNamespace(
        cfg=cfg, params=params, stop_ids=(), dtype=jnp.float32, backend="cpu", name="tiny", **nothing
    )


@pytest.mark.slow
def test_a_tree_cut_from_the_survey_takes_as_many_tokens_as_was_seen(lm):
    cycles = tune.survey(lm, PROMPTS, 40, batch=2)
    assert cycles.right.any(axis=1).mean() > 0.1 and cycles.match.max() > 1
    everything = range(1, cycles.right.shape[1])
    expected = tokens_of(cycles, np.ones(len(cycles.match), bool), everything)
    trees = TreeSet("survey", (cycles.tree,), (0,), sources=(tune.Survey(),))
    state, _ = decode_all(lm.params, lm.cfg, trees, PROMPTS, max_new_tokens=40)
    passes = [state.accepted[b, : state.forwards[b] - 1] for b in range(3)]
    assert expected == pytest.approx(np.concatenate(passes).mean())


def test_sizes_are_timed_in_turns(monkeypatch):
    timed = []

    def timed_pass(lm, nodes, batch, noise):
        def measure():
            timed.append(nodes)
            return nodes * (1.0 if len(timed) <= 3 else 2.0)  # a machine that gets slower

        return measure

    monkeypatch.setattr(tune, "timed_pass", timed_pass)
    assert tune.costs(None, 1) == {1: 2.0, 2: 4.0, 3: 6.0, 4: 8.0}  # 4 nodes cost more than any tree is worth
    assert timed[4:12] == [1, 2, 3, 4] * 2


@pytest.mark.slow
def test_tuned_sets_are_written_and_read_back(tmp_path, lm, monkeypatch):
    monkeypatch.setattr(tune, "costs", lambda lm, batch, noise: {1: 1.0, 8: 1.0 + 0.1 * batch, 64: 9.0})
    monkeypatch.setattr(tune, "race", lambda lm, sets, *_: [3.0, 2.0, 1.0][: len(sets)])
    said = []
    sets, figures = tune.tune(lm, PROMPTS, batches=(1, 8), max_new_tokens=30, say=said.append)
    path = tmp_path / "trees.json"
    tree_file.write(path, sets, figures)
    assert json.loads(path.read_text())["batches"]["8"]["tuned"]["cost_ms"] == {"1": 1000, "8": 1800, "64": 9000}
    assert tree_set("tr-jacobi", str(path)) == sets[1] and tree_set("tr-jacobi", str(path), batch=5) == sets[8]
    plain = decode_all(lm.params, lm.cfg, tree_set("ar"), PROMPTS, max_new_tokens=30)[1]
    for trees in sets.values():
        assert decode_all(lm.params, lm.cfg, trees, PROMPTS, max_new_tokens=30)[1] == plain


@pytest.mark.parametrize("seconds,taken", [([1, 2, 3], "none"), ([3, 1, 2], "default"), ([3, 2, 1], "tuned")])
def test_what_was_fastest_in_the_end_is_kept(lm, monkeypatch, seconds, taken):
    monkeypatch.setattr(tune, "survey", lambda *_, **__: CYCLES)
    monkeypatch.setattr(tune, "costs", lambda lm, batch, noise: {1: 1.0, 2: 1.1, 3: 1.2, 8: 9.0})
    monkeypatch.setattr(tune, "race", lambda lm, sets, *_: seconds)
    sets, figures = tune.tune(lm, PROMPTS, batches=(1,), say=str)
    made = build(CYCLES, {1: 1.0, 2: 1.1, 3: 1.2, 8: 9.0}, "tuned1", noise=0)[0]
    assert sets[1] == {"none": TREE_SETS["root"], "default": TREE_SETS["adaptive"], "tuned": made}[taken]
    assert figures["batches"][1]["taken"] == taken


@pytest.mark.slow
def test_all_trees_of_a_race_decode_the_same(lm):
    sets = TREE_SETS["root"], TREE_SETS["adaptive"]
    (root, _), (drafted, _) = (tune.decoded(lm, trees, PROMPTS[:2], 12, batch=3, slots=256) for trees in sets)
    lengths = [len(prompt) + 12 for prompt in PROMPTS[:2]]
    for row, length in enumerate(lengths):
        assert root.tokens[row, :length].tolist() == drafted.tokens[row, :length].tolist()
    assert root.limit[:2].tolist() == lengths and drafted.passes.sum() < root.passes.sum()
    assert all(seconds > 0 for seconds in tune.race(lm, sets, PROMPTS, 12, batch=2))


def test_a_file_may_say_that_no_draft_pays(tmp_path):
    path = tmp_path / "trees.json"
    tree_file.write(path, {1: TREE_SETS["root"]}, {})
    assert tree_set("lookup", str(path)).width == 1


def some_head(lm, name):
    """An untrained head of the source."""
    if name == MEDUSA:
        return {"heads": init_heads(lm.cfg, 3)}
    if name == DRAFT_MODEL:
        first = lm.params.replace(layers=lm.params.layers[:1])
        cfg = dataclasses.replace(lm.cfg, layers=1)
        return {"draft": SimpleNamespace(cfg=cfg, params=first, dtype=lm.dtype, activations=lm.dtype)}
    return {"eagle": drafter_of(init_eagle(jax.random.key(0), lm.cfg, 40), lm.params, lm.cfg, lm.dtype)}


@pytest.mark.slow
@pytest.mark.parametrize("method,name", [("medusa", MEDUSA), ("eagle", EAGLE), ("draft-model", DRAFT_MODEL)])
def test_trees_of_one_source_alone(lm, monkeypatch, method, name):
    lm = SimpleNamespace(**vars(lm) | some_head(lm, name), activations=jnp.float32)
    monkeypatch.setattr(tune, "costs", lambda lm, batch, noise: dict.fromkeys(range(1, 65), 1.0))
    monkeypatch.setattr(tune, "race", lambda lm, sets, *_: [3.0, 2.0, 1.0][: len(sets)])
    sets, figures = tune.tune(lm, PROMPTS[:2], batches=(1,), max_new_tokens=20, method=method, say=str)
    (tree,) = sets[1].trees
    assert (figures["device"], figures["method"]) == (machine(), method)
    assert set(sets[1].names) <= {name} and tree.size > 1
    with pytest.raises(InputError, match=f"no trees for ngrams: tiny .* accepted: tr-jacobi, lookup, {method}"):
        tune.tune(lm, PROMPTS, method="ngrams")
    assert tune.timed_pass(lm, 4, 1, slots=256, cycles=2)() > 0


@pytest.mark.parametrize("dear", [1.0, 2.0])
def test_noise_stays_where_it_brings_more_than_it_costs(lm, monkeypatch, dear):
    spec = TreeSpec("both", (-1, 0, 0), ((ROOT, 0), ((JACOBI, 0), (RECYCLING, 0)), (RECYCLING, 0)))
    right = np.array([[1, 1, 0], [1, 1, 1]], bool)
    monkeypatch.setattr(tune, "survey", lambda *_, **__: Cycles(spec, right, np.zeros(2, int)))
    monkeypatch.setattr(tune, "costs", lambda lm, batch, noise: {1: 1.0, 2: 1.1, 4: 1.1 * dear if noise else 1.1})
    monkeypatch.setattr(tune, "race", lambda lm, sets, *_: [3.0, 2.0, 1.0][: len(sets)])
    lm = SimpleNamespace(**vars(lm) | {"drafter": SimpleNamespace(noise_embed=np.zeros((2, 4)))})
    sets, figures = tune.tune(lm, PROMPTS, batches=(1,), say=str)
    # 2 tokens for 1.1 with noise, 1.5 without.
    assert [tree.size for tree in sets[1].trees] == ([4] if dear == 1 else [2])
    assert (NOISE in sets[1].names) == (dear == 1) and figures["batches"][1]["tuned"]["noise"] == (
        2 if dear == 1 else 0
    )


def test_with_ngrams_the_survey_asks_them_in_place_of_recycling():
    tree = tune.survey_tree(0, NGRAMS)
    assert not tune.survey_tree(0).kind(NGRAMS).any() and not tree.kind(RECYCLING).any()
    long = [node for node, wants in enumerate(tree.wants) if wants == ((RETRIEVAL, 0), (NGRAMS, 0))]
    first = next(node for node in np.flatnonzero(tree.kind(NGRAMS)) if tree.parents[node] == 0)
    cut = cut_out(tree, [int(first), *long[:2]], "cut", noise=False)
    assert cut.parents == (-1, 0, 0, 2)
    # The chain's first node stands beside one of n-grams, and takes the next of these where that one has its token.
    assert cut.sources[1:] == ((NGRAMS, 0), ((RETRIEVAL, 0), (NGRAMS, 0), (NGRAMS, 1)), ((RETRIEVAL, 0), (NGRAMS, 0)))


def test_with_an_adapter_the_survey_asks_noise_too():
    tree = tune.survey_tree(4)
    assert tree.follow[0, :4].tolist() == np.flatnonzero(tree.kind(NOISE)).tolist() and tree.noise_depth.max() == 4
    # Where it predicts nothing, others draft; but not in trees of one source.
    first = lambda tree: next(wants for wants in tree.wants if wants[0] == (JACOBI, 0))
    assert first(tree) == ((JACOBI, 0), (RECYCLING, 0)) and first(tune.survey_tree(4, alone=True)) == ((JACOBI, 0),)
    assert first(tune.survey_tree(4, NGRAMS)) == ((JACOBI, 0), (NGRAMS, 0)) and tree.kind(JACOBI).sum() > 10
    assert not tune.survey_tree(0).kind(NOISE, JACOBI).any()


@pytest.mark.slow
def test_a_pass_is_timed(lm):
    assert tune.timed_pass(lm, 4, 2, slots=256, cycles=2)() > 0


def test_what_is_no_tree_file_is_refused(tmp_path):
    path = tmp_path / "trees.json"
    with pytest.raises(InputError, match="trees.json: No such file"):
        tree_set("tr-jacobi", str(path))
    for text in ("{}", "[1]", '{"sets": {}}', '{"sets": {"1": {"name": "x", "trees": [{}]}}}', "{"):
        path.write_text(text)
        with pytest.raises(InputError, match="not one that --tune_out wrote"):
            tree_set("tr-jacobi", str(path))
    wrong = tree_file.to_dict(TreeSet("wrong", (chain(1, RECYCLING),), (0,)))
    path.write_text(json.dumps({"sets": {"1": wrong | {"cost": [1.0]}}}))
    with pytest.raises(InputError, match=f"a cost and {LONGEST_MATCH + 1} worths"):
        tree_set("tr-jacobi", str(path))
