"""The loop against plain decoding: with random models, and with a model made of a table."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import decode_all

from msn_jax import DecodeConfig, InputError, ModelConfig, forward
from msn_jax.cache import init_cache, write_cache
from msn_jax.decode import TREE_SETS, TreeSet, TreeSpec, init_state, loop, prefill, run, tree_set, verify
from msn_jax.decode.tree import EITHER, JACOBI, ROOT, branching

RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, 61, n).tolist() for n in (1, 9, 33, 70)]  # one token; below and above a prefill chunk
NEW = 40
FORKED = TreeSpec(  # twins from both sources, and noise
    "forked",
    (-1, 0, 1, 0, 3, 0),
    ((ROOT, 0), (EITHER, 0), (EITHER, 0), (JACOBI, 0), (JACOBI, 1), ("noise", 0)),
)
ARMS = [
    ("ar", tree_set("ar")),
    ("tr-jacobi", tree_set("tr-jacobi")),
    ("tr-jacobi", tree_set("tr-jacobi", "msn69")),
    ("tr-jacobi", TreeSet("forked", (FORKED,), (0,))),
    *(
        pytest.param((method, tree_set(method, tree)), marks=pytest.mark.slow)
        for method, tree in (
            ("lookup", None),
            ("jacobi", None),
            ("jacobi", "msn69"),
        )
    ),
]


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: f"{arm[0]}-{arm[1].name}")
def test_greedy_equals_plain_decoding(tiny, plain_greedy, arm):
    cfg, params = tiny
    expected = [plain_greedy(prompt, NEW) for prompt in PROMPTS]
    state, together = decode_all(params, cfg, arm[1], PROMPTS, max_new_tokens=NEW)
    assert together == expected
    assert state.accepted.sum(axis=1).tolist() == [NEW] * 4
    assert (state.accepted > 0).sum(axis=1).tolist() == state.forwards.tolist()
    assert state.passes.sum() == state.forwards.max()


@pytest.mark.slow
@pytest.mark.parametrize("row", [0, 2])
def test_a_row_alone_is_as_in_a_batch(tiny, plain_greedy, row):
    cfg, params = tiny
    _, alone = decode_all(params, cfg, tree_set("tr-jacobi"), [PROMPTS[row]], max_new_tokens=NEW)
    assert alone == [plain_greedy(PROMPTS[row], NEW)]


@pytest.mark.parametrize("arm", ARMS[1:], ids=lambda arm: f"{arm[0]}-{arm[1].name}")
@pytest.mark.parametrize("top", [{}, {"top_k": 20, "top_p": 0.9}], ids=["all", "top"])
def test_sampling_equals_plain_sampling(tiny, arm, top):
    cfg, params = tiny
    settings = dict(max_new_tokens=NEW, temperature=0.8, seed=3, **top)
    plain = decode_all(params, cfg, TREE_SETS["root"], PROMPTS, **settings)[1]
    assert decode_all(params, cfg, arm[1], PROMPTS, **settings)[1] == plain
    other = decode_all(params, cfg, TREE_SETS["root"], PROMPTS, **settings | {"seed": 4})[1]
    assert all(a != b for a, b in zip(plain, other))


def test_drafts_are_accepted_at_all(tiny):
    cfg, params = tiny
    state, _ = decode_all(params, cfg, tree_set("tr-jacobi", "msn69"), PROMPTS, max_new_tokens=NEW)
    assert state.forwards.max() < NEW and state.accepted.max() > 2


@pytest.mark.slow
def test_the_full_context_can_be_used(tiny, plain_greedy):
    cfg, params = tiny
    count = cfg.max_position - len(PROMPTS[1])
    state, (row,) = decode_all(params, cfg, tree_set("tr-jacobi"), [PROMPTS[1]], max_new_tokens=count)
    assert len(row) == count and row == plain_greedy(PROMPTS[1], count)


def test_too_few_slots_are_refused(tiny):
    cfg, params = tiny
    trees = tree_set("tr-jacobi")
    with pytest.raises(InputError, match="100 cache slots; these prompts need 118"):
        init_state(cfg, trees, [[1] * 90], DecodeConfig(max_new_tokens=20), (), slots=100)
    state = init_state(cfg, trees, [[1] * 90], DecodeConfig(max_new_tokens=2), (), slots=100)
    with pytest.raises(InputError, match="100 cache slots do not hold prompts of 89 in chunks of 64"):
        prefill(params, state, cfg=cfg, chunk=64)


def test_a_stop_ends_a_row_and_not_its_neighbours(tiny, plain_greedy):
    cfg, params = tiny
    expected = [plain_greedy(prompt, NEW) for prompt in PROMPTS]
    stop = expected[1][7]
    trees = tree_set("tr-jacobi", "msn69")
    state, rows = decode_all(params, cfg, trees, PROMPTS, stop_ids=(60, stop), max_new_tokens=NEW)
    cut = [row[: row.index(stop) + 1] if stop in row else row for row in expected]
    cut = [row[: row.index(60) + 1] if 60 in row else row for row in cut]
    assert rows == cut and len({len(row) for row in rows}) > 1
    assert state.stopped.tolist() == [row[-1] in (60, stop) for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adaptive", "msn69"])
def test_cache_after_commit_is_that_of_a_prefill(tiny, name):
    cfg, params = tiny
    state, rows = decode_all(params, cfg, tree_set("tr-jacobi", name), PROMPTS, max_new_tokens=NEW)
    for b, (prompt, row) in enumerate(zip(PROMPTS, rows, strict=True)):
        text = jnp.asarray([(prompt + row)[:-1]])
        assert state.cache.length[b] == text.shape[1]
        _, new = forward(params, cfg, text, jnp.arange(text.shape[1])[None])
        whole = write_cache(init_cache(cfg, 1, 256), new, jnp.zeros(1, jnp.int32))
        for ours, theirs in zip(state.cache.k + state.cache.v, whole.k + whole.v, strict=True):
            kept = slice(0, text.shape[1])
            np.testing.assert_allclose(ours[b, :, kept], theirs[0, :, kept], atol=1e-4)


@pytest.mark.slow
def test_finished_rows_stay_as_they_are(tiny):
    cfg, params = tiny
    trees = tree_set("tr-jacobi")
    state, _ = decode_all(params, cfg, trees, PROMPTS[:2], max_new_tokens=5)
    again, _ = run(
        params,
        jax.tree.map(jnp.asarray, state).replace(done=jnp.array([True, False])),
        3,
        cfg=cfg,
        trees=trees,
    )
    assert int(again.cache.length[0]) == state.cache.length[0]
    assert int(again.forwards[0]) == state.forwards[0]
    np.testing.assert_array_equal(
        again.tokens[0, : state.cache.length[0] + 1], state.tokens[0, : state.cache.length[0] + 1]
    )


@pytest.mark.slow
def test_chunks_give_the_tokens_of_one_run(tiny, plain_greedy):
    cfg, params = tiny
    trees = tree_set("tr-jacobi")
    state = init_state(cfg, trees, [PROMPTS[2]], DecodeConfig(max_new_tokens=NEW), (), slots=256)
    state = prefill(params, state, cfg=cfg, chunk=16)
    shown, at = [], len(PROMPTS[2])
    for _ in range(100):
        state, progress = run(params, state, 3, cfg=cfg, trees=trees)
        end = int(progress.last[0]) + 1
        shown += np.asarray(progress.tokens)[0, at:end].tolist()
        at = end
        if progress.done.all():
            break
    assert shown == plain_greedy(PROMPTS[2], NEW)


# A model made of a table: what follows a token depends on its position and itself. After a wrong token comes 0.


def table_forward(params, cfg, tokens, positions, mask=None, cache=None, **settings):
    nothing = jnp.zeros((tokens.shape[0], cfg.kv_heads, tokens.shape[1], cfg.head_dim))
    return jax.nn.one_hot(params[positions, tokens], cfg.vocab_size), ((nothing, nothing),)


def table_of(text, vocab):
    table = np.zeros((256, vocab), np.int32)
    for position, (token, following) in enumerate(zip(text, text[1:])):
        table[position, token] = following
    return jnp.asarray(table)


@pytest.fixture
def decode_table(monkeypatch):
    """Decode a text that a table knows, with the modules as they are patched now."""
    monkeypatch.setattr(loop, "forward", table_forward)
    monkeypatch.setattr(loop, "unembed", lambda params, cfg, hidden: hidden)
    cfg = ModelConfig(vocab_size=16, embed=2, layers=1, heads=1, kv_heads=1, head_dim=2, mlp=2, max_position=256)

    def decode(text, prompt_tokens, tree, stop_ids=()):
        trees = TreeSet(tree.name, (tree,), (0,))
        new = len(text) - prompt_tokens
        prompt = text[:prompt_tokens]
        state = init_state(cfg, trees, [prompt], DecodeConfig(max_new_tokens=new), stop_ids, slots=256)
        step = jax.jit(partial(loop.step, cfg=cfg, trees=trees))  # a new function: nothing cached from before
        state = state.replace(cache=state.cache.replace(length=jnp.array([prompt_tokens - 1])))
        while not state.done.all():
            state = step(table_of(text, cfg.vocab_size), state)
        return np.asarray(state.tokens)[0, prompt_tokens : int(state.cache.length[0]) + 1].tolist(), state

    return decode


# The root 1 recurs right after the leaf 4, but then comes 5, not 2.
RECURS = [1, 2, 3, 4, 1, 2, 3, 4, 1, 5, 6, 7, 8, 9]
TWO_CHAINS = branching("two chains", 3, {(): 1, (0,): 1, (0, 0): 1, (0, 0, 0): 1, (0, 0, 0, 0): 1})


def test_a_root_that_recurs_after_a_leaf(decode_table):
    tokens, state = decode_table(RECURS, 5, TWO_CHAINS)
    assert tokens == RECURS[5:]
    assert state.accepted[0, 0] == 4  # the retrieved 2 3 4 were taken, and the 1 after them


def test_a_stop_inside_an_accepted_path(decode_table):
    tokens, state = decode_table(RECURS, 5, TWO_CHAINS, stop_ids=(3,))
    assert tokens == [2, 3] and bool(state.stopped[0])
    assert state.accepted[0, 0] == 2


def pad_that_matches(tree, tokens, valid, targets):
    """The reference's fault: shorter paths are filled up with the root, which then is verified as well."""
    leaves = sorted(set(range(tree.size)) - set(tree.parents))
    paths = np.zeros((len(leaves), tree.width), int)
    for i, leaf in enumerate(leaves):
        paths[i, : tree.depth[leaf] + 1] = tree.path[leaf, : tree.depth[leaf] + 1]
    right = (valid[:, paths] & (tokens[:, paths] == jnp.roll(targets[:, paths], 1, axis=2)))[:, :, 1:]
    reward = jnp.cumprod(right, axis=2).sum(axis=2)
    path = jnp.asarray(paths)[jnp.argmax(reward, axis=1)]
    best = jnp.take_along_axis(path, reward.max(axis=1)[:, None], axis=1)[:, 0]
    return best, jnp.take_along_axis(targets, path, axis=1), reward.max(axis=1) + 1


