"""Sources of drafts: none changes a token, each drafts what its rule says, played again in NumPy."""

import collections
import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import decode_all

from msn_jax import DecodeConfig, InputError, forward, generate, unembed
from msn_jax.decode import TREE_SETS, TreeSet, TreeSpec, init_state, loop, tree_set
from msn_jax.decode.source import Source, Text, Weights, fill
from msn_jax.decode.sources import SOURCES, recycling, retrieval
from msn_jax.decode.tree import JACOBI, LONGEST_MATCH, NOISE, RECYCLING, RETRIEVAL, ROOT, branching, chain
from msn_jax.plan import cache_copies

ROOT_DIR = Path(__file__).parent.parent
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, 61, n).tolist() for n in (1, 9, 33, 70)]
NEW = 40


class Guess(Source):
    """Drafts at random."""

    name = "guess"

    def begin(self, weights, carry, text, ask):
        return text.key(), None

    def level(self, weights, carry, scratch, at, tokens):
        draw = jax.vmap(lambda key: jax.random.randint(key, (len(at.nodes),), 0, weights.cfg.vocab_size))
        return draw(scratch), scratch


GUESSES = TreeSet("guesses", (branching("guesses", 0, {(): 12, (0,): 3}, kind="guess"),), (0,), sources=(Guess(),))
_MIXED = TreeSpec(  # every source under and beside every other, and noise
    "mixed",
    (-1, 0, 1, 0, 3, 0, 0, 5, 2, 0, 9),
    (
        (ROOT, 0),
        (RETRIEVAL, 0),
        ((RETRIEVAL, 0), (RECYCLING, 0)),
        ((JACOBI, 0), (RECYCLING, 0)),
        (RECYCLING, 0),
        ((RECYCLING, 0), (RECYCLING, 1), (JACOBI, 1)),
        ("guess", 0),
        (JACOBI, 0),
        ("guess", 0),
        (NOISE, 0),
        (NOISE, 0),
    ),
)
MIXED = TreeSet("mixed", (chain(2, RECYCLING), _MIXED), (0, 1), sources=(Guess(),))
ARMS = [GUESSES, MIXED, tree_set("recycling"), TREE_SETS["mix16"]]


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("trees", ARMS, ids=lambda trees: trees.name)
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.8, "seed": 3}], ids=["greedy", "sampled"])
def test_no_source_changes_a_token(tiny, trees, settings, batch):
    cfg, params = tiny
    prompts, settings = PROMPTS[-batch:], {"max_new_tokens": NEW, **settings}
    _, plain = decode_all(params, cfg, TREE_SETS["root"], prompts, **settings)
    state, drafted = decode_all(params, cfg, trees, prompts, **settings)
    assert drafted == plain
    assert state.accepted.max() > 1  # even guesses are right at times


@pytest.mark.slow
@pytest.mark.parametrize("name", ["chain4", "msn69", "recycle8"])
def test_what_a_row_accepts_does_not_depend_on_its_neighbours(tiny, name):
    cfg, params = tiny
    together, _ = decode_all(params, cfg, TREE_SETS[name], PROMPTS, max_new_tokens=NEW)
    for row in (1, 3):
        state = init_state(cfg, TREE_SETS[name], [PROMPTS[row]], DecodeConfig(max_new_tokens=NEW), (), slots=256)
        state = loop.prefill(params, state.replace(request=jnp.array([row])), cfg=cfg, chunk=16)
        alone, _ = loop.run(params, state, 2**31 - 1, cfg=cfg, trees=TREE_SETS[name])
        assert alone.accepted[0].tolist() == together.accepted[row].tolist()


