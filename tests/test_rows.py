"""Rows to train on: forms, files, the hub, the standard library."""

import gzip
import itertools

import datasets
import pyarrow.parquet
import pytest
from test_cli import write_rows

from msn_jax import InputError
from msn_jax.config import DataSource
from msn_jax.rows import Unusable, read_rows, to_messages

CONVERSATION = [("user", "hi"), ("assistant", "yo"), ("user", "so"), ("assistant", "ok!")]


def messages(*turns):
    return [{"role": role, "content": content} for role, content in turns]


@pytest.mark.parametrize(
    "row, prompt, reply",
    [
        ({"instruction": "Add.", "response": "3"}, "Add.", "3"),
        ({"instruction": "Add.", "context": "1 2", "response": "3", "id": 7}, "Add.\n\n1 2", "3"),
        ({"instruction": "Add.", "input": "1 2", "output": "3", "response": None}, "Add.\n\n1 2", "3"),
        ({"instruction": "Add.", "context": "1", "input": "2", "output": "3"}, "Add.\n\n1\n\n2", "3"),
        ({"instruction": "Add.", "context": "", "input": " ", "response": "3"}, "Add.", "3"),
        ({"prompt": "Add", "completion": " 3"}, "Add", " 3"),
        ({"prompt": "def f():\n", "canonical_solution": "    return 3\n"}, "def f():\n", "    return 3\n"),
        ({"question": "1+2?", "answer": "3", "messages": None}, "1+2?", "3"),
    ],
)
def test_a_row_with_one_turn(row, prompt, reply):
    assert to_messages(row) == messages(("user", prompt), ("assistant", reply))


def test_a_row_of_messages_keeps_role_and_content():
    row = {"messages": [{"role": "system", "content": "Be brief.", "name": None}, *messages(*CONVERSATION)]}
    assert to_messages(row) == messages(("system", "Be brief."), *CONVERSATION)


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"text": "hello"}, "unknown keys"),
        ({"response": "3"}, "unknown keys"),
        ({"prompt": "Add", "completion": None}, "no response"),
        ({"prompt": "Add", "answer": "3"}, "no response"),
        ({"question": "1+2?", "answer": " \n"}, "no response"),
        ({"messages": messages(("user", "hi"))}, "no response"),
        ({"messages": messages(("user", "hi"), ("assistant", ""), ("user", "?"), ("assistant", "yo"))}, "no response"),
        ({"messages": []}, "no response"),
        ({"prompt": " ", "completion": "3"}, "empty prompt"),
        ({"messages": messages(("assistant", "yo"), ("user", "hi"))}, "empty prompt"),
        ({"question": "1+2?", "answer": 3}, "not text"),
        ({"question": "1+2?", "answer": "\ud800"}, "not text"),
        ({"messages": "hi"}, "not text"),
        ({"messages": ["hi", "yo"]}, "not text"),
        ({"messages": [{"role": "user", "content": ["hi"]}]}, "not text"),
    ],
)
def test_a_row_that_cannot_be_used_gives_a_reason(row, reason):
    with pytest.raises(Unusable) as e:
        to_messages(row)
    assert str(e.value) == reason


def test_all_readable_kinds_give_the_same_rows(tmp_path):
    rows = [{"prompt": "a\u2028b", "completion": "2024-01-01"}, {"prompt": "c", "completion": "d"}]
    plain = write_rows(tmp_path / "a[1].jsonl", rows)
    plain.write_bytes(b"\xef\xbb\xbf" + plain.read_bytes().replace(b"\n", b"\r\n\r\n"))  # as Windows writes it
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes(), mtime=0))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a[2].parquet")
    for path in (plain, tmp_path / "a.jsonl.gz", tmp_path / "a[2].parquet"):
        assert list(read_rows(DataSource(path=str(path)))) == rows


def test_an_unknown_hub_id_gives_one_line(monkeypatch):
    def offline(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(InputError, match=r"nobody/nothing: no such file, and as a hub id: Couldn't reach the Hub$"):
        list(read_rows(DataSource(path="nobody/nothing")))


def test_a_hub_id_may_name_a_subset(monkeypatch):
    calls = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: calls.append((args, kwargs)) or [{"a": 1}])
    assert list(read_rows(DataSource(path="openai/gsm8k:main", split="test"))) == [{"a": 1}]
    assert list(read_rows(DataSource(path="org/name"))) == [{"a": 1}]
    assert calls == [(("openai/gsm8k", "main"), {"split": "test"}), (("org/name", None), {"split": "train"})]


@pytest.mark.slow
def test_the_standard_library_teaches_functions():
    source = DataSource(path="stdlib")
    rows = list(read_rows(source))
    assert len(rows) > 3000
    assert rows[:200] == list(itertools.islice(read_rows(source), 200))
    [row] = [row for row in rows if row["instruction"].startswith("def shuffle(self, x):")]
    assert row["instruction"] == 'def shuffle(self, x):\n    """Shuffle list x in place, and return None."""'
    assert row["response"].startswith("def shuffle(self, x):\n    randbelow = self._randbelow\n")
    assert "Shuffle list" not in row["response"]
    assert len({row["response"] for row in rows}) == len(rows)
