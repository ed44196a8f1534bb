"""A smaller model that drafts: by its rule in plain Python, over prompts of any length, in rows that come and go."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import decode_all
from test_source import PROMPTS

import decode
from msn_jax import DecodeConfig, InputError, forward, generate, init, load, unembed
from msn_jax.decode import TREE_SETS, TreeSet, init_state, loop, tree_set
from msn_jax.decode import engine as engine_module
from msn_jax.decode.engine import Engine, trees_of
from msn_jax.decode.request import Request
from msn_jax.decode.sources.draft_model import DraftModel
from msn_jax.decode.tree import RETRIEVAL, ROOT, TreeSpec, branching
from msn_jax.io.loading import draft_of
from msn_jax.plan import cache_copies

NEW = 40
WIDE = branching("wide", 0, {(): 3, (0,): 2, (1,): 1, (0, 0): 2}, kind="draft-model")


def drawn_by(small, spec):
    cfg, _ = small
    return TreeSet(spec.name, (spec,), (0,), sources=(DraftModel(cfg, jnp.float32, jnp.float32),))


@pytest.fixture(scope="module")
def small(one_layer):
    """(cfg, params): the model itself, a little off, so that it is right at times."""
    cfg, params = one_layer
    return cfg, jax.tree.map(lambda a, b: a + 0.2 * b, params, jax.jit(init, static_argnums=1)(jax.random.key(7), cfg))


def last_logits(cfg, params):
    """A function of a text: the logits [V] after it, of the whole text without a cache."""

    @jax.jit
    def run(tokens, last):
        hidden, _ = forward(params, cfg, tokens, jnp.arange(tokens.shape[1])[None])
        return unembed(params, cfg, hidden)[0, last]

    return lambda text: np.asarray(run(jnp.asarray([text + [0] * (160 - len(text))], jnp.int32), len(text) - 1))


@pytest.mark.slow
def test_drafts_are_the_best_of_the_smaller_model_after_what_stands_above(one_layer, small):
    model, draft = last_logits(*one_layer), last_logits(*small)
    for prompt in PROMPTS[1:]:
        text, count, accepted = prompt, NEW, []
        while count:
            paths = {0: []}
            for node in range(1, WIDE.size):
                if (above := paths.get(WIDE.parents[node])) is not None:
                    said = int(np.argsort(-draft(text + above), kind="stable")[WIDE.wants[node][0][1]])
                    if said == model(text + above).argmax():
                        paths[node] = [*above, said]
            hit = max(paths.values(), key=len)
            emitted = [*hit, int(model(text + hit).argmax())][:count]
            accepted.append(len(emitted))
            text, count = text + emitted, count - len(emitted)
        own = {"draft-model": small[1]}
        state, _ = decode_all(*reversed(one_layer), drawn_by(small, WIDE), [prompt], drafter=own, max_new_tokens=NEW)
        assert state.accepted[0, : int(state.forwards[0])].tolist() == accepted
        assert max(accepted) > 1 and len(accepted) > NEW // 4


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.8, "seed": 3}], ids=["greedy", "sampled"])
def test_a_draft_model_changes_no_token(one_layer, small, settings, batch):
    cfg, params = one_layer
    settings, prompts = {"max_new_tokens": NEW, **settings}, PROMPTS[-batch:]
    plain = decode_all(params, cfg, TREE_SETS["root"], prompts, **settings)[1]
    # Beside another source, and under what that one found.
    sources = ((ROOT, 0), (RETRIEVAL, 0), (("draft-model", 0), ("draft-model", 1)), ("draft-model", 0))
    mixed = drawn_by(small, TreeSpec("mixed", (-1, 0, 0, 1), sources))
    own = {"draft-model": small[1]}
    assert decode_all(params, cfg, mixed, prompts, drafter=own, **settings)[1] == plain


@pytest.mark.slow
def test_all_that_the_model_itself_drafts_is_kept(tiny_lm, monkeypatch):
    """In rows that are refilled, while the cache grows and shrinks: one key in a wrong place would lose a draft."""
    monkeypatch.setattr(engine_module, "SMALL", 0)
    monkeypatch.setattr(engine_module, "AHEAD", 16)
    monkeypatch.setattr(loop, "bucket", lambda slots: -(-slots // 96) * 96)
    one = draft_of(tiny_lm, 1, jnp.float32)
    lm = dataclasses.replace(one, draft=one, stop_ids=())
    rng = np.random.default_rng(2)
    asked = [
        Request(rng.integers(3, 97, n).tolist(), DecodeConfig(max_new_tokens=new))
        for n, new in ((3, 61), (130, 41), (5, 3), (66, 21))
    ]
    sizes = []
    with Engine(lm, method="draft-model", tree="model4", batch_size=2, cycles=3, keep=True) as engine:
        for request in asked:
            engine.submit(request)
        while not all(request.finished for request in asked):
            engine.step()
            sizes.append(engine.slots)
    steps = np.diff(sizes)
    assert (steps > 0).any() and (steps < 0).any()
    for request in asked:
        left = len(request.tokens)
        assert request.accepted == [4] * (left // 4) + [left % 4] * (left % 4 > 0)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 4])
def test_the_loop_copies_neither_cache(one_layer, small, batch):
    cfg, params = one_layer
    small = dataclasses.replace(small[0], kv_heads=1, heads=2, head_dim=16), None
    own = {"draft-model": jax.eval_shape(partial(init, cfg=small[0]), jax.random.key(0))}
    trees = drawn_by(small, WIDE)
    state = init_state(cfg, trees, [[1, 2]] * batch, DecodeConfig(max_new_tokens=9), (), slots=256)
    hlo = loop.run.lower(params, state, 5, own, cfg=cfg, trees=trees).compile().as_text()
    for shape in ((batch, cfg.kv_heads, 256, cfg.head_dim), (batch, 1, 256, 16)):
        assert f"[{','.join(map(str, shape))}]" in hlo and cache_copies(hlo, shape) == []


@pytest.mark.slow
def test_a_draft_model_is_loaded_beside_its_model(tiny_ckpt, smollm2_text):
    lm = load(tiny_ckpt, draft=1)
    assert len(lm.draft.params.layers) == lm.draft.cfg.layers == 1 and "drafts by its first 1 layers" in repr(lm)
    assert load(tiny_ckpt, draft=tiny_ckpt).draft.cfg == lm.cfg
    short = dataclasses.replace(lm.draft, cfg=dataclasses.replace(lm.cfg, max_position=20, layers=1))
    with pytest.raises(InputError, match="prompt 1 has 9 tokens, with 12 new ones 21; the model's context is 20"):
        generate(dataclasses.replace(lm, draft=short), [[3] * 9], method="draft-model", max_new_tokens=12)
    with pytest.raises(
        InputError, match="'model4' drafts with a smaller model, and .* has none; accepted: --draft_ckpt"
    ):
        trees_of(load(tiny_ckpt), "draft-model", None, 1)
    with pytest.raises(InputError, match="'model4' names the source 'draft-model'; accepted: with such a Source"):
        init_state(lm.cfg, tree_set("draft-model"), [[3]], DecodeConfig(max_new_tokens=9), (), slots=256)
    other = dataclasses.replace(lm, cfg=dataclasses.replace(lm.cfg, vocab_size=98))
    with pytest.raises(InputError, match="a vocabulary of 97 tokens; accepted: that of .*, of 98"):
        draft_of(other, tiny_ckpt, jnp.float32)
    with pytest.raises(InputError, match="another tokenizer; accepted: that of"):
        draft_of(dataclasses.replace(lm, tokenizer=smollm2_text.tokenizer), tiny_ckpt, jnp.float32)


@pytest.mark.slow
def test_decode_py_drafts_with_a_smaller_model(tiny_ckpt, capsys):
    ask = lambda *flags: decode.main(["--ckpt", str(tiny_ckpt), "--prompt", "ab", "--max_new_tokens", "9", *flags])
    ask("--method", "draft-model", "--draft_layers", "1", "--compare")
    assert "tokens identical: yes" in capsys.readouterr().out
    for flags, said in (
        (("--method", "draft-model", "--draft_layers", "9"), "--draft_layers 9: accepted: 1 to 3, the layers of"),
        (("--method", "draft-model", "--draft_ckpt", "nowhere"), "--draft_ckpt nowhere: no such file"),
        (("--draft_layers", "1"), "--draft_layers does nothing with --method tr-jacobi; accepted: --method draft-mod"),
    ):
        with pytest.raises(InputError, match=said):
            ask(*flags)
