"""Likelihoods against torch's logits, and what evals/tasks.py reads in an answer, against cases by hand."""

import gzip
import importlib
import json
import sys
from types import ModuleType, SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDENS

from evals import tasks
from msn_jax import LM, InputError, forward, unembed
from msn_jax.io import hf
from msn_jax.score import loglikelihoods, rolling_pairs


@pytest.fixture(scope="module")
def golden():
    folder = GOLDENS / "tiny_mha"
    cfg = hf.read_config(folder)
    params = hf.load_params(cfg, hf.SafetensorsSource(folder))
    return LM("tiny", cfg, params, None, ()), np.load(folder / "logits.npz")


def test_likelihoods_are_those_of_torch(golden):
    lm, file = golden
    ids, logits = file["ids"], file["logits"].astype(np.float64)
    logp = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    cuts = [(0, 1, 4), (0, 12, 13), (1, 5, 40), (1, 30, 38)]  # row, where the continuation begins, where it ends
    expected = [sum(logp[row, i - 1, ids[row, i]] for i in range(at, end)) for row, at, end in cuts]
    pairs = [(ids[row, :at].tolist(), ids[row, at:end].tolist()) for row, at, end in cuts]
    greedy = [*ids[0, :12], int(logits[0, 11].argmax())]
    scores = loglikelihoods(lm, [*pairs, (greedy[:-1], greedy[-1:])], batch_size=3)
    np.testing.assert_allclose([score for score, _ in scores[:4]], expected, atol=1e-3)
    assert scores[4][1] and not any(is_greedy for _, is_greedy in scores[:4])
    with pytest.raises(InputError, match="pair 2 has an empty"):
        loglikelihoods(lm, [([1], [2]), ([1], [])])
    with pytest.raises(InputError, match="the model's context is"):
        loglikelihoods(lm, [([1] * 5000, [2])])


def log_p(lm, ids, start):
    """log p(ids[start:] | ids[:start]) of one pass."""
    hidden, _ = forward(lm.params, lm.cfg, jnp.asarray([ids[:-1]]), jnp.arange(len(ids) - 1)[None])
    logits = np.asarray(unembed(lm.params, lm.cfg, hidden)[0], np.float64)
    scores = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return sum(scores[i - 1, ids[i]] for i in range(start, len(ids)))


@pytest.mark.slow
def test_the_last_token_need_not_fit(golden):
    lm, _ = golden
    most = lm.cfg.max_position
    ids = np.random.default_rng(0).integers(0, lm.cfg.vocab_size, most + 1).tolist()
    scores = loglikelihoods(lm, [(ids[:1], ids[1:]), (ids[:-1], ids[-1:])], batch_size=2)
    np.testing.assert_allclose([s for s, _ in scores], [log_p(lm, ids, 1), log_p(lm, ids, most)], rtol=1e-4)
    with pytest.raises(InputError, match=f"pair 1 has {most + 2} tokens"):
        loglikelihoods(lm, [([1], [2] * (most + 1))])
    with pytest.raises(InputError, match="pair 2 has token ids outside"):
        loglikelihoods(lm, [([1], [2]), ([1], [lm.cfg.vocab_size])])


def test_rolling_pairs():
    pairs = rolling_pairs([1, 2, 3, 4, 5, 6, 7, 8], 0, most=3)
    assert pairs == [([0], [1, 2, 3]), ([3], [4, 5, 6]), ([5, 6], [7, 8])]
    assert rolling_pairs([1, 2], 0, most=3) == [([0], [1, 2])] and rolling_pairs([], 0, most=3) == []