@pytest.mark.slow
def test_the_tree_of_a_cycle_has_the_most_tokens_for_its_cost():
    small, wide = chain(1, RETRIEVAL), chain(7, RETRIEVAL)
    worth = lambda none, long: (none,) * 5 + (long,) * (LONGEST_MATCH - 4)
    trees = TreeSet("figures", (small, wide), (0, 5), (worth(1.0, 1.8), worth(1.2, 6.0)), (1.0, 2.0))
    pick = lambda confidence, live: int(loop.choose(trees, jnp.array(confidence), jnp.array(live)))
    assert pick([4], [True]) == 0 and pick([5], [True]) == 1
    # Two rows: 2.8 for 1 against 7.2 for 2. Three: 3.8 against 8.4; four: 4.8 against 9.6, the smaller of equals.
    assert pick([16, 0], [True] * 2) == 1 and pick([16, 0, 0], [True] * 3) == 1 and pick([16, 0, 0, 0], [True] * 4) == 0
    assert pick([0, 16], [True, False]) == 0  # finished rows want nothing
    plain = TreeSet("no figures", (small, wide), (0, 5))
    pick = lambda confidence: int(loop.choose(plain, jnp.array(confidence), jnp.ones(3, bool)))
    assert pick([16, 0, 0]) == 0 and pick([16, 5, 0]) == 1
    with pytest.raises(InputError, match="min_match 17; accepted: 0 to 16"):
        TreeSet("bad", (small, wide), (0, 17))
    with pytest.raises(InputError, match="a cost and 17 worths"):
        TreeSet("bad", (small, wide), (0, 5), (worth(1, 2),), (1.0, 2.0))


@pytest.mark.slow
def test_a_node_takes_the_first_choice_that_no_sibling_took():
    parents = (-1, 0, 0, 0, 3, 3)
    tree = TreeSpec(
        "choices", parents, ((ROOT, 0), (JACOBI, 0), *[((RECYCLING, r), (RECYCLING, r + 1)) for r in (0, 1, 0, 0)])
    )
    table = jnp.full((1, 9, recycling.RANKS), -1).at[0, 1, :3].set(jnp.array([4, 5, 6])).at[0, 6, :1].set(7)
    nothing = {source.name: None for source in SOURCES}

    def drafted(jacobi):
        carry = nothing | {"jacobi": jnp.array([[[jacobi]]]), "recycling": table}
        return fill(tree, SOURCES, nothing, carry, nothing, jnp.array([1]))[0].tolist()

    assert drafted(4) == [1, 4, 5, 6, 7, -1]
    assert drafted(8) == [1, 8, 4, 5, -1, -1]
    assert drafted(-1) == [1, -1, 4, 5, -1, -1]
    tree = dataclasses.replace(tree, twins=True)  # all that may repeat a sibling take their first choice
    assert drafted(4) == [1, 4, 4, 5, -1, -1] and drafted(-1) == [1, -1, 4, 5, -1, -1]


@pytest.mark.parametrize("vocab", [61, 4097])
def test_largest_is_top_k(vocab):
    logits = np.random.default_rng(0).integers(0, 40, (5, 3, vocab)).astype(np.float32)  # many ties
    np.testing.assert_array_equal(recycling.largest(jnp.asarray(logits), 8), jax.lax.top_k(logits, 8)[1])


def retrieved(text, count, ranks):
    """Every earlier end, every length, every vote, one at a time."""
    ends = []
    for end in range(len(text) - 1):
        n = 0
        while n <= end and n < LONGEST_MATCH and text[end - n] == text[len(text) - 1 - n]:
            n += 1
        if n:
            ends.append((n, end))
    ends = sorted(ends, reverse=True)[: retrieval.PLACES]
    votes = collections.Counter()
    for n, end in ends:
        for length in range(1, count + 1):
            if end + length < len(text):
                votes[tuple(text[end + 1 : end + 1 + length])] += 2**n
    chosen = []
    for _ in range(ranks):
        best, score = (), 0
        for _, end in ends:
            path = tuple(text[end + 1 : end + 1 + count])
            worth = sum(votes[path[:length]] for length in range(1, len(path) + 1))
            if worth > score and path[0] not in {other[0] for other in chosen if other}:
                best, score = path, worth
        chosen.append(best)
    return [list(path) + [-1] * (count - len(path)) for path in chosen], ends[0][0] if ends else 0


