"""Rows to train on, from files, the hub or the standard library, and the conversation that each holds."""

from __future__ import annotations

import ast
import glob
import gzip
import hashlib
import itertools
import json
import os
import sys
import sysconfig
import textwrap
import tokenize
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
from datasets.exceptions import DatasetsError

from msn_jax.config import DataSource
from msn_jax.errors import InputError, first_line

ACCEPTED = "a .jsonl, .jsonl.gz or .parquet file, a hub id (org/name or org/name:subset), or stdlib"
STDLIB = "stdlib"
_JSONL, _PARQUET = (".jsonl", ".jsonl.gz"), (".parquet",)
# Folders of the standard library without functions that teach anything: tests, tables, other people's packages.
_NOISE = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data"}

# Keys of a prompt (the first one marks the form, the others may be absent) -> keys of its reply.
_FORMS = {
    ("instruction", "context", "input"): ("response", "output"),
    ("prompt",): ("completion", "canonical_solution"),
    ("question",): ("answer",),
}
KEYS = "messages, or " + ", or ".join(f"{'/'.join(prompt)} and {'/'.join(reply)}" for prompt, reply in _FORMS.items())

# What a message can say beside its content, by the names that chat templates know.
SPOKEN = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")


class Unusable(Exception):
    """A row that cannot be trained on. The message is the reason it is counted under."""


def read_rows(source: DataSource) -> Iterator[dict[str, Any]]:
    """The rows of a source, in their order; see ACCEPTED for what its path may be.

    Raises InputError where nothing can be read, naming the line of a JSONL file that is not a JSON object.
    """
    if source.path == STDLIB:
        rows = _stdlib_rows()
    elif _is_hub_id(source.path):
        rows = map(_without_null, _from_hub(source))
    else:
        rows = _file_rows(source.path)
    first = next(rows, None)
    if first is None:
        raise InputError(f"{source.path}: there are no rows in it")
    yield first
    yield from rows


