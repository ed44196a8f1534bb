"""Noise as a distribution: counts, places and sources against what the paper's recipe says, on hand-made rows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msn_jax import InputError, NoiseConfig, add_noise
from msn_jax.noise import noise_depth, segment_length

PAPER = NoiseConfig(length=5)


def row(*parts):
    """A packed row of examples; "p" is a prompt token, "r" a response token, "." padding."""
    ids = [i + 1 if c != "." else 0 for i, part in enumerate(parts) for c in part]
    return jnp.array([[c == "r" for part in parts for c in part]]), jnp.array([ids])


def starts(depth):
    return np.argwhere(np.asarray(depth) == 1)


def many(response, segments, cfg, count=2000, **kwargs):
    """`count` independent draws for one row. int32[count, T]"""
    keys = jax.random.split(jax.random.key(0), count)
    return np.asarray(jax.jit(jax.vmap(lambda k: noise_depth(k, response, segments, cfg, **kwargs)[0]))(keys))


def test_one_segment_of_each_example_starts_anywhere_in_the_reply_with_equal_chance():
    response, segments = row("pppp" + "r" * 12, "pp" + "r" * 8, "pprrrrr", "....")
    depth = many(response, segments, PAPER, 6000)
    # 12 reply tokens leave room for 5 noisy ones and a label at 7 starts, 8 at 3; 5 tokens are too few.
    counts = (depth == 1).sum(axis=0)
    assert np.flatnonzero(counts).tolist() == [*range(4, 11), *range(18, 21)]
    assert ((depth == 1)[:, :16].sum(axis=1) == 1).all() and ((depth == 1)[:, 16:26].sum(axis=1) == 1).all()
    for expected, found in ((6000 / 7, counts[4:11]), (6000 / 3, counts[18:21])):
        chi2 = ((found - expected) ** 2 / expected).sum()
        assert chi2 < 30  # 6 degrees of freedom: once in 25,000
    first = np.argmax(depth == 1, axis=1)
    for j in range(5):
        assert (depth[np.arange(6000), first + j] == j + 1).all()
    assert (depth > 0).sum() == 6000 * 10


def test_a_segment_stays_in_one_reply_of_a_conversation():
    response, segments = row("pp" + "r" * 7 + "ppp" + "r" * 6)
    found = np.unique(starts(many(response, segments, PAPER))[:, 1])
    assert found.tolist() == [2, 3, 12]


def test_a_reply_at_the_very_start_keeps_a_clean_token_to_draw_from():
    response, segments = row("r" * 7)
    assert np.unique(starts(many(response, segments, PAPER))[:, 1]).tolist() == [1]


def test_several_segments_leave_a_clean_token_between_them():
    cfg = NoiseConfig(length=3, segments=3)
    response, segments = row("pp" + "r" * 30, "pp" + "r" * 10, "p" + "r" * 4)
    depth = many(response, segments, cfg)
    per_example = [(depth == 1)[:, a:b].sum(axis=1) for a, b in ((0, 32), (32, 44), (44, 49))]
    assert (per_example[0] == 3).all()
    assert set(per_example[1]) == {1, 2} and (per_example[2] == 1).all()  # 10 tokens hold 2, or 1 in the middle
    for one in depth:
        at = np.flatnonzero(one == 1)
        for a in at:
            assert one[a : a + 4].tolist() == [1, 2, 3, 0]  # whole, and the token after is clean


def test_density_sets_the_share_of_noisy_tokens():
    cfg = NoiseConfig(length=4, density=0.25)
    response, segments = row("pp" + "r" * 160, "pp" + "r" * 20)
    depth = many(response, segments, cfg, 50)
    assert ((depth == 1)[:, :162].sum(axis=1) == 10).all()
    assert ((depth == 1)[:, 162:].sum(axis=1) == 1).all()


def test_a_traced_length_is_that_of_the_segments():
    response, segments = row("pp" + "r" * 12)
    for L in (1, 3, 5):
        depth = many(response, segments, PAPER, 50, length=jnp.int32(L))
        assert (depth.max(axis=1) == L).all() and ((depth > 0).sum(axis=1) == L).all()
    schedule = NoiseConfig(length=4, progressive_steps=8)
    assert [int(segment_length(jnp.int32(s), schedule)) for s in (0, 1, 2, 4, 6, 7, 8, 100)] == [1, 1, 2, 3, 4, 4, 4, 4]
    assert int(segment_length(jnp.int32(0), PAPER)) == 5


def test_ahead_noise_is_drawn_evenly_from_before_the_segment_in_the_same_example():
    response, segments = row("ppppp", "pppp" + "r" * 6)
    tokens = jnp.arange(15)[None] + 100
    keys = jax.random.split(jax.random.key(1), 3000)
    noisy = np.asarray(jax.jit(jax.vmap(lambda k: add_noise(k, tokens, response, segments, PAPER)[0]))(keys))
    # One start is possible: index 9, so the sources are the prompt at 5..8.
    changed = noisy[:, 9:14]
    values, counts = np.unique(changed, return_counts=True)
    assert values.tolist() == [105, 106, 107, 108]
    assert ((counts - 3750) ** 2 / 3750).sum() < 25
    assert (np.delete(noisy, range(9, 14), axis=1) == np.delete(np.asarray(tokens[0]), range(9, 14))).all()


@pytest.mark.slow
def test_random_noise_covers_the_vocabulary():
    cfg = NoiseConfig(kind="random", vocab_size=7)
    response, segments = row("pppp" + "r" * 6)
    keys = jax.random.split(jax.random.key(2), 2000)
    tokens = jnp.full((1, 10), 50)
    noisy = np.asarray(jax.jit(jax.vmap(lambda k: add_noise(k, tokens, response, segments, cfg)[0]))(keys))
    values, counts = np.unique(noisy[:, 4:9], return_counts=True)
    assert values.tolist() == list(range(7)) and counts.min() > 1200
    with pytest.raises(InputError, match="vocab_size"):
        add_noise(keys[0], tokens, response, segments, NoiseConfig(kind="random"))


def test_none_changes_nothing():
    response, segments = row("pp" + "r" * 10)
    tokens = jnp.arange(12)[None]
    assert (add_noise(jax.random.key(0), tokens, response, segments, NoiseConfig(kind="none")) == tokens).all()


@pytest.mark.slow
def test_same_key_same_noise_under_jit_and_vmap():
    response, segments = (jnp.concatenate([a] * 4) for a in row("ppp" + "r" * 20, "pp" + "r" * 9, ".."))
    tokens = jax.random.randint(jax.random.key(5), response.shape, 0, 1000)
    cfg = dataclasses.replace(PAPER, segments=2)
    plain = add_noise(jax.random.key(3), tokens, response, segments, cfg)
    assert (
        jax.jit(add_noise, static_argnames="cfg")(jax.random.key(3), tokens, response, segments, cfg) == plain
    ).all()
    assert not (add_noise(jax.random.key(4), tokens, response, segments, cfg) == plain).all()
    keys = jax.random.split(jax.random.key(3), 2)
    over = jax.vmap(lambda k: add_noise(k, tokens, response, segments, cfg))(keys)
    for k, got in zip(keys, over, strict=True):
        assert (got == add_noise(k, tokens, response, segments, cfg)).all()
    assert len({tuple(r) for r in np.asarray(plain).tolist()}) > 1  # rows of a batch differ