def test_retrieval_by_its_rule():
    rng = np.random.default_rng(0)
    find = jax.jit(retrieval.retrieve, static_argnums=(2, 3))
    for _ in range(60):
        length = int(rng.integers(1, 90))
        text = rng.integers(0, 3, length).tolist()
        tokens = np.full((1, 96), 2)  # what lies beyond the text must not be found
        tokens[0, :length] = text
        got, match = find(jnp.asarray(tokens, jnp.int32), jnp.array([length - 1]), 5, 3)
        assert (got[0].tolist(), int(match[0])) == retrieved(text, 5, 3), text
    # The longest match, of two tokens, says 5, 4 with 2^2 votes; three of one token say 6, 7 with 3 * 2^1.
    text = [1, 6, 7, 1, 6, 7, 3, 1, 6, 7, 2, 1, 5, 4, 2, 1]
    assert retrieved(text, 2, 2) == ([[6, 7], [5, 4]], 2)


def recycle(logits_of, tree, table, text, count):
    """Token Recycling of one text in plain Python. Returns what each pass accepted; changes the table."""
    accepted = []
    while count:
        tokens = [text[-1]]
        for parent, (_, rank) in list(zip(tree.parents, tree.sources, strict=True))[1:]:
            tokens.append(table.get(tokens[parent], [-1] * 8)[rank])
        paths = []
        for node in range(tree.size):
            path, above = [], node
            while above > 0:
                path, above = [tokens[above], *path], tree.parents[above]
            paths.append(path)
        known = {node: logits_of(text + path) for node, path in enumerate(paths) if -1 not in path}
        # A node that has a token under one that has none is still run; there is none here: -1 has no followers.
        best = lambda node: int(known[node].argmax())  # noqa: B023
        right = {0}
        for node in range(1, tree.size):
            if tree.parents[node] in right and tokens[node] == best(tree.parents[node]):
                right.add(node)
        last = max(right, key=lambda node: (len(paths[node]), -node))  # noqa: B023
        emitted = [*paths[last], best(last)][:count]
        accepted.append(len(emitted))
        count -= len(emitted)
        text = text + emitted
        for node, logits in known.items():
            table[tokens[node]] = np.argsort(-logits, kind="stable")[:8].tolist()
    return accepted


@pytest.mark.slow
def test_recycling_by_its_rule(tiny):
    cfg, params = tiny
    tree = branching("recycled", 0, {(): 4, (0,): 3, (1,): 1, (0, 0): 2, (0, 0, 1): 8}, kind=RECYCLING)
    trees = TreeSet("recycled", (tree,), (0,))

    @jax.jit
    def run(tokens, last):
        hidden, _ = forward(params, cfg, tokens, jnp.arange(tokens.shape[1])[None])
        return unembed(params, cfg, hidden)[0, last]

    def logits_of(text):
        return np.asarray(run(jnp.asarray([text + [0] * (160 - len(text))], jnp.int32), len(text) - 1))

    table, memory = {}, None
    for prompt in PROMPTS[1:3]:
        expected = recycle(logits_of, tree, table, prompt, NEW)
        state = init_state(cfg, trees, [prompt], DecodeConfig(max_new_tokens=NEW), (), slots=256, memory=memory)
        state = loop.prefill(params, state, cfg=cfg, chunk=16)
        state, _ = loop.run(params, state, 2**31 - 1, cfg=cfg, trees=trees)
        memory = state.drafts
        assert state.accepted[0, : int(state.forwards[0])].tolist() == expected
        known = np.asarray(memory["recycling"])[0]
        assert {t: row.tolist() for t, row in enumerate(known) if row[0] >= 0} == table
    assert sum(expected) > len(expected) and len(table) > 30


@pytest.mark.slow
def test_rows_share_a_table_that_is_given(tiny):
    cfg, params = tiny
    shared = {"recycling": jnp.full((1, cfg.vocab_size, recycling.RANKS), -1)}
    trees = TREE_SETS["recycle8"]
    _, plain = decode_all(params, cfg, TREE_SETS["root"], PROMPTS, max_new_tokens=NEW)
    state = init_state(cfg, trees, PROMPTS, DecodeConfig(max_new_tokens=NEW), (), slots=256, memory=shared)
    state = loop.prefill(params, state, cfg=cfg, chunk=16)
    state, _ = loop.run(params, state, 2**31 - 1, cfg=cfg, trees=trees)
    rows = [state.tokens[b, len(p) : len(p) + NEW].tolist() for b, p in enumerate(PROMPTS)]
    assert rows == plain
    own, _ = decode_all(params, cfg, trees, PROMPTS, max_new_tokens=NEW)
    assert state.drafts["recycling"].shape[0] == 1
    assert int(state.forwards.sum()) < int(own.forwards.sum())  # each row learns from the others


