"""N-grams of earlier replies: counted, ranked, found again, and drafted at every depth of a tree."""

import dataclasses
import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import decode_all
from test_source import PROMPTS, ROOT_DIR

from experiments import ngrams as script
from msn_jax import InputError, generate, load
from msn_jax.config import LoraConfig
from msn_jax.decode import TREE_SETS, tree_set
from msn_jax.decode.source import Weights, fill
from msn_jax.decode.sources.ngrams import Ngrams
from msn_jax.decode.tree import branching
from msn_jax.io.adapters import load_adapter, save_adapter
from msn_jax.ngrams import ORDER, RANKS, SLOTS, NgramTable, following, hashes, make_table

TEXTS = [([9], [1, 2, 3, 1, 2, 4]), ([9], [1, 2, 3])]


def table_of(texts, vocab=61, least=1, buckets=64):
    table, lost = make_table(texts, vocab, least, buckets)
    assert not lost
    return NgramTable(jnp.asarray(table.keys), jnp.asarray(table.ranked))


def count(texts):
    """How often each token followed each context, by the context's length less 1; one at a time."""
    counts = [{} for _ in range(ORDER)]
    for before, reply in texts:
        text = [*before, *reply]
        for at in range(len(before), len(text)):
            for order in range(1, min(ORDER, at) + 1):
                after = counts[order - 1].setdefault(tuple(text[at - order : at]), {})
                after[text[at]] = after.get(text[at], 0) + 1
    return counts


def ranked(counts, context):
    """What may follow a context, by Witten and Bell's interpolation."""
    share = {}
    for order in range(1, len(context) + 1):
        after = counts[order - 1][context[-order:]]
        total = sum(after.values())
        weight = total / (total + len(after))
        share = {token: (1 - weight) * p for token, p in share.items()}
        for token, n in after.items():
            share[token] = share.get(token, 0.0) + weight * n / total
    return sorted(share, key=lambda token: (-share[token], token))[:RANKS]


def slow_table(texts, vocab_size, least, buckets):
    """`make_table`, one context after the other."""
    counts = count(texts)
    kept = [(sum(after.values()), context) for part in counts for context, after in part.items()]
    kept = [(n, context) for n, context in kept if n >= least or len(context) == 1]
    keys = np.zeros((buckets, SLOTS), np.uint32)
    tokens = np.zeros((buckets, SLOTS, RANKS), np.uint16)
    used, lost = np.zeros(buckets, int), 0
    for _, context in sorted(kept, key=lambda pair: (-pair[0], pair[1])):
        (first,), (second,) = hashes(np.array([[-1] * (ORDER - len(context)) + [*context]]), len(context))
        bucket = int(first) & (buckets - 1)
        if used[bucket] == SLOTS:
            lost += 1
            continue
        best = ranked(counts, context)
        keys[bucket, used[bucket]] = second
        tokens[bucket, used[bucket]] = best + best[-1:] * (RANKS - len(best))
        used[bucket] += 1
    return keys, tokens, lost


def test_counts_by_hand():
    assert count(TEXTS) == [
        {(9,): {1: 2}, (1,): {2: 3}, (2,): {3: 2, 4: 1}, (3,): {1: 1}},
        {(9, 1): {2: 2}, (1, 2): {3: 2, 4: 1}, (2, 3): {1: 1}, (3, 1): {2: 1}},
        {(9, 1, 2): {3: 2}, (1, 2, 3): {1: 1}, (2, 3, 1): {2: 1}, (3, 1, 2): {4: 1}},
        {(9, 1, 2, 3): {1: 1}, (1, 2, 3, 1): {2: 1}, (2, 3, 1, 2): {4: 1}},
    ]  # each token of a reply, none of a prompt


def test_ranks_by_hand():
    counts = [{(2,): {5: 3, 6: 1}}, {(1, 2): {6: 1}}]
    # One token: weight 4/6, so 5 has 1/2 and 6 has 1/6. Two: weight 1/2, so 5 has 1/4 and 6 has 1/12 + 1/2.
    assert ranked(counts, (2,)) == [5, 6] and ranked(counts, (1, 2)) == [6, 5]