def content_id(source: DataSource) -> str:
    """A text that changes when the rows of a source do; empty for a path that `read_rows` refuses."""
    if source.path == STDLIB:
        return f"{STDLIB} {sys.version}"
    if _is_hub_id(source.path):
        return str(_from_hub(source).cache_files)  # their path holds the revision
    if not Path(source.path).is_file():
        return ""
    with open(source.path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_hub_id(path: str) -> bool:
    named_as_file = path.endswith(_JSONL + _PARQUET) or path[:1] in tuple("./~")
    return path.count("/") == 1 and not named_as_file and not Path(path).exists()


def _from_hub(source: DataSource) -> datasets.Dataset:
    silence()
    try:
        name, _, subset = source.path.partition(":")
        return datasets.load_dataset(name, subset or None, split=source.split)
    except Exception as e:  # whatever the network, the hub or the reader of the set runs into
        raise InputError(f"{source.path}: no such file, and as a hub id: {first_line(e)}") from e


def _file_rows(path: str) -> Iterator[dict[str, Any]]:
    if not path.endswith(_JSONL + _PARQUET) or not Path(path).is_file():
        kind = "a directory" if Path(path).is_dir() else "not of a known kind" if Path(path).exists() else "missing"
        raise InputError(f"data source {path!r} is {kind}; accepted: {ACCEPTED}")
    try:
        yield from _json_rows(path) if path.endswith(_JSONL) else _parquet_rows(path)
    except InputError:
        raise
    except (OSError, EOFError, ValueError, zlib.error, DatasetsError) as e:  # of gzip, Unicode, Arrow and datasets
        raise InputError(f"{path}: cannot be read ({first_line(e)})") from e


def _parquet_rows(path: str) -> Iterator[dict[str, Any]]:
    silence()
    rows = datasets.load_dataset("parquet", data_files=[glob.escape(path)], split="train", streaming=True)
    return map(_without_null, rows)


def _without_null(value: Any) -> Any:
    """Columns have one type for all rows: Arrow fills the keys that an object lacks, at any depth, with null."""
    if isinstance(value, dict):
        return {key: _without_null(part) for key, part in value.items() if part is not None}
    return [_without_null(part) for part in value] if isinstance(value, list) else value


def _json_rows(path: str) -> Iterator[dict[str, Any]]:
    # The JSON loader of `datasets` (5.2) is not used: it makes dates of text, guesses one type for all rows of a column
    # (so that one odd row costs the file), takes some rows for agent traces, and does not name the line.
    with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as e:
                raise InputError(f"{path}, line {number}: not valid JSON ({first_line(e)})") from None
            if not isinstance(row, dict):
                raise InputError(f"{path}, line {number}: a {type(row).__name__}; accepted: a JSON object")
            yield row


def silence() -> None:
    """Silence what the libraries print: errors come back as InputError. Process-wide."""
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    huggingface_hub.logging.set_verbosity_error()


def _stdlib_rows() -> Iterator[dict[str, str]]:
    """Functions of the running Python's standard library: signature and docstring -> source without docstring."""
    seen = set()
    for folder, folders, files in os.walk(sysconfig.get_path("stdlib")):
        folders[:] = sorted(set(folders) - _NOISE)
        for file in sorted(files):
            for row in _functions(Path(folder, file)) if file.endswith(".py") else ():
                if row["response"] not in seen:  # copies would end up in both train and held-out
                    seen.add(row["response"])
                    yield row


def _functions(path: Path) -> Iterator[dict[str, str]]:
    with tokenize.open(path) as file:  # honours a coding comment
        text = file.read()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of invalid escapes in somebody else's source
        tree = ast.parse(text)
    lines = text.split("\n")  # not splitlines: a form feed does not end a line for ast
    blocks = [tree.body]
    while blocks:
        for node in blocks.pop(0):
            if isinstance(node, ast.ClassDef | ast.If | ast.Try):
                blocks.append(node.body)
            # A nested function is left out: it is part of the row of the function around it.
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and len(node.body) > 1:
                doc, rest = node.body[:2]
                if ast.get_docstring(node) and node.lineno < doc.lineno and doc.end_lineno < rest.lineno:
                    signature = lines[node.lineno - 1 : doc.lineno - 1]
                    docstring = lines[doc.lineno - 1 : doc.end_lineno]
                    body = itertools.dropwhile(lambda line: not line.strip(), lines[doc.end_lineno : node.end_lineno])
                    yield {
                        "instruction": textwrap.dedent("\n".join(signature + docstring)),
                        "response": textwrap.dedent("\n".join([*signature, *body])),
                    }


def to_messages(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The conversation in a row: its `messages`, or one prompt and its reply (see _FORMS).

    Messages keep all their keys, for the chat template to use: calls of tools, names, thoughts.
    Raises Unusable: unknown keys, not text, no response, empty prompt.
    """
    if row.get("messages") is not None:
        messages = row["messages"]
        if not isinstance(messages, list):
            raise Unusable("not text")
        messages = [_message(message) for message in messages]
    else:
        prompt_keys, reply_keys = _form(row)
        prompt = [text for key in prompt_keys if (text := _text(row.get(key))).strip()]
        reply = [text for key in reply_keys if (text := _text(row.get(key))).strip()]
        messages = [
            {"role": "user", "content": "\n\n".join(prompt)},
            {"role": "assistant", "content": reply[0] if reply else ""},
        ]
    replies = [m for m in messages if m["role"] == "assistant"]
    if not replies or not all((m.get("content") or "").strip() or used_keys([m]) for m in replies):
        raise Unusable("no response")
    before = itertools.takewhile(lambda m: m["role"] != "assistant", messages)
    if not any((m.get("content") or "").strip() for m in before):
        raise Unusable("empty prompt")
    return messages


def tools_of(row: dict[str, Any]) -> list[dict] | None:
    """The tools that a row offers to its model; None where it has none. Raises Unusable: tools are no list."""
    tools = _parsed(row.get("tools"), "tools are no list") or None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise Unusable("tools are no list")
    return tools


def used_keys(messages: list[dict[str, Any]], tools: list[dict] | None = None) -> list[str]:
    """Keys of a conversation that say more than the text of its messages; a template may leave them out."""
    return ["tools"] * bool(tools) + [key for key in SPOKEN if any(message.get(key) for message in messages)]


def _message(message: Any) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise Unusable("not text")
    # Arrow fills the keys that a message lacks with null; a template would take them for there.
    kept = {key: value for key, value in message.items() if value is not None or key == "content"}
    if "tool_calls" in kept:
        kept["tool_calls"] = _parsed(kept["tool_calls"], "tool_calls are no list")
        if not isinstance(kept["tool_calls"], list):
            raise Unusable("tool_calls are no list")
    kept["role"] = _text(message.get("role"))
    if message.get("content") is not None or not used_keys([kept]):
        kept["content"] = _text(message.get("content"))
    _text(json.dumps(kept, ensure_ascii=False, default=str))
    return kept


def _parsed(value: Any, reason: str) -> Any:
    """Lists of objects are JSON text in many data sets, since their keys differ from row to row."""
    try:
        return json.loads(value) if isinstance(value, str) and value else value
    except (ValueError, RecursionError):
        raise Unusable(reason) from None


def _form(row: dict[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    for form in _FORMS.items():
        if row.get(form[0][0]) is not None:
            return form
    raise Unusable("unknown keys")


def _text(value: Any) -> str:
    if value is None:  # Arrow fills the keys that a row lacks
        return ""
    if not isinstance(value, str):
        raise Unusable("not text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair, as JSON can spell it
        raise Unusable("not text") from None
    return value
