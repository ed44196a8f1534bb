"""A conversation at the terminal."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

from msn_jax.config import DecodeConfig
from msn_jax.decode.engine import Engine
from msn_jax.decode.generate import Stream, stream_engine
from msn_jax.decode.prompts import as_chat, encode
from msn_jax.errors import InputError
from msn_jax.io.loading import LM
from msn_jax.io.tokenizer import require_template

HELP = "/reset forgets what was said, /save FILE keeps it, Ctrl-C ends a reply, Ctrl-D or an empty line the chat"

KEPT = 0.75  # of the context's room, when the oldest turns of a chat are dropped


def chat(lm: LM, decode: DecodeConfig, system: str | None = None) -> None:
    """Talk until an empty line. What cannot be answered is said in one line, and what was said before stays.

    system: what the model is told before the first turn.
    """
    require_template(lm.tokenizer)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives `input` line editing and a history)
    start = [] if system is None else [{"role": "system", "content": system}]
    note(HELP)
    with stream_engine(lm, decode, keep=True) as engine:
        turns(engine, decode, start)


def turns(engine: Engine, decode: DecodeConfig, start: list[dict]) -> None:
    """Questions and replies until an empty line. start: messages before them, which are never forgotten."""
    lm, said = engine.lm, list(start)
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            text = ""
        except KeyboardInterrupt:
            print()
            note(HELP)
            continue
        except UnicodeDecodeError:
            note("that was not valid UTF-8")
            continue
        if not text:
            return
        if text.startswith("/"):
            said = command(text, said, start)
            continue
        try:
            asked, ids = fitting(lm, [*said, *as_chat(text)], decode.max_new_tokens, keep=len(start))
            if len(asked) <= len(said):
                note(f"the context is full: the oldest {len(said) + 1 - len(asked)} messages are forgotten")
            said = [*asked, {"role": "assistant", "content": reply(engine, ids, decode)}]
        except InputError as e:
            note(str(e))


def note(text: str) -> None:
    """A line that is not the model's."""
    print(f"[{text}]", file=sys.stderr, flush=True)


def command(text: str, said: list[dict], start: list[dict]) -> list[dict]:
    """Do what a line that begins with a slash asks for; the conversation after it."""
    name, _, argument = text.partition(" ")
    if name == "/reset":
        note("forgotten")
        return list(start)
    if name == "/save" and argument:
        try:
            with Path(argument).open("x", encoding="utf-8") as file:  # nothing is overwritten
                file.write(json.dumps({"messages": said}, ensure_ascii=False) + "\n")
            note(f"wrote {argument}")
        except OSError as e:
            note(f"{argument}: cannot be written ({e.strerror})")
        return said
    note(HELP)
    return said


def fitting(lm: LM, messages: list[dict], new_tokens: int, keep: int) -> tuple[list[dict], list[int]]:
    """The conversation and its ids, without its oldest turns where they leave no room for `new_tokens`.

    What stays then is at most KEPT of the room: all that stays is read anew, so it should not happen at every turn.
    keep: messages at the beginning that stay. Raises InputError where the last message alone does not fit.
    """
    first, rest = messages[:keep], messages[keep:]
    room = lm.context - new_tokens
    enough = room
    while True:
        ids = encode(lm, [*first, *rest])
        if len(ids) <= enough or (len(ids) <= room and len(rest) == 1):
            return [*first, *rest], ids
        enough = KEPT * room
        if len(rest) == 1:
            raise InputError(f"this has {len(ids)} tokens; with {new_tokens} new ones the context is {lm.context}")
        rest = rest[2:]  # a question and its reply


def reply(engine: Engine, ids: list[int], decode: DecodeConfig) -> str:
    """Print an answer as it comes; its text. Ctrl-C ends it where it is."""
    answer = Stream(engine.lm, ids, decode, engine)
    try:
        for piece in answer:
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        answer.close()
        print()
        note("interrupted")
        return answer.text
    print()
    result = answer.result
    read = f"prefill_tokens {answer.request.prefill_tokens} of {result.prompt_tokens}"
    note(f"{len(result.tokens)} tokens, {result.mat:.2f} a pass, {result.tokens_per_s:.1f} tokens/s; {read}")
    return answer.text
