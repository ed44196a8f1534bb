"""EAGLE as a source of drafts: its tree by the published rule in NumPy, and text that stays what it is."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import decode_all
from test_eagle import entry64, joined64, logits64, random_head
from test_source import PROMPTS

from msn_jax import DecodeConfig, InputError, forward
from msn_jax.decode import TREE_SETS, TreeSet, init_state, loop, prefill, run
from msn_jax.decode import engine as engine_module
from msn_jax.decode.engine import Engine, trees_of
from msn_jax.decode.request import Request
from msn_jax.decode.source import ask, fill
from msn_jax.decode.sources import sources_of, taps_of, weights_of
from msn_jax.decode.sources.eagle import Eagle
from msn_jax.decode.tree import NOISE, RETRIEVAL, ROOT, TreeSpec, branching
from msn_jax.eagle import drafter_of, taps
from msn_jax.plan import cache_copies

WIDE = branching("wide", 0, {(): 4, (0,): 2, (1,): 2, (0, 0): 2, (0, 1): 1, (0, 0, 0): 1}, kind="eagle")
UNDER = TreeSpec("under", (-1, 0, 1, 2, 3, 0, 4), (("root", 0), *[(RETRIEVAL, 0)] * 3, *[("eagle", 1)] * 3))


def drawn_by(spec):
    return TreeSet(spec.name, (spec,), (0,), sources=(Eagle(jnp.float32, jnp.float32),))


@pytest.fixture(scope="module")
def own(tiny):
    cfg, params = tiny
    return {"eagle": drafter_of(random_head(cfg), params, cfg, jnp.float32)}


def drafted_by_hand(tree, text, given, tiny, features):
    """The tree's tokens after a text by EAGLE's rule; those of other sources are `given`, int[M]."""
    cfg, params = tiny
    head = random_head(cfg)
    seen, out, tokens = [], None, [text[-1], *[-1] * (tree.size - 1)]
    for t, token in enumerate(text[1:]):
        out, kv = entry64(head, cfg, params, token, joined64(head, cfg, features[t]), t, seen)
        seen.append(kv)
    outs, kept = {0: out}, {0: []}
    for node in range(1, tree.size):
        (kind, rank), parent = tree.wants[node][0], tree.parents[node]
        if kind == "eagle" and outs.get(parent) is not None:
            best = np.argsort(-logits64(head, cfg, params, outs[parent]), kind="stable")[rank]
            tokens[node] = int(head.vocabulary[best])
        elif kind != "eagle":
            tokens[node] = given[node]
        if tokens[node] >= 0 and outs.get(parent) is not None:
            place = len(text) - 2 + tree.depth[node]
            above = [*seen, *kept[parent]]
            outs[node], kv = entry64(head, cfg, params, tokens[node], outs[parent], place, above)
            kept[node] = [*kept[parent], kv]
    return tokens


@pytest.mark.slow
@pytest.mark.parametrize("spec", [WIDE, UNDER], ids=lambda spec: spec.name)
def test_drafts_are_those_of_the_published_rule(tiny, own, spec):
    """Pass by pass, in rows of several lengths, one of a single token; prompts longer than what one pass reads."""
    cfg, params = tiny
    trees, rng = drawn_by(spec), np.random.default_rng(1)
    repeated = rng.integers(0, 61, 9).tolist()
    prompts = [[7], [*repeated, *repeated[:5]], rng.integers(0, 61, 90).tolist()]
    state = prefill(
        params, init_state(cfg, trees, prompts, DecodeConfig(max_new_tokens=30), (), slots=256), cfg=cfg, chunk=16
    )
    features = jax.jit(lambda tokens: forward(params, cfg, tokens, jnp.arange(160)[None], taps=taps(cfg))[2])

    @jax.jit
    def drafted(state):
        text, sources = loop.text_of(state), sources_of(trees)
        weights = weights_of(sources, params, cfg, own)
        carry = {
            s.name: s.read(weights[s.name], state.drafts[s.name], text, ~state.done, ask(trees, s)) for s in sources
        }
        begun = {s.name: s.begin(weights[s.name], carry[s.name], text, ask(trees, s))[0] for s in sources}
        return fill(spec, sources, weights, carry, begun, text.root)

    right = 0
    for _ in range(6):
        tokens, lasts = np.asarray(drafted(state)), np.asarray(state.cache.length)
        of_rows = np.float64(features(state.tokens[:, :160]))
        for row, last in enumerate(lasts):
            text = np.asarray(state.tokens)[row, : last + 1].tolist()
            expected = drafted_by_hand(spec, text, tokens[row], tiny, of_rows[row])
            assert tokens[row].tolist() == expected
            right += sum(token >= 0 for token in expected[1:])
        state, _ = run(params, state, 1, own, cfg=cfg, trees=trees)
    assert right > 6 * spec.size and state.accepted.max() > 1


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.8, "seed": 3}], ids=["greedy", "sampled"])
def test_a_head_changes_no_token(tiny, own, settings, batch):
    cfg, params = tiny
    settings, prompts = {"max_new_tokens": 40, **settings}, PROMPTS[-batch:]
    plain = decode_all(params, cfg, TREE_SETS["root"], prompts, **settings)[1]
    # Alone, and beside retrieval, under it, with probes of another source.
    wants = ((ROOT, 0), (RETRIEVAL, 0), (("eagle", 0), ("eagle", 1)), ("eagle", 0), ("jacobi", 0), (NOISE, 0))
    for spec in (WIDE, TreeSpec("mixed", (-1, 0, 0, 1, 0, 0), wants)):
        assert decode_all(params, cfg, drawn_by(spec), prompts, drafter=own, **settings)[1] == plain


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 4])
def test_the_loop_copies_no_cache(tiny, own, batch):
    cfg, params = tiny
    trees = drawn_by(WIDE)
    state = init_state(cfg, trees, [[1, 2]] * batch, DecodeConfig(max_new_tokens=9), (), slots=256)
    hlo = loop.run.lower(params, state, 5, own, cfg=cfg, trees=trees).compile().as_text()
    for shape in ((batch, cfg.kv_heads, 256, cfg.head_dim), (batch, 1, 256, 3 * cfg.embed)):
        assert f"[{','.join(map(str, shape))}]" in hlo and cache_copies(hlo, shape) == []


@pytest.mark.slow
def test_rows_that_take_turns_draft_as_each_alone(tiny_lm, monkeypatch):
    """Prompts that begin like what a row has read, in a cache that grows and shrinks: features stay with their text."""
    monkeypatch.setattr(engine_module, "SMALL", 0)
    monkeypatch.setattr(engine_module, "AHEAD", 16)
    monkeypatch.setattr(loop, "bucket", lambda slots: -(-slots // 96) * 96)
    head = drafter_of(random_head(tiny_lm.cfg), tiny_lm.params, tiny_lm.cfg, jnp.float32)
    lm = dataclasses.replace(tiny_lm, stop_ids=(), eagle=head)
    text = np.random.default_rng(5).integers(3, 97, 140).tolist()
    asked = [(text[:3], 61), (text[:130], 21), ([*text[:100], 9, 9], 21), (text[7:9], 3), (text[50:116], 21)]

    def decoded(rows, prompts):
        requests, sizes = [Request(prompt, DecodeConfig(max_new_tokens=new)) for prompt, new in prompts], []
        with Engine(lm, method="eagle", tree="eagle60", batch_size=rows, cycles=3, keep=True) as engine:
            for request in requests:
                engine.submit(request)
            while not all(request.finished for request in requests):
                engine.step()
                sizes.append(engine.slots)
        return requests, np.diff(sizes)

    together, steps = decoded(2, asked)
    assert (steps > 0).any() and (steps < 0).any()
    assert sum(r.prefill_tokens for r in together) < sum(len(r.prompt) for r in together) - 60
    for request, alone in zip(together, [decoded(1, [one])[0][0] for one in asked], strict=True):
        assert (request.tokens, request.accepted) == (alone.tokens, alone.accepted)
    assert max(max(r.accepted) for r in together) > 1


def test_what_an_eagle_tree_needs(tiny_lm):
    with pytest.raises(InputError, match="'eagle5' drafts by EAGLE heads, and .* has none; accepted: --adapter with"):
        trees_of(tiny_lm, "eagle", None, 1)

    class Other(Eagle):
        name = "other"
        taps = lambda self, cfg: (0,)

    assert taps_of(TREE_SETS["chain4"], tiny_lm.cfg) == ()
    both = TreeSpec("both", (-1, 0, 0), (("root", 0), ("eagle", 0), ("other", 0)))
    trees = TreeSet("both", (both,), (0,), sources=(Eagle(None, None), Other(None, None)))
    with pytest.raises(InputError, match="'both': its sources read different layers"):
        taps_of(trees, tiny_lm.cfg)
