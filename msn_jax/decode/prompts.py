"""Prompts: what a caller or a file gives, as token ids. Raises InputError for all that cannot be decoded."""

from __future__ import annotations

import json
import operator
import reprlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from msn_jax.errors import InputError
from msn_jax.io.loading import LM
from msn_jax.io.tokenizer import encode_chat, encode_text


def encode(lm: LM, prompt: str | Sequence, tools: list[dict] | None = None) -> list[int]:
    """Token ids of a raw text, of a conversation (a list of role/content dicts), or of a list of ids as it is.

    tools: those that a conversation may call, as its chat template takes them.
    Raises InputError for anything else, and for a prompt without a token.
    """
    accepted = "accepted: a text, a list of messages {role, content}, or a list of token ids"
    if isinstance(prompt, str):
        ids = encode_text(lm.tokenizer, prompt)
    elif isinstance(prompt, Mapping):
        raise InputError(f"a prompt is one {'message' if 'role' in prompt else 'dict'}; {accepted}")
    elif not hasattr(prompt, "__len__") or not hasattr(prompt, "__getitem__") or isinstance(prompt, bytes):
        raise InputError(f"a prompt is {shown(prompt)}; {accepted}")
    elif len(prompt) and isinstance(prompt[0], Mapping):
        check_messages(prompt)
        ids = encode_chat(lm.tokenizer, prompt, tools)
    else:
        ids = [_token_id(lm, i, accepted) for i in prompt]
    if max(ids, default=0) >= lm.cfg.vocab_size:
        raise InputError(f"a prompt has the token id {max(ids)}; accepted: 0 to {lm.cfg.vocab_size - 1}")
    if not ids:
        raise InputError("the prompt is empty; accepted: at least one token")
    return ids


def check_messages(messages: Sequence) -> None:
    """Raise InputError for a conversation that no chat template can render."""
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InputError(f"a message is {reprlib.repr(message)}; accepted: {{role, content}}, both texts")
        # A message that calls tools may say nothing.
        silent = message.get("content") is None and message.get("tool_calls")
        if not silent and not isinstance(message.get("content"), str):
            raise InputError(f"the content of a message is {reprlib.repr(message.get('content'))}; accepted: a text")


def _token_id(lm: LM, value: Any, accepted: str) -> int:
    try:
        i = operator.index(value)
    except TypeError as e:
        raise InputError(f"a prompt has {shown(value)} where a token id belongs; {accepted}") from e
    if isinstance(value, bool) or not 0 <= i < lm.cfg.vocab_size:
        raise InputError(f"a prompt has the token id {value!r}; accepted: 0 to {lm.cfg.vocab_size - 1}")
    return i


def shown(value: Any) -> str:
    """A value of the wrong kind, in a few words."""
    return "None" if value is None else f"the {type(value).__name__} {reprlib.repr(value)}"


class Row(NamedTuple):
    """A prompt of a file."""

    id: Any
    prompt: str | list
    tools: list[dict] | None = None


def read_prompts(path: str, chat_template: str) -> list[Row]:
    """The rows of a JSONL file; "-" is stdin. chat_template: of --chat_template.

    Raises InputError with the line number of a row that cannot be used.
    """
    try:
        lines = (sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()).splitlines()
    except OSError as e:
        raise InputError(f"--prompts {path}: {e.strerror}") from e
    name, rows = "stdin" if path == "-" else path, []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{name} line {number}"
        try:
            row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))  # Windows begins a file with a mark
            json.dumps(row, ensure_ascii=False).encode("utf-8")  # JSON can spell half a character
        except json.JSONDecodeError as e:
            raise InputError(f"{where}: not valid JSON ({e.msg}, column {e.colno})") from e
        except UnicodeError as e:
            raise InputError(f"{where}: not valid UTF-8 ({e.reason} at {e.start})") from e
        except (ValueError, RecursionError) as e:
            raise InputError(f"{where}: not JSON that can be read ({e})") from e
        rows.append(read_row(row, where, chat_template, len(rows)))
    if not rows:
        raise InputError(f"{name}: no prompts in it")
    return rows


def read_row(row: object, where: str, chat_template: str, index: int) -> Row:
    """A row of a file of prompts; one without an id has its index for it."""
    if not isinstance(row, dict) or not row.keys() & {"prompt", "messages", "turns"}:
        raise InputError(f"{where}: no `prompt`, `messages` or `turns`")
    id_ = row.get("id", row.get("question_id", index))
    if "messages" in row:
        messages = row["messages"]
        try:
            if not isinstance(messages, list) or not messages:
                raise InputError(f"not {reprlib.repr(messages)}")
            check_messages(messages)
        except InputError as e:
            raise InputError(f"{where}: `messages` must be a list of {{role, content}} texts ({e})") from e
        return Row(id_, messages, _tools(row.get("tools"), where))
    turns = [row["prompt"]] if "prompt" in row else row["turns"]
    text = turns[0] if isinstance(turns, list) and turns else None
    if not isinstance(text, str) or not text:
        raise InputError(f"{where}: the prompt is empty or not a text")
    return Row(id_, text if chat_template == "no" or ("prompt" in row and chat_template == "auto") else as_chat(text))


def _tools(tools: Any, where: str) -> list[dict] | None:
    try:
        tools = json.loads(tools) if isinstance(tools, str) else tools  # as data sets for training have them
    except (ValueError, RecursionError) as e:
        raise InputError(f"{where}: `tools` is not JSON ({e})") from e
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise InputError(f"{where}: `tools` must be a list of objects")
    return tools or None


def as_chat(text: str) -> list[dict[str, str]]:
    """A conversation that begins with a text."""
    return [{"role": "user", "content": text}]