@pytest.mark.parametrize("least, buckets", [(1, 2**15), (2, 512), (3, 16)])
def test_a_table_is_that_of_counting_one_by_one(least, buckets):
    rng = np.random.default_rng(least)
    odds = 1 / np.arange(1, 41)
    draw = lambda n: rng.choice(40, n, p=odds / odds.sum()).tolist()
    texts = [(draw(rng.integers(1, 5)), draw(rng.integers(1, 70))) for _ in range(60)] + [([], [3, 4])]
    table, lost = make_table(texts, 40, least, buckets)
    keys, tokens, left = slow_table(texts, 40, least, buckets)
    np.testing.assert_array_equal(table.keys, keys)
    np.testing.assert_array_equal(table.ranked, tokens)
    assert lost == left and table.ranked.dtype == np.uint16 and (lost > 0) == (buckets < 1024)


def test_the_longest_known_end_of_a_context_counts():
    rng = np.random.default_rng(0)
    texts = [(rng.integers(0, 5, 2).tolist(), rng.integers(0, 5, 40).tolist()) for _ in range(12)]
    counts, table = count(texts), table_of(texts, buckets=4096)
    contexts = rng.integers(0, 5, (200, ORDER))
    contexts[:40, :2] = -1  # a text of two tokens
    contexts[40:50] = rng.integers(6, 9, (10, ORDER))  # never seen
    contexts[50:60, :3] = 7  # but for the last token
    found = np.asarray(following(table, jnp.asarray(contexts, jnp.int32)))
    lengths = set()
    for context, got in zip(contexts.tolist(), found.tolist(), strict=True):
        ends = [tuple(context[-n:]) for n in range(1, ORDER + 1) if -1 not in context[-n:]]
        known = [end for end in ends if end in counts[len(end) - 1]]
        best = ranked(counts, known[-1]) if known else [-1]
        assert got == best + best[-1:] * (RANKS - len(best))
        lengths.add(len(known[-1]) if known else 0)
    assert lengths == {0, 1, 2, 3, 4}


def test_rare_contexts_and_full_buckets_are_left_out():
    table = table_of(TEXTS, least=2)
    known = lambda *context: int(following(table, jnp.array([(-1,) * (ORDER - len(context)) + context]))[0, 0])
    assert known(3) == 1  # of one token: always
    assert known(1, 2) == 3 and known(3, 1) == 2  # the second came once, so its last token alone is known
    small, lost = make_table(TEXTS, 61, 1, 1)
    assert small.keys.shape == (1, 4) and (small.keys > 0).all() and lost == sum(map(len, count(TEXTS))) - 4


def test_every_node_continues_what_stands_above_it():
    tree = branching("grams", 0, {(): 2, (0,): 2, (0, 0): 1, (0, 0, 0): 1, (1,): 1}, kind="ngrams")
    table = table_of([([9, 8], [1, 2, 3, 4, 5, 6]), ([7, 8], [1, 3])])
    source = Ngrams()
    weights = {"ngrams": Weights(None, table, None)}
    drafted = lambda before: fill(
        tree, (source,), weights, {"ngrams": ()}, {"ngrams": jnp.array([before])}, jnp.array([1])
    )[0].tolist()
    # After 8 1 came 2 and 3; after 1 2, 3; after 8 1 3 nothing that was not after 3 alone.
    assert drafted([-1, 9, 8]) == [1, 2, 3, 3, -1, 4, 4, 5]
    assert drafted([-1, 7, 8]) == [1, 3, 2, 4, -1, 3, 5, 6]


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.8, "seed": 3}], ids=["greedy", "sampled"])
def test_ngrams_change_no_token(tiny, settings, batch):
    cfg, params = tiny
    settings, prompts = {"max_new_tokens": 40, **settings}, PROMPTS[-batch:]
    _, plain = decode_all(params, cfg, TREE_SETS["root"], prompts, **settings)
    own = table_of([(prompt, reply) for prompt, reply in zip(prompts, plain, strict=True)], buckets=1024)
    state, drafted = decode_all(params, cfg, TREE_SETS["found16"], prompts, drafter={"ngrams": own}, **settings)
    assert drafted == plain
    assert state.forwards.max() < 20  # it has seen these very replies


