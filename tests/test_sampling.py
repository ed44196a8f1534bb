"""What a request may ask beside its tokens: a repetition penalty, stop texts, log-probabilities."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msn_jax import DecodeConfig, InputError, forward, generate, stream, unembed
from msn_jax.decode.stops import tokens_until_stop

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(3, 97, n).tolist() for n in (1, 12, 40, 7, 90)]
ARMS = [("tr-jacobi", "chain4"), ("tr-jacobi", "msn69"), ("recycling", None), ("lookup", None)]
REPEATS = {"repetition_penalty": 1.3}
DRAWN = {"temperature": 0.9, "seed": 3}
NEW = 40


def tokens(results):
    return [r.tokens for r in results]


@pytest.fixture(scope="module")
def logits_after(tiny_lm):
    """A function: the logits float64[T, V] after each token of a text, without a cache or a loop."""

    @jax.jit
    def whole(ids):
        return unembed(tiny_lm.params, tiny_lm.cfg, forward(tiny_lm.params, tiny_lm.cfg, ids, jnp.arange(256)[None])[0])

    return lambda ids: np.asarray(whole(jnp.asarray([ids + [0] * (256 - len(ids))])), np.float64)[0, : len(ids)]


@pytest.mark.parametrize("method, tree", [("ar", None), *ARMS])
def test_a_penalty_knows_the_tokens_above_each_node(tiny_lm, logits_after, method, tree):
    """Greedy, by the published rule on the whole text so far; then drawn, as `ar` draws."""
    results = generate(tiny_lm, PROMPTS, method=method, tree=tree, max_new_tokens=NEW, batch_size=2, **REPEATS)
    for prompt, result in zip(PROMPTS, results, strict=True):
        for n, token in enumerate(result.tokens):
            text = prompt + result.tokens[:n]
            scores = logits_after(text)[-1]
            seen = list(set(text))
            scores[seen] = np.where(scores[seen] < 0, scores[seen] * 1.3, scores[seen] / 1.3)
            assert scores[token] >= scores.max() - 1e-4
    plain = generate(tiny_lm, PROMPTS, method=method, tree=tree, max_new_tokens=NEW, batch_size=2)
    assert tokens(plain) != tokens(results)
    settings = dict(max_new_tokens=NEW, batch_size=2, **DRAWN, **REPEATS, min_p=0.02)
    by = lambda method, tree: tokens(generate(tiny_lm, PROMPTS, method=method, tree=tree, **settings))
    assert by(method, tree) == by("ar", None)


@pytest.mark.parametrize("method, tree", [("ar", None), *ARMS[:2]])
@pytest.mark.parametrize("settings", [{}, DRAWN], ids=["greedy", "drawn"])
def test_a_reply_ends_before_its_stop_text(tiny_lm, method, tree, settings):
    whole = generate(tiny_lm, PROMPTS, method="ar", max_new_tokens=NEW, **settings)
    stops = [result.text[9 + i : 11 + i] for i, result in enumerate(whole)]  # a token is one character: across two
    settings = dict(method=method, tree=tree, max_new_tokens=NEW, **settings, stop=[*stops, "never so"])
    for rows in (1, 3):
        for result, before in zip(generate(tiny_lm, PROMPTS, batch_size=rows, **settings), whole, strict=True):
            ends = [before.text.index(stop) for stop in stops if stop in before.text]
            assert result.text == before.text[: min(ends)] and result.finish_reason == "stop"
            known = len(result.tokens)
            assert result.tokens == before.tokens[:known]
            assert any(before.text[: min(ends) + 2].endswith(stop) for stop in stops)
            assert tokens_until_stop(lambda ids: "".join(chr(i + 30) for i in ids), result.tokens, 0, stops) == known
            assert sum(result.accepted) == known and len(result.accepted) == result.forwards
    # Without a batch a row's number is 0: that of the first prompt.
    answer = stream(tiny_lm, PROMPTS[0], **settings)
    assert "".join(answer) == answer.text == answer.result.text == result_text(whole[0], stops)


def result_text(whole, stops):
    return whole.text[: min(whole.text.index(stop) for stop in stops if stop in whole.text)]


def test_impossible_stop_texts_are_refused(tiny_lm):
    for stop in ([""], [3], 3):
        with pytest.raises(InputError, match="stop = .* is not possible; accepted: a list"):
            generate(tiny_lm, PROMPTS, stop=stop)


@pytest.mark.parametrize("method, tree", [("ar", None), *ARMS[:2]])
def test_log_probabilities_are_those_of_the_model(tiny_lm, logits_after, method, tree):
    asked = dict(max_new_tokens=100, **DRAWN, top_p=0.9, logprobs=3)
    results = generate(tiny_lm, PROMPTS, method=method, tree=tree, batch_size=2, **asked)
    assert tokens(results) == tokens(generate(tiny_lm, PROMPTS, method="ar", max_new_tokens=100, **DRAWN, top_p=0.9))
    for prompt, result in zip(PROMPTS, results, strict=True):
        logits = logits_after(prompt + result.tokens)[len(prompt) - 1 : -1]
        expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        np.testing.assert_allclose(result.logprobs, expected[np.arange(len(logits)), result.tokens], atol=1e-4)
        ids, top = (np.array(x) for x in zip(*(zip(*pairs, strict=True) for pairs in result.top_logprobs), strict=True))
        np.testing.assert_allclose(top, -np.sort(-expected, axis=1)[:, :3], atol=1e-4)
        np.testing.assert_allclose(np.take_along_axis(expected, ids, axis=1), top, atol=1e-4)
        assert result.row()["logprobs"] == result.logprobs
    (bare,) = generate(tiny_lm, PROMPTS[:1], max_new_tokens=3)
    assert bare.logprobs is None and not any(name.endswith("logprobs") for name in bare.row())


def test_log_probabilities_end_where_the_reply_does(tiny_lm):
    (whole,) = generate(tiny_lm, PROMPTS[1:2], method="ar", max_new_tokens=NEW, logprobs=0)
    stop = whole.text[20:22]
    answer = stream(tiny_lm, PROMPTS[1], tree="chain4", max_new_tokens=NEW, logprobs=2, stop=stop)
    assert "".join(answer) == whole.text[: whole.text.index(stop)]
    result = answer.result
    assert len(result.logprobs) == len(result.top_logprobs) == len(result.tokens) < NEW
    np.testing.assert_allclose(result.logprobs, whole.logprobs[: len(result.tokens)], atol=1e-4)
    assert dataclasses.asdict(result)["finish_reason"] == "stop"


def test_settings_have_bounds():
    for wrong in ({"min_p": 1.5}, {"repetition_penalty": 0}, {"logprobs": 21}, {"logprobs": -1}):
        with pytest.raises(InputError, match=f"{next(iter(wrong))} = .* is not possible"):
            DecodeConfig(**wrong)