def off_by_one_path(tree, tokens, valid, targets):
    """Emits the nodes of the path instead of what follows them."""
    best, _, count = verify_accept(tree, tokens, valid, targets)
    return best, jnp.take_along_axis(tokens, jnp.asarray(tree.path)[best], axis=1), count


def stop_ignored(emitted, count, remaining, stop_ids):
    """Looks for a stop only at the end of what a pass emits."""
    kept = jnp.minimum(count, remaining)
    final = jnp.take_along_axis(emitted, kept[:, None] - 1, axis=1)
    return kept, (final == stop_ids[None]).any(axis=1)


verify_accept = verify.accept


@pytest.mark.parametrize(
    "part, wrong", [("accept", pad_that_matches), ("accept", off_by_one_path), ("cut", stop_ignored)]
)
def test_wrong_verifiers_are_caught(decode_table, monkeypatch, part, wrong):
    stop_ids, right = ((3,), [2, 3]) if wrong is stop_ignored else ((), RECURS[5:])
    monkeypatch.setattr(verify, part, wrong)
    assert decode_table(RECURS, 5, TWO_CHAINS, stop_ids)[0] != right


def test_pad_that_matches_is_right_but_for_the_pad(decode_table, monkeypatch):
    """The wrong verifier is wrong in that one way: without a recurring root its text is right."""
    monkeypatch.setattr(verify, "accept", pad_that_matches)
    text = [1, 2, 3, 4, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert decode_table(text, 5, TWO_CHAINS)[0] == text[5:]
