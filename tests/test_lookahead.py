"""Lookahead decoding against its published rule, played again in plain Python."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import decode_all

from msn_jax import DecodeConfig, forward, unembed
from msn_jax.decode import TREE_SETS, TreeSet, init_state, loop
from msn_jax.decode.source import Text
from msn_jax.decode.sources.jacobi import prefix_tokens
from msn_jax.decode.sources.lookahead import places, remember
from msn_jax.decode.tree import guesses
from msn_jax.plan import cache_copies

RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, 61, n).tolist() for n in (1, 9, 33, 70)]
NEW = 60
GRAMS, LENGTH, COLUMNS = 2, 3, 4
TREES = TreeSet("guesses", (guesses("guesses", GRAMS, LENGTH, COLUMNS),), (0,))


def test_a_window_by_hand():
    """Two levels of three columns, beside one n-gram of two."""
    tree = guesses("small", 1, 2, 3)
    #                      root, the n-gram, level 0, level 1 under each of its columns
    assert tree.parents == (-1, 0, 1, 0, 3, 0, 3, 4)
    assert tree.depth.tolist() == [0, 1, 2, 1, 2, 1, 2, 3]
    # A token of level 1 sees the columns of level 0 up to its own.
    assert np.flatnonzero(tree.ancestors[7]).tolist() == [0, 3, 4, 7]
    assert places(tree).tolist() == [[3, 0, 1], [4, 0, 2], [5, 1, 0], [6, 1, 1], [7, 1, 2]]
    assert tree.width == 3  # what the window says is never emitted


def test_the_newest_grams_of_a_token_stay():
    grams = jnp.full((1, 9, 2, 2), -1)
    for gram in ([1, 2], [3, 4], [1, 2], [5, 6]):  # 1, 2 is new again when 5, 6 comes
        grams = remember(grams, jnp.array([7]), jnp.array([gram]))
    assert grams[0, 7].tolist() == [[1, 2], [5, 6]] and (grams[0, :7] == -1).all()
    assert (remember(grams, jnp.array([9]), jnp.array([[0, 0]])) == grams).all()


def look_ahead(best_after, drawn, text, count):
    """One text by the rule of the paper's section 3, in lists. Returns what each pass accepted."""
    pool, rows, accepted = {}, None, []
    while count:
        root = text[-1]
        if rows is None:
            at = 1 + GRAMS * LENGTH
            rows = [[None, *drawn(len(text) - 1)[at : at + COLUMNS - 1]]]
        rows[0][0] = root
        level = len(rows) - 1
        column = lambda i: [row[i] for row in rows]  # noqa: B023
        said = [best_after(text + rows[0][1:i] + (column(i) if i else column(0)[1:])) for i in range(COLUMNS)]
        hit = []
        for gram in reversed(pool.get(root, [])):
            right = []
            while len(right) < LENGTH and gram[len(right)] == best_after(text + right):
                right.append(gram[len(right)])
            hit = max(hit, right, key=len)
        emitted = [*hit, best_after(text + hit)][:count]
        if level == LENGTH - 1:
            for i in range(COLUMNS):
                key, *gram = [*column(i), said[i]]
                known = pool.setdefault(key, [])
                if gram in known:
                    known.remove(gram)
                pool[key] = [*known, gram][-GRAMS:]
            rows = [*rows[1:], said]
        else:
            rows = [*rows, said]
        accepted.append(len(emitted))
        count -= len(emitted)
        text = text + emitted
    return accepted


@pytest.mark.slow
def test_lookahead_by_its_rule(tiny):
    cfg, params = tiny

    @jax.jit
    def run(tokens, last):
        hidden, _ = forward(params, cfg, tokens, jnp.arange(tokens.shape[1])[None])
        return jnp.argmax(unembed(params, cfg, hidden)[0, last])

    best_after = lambda text: int(run(jnp.asarray([text + [0] * (160 - len(text))], jnp.int32), len(text) - 1))
    for prompt in PROMPTS[1:]:
        one = lambda n: jnp.array([n])
        tokens = jnp.asarray([prompt])
        key_at = lambda last: Text(tokens, one(last), one(0), jnp.uint32(0)).key()  # noqa: B023
        drawn = lambda last: prefix_tokens(key_at(last), tokens, one(last), TREES.trees[0].size)[0].tolist()  # noqa: B023
        expected = look_ahead(best_after, drawn, prompt, NEW)
        state, _ = decode_all(params, cfg, TREES, [prompt], max_new_tokens=NEW)
        assert state.accepted[0, : int(state.forwards[0])].tolist() == expected
        assert len(expected) < NEW  # some n-gram came again


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.8, "seed": 3}], ids=["greedy", "sampled"])
def test_lookahead_changes_no_token(tiny, settings, batch):
    cfg, params = tiny
    settings = {"max_new_tokens": NEW, **settings}
    plain = decode_all(params, cfg, TREE_SETS["root"], PROMPTS[-batch:], **settings)[1]
    assert decode_all(params, cfg, TREE_SETS["lookahead56"], PROMPTS[-batch:], **settings)[1] == plain


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 4])
def test_the_loop_copies_neither_cache_nor_pool(tiny, batch):
    cfg, params = tiny
    state = init_state(cfg, TREES, [[1, 2]] * batch, DecodeConfig(max_new_tokens=9), (), slots=256)
    hlo = loop.run.lower(params, state, 5, cfg=cfg, trees=TREES).compile().as_text()
    for shape in ((batch, cfg.kv_heads, 256, cfg.head_dim), (batch, cfg.vocab_size, GRAMS, LENGTH)):
        assert f"[{','.join(map(str, shape))}]" in hlo and cache_copies(hlo, shape) == []
