"""The chat: what it remembers, forgets, and survives."""

import json
import re

import pytest

from msn_jax import DecodeConfig, InputError, chat, generate
from msn_jax.decode.engine import Engine
from msn_jax.io.tokenizer import require_template

pytestmark = pytest.mark.slow


@pytest.fixture
def talk(tiny_lm, monkeypatch, capsys):
    """Type lines at a chat; returns (conversations that the model was asked, what stderr says)."""

    def call(*typed, system=None, new=4, lm=tiny_lm):
        asked, encode, lines = [], chat.encode, iter([*typed, ""])

        def line(_):
            said = next(lines)
            if isinstance(said, BaseException):
                raise said
            return said

        monkeypatch.setattr("builtins.input", line)
        monkeypatch.setattr(chat, "encode", lambda lm, messages: asked.append(messages) or encode(lm, messages))
        chat.chat(lm, DecodeConfig(max_new_tokens=new), system)
        monkeypatch.setattr(chat, "encode", encode)
        return asked, capsys.readouterr().err

    return call


def roles(messages):
    return [m["role"] for m in messages]


def test_a_chat_can_be_reset_and_saved(talk, tmp_path):
    path = tmp_path / "said.jsonl"
    asked, err = talk("ab", "qc", f"/save {path}", f"/save {path}", "/reset", "cd", "/what", system="be kind")
    assert [roles(m) for m in asked] == [
        ["system", "user"],
        ["system", "user", "assistant", "user"],
        ["system", "user"],
    ]
    assert all(m[0]["content"] == "be kind" for m in asked)
    saved = json.loads(path.read_text())["messages"]
    assert roles(saved) == ["system", "user", "assistant", "user", "assistant"]
    assert "cannot be written (File exists)" in err and err.count(chat.HELP) == 2


def test_ctrl_c_ends_a_reply_and_not_the_chat(talk, monkeypatch):
    pieces = iter(["12", KeyboardInterrupt()])

    class Interrupted:
        text = ""

        def __init__(self, *_):
            pass

        def __iter__(self):
            return self

        def close(self):
            pass

        def __next__(self):
            piece = next(pieces)
            if isinstance(piece, BaseException):
                raise piece
            self.text += piece
            return piece

    with monkeypatch.context() as patch:
        patch.setattr(chat, "Stream", Interrupted)
        pieces = iter(["12", KeyboardInterrupt(), "3", KeyboardInterrupt()])
        asked, err = talk("ab", KeyboardInterrupt(), "qc")
    assert [m["content"] for m in asked[1]] == ["ab", "12", "qc"] and err.count("interrupted") == 2


@pytest.mark.parametrize("when", ["before", "after"])
def test_ctrl_c_while_a_prompt_is_read_leaves_nothing_half_read(talk, tiny_lm, monkeypatch, when):
    """The model answers the next question as it would answer it alone."""
    reads, read = [], Engine._read_chunk

    def interrupted(engine, state, row, at):
        reads.append(at)
        if len(reads) == 2 and when == "before":
            raise KeyboardInterrupt
        state = read(engine, state, row, at)
        if len(reads) == 2:  # after the old state was given away
            raise KeyboardInterrupt
        return state

    generate(tiny_lm, ["ab"], max_new_tokens=4)  # what compiles reads too
    monkeypatch.setattr(Engine, "_read_chunk", interrupted)
    asked, err = talk("a" * 100, "bcd", "efg", new=9)
    assert err.count("interrupted") == 1 and [m["content"] for m in asked[1]][1:] == ["", "bcd"]
    monkeypatch.undo()
    (plain,) = generate(tiny_lm, [asked[1]], method="ar", max_new_tokens=9)
    assert asked[2][3]["content"] == plain.text


def test_a_full_context_forgets_its_oldest_turns(talk, tiny_lm):
    room = tiny_lm.cfg.max_position
    long = "a" * (room // 3)
    asked, err = talk(long, long, long, "ab", system="be kind")
    assert err.count("the context is full: the oldest") >= 1
    for messages in asked:
        assert messages[0] == {"role": "system", "content": "be kind"}
    assert asked[-1][-1] == {"role": "user", "content": "ab"} and roles(asked[-1])[1::2] == ["user"] * (
        len(asked[-1]) // 2
    )
    # What cannot fit by itself is refused, and what was said stays.
    asked, err = talk("ab", "b" * room, "qc")
    assert f"the context is {room}" in err and [m["content"] for m in asked[-1]][::2] == ["ab", "qc"]


def test_a_turn_reads_only_what_is_new(talk, tiny_lm):
    typed = [f"turn {i}{'xyz' * (i % 4)}" for i in range(30)]
    asked, err = talk(*typed, system="be kind", new=12)
    told = re.findall(r"prefill_tokens (\d+) of (\d+)", err)
    read, whole = ([int(n) for n in column] for column in zip(*told, strict=True))
    forgotten = err.count("the context is full")
    assert len(read) == 30 and 1 <= forgotten <= 10
    assert read[0] == whole[0] - 1
    # The last token of a prompt is the first root: what is new begins with the last one of the reply before.
    grown = [i for i in range(1, 30) if whole[i] > whole[i - 1]]
    assert len(grown) == 29 - forgotten
    assert all(read[i] <= whole[i] - whole[i - 1] for i in grown)
    # What was too long was asked for as well: the last of each turn was answered, and the next one tells how.
    answered = [next(m for m in asked[::-1] if m[-1]["content"] == text) for text in typed]
    replies = [messages[-2]["content"] for messages in answered[1:]]
    plain = generate(tiny_lm, answered[:-1], method="ar", max_new_tokens=12)
    assert replies == [r.text for r in plain]


def test_a_model_without_a_template_cannot_chat(tiny_lm):
    class NoTemplate:
        chat_template = None

    with pytest.raises(InputError, match="no chat template"):
        require_template(NoTemplate())