@pytest.fixture
def harness(golden, monkeypatch):
    """HarnessLM over a byte for a token, with BOS and end tokens; of the harness itself only the names."""
    for name in ("lm_eval", "lm_eval.api", "lm_eval.api.instance", "lm_eval.api.model"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["lm_eval"].simple_evaluate = None
    sys.modules["lm_eval.api.instance"].Instance = SimpleNamespace
    sys.modules["lm_eval.api.model"].TemplateLM = type("TemplateLM", (), {})
    monkeypatch.delitem(sys.modules, "evals.lm_eval_model", raising=False)
    module = importlib.import_module("evals.lm_eval_model")
    lm, calls = golden[0], []

    class Words(SimpleNamespace):
        def __call__(self, text, add_special_tokens, verbose):
            return {"input_ids": [3] * add_special_tokens + [5 + ord(c) % 50 for c in text]}

    words = Words(bos_token="<s>", bos_token_id=3, eos_token_id=4)
    monkeypatch.setattr(module, "load", lambda *a, **k: LM("tiny", lm.cfg, lm.params, words, ()))
    answer = lambda lm, ids, **k: calls.append((ids, k)) or [SimpleNamespace(text="ab\ncd")]
    monkeypatch.setattr(module, "generate", answer)
    made = module.HarnessLM("tiny")
    made.cache_hook, made.calls = SimpleNamespace(add_partial=lambda *a: None), calls
    yield made
    sys.modules.pop("evals.lm_eval_model")


@pytest.mark.slow
def test_the_harness_is_given_texts_behind_bos(harness):
    text = "what follows bos"
    ids = [5 + ord(c) % 50 for c in text]
    assert harness.prefix_token_id == 3 and harness.eot_token_id == 4
    (rolling,) = harness.loglikelihood_rolling([SimpleNamespace(args=(text,))])
    assert rolling == pytest.approx(log_p(harness.lm, [3, *ids], 1), abs=1e-3)
    # As many answers as fit: the context is cut off at its front, an answer of the whole context keeps one token of it.
    most = harness.lm.cfg.max_position
    long = np.random.default_rng(1).integers(0, harness.lm.cfg.vocab_size, most + 9).tolist()
    scores = harness._loglikelihood_tokens([(None, long[:9], long[9:]), (None, long[:-1], long[-1:])])
    expected = [log_p(harness.lm, long[8:], 1), log_p(harness.lm, long[8:], most)]
    np.testing.assert_allclose([score for score, _ in scores], expected, rtol=1e-4)
    harness.tokenizer.bos_token_id = None
    assert harness.prefix_token_id == 4


@pytest.mark.parametrize(
    "more", [{}, {"temperature": None}, {"do_sample": False, "temperature": 0.7}, {"temperature": 0}]
)
def test_the_harness_generates_greedily(harness, more):
    ask = lambda settings: harness.generate_until([SimpleNamespace(args=("say", settings))])
    assert ask({"until": ["\n"], "max_gen_toks": 7, **more}) == ["ab"]
    assert harness.calls[0][1]["max_new_tokens"] == 7 and harness.calls[0][0][0][0] == 3
    for wrong in ({"do_sample": True}, {"temperature": 0.7}, {"max_gen_toks": harness.lm.cfg.max_position}):
        with pytest.raises(InputError, match="greedy alone|max_gen_toks"):
            ask(wrong)


def test_answers_are_read_as_people_would():
    read = {"so 1,234.50 dollars.": "1234.5", "-7.0": "-7", "#### 18": "18", "3 and then 12": "12", "none": None}
    assert {text: tasks.last_number(text) for text in read} == read
    assert tasks.last_number("x" + "9" * 5000) == "9" * 5000
    assert tasks.cut("    return 1\n\nprint(f(2))\n", tasks.HUMAN_EVAL_STOPS) == "    return 1\n"
    assert tasks.cut("import re\ndef f(): pass\n\nassert f()", tasks.MBPP_STOPS) == "import re\ndef f(): pass\n"
    # Wilson's interval of 5 of 10, from its formula by hand.
    assert tasks.interval(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)


def test_answers_in_code_are_samples_for_evalplus(tmp_path, monkeypatch):
    rows = {"mbpp.jsonl": {"task_id": 11, "text": "One.", "test_list": ["assert f() == 1"], "test_setup_code": "x = 1"}}
    rows["human_eval.jsonl.gz"] = {"task_id": "HumanEval/0", "prompt": "def f():\n", "test": "", "entry_point": "f"}
    for name, row in rows.items():
        with (gzip.open if name.endswith(".gz") else open)(tmp_path / name, "wt") as file:
            print(json.dumps(row), file=file)
    said, ran = "    return 1\n\nprint(f())\n", []
    monkeypatch.setattr(tasks, "generate", lambda lm, prompts, **_: [SimpleNamespace(text=said) for _ in prompts])
    monkeypatch.setattr(tasks, "run_program", lambda program: ran.append(program) or "passed")
    found = [next(tasks.code(None, tasks.code_prompts(name, tmp_path), 1)) for name in ("humaneval", "mbpp")]
    assert [row["task_id"] for row in found] == ["HumanEval/0", "Mbpp/11"]
    assert [row["solution"] for row in found] == ["def f():\n    return 1\n", "    return 1\n"]
    assert ran == ["def f():\n    return 1\n\n\ncheck(f)\n", "    return 1\n\nx = 1\nassert f() == 1\n"]


def test_choices_are_rated_by_likelihood_and_by_likelihood_a_character(tmp_path, monkeypatch):
    (tmp_path / "mmlu").mkdir()
    (tmp_path / "mmlu" / "b_c_test.csv").write_text('1 + 1?,2,"22, or two",222,2222,B\nLast?,a,b,c,d,D\n')
    (tmp_path / "mmlu" / "a_test.csv").write_text("First?,aa,b,cc,dddd,A\n")
    items = tasks.mmlu_items(tmp_path)
    assert [item["id"] for item in items] == ["a_test/0", "b_c_test/0", "b_c_test/1"]  # in turns
    asked = []

    def likelihoods(lm, pairs, batch_size):
        asked.extend(pairs)
        return [(score, False) for score in (-4, -5, -6, -6, -2, -9, -7, -8, -3, -3, -3, -1)]

    monkeypatch.setattr(tasks, "loglikelihoods", likelihoods)
    monkeypatch.setattr(tasks, "encode", lambda lm, text: text)
    monkeypatch.setattr(tasks, "encode_text", lambda tokenizer, text, special_tokens: text)
    lm = LM("named", None, None, None, ())
    # A character: -2, -5, -3, -1.5; -2, -0.9, -2.3, -2; -3, -3, -3, -1.
    got = [(row["answer"], row["correct"]) for row in tasks.mmlu_cloze(lm, items, 8)]
    assert got == [("dddd", False), ("22, or two", True), ("d", True)]
    assert asked[5] == ("The following are questions about b c.\nQuestion: 1 + 1?\nAnswer:", " 22, or two")
    got = [(row["answer"], row["correct"]) for row in tasks.mmlu(lm, items, 8)]
    assert got == [("A", True), ("A", False), ("D", True)]
    about = "The following is a multiple choice question about b c."
    assert asked[17] == (f"{about}\n\n1 + 1?\nA. 2\nB. 22, or two\nC. 222\nD. 2222\nAnswer:", " B")
