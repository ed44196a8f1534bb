"""Conversations to tokens: what the chat template makes of one, and which of its tokens the assistant says."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from transformers import PreTrainedTokenizerBase

from msn_jax.errors import InputError, first_line
from msn_jax.io.tokenizer import TEMPLATE_ERRORS, render
from msn_jax.rows import Unusable, used_keys

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
)
# Why a row cannot be trained on.
REWRITES = "template rewrites earlier turns"
GENERATION_PROMPT = "generation prompt is no beginning of the reply"


def apply_template(tokenizer: PreTrainedTokenizerBase, setting: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer with the chat template that `data.chat_template` names, changed in place.

    setting: None keeps its own; `plain` is text, newline, reply, end token; else a .jinja file.
    Raises InputError where there is no template, no end token for `plain`, or the file cannot be used.
    """
    if setting is None:
        if not tokenizer.chat_template:
            raise InputError("the tokenizer has no chat template; accepted as data.chat_template: plain, a .jinja file")
    elif setting == "plain":
        if tokenizer.eos_token is None:
            raise InputError("data.chat_template = plain needs a tokenizer with an end token; this one has none")
        starts = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
        tokenizer.chat_template = "{{ bos_token }}" * starts + PLAIN
    elif setting.endswith(".jinja"):
        _template_from_file(tokenizer, setting)
    else:
        raise InputError(f"data.chat_template = {setting} is not possible; accepted: null, plain, a .jinja file")
    return tokenizer


def _template_from_file(tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    try:
        tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"data.chat_template {path} cannot be read ({first_line(e)})") from None
    if not tokenizer.chat_template.strip():
        raise InputError(f"data.chat_template {path} is empty")
    try:
        render(tokenizer, [{"role": "user", "content": "a"}])
    except jinja2.TemplateSyntaxError as e:
        raise InputError(f"data.chat_template {path}, line {e.lineno}: {first_line(e)}") from None
    except TEMPLATE_ERRORS:
        pass  # it refuses the probe, not every conversation: rows that it refuses are counted


def encode_example(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[dict[str, Any]],
    stop_ids: Iterable[int] | None = None,
    tools: list[dict] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens int32[n] of a conversation up to the end of its last reply, and which belong to a reply, bool[n].

    A reply is what the chat template adds after the prompt that `encode_chat` makes of the messages before it, up
    to and including the first of `stop_ids` (default: the tokenizer's end token). The conversation is tokenised whole,
    as decoding does with what was said before; a token that is partly prompt and partly reply counts as reply. An
    earlier reply that the template shows otherwise once the talk goes on (without its thoughts, say) is no reply here.
    Raises Unusable: see `_replies`; template leaves out (a key of the messages), template gives no stop token.
    """
    stop_ids = {tokenizer.eos_token_id} if stop_ids is None else set(stop_ids)
    text, replies = _replies(tokenizer, messages, tools)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, spans = encoded["input_ids"], encoded["offset_mapping"]
    stops = [i for i, token in enumerate(ids) if token in stop_ids]
    special, is_reply = tokenizer.added_tokens_decoder, np.zeros(len(ids), bool)
    for start, end in replies:
        first = next((i for i, span in enumerate(spans) if span[1] > start), len(ids))
        # A special token may swallow spaces around it, but it is whole.
        first += first < len(ids) and spans[first][0] < start and ids[first] in special
        stop = next((i for i in stops if i >= first and spans[i][0] < end), None)
        if stop is not None:
            is_reply[first : stop + 1] = True
    if stop is None:  # of the last reply; an earlier one may have been rewritten before its end
        raise Unusable("template gives no stop token")
    return np.array(ids[: stop + 1], np.int32), is_reply[: stop + 1]


def _replies(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], tools: list[dict] | None
) -> tuple[str, list[tuple[int, int]]]:
    """The conversation up to its last reply, rendered, and where its replies lie in that text.

    Raises Unusable: no response, template refuses, template leaves out ..., template rewrites earlier turns, generation
    prompt is no beginning of the reply.
    """
    at = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not at:
        raise Unusable("no response")
    try:
        template = tokenizer.get_chat_template(tools=tools)
        if lost := [key for key in used_keys(messages, tools) if key not in template]:
            raise Unusable(f"template leaves out {lost[0]}")
        prompts = [render(tokenizer, messages[:i], tools, add_generation_prompt=True) for i in at]
        turns = [render(tokenizer, messages[: i + 1], tools) for i in at]
        whole = turns[-1]
        if not whole.startswith(prompts[-1]):
            rewritten = not whole.startswith(render(tokenizer, messages[: at[-1]], tools))
            raise Unusable(REWRITES if rewritten else GENERATION_PROMPT)
    except Unusable:
        raise
    except TEMPLATE_ERRORS as e:
        raise Unusable("template refuses") from e
    same = lambda turn: len(os.path.commonprefix([turn, whole]))
    return whole, [(len(p), same(t)) for p, t in zip(prompts, turns, strict=True) if whole.startswith(p)]
