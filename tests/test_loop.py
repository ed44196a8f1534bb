"""The loop against plain decoding: with random models, with a model made of a table, and with SmolLM2."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDENS, decode_all

from msn_jax import DecodeConfig, InputError, ModelConfig, forward, generate
from msn_jax.cache import init_cache, write_cache
from msn_jax.decode import TREE_SETS, TreeSet, TreeSpec, init_state, loop, prefill, run, tree_set, verify
from msn_jax.decode.tree import EITHER, JACOBI, RETRIEVAL, ROOT, branching, chain
from msn_jax.plan import cache_copies

RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, 61, n).tolist() for n in (1, 9, 33, 70)]  # one token; below and above a prefill chunk
NEW = 40
FORKED = TreeSpec(  # twins from both sources, and noise
    "forked",
    (-1, 0, 1, 0, 3, 0),
    ((ROOT, 0), (EITHER, 0), (EITHER, 0), (JACOBI, 0), (JACOBI, 1), ("noise", 0)),
)
ARMS = [
    *((method, tree_set(method)) for method in ("ar", "lookup", "jacobi", "tr-jacobi")),
    *((method, tree_set(method, "msn69")) for method in ("lookup", "jacobi", "tr-jacobi")),
    ("tr-jacobi", tree_set("tr-jacobi", "small13")),
    ("tr-jacobi", TreeSet("forked", (FORKED,), (0,))),
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


def table_forward(params, cfg, tokens, positions, mask=None, cache=None, adapter=None, noise_depth=None, dtype=None):
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
    stop_ids = (3,) if wrong is stop_ignored else ()
    expected, _ = decode_table(RECURS, 5, TWO_CHAINS, stop_ids)
    monkeypatch.setattr(verify, part, wrong)
    assert decode_table(RECURS, 5, TWO_CHAINS, stop_ids)[0] != expected


def test_pad_that_matches_is_right_but_for_the_pad(decode_table, monkeypatch):
    """The wrong verifier is wrong in that one way: without a recurring root its text is right."""
    monkeypatch.setattr(verify, "accept", pad_that_matches)
    text = [1, 2, 3, 4, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert decode_table(text, 5, TWO_CHAINS)[0] == text[5:]


# Compilation.


def traces(params, cfg, trees, prompts, **settings):
    before = loop.run._cache_size()
    decode_all(params, cfg, trees, prompts, stop_ids=settings.pop("stop_ids", ()), **settings)
    return loop.run._cache_size() - before


def test_one_trace_for_each_tree_set_bucket_and_batch(tiny):
    cfg, params = tiny
    trees = TreeSet("counted", (chain(2, RETRIEVAL), chain(3, EITHER)), (0, 2))
    assert traces(params, cfg, trees, PROMPTS[:1], max_new_tokens=3) == 1
    for change in (
        {"max_new_tokens": 9},
        {"max_new_tokens": 3, "temperature": 0.5, "seed": 7, "top_k": 3, "top_p": 0.5},
        {"max_new_tokens": 3, "stop_ids": (4, 5)},
    ):
        assert traces(params, cfg, trees, PROMPTS[2:3], **change) == 0
    assert traces(params, cfg, trees, PROMPTS[:2], max_new_tokens=3) == 1
    assert traces(params, cfg, trees, PROMPTS[:1], max_new_tokens=3, slots=512) == 1
    another = TreeSet("counted too", trees.trees[:1], (0,))
    assert traces(params, cfg, another, PROMPTS[:1], max_new_tokens=3) == 1


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize(
    "name, dtype",
    [("root", "float32"), ("adaptive", "float32"), ("adaptive", "bfloat16"), ("msn69", "float32")],
)
def test_the_loop_copies_no_cache(tiny, name, dtype, batch):
    cfg, params = tiny
    params = jax.tree.map(lambda a: a.astype(dtype), params)
    trees = TREE_SETS[name]
    state = init_state(cfg, trees, [[1, 2]] * batch, DecodeConfig(max_new_tokens=9), (), slots=256, dtype=dtype)
    hlo = run.lower(params, state, 5, cfg=cfg, trees=trees).compile().as_text()
    shape = (batch, cfg.kv_heads, 256, cfg.head_dim)
    of_a_cache = f"[{','.join(map(str, shape))}]"
    assert of_a_cache in hlo and cache_copies(hlo, shape) == []
    assert dtype == "float32" or "f32" + of_a_cache not in hlo


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_prefill_copies_no_cache(tiny, dtype, batch):
    cfg, params = tiny
    params = jax.tree.map(lambda a: a.astype(dtype), params)
    state = init_state(
        cfg, TREE_SETS["root"], [[1, 2]] * batch, DecodeConfig(max_new_tokens=9), (), slots=256, dtype=dtype
    )
    chunk = partial(loop.prefill_chunk, cfg=cfg, chunk=64, dtype=state.activations)
    one = lambda i, cache: chunk(params, cache, state.tokens, 64 * i)
    hlo = jax.jit(lambda cache: jax.lax.fori_loop(0, 3, one, cache)).lower(state.cache).compile().as_text()
    shape = (batch, cfg.kv_heads, 256, cfg.head_dim)
    assert f"[{','.join(map(str, shape))}]" in hlo and cache_copies(hlo, shape) == []


@pytest.mark.parametrize("name", ["root", "chain4"])
def test_bfloat16_weights_are_read_as_they_are(tiny, name):
    cfg, params = tiny
    trees = TREE_SETS[name]
    params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    widened = {}
    new = partial(init_state, cfg, trees, [[1, 2]], DecodeConfig(max_new_tokens=9), (), slots=256, dtype=jnp.bfloat16)
    for backend in ("tpu", "cpu"):
        hlo = run.lower(params, new(backend=backend), 5, cfg=cfg, trees=trees).compile().as_text()
        widened[backend] = f"f32[{cfg.embed},{cfg.mlp}]" in hlo
    # With results in bfloat16, or for one row, XLA:CPU makes a float32 copy of each matrix in each pass.
    assert widened == {"tpu": True, "cpu": False}


def test_a_copied_cache_would_be_seen(tiny):
    cfg, params = tiny

    def select_between_caches(state):
        # What finished rows must not be gated by.
        old = state.cache.k[0]
        new = jnp.where(state.done[:, None, None, None], old, old + 1)
        return state.replace(
            cache=state.cache.replace(k=(jnp.concatenate([new[..., 1:], old[..., :1]], -1), *state.cache.k[1:]))
        )

    state = init_state(cfg, TREE_SETS["root"], [[1, 2]], DecodeConfig(max_new_tokens=9), (), slots=256)
    loop_ = lambda state: jax.lax.fori_loop(0, 3, lambda i, s: select_between_caches(s), state)
    hlo = jax.jit(loop_).lower(state).compile().as_text()
    assert cache_copies(hlo, (1, cfg.kv_heads, 256, cfg.head_dim))


@pytest.mark.parametrize(
    "slots, size",
    [(1, 256), (256, 256), (257, 512), (1025, 1536), (1537, 2048), (2049, 3072), (3073, 4096), (8200, 12288)],
)
def test_buckets(slots, size):
    assert loop.bucket(slots) == size


# SmolLM2.


def test_smollm2_writes_what_torch_writes(smollm2):
    golden = np.load(GOLDENS / "smollm2.npz")
    prompt, expected = golden["greedy_prompt"].tolist(), golden["greedy_tokens"].tolist()
    for method in ("ar", "tr-jacobi"):
        (result,) = generate(smollm2, [prompt], method=method, max_new_tokens=len(expected))
        assert result.tokens == expected
        assert sum(result.accepted) == len(result.tokens) and len(result.accepted) == result.forwards


def test_smollm2_methods_agree(smollm2):
    # A prompt with much to copy, so that long paths are accepted.
    prompt = "The colours, over and over: red, green, blue, yellow, red, green, blue, yellow, red, green,"
    plain = generate(smollm2, [prompt], method="ar", max_new_tokens=48)[0]
    fast = generate(smollm2, [prompt], method="tr-jacobi", max_new_tokens=48)[0]
    assert fast.tokens == plain.tokens and fast.text == plain.text
    assert plain.forwards == len(plain.tokens) and fast.forwards < 0.5 * plain.forwards
    warm = dict(max_new_tokens=48, temperature=0.8, seed=11)
    assert (
        generate(smollm2, [prompt], method="tr-jacobi", **warm)[0].tokens
        == generate(smollm2, [prompt], method="ar", **warm)[0].tokens
    )


@pytest.mark.parametrize("batch", [1, 2])
def test_every_tree_has_run_before_the_clock_starts(shallow, monkeypatch, batch):
    passes = []

    def counted(*args, **settings):
        state, progress = run(*args, **settings)
        passes.append(state.passes.tolist())
        return state, progress

    monkeypatch.setattr(loop, "run", counted)
    monkeypatch.setattr("msn_jax.decode.generate._warm", set())
    trees = TREE_SETS["adaptive"]
    for max_new_tokens, warmed in ((3, len(trees.trees)), (2, 0)):  # a program is run for this once
        passes.clear()
        settings = dict(batch_size=batch, max_new_tokens=max_new_tokens)
        generate(shallow, [list(range(40))] * batch, method="tr-jacobi", tree="adaptive", **settings)
        assert len(passes) == warmed + 1
        assert passes[:warmed] == [[int(a == b) for a in range(warmed)] for b in range(warmed)]


def test_the_shortest_prompt_may_fill_its_slots(shallow, monkeypatch):
    monkeypatch.setattr("msn_jax.decode.generate._warm", set())  # what runs before the clock must fit them too
    settings = dict(tree="adaptive", max_new_tokens=247)  # 1 + 247 + 8 that a pass may write: the smallest bucket
    (plain,) = generate(shallow, [[3]], method="ar", max_new_tokens=247)
    (drafted,) = generate(shallow, [[3]], method="tr-jacobi", **settings)
    assert drafted.tokens == plain.tokens
