"""Acceptance from hand-made trees and logits; sampling against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msn_jax import DecodeConfig
from msn_jax.decode import verify
from msn_jax.decode.loop import sampling_of
from msn_jax.decode.source import fill
from msn_jax.decode.sources import SOURCES, jacobi
from msn_jax.decode.tree import EITHER, JACOBI, NOISE, RETRIEVAL, ROOT, TreeSpec

#        - 1(a) - 3(b) - 5(noise)
#   0(r)
#        - 2(c) - 4(d)
TREE = TreeSpec(
    "hand",
    (-1, 0, 0, 1, 2, 3),
    ((ROOT, 0), (JACOBI, 0), (JACOBI, 1), (JACOBI, 0), (JACOBI, 0), (NOISE, 0)),
)
R, A, B, C, D, X = 1, 2, 3, 4, 5, 9
TOKENS = jnp.array([[R, A, C, B, D, 7]])
VALID = jnp.array([[True, True, True, True, True, False]])


accept = jax.jit(verify.accept, static_argnums=0)
cut = jax.jit(verify.cut)


def accepted(targets, tokens=TOKENS, valid=VALID):
    best, emitted, count = accept(TREE, tokens, valid, jnp.array([targets]))
    return int(best[0]), emitted[0, : int(count[0])].tolist()


def test_never_accepts():
    assert accepted([X, B, D, 7, X, X]) == (0, [X])


def test_always_accepts():
    assert accepted([A, B, D, X, X, X]) == (3, [A, B, X])


def test_takes_the_other_branch_in_part():
    assert accepted([C, B, X, X, D, X]) == (2, [C, X])
    assert accepted([C, B, D, X, X, X]) == (4, [C, D, X])


def test_a_child_needs_its_parent():
    # Node 3 is what follows node 1, but node 1 is not what follows the root.
    assert accepted([X, B, D, X, X, X]) == (0, [X])


def test_an_invalid_node_never_matches():
    # The noise under node 3 happens to be the token that comes next.
    assert accepted([A, B, D, 7, X, X]) == (3, [A, B, 7])
    assert accepted([A, B, D, X, X, X], valid=VALID.at[0, 1].set(False)) == (0, [A])


def test_a_root_that_recurs_after_a_leaf_is_no_pad():
    assert accepted([A, B, D, R, R, X]) == (3, [A, B, R])


def test_twins_accept_the_longer_way():
    tokens = jnp.array([[R, A, A, X, D, 7]])
    assert accepted([A, 7, D, 7, X, X], tokens=tokens) == (4, [A, D, X])


def test_rows_differ():
    tokens, valid = jnp.tile(TOKENS, (2, 1)), jnp.tile(VALID, (2, 1))
    best, _, _ = accept(TREE, tokens, valid, jnp.array([[A, B, D, X, X, X], [C, X, X, X, X, X]]))
    assert best.tolist() == [3, 2]


@pytest.mark.parametrize(
    "emitted, count, remaining, kept, stopped",
    [
        ([5, 6, 7, 8], 4, 9, 4, False),
        ([5, 6, 7, 8], 2, 9, 2, False),
        ([5, 6, 7, 8], 4, 3, 3, False),
        ([5, 99, 7, 8], 4, 9, 2, True),  # a stop inside the path: nothing after it
        ([5, 6, 7, 99], 3, 9, 3, False),  # a stop that was not accepted
        ([5, 99, 98, 8], 4, 1, 1, False),  # the limit comes before the stop
        ([5, 6, 98, 99], 4, 9, 3, True),  # the first of two stop ids
    ],
)
def test_cut(emitted, count, remaining, kept, stopped):
    as_row = lambda x: jnp.array([x])
    got = cut(as_row(emitted), as_row(count), as_row(remaining), jnp.array([99, 98, -1]))
    assert (int(got[0][0]), bool(got[1][0])) == (kept, stopped)


def drawn(**settings):
    return sampling_of(DecodeConfig(**{"temperature": 1.0} | settings))


def numpy_keep(logits, top_k=0, top_p=1.0, min_p=0.0):
    """Top-k, then top-p, then min-p, one token at a time in float64."""
    logits = np.asarray(logits, np.float64)
    at_k = [t for t in range(len(logits)) if not top_k or (logits > logits[t]).sum() < top_k]
    p = np.exp(logits - logits.max())
    mass = p[at_k].sum()
    # 1 keeps all: it is asked of a sum that is rounded.
    at_p = [t for t in at_k if top_p == 1 or sum(p[u] for u in at_k if p[u] > p[t]) < top_p * mass]
    return {t for t in at_p if p[t] >= min_p}


keep_top = jax.jit(verify.keep_top)


def kept_of(logits, top_k, top_p, min_p):
    got = keep_top(logits, jnp.int32(top_k), jnp.float32(top_p), jnp.float32(min_p))
    return [set(np.flatnonzero(row)) for row in np.isfinite(got)]


@pytest.mark.parametrize(
    "top_k, top_p, min_p",
    [
        (0, 1.0, 0),
        (5, 1.0, 0),
        (0, 0.7, 0),
        (8, 0.5, 0),
        (1, 1.0, 0),
        (0, 1e-6, 0),
        (0, 1e-46, 0),
        (0, 1.0, 0.1),
        (9, 0.9, 0.3),
        (0, 1.0, 1.0),
        (60, 1.0, 0),
    ],
)
def test_keep_top_matches_numpy(top_k, top_p, min_p):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(6, 50)) * 2
    logits[3] -= 100  # all negative
    logits[4] = np.round(logits[4])  # ties at every edge, and both zeros
    logits[5] = np.where(rng.random(50) < 0.5, -0.0, 0.0)
    logits = logits.astype(np.float32)
    expected = [numpy_keep(row, top_k, top_p, min_p) for row in logits]
    assert kept_of(jnp.asarray(logits), top_k, top_p, min_p) == expected
    assert top_k != 5 or len(expected[4]) > 5  # a tie at the edge


def test_rows_keep_by_their_own_settings():
    logits = np.random.default_rng(1).normal(size=(4, 30)).astype(np.float32) * 3
    settings = [(3, 1.0, 0.0), (0, 0.8, 0.0), (0, 1.0, 0.2), (0, 1.0, 0.0)]
    assert kept_of(jnp.asarray(logits), *map(np.array, zip(*settings, strict=True))) == [
        numpy_keep(row, *of_row) for row, of_row in zip(logits, settings, strict=True)
    ]


def test_a_penalty_is_that_of_what_was_seen():
    # The published rule, one token at a time.
    rng = np.random.default_rng(2)
    logits, text = rng.normal(size=(2, 9)).astype(np.float32), rng.integers(0, 9, (2, 7)).astype(np.int32)
    last, penalty = np.array([2, 5]), np.float32([1.5, 0.8])
    got = verify.penalised(logits, verify.seen_tokens(jnp.asarray(text), jnp.asarray(last), 9), jnp.asarray(penalty))
    for row in range(2):
        for token in range(9):
            score = logits[row, token]
            if token in text[row, : last[row] + 1]:
                score = score * penalty[row] if score < 0 else score / penalty[row]
            np.testing.assert_allclose(got[row, token], score, rtol=1e-6)


@pytest.mark.slow
def test_near_ties_of_sampling_are_those_that_change_the_draw():
    # The edges of top-k and top-p moved by hand: sets of tokens in NumPy, the best of each by its score.
    n, zero, rng = 800, jnp.int32(0), np.random.default_rng(1)
    logits = rng.normal(size=(n, 6)).astype(np.float32)
    logits[::2, 0] = logits[::2, 1] + 5e-4
    order = np.argsort(-logits)
    p = np.exp(np.take_along_axis(logits, order, axis=1).astype(np.float64))
    mass = (p / p.sum(axis=1, keepdims=True)).cumsum(axis=1)[:, 2]
    top_p = (mass + np.resize([-5e-4, 5e-4, -2e-3, 2e-3], n)).astype(np.float32)  # half of them close to the edge
    at = jnp.arange(n)
    sampling = drawn(seed=3)
    scores = logits + np.asarray(verify.sampling_scores(jnp.zeros((n, 6)), at, jnp.zeros(n, jnp.int32), sampling))

    per_row = verify.Sampling(None, None, 0, None, None, None)
    by_p = jax.vmap(verify.near_tie, (0, 0, None, per_row))(logits, at, zero, sampling.replace(top_p=top_p))
    cut = sampling.replace(top_k=jnp.int32(3))
    by_k = jax.vmap(verify.near_tie, (0, 0, None, None))(logits, at, zero, cut)
    expected_p, expected_k = [], []
    for row, p, score, (first, second, third, fourth, *_) in zip(logits, top_p, scores, order, strict=True):
        best = lambda kept: max(kept, key=score.__getitem__)  # noqa: B023
        expected_p.append(len({best(numpy_keep(row, 0, p + d)) for d in (-1e-3, 0, 1e-3)}) > 1)
        other = fourth if row[third] - row[fourth] < 1e-3 else third
        expected_k.append(best((first, second, third)) != best((first, second, other)))
    close = np.sort(scores)[:, -2] > np.sort(scores)[:, -1] - 2e-3  # ties of another kind
    np.testing.assert_array_equal(np.array(by_p)[~close], np.array(expected_p)[~close])
    np.testing.assert_array_equal(np.array(by_k)[~close], np.array(expected_k)[~close])
    assert 10 < sum(expected_p) < n / 2 and 10 < sum(expected_k) < n / 2 and close.sum() < 10


@pytest.mark.slow
def test_near_ties_of_greedy_decoding_are_close_scores():
    greedy = drawn(temperature=0)
    tie = lambda *logits: bool(verify.near_tie(jnp.array(logits), jnp.int32(3), jnp.int32(0), greedy))
    assert tie(1.0, 2.0, 2.0005) and not tie(1.0, 2.0, 2.0015) and not tie(1.0, 1.0, 2.0)


@pytest.mark.slow
def test_samples_follow_the_softmax():
    logits = jnp.array([1.0, 0.0, -1.0, 2.0])
    n = 4000
    sampling = drawn(temperature=0.7, top_k=3, seed=5)
    rows = jnp.tile(logits, (n, 1))
    draws = jnp.argmax(verify.sampling_scores(rows, jnp.arange(n), jnp.zeros(n, jnp.int32), sampling), axis=-1)
    p = np.exp(np.array([1.0, 0.0, -np.inf, 2.0]) / 0.7)
    p /= p.sum()
    share = np.bincount(draws, minlength=4) / n
    assert share[2] == 0
    # Five standard deviations of a share of n draws: once in a million seeds.
    assert (np.abs(share - p) <= 5 * np.sqrt(p * (1 - p) / n)).all()


@pytest.mark.slow
def test_noise_depends_on_seed_request_and_position():
    logits = jnp.zeros((1, 8))
    at = lambda seed, request, position: verify.sampling_scores(
        logits, jnp.array([position]), jnp.array([request]), drawn(seed=seed)
    )
    one = at(1, 2, 3)
    np.testing.assert_array_equal(one, at(1, 2, 3))
    for other in (at(2, 2, 3), at(1, 3, 3), at(1, 2, 4)):
        assert np.abs(one - other).min() > 0


def test_fill_takes_each_source_and_marks_the_empty():
    tree = TreeSpec(
        "fill",
        (-1, 0, 1, 0, 3, 3, 4),
        ((ROOT, 0), (RETRIEVAL, 0), (RETRIEVAL, 0), (EITHER, 0), (EITHER, 0), (JACOBI, 1), (NOISE, 0)),
    )
    nothing = {source.name: None for source in SOURCES}
    carry = nothing | {"jacobi": jnp.array([[[10, 11], [20, 21]]])}
    scratch = nothing | {"retrieval": jnp.array([[[30, -1]]])}
    drafts = jax.jit(lambda *given: fill(tree, SOURCES, nothing, *given))(carry, scratch, jnp.array([1]))
    # Node 3 has the token of node 1, its sibling, so it takes its second choice.
    assert drafts[0].tolist() == [1, 30, -1, 10, 20, 21, -1]


def test_predict_ahead_reads_the_rows_that_follow():
    tree = TreeSpec("ahead", (-1, 0, 1), ((ROOT, 0), (JACOBI, 0), (JACOBI, 0)))
    logits = jax.nn.one_hot(jnp.array([[4, 5, 6]]), 8) + 0.5 * jax.nn.one_hot(jnp.array([[0, 1, 2]]), 8)
    greedy = jnp.argmax(logits, axis=-1)
    predict = jax.jit(jacobi.predict_ahead, static_argnums=(0, 4, 5))
    ahead = lambda best, ranks: predict(tree, logits, greedy, jnp.array([best]), 3, ranks)[0].tolist()
    assert ahead(0, 2) == [[5, 1], [6, 2], [-1, -1]]
    assert ahead(1, 1) == [[6], [-1], [-1]]
    assert ahead(2, 1) == [[-1], [-1], [-1]]


def test_noise_comes_from_the_prefix():
    tokens = jnp.arange(100, 140)[None].repeat(3, axis=0)
    keys = jax.random.split(jax.random.key(0), 3)
    drawn = jacobi.prefix_tokens(keys, tokens, jnp.array([0, 4, 39]), 500)
    assert set(drawn[0].tolist()) == {100}
    assert set(drawn[1].tolist()) == {100, 101, 102, 103, 104}
    assert set(drawn[2].tolist()) == set(range(100, 140))