def test_a_finished_row_teaches_a_shared_table_nothing(tiny):
    cfg, _ = tiny
    source, table = recycling.Recycling(), jnp.full((1, 61, recycling.RANKS), -1)
    top = jnp.arange(2 * 3 * 8).reshape(2, 3, 8)
    news = recycling.News(jnp.array([[5, 6, -1], [6, 7, 5]]), top)
    text = Text(None, jnp.array([4, 8]), None, None)
    both = source.update(None, table, news, text, jnp.array([True, True]))
    assert both[0, jnp.array([5, 6, 7]), 0].tolist() == [40, 24, 32]  # the later row's, where both know the token
    first = source.update(None, table, news, text, jnp.array([True, False]))
    assert first[0, jnp.array([5, 6, 7]), 0].tolist() == [0, 8, -1]


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("name", ["recycle8", "mix16"])
def test_the_loop_copies_neither_cache_nor_table(tiny, name, batch):
    cfg, params = tiny
    state = init_state(cfg, TREE_SETS[name], [[1, 2]] * batch, DecodeConfig(max_new_tokens=9), (), slots=256)
    hlo = loop.run.lower(params, state, 5, cfg=cfg, trees=TREE_SETS[name]).compile().as_text()
    for shape in ((batch, cfg.kv_heads, 256, cfg.head_dim), (batch, cfg.vocab_size, recycling.RANKS)):
        assert f"[{','.join(map(str, shape))}]" in hlo and cache_copies(hlo, shape) == []


@pytest.mark.slow
def test_a_table_is_kept_in_a_file(tmp_path, shallow):
    path = tmp_path / "memory.npz"
    table = recycling.read_table(path, shallow.cfg.vocab_size)
    assert table.shape == (1, shallow.cfg.vocab_size, 8) and (table == -1).all()  # no file yet
    lm = dataclasses.replace(shallow, memory={"recycling": table})
    settings = dict(method="recycling", tree="recycle8", max_new_tokens=20)
    first, again = (generate(lm, [[3, 4, 5]], **settings)[0] for _ in range(2))
    plain = generate(shallow, [[3, 4, 5]], method="ar", max_new_tokens=20)[0]
    assert first.tokens == again.tokens == plain.tokens and again.forwards < first.forwards
    recycling.write_table(path, lm.memory["recycling"])
    read = recycling.read_table(path, shallow.cfg.vocab_size)
    np.testing.assert_array_equal(read, lm.memory["recycling"])
    with pytest.raises(InputError, match="same vocabulary, 61 rows of 8 token ids"):
        recycling.read_table(path, 61)
    path.write_text("nothing")
    with pytest.raises(InputError, match="memory.npz: cannot be read"):
        recycling.read_table(path, 61)


@pytest.mark.slow
def test_the_sources_of_the_docs_draft(tiny):
    cfg, params = tiny
    code = re.findall(r"```python\n(.*?)```", (ROOT_DIR / "docs/drafts.md").read_text(), re.DOTALL)
    names = {}
    exec("\n".join(code), names)
    plain = decode_all(params, cfg, TREE_SETS["root"], PROMPTS, max_new_tokens=NEW)[1]
    for trees in (TreeSet("example", (names["tree"],), (0,)), names["trees"]):
        assert decode_all(params, cfg, trees, PROMPTS, max_new_tokens=NEW)[1] == plain
    root = jnp.array([7])
    carry = {"following": None}
    (own,) = names["trees"].sources
    weights = {"following": Weights(params, None, cfg)}
    drafts = fill(names["trees"].trees[0], (own,), weights, carry, carry, root)
    assert drafts[0].tolist() == [7, 8, 9, 10, 11]


def test_a_draft_at_random_is_that_of_its_row_alone():
    data = lambda *rows: jax.random.key_data(Text(None, *(jnp.array(row) for row in rows)).key()).tolist()
    both = data([4, 8], [3, 5], [1, 2])  # position, request, seed
    assert data([8], [5], [2]) == both[1:]
    assert all(other != both[1:] for other in (data([9], [5], [2]), data([8], [6], [2]), data([8], [5], [3])))
