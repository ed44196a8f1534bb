"""Likelihoods against torch's logits, and the judges of evals/tasks.py against cases by hand."""

import numpy as np
import pytest
from conftest import GOLDENS

from evals import tasks
from msn_jax import LM, InputError
from msn_jax.io import hf
from msn_jax.score import loglikelihoods


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


@pytest.mark.parametrize(
    ("source", "outcome"),
    [
        ("assert 1 + 1 == 2", "passed"),
        ("assert 1 + 1 == 3", "failed"),
        ("import sys; sys.exit(99)", "failed"),
        ("import socket; socket.create_connection(('127.0.0.1', 9), 1)", "failed"),
        ("x = bytearray(2 << 30)", "failed"),
        ("open('f', 'w').write('a' * (2 << 20))", "failed"),
        ("import os; assert not os.listdir() and not os.environ.get('HOME')", "passed"),
    ],
)
def test_programs_run_apart(source, outcome):
    assert tasks.run_program(source) == outcome


def test_programs_that_do_not_end_are_stopped(monkeypatch):
    monkeypatch.setattr(tasks, "_CONFINED", tasks._CONFINED.replace('("CPU", 5)', '("CPU", 1)'))
    assert tasks.run_program("while True: pass") == "timed out"
    monkeypatch.setattr(tasks, "PROGRAM_SECONDS", 0.2)
    assert tasks.run_program("import time; time.sleep(60)") == "timed out"


def test_answers_are_read_as_people_would():
    read = {"so 1,234.50 dollars.": "1234.5", "-7.0": "-7", "#### 18": "18", "3 and then 12": "12", "none": None}
    assert {text: tasks.last_number(text) for text in read} == read
    assert tasks.last_number("x" + "9" * 5000) == "9" * 5000
    assert tasks.cut("    return 1\n\nprint(f(2))\n", tasks.HUMAN_EVAL_STOPS) == "    return 1\n"
    assert tasks.cut("import re\ndef f(): pass\n\nassert f()", tasks.MBPP_STOPS) == "import re\ndef f(): pass\n"
    # Wilson's interval of 5 of 10, from its formula by hand.
    assert tasks.interval(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)


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