@pytest.mark.slow
def test_a_table_from_replies_is_an_adapter(tiny_ckpt, tmp_path, monkeypatch, capsys):
    rows = tmp_path / "own.jsonl"
    rows.write_text(json.dumps({"messages": [{"role": "user", "content": "Count."}]}) + "\n")
    # The template of the tiny model ends no reply with a stop token, as conversations need it.
    replies = [(np.array([5, 6, 7, 8, 9, 2]), np.arange(6) > 1), (np.array([5, 6, 7, 7, 2]), np.arange(5) > 1)]
    monkeypatch.setattr(script, "encoded", lambda lm, talks, most: [*replies, (np.full(40, 3), np.arange(40) > 3)])
    run = lambda *more: monkeypatch.setattr(
        sys, "argv", ["ngrams", "--ckpt", str(tiny_ckpt), "--replies", str(rows), "--out", str(tmp_path / "n"), *more]
    )
    run("--buckets", "100")
    with pytest.raises(InputError, match="--buckets 100: accepted: a power of two"):
        script.main()
    (tmp_path / "odd.jsonl").write_text('{"prompt": "Count.", "completion": "1"}\n')
    run("--replies", str(tmp_path / "odd.jsonl"))
    with pytest.raises(InputError, match="odd.jsonl: a row without messages; accepted: what own_responses.py writes"):
        script.main()
    run("--buckets", "64")
    script.main()
    assert "2 replies" in capsys.readouterr().out  # one loops
    lm = load(tiny_ckpt, adapter=[tmp_path / "n"])
    assert "with n-grams" in repr(lm) and lm.heads is None
    settings = dict(max_new_tokens=12, tree="grams8")
    plain = generate(lm, [[3, 4, 5]], method="ar", max_new_tokens=12)[0]
    assert generate(lm, [[3, 4, 5]], method="ngrams", **settings)[0].tokens == plain.tokens
    with pytest.raises(InputError, match="'grams8' drafts from n-grams, and .* has none; accepted: --adapter"):
        generate(load(tiny_ckpt), [[3, 4, 5]], method="ngrams", **settings)
    save_adapter(tmp_path / "other", table_of([([0], [99, 98])], vocab=100), LoraConfig(), "base")
    with pytest.raises(InputError, match="n-grams of another vocabulary than this model's 97 tokens"):
        load_adapter(tmp_path / "other", lm.cfg)


@pytest.mark.slow
def test_the_shipped_table_drafts_for_its_model(smollm2):
    table = load_adapter(ROOT_DIR / "adapters/smollm2-135m-ngrams", smollm2.cfg)
    lm = dataclasses.replace(smollm2, ngrams=table)
    prompt, settings = ["What is a prime number?"], dict(max_new_tokens=24)
    plain = generate(lm, prompt, method="ar", **settings)[0]
    drafted = generate(lm, prompt, method="ngrams", tree="grams8", **settings)[0]
    assert drafted.tokens == plain.tokens and drafted.forwards < 18


def test_default_trees_take_ngrams_where_there_are_some():
    for backend in ("cpu", "gpu", "tpu"):
        for draft_only in (False, True):
            for batch in (1, 8):
                names = lambda ngrams: tree_set("tr-jacobi", None, backend, draft_only, batch, ngrams).names  # noqa: B023
                assert "ngrams" not in names(False)
                assert ("ngrams" in names(True)) == (backend != "cpu" or batch == 1)  # not measured in batches there
