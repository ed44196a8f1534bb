"""Tokenizers: from a Hugging Face directory or rebuilt from GGUF metadata; prompts in, streamed text out."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from msn_jax.errors import InputError, first_line, warn

# Control tokens that end a reply, by the names that published chat models give them.
_END_NAMES = {"<|im_end|>", "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|EOT|>", "</s>"}
# What llama.cpp takes for such tokens beside those, whatever type the file gives them.
_GGUF_END_NAMES = {"<|end|>", "<end_of_turn>", "<EOT>", "[EOT]", "<end_of_utterance>", "<｜end▁of▁sentence｜>"}
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # gguf token types

_GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _splits(*patterns: str) -> pre_tokenizers.PreTokenizer:
    """One pattern after the other, each match on its own; then bytes."""
    split = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


# `tokenizer.ggml.pre` -> how the text is split before byte pair merges (llama.cpp, src/llama-vocab.cpp).
_SPLITS = {
    "gpt-2": _splits(_GPT2_SPLIT),
    "smollm": _splits(r"\p{N}", _GPT2_SPLIT),
    "llama-bpe": _splits(_LLAMA3_SPLIT),
    "smaug-bpe": _splits(_LLAMA3_SPLIT),
    "qwen2": _splits(_LLAMA3_SPLIT.replace("{1,3}", "")),
    "deepseek-coder": _splits(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+", r"\p{N}"),
    "default": _splits(r"[\p{P}\$\+<=>\^~\|]+", _GPT2_SPLIT, r"\p{N}+", "[0-9][0-9][0-9]"),
}
# Other names of the same splittings.
_SAME = {
    **dict.fromkeys(("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"), "llama-bpe"),
    **dict.fromkeys(("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), "smollm"),
    **dict.fromkeys(("phi-2", "mpt", "olmo", "jais", "gigachat", "mellum", "trillion", "exaone4"), "gpt-2"),
    **dict.fromkeys(("deepseek-r1-qwen", "megrez"), "qwen2"),
    "dbrx": "smaug-bpe",
}


def from_gguf(meta: dict[str, Any]) -> tuple[PreTrainedTokenizerBase, set[int]]:
    """The tokenizer in GGUF metadata, and the ids that end a reply.

    Byte-level pairs (`gpt2`) or SentencePiece pairs with byte fallback (`llama`). A key that is absent means what
    llama.cpp takes it to mean, with a warning where llama.cpp warns.
    Raises InputError for a tokenizer model or pre-tokenizer that is not in the tables above, and for damaged fields.
    """
    there = {key: value for key, value in meta.items() if value is not None}
    get: Callable[..., Any] = lambda name, default=None: there.get(f"tokenizer.{name}", default)
    model = get("ggml.model")
    if model not in ("gpt2", "llama"):
        raise InputError(f"GGUF tokenizer model {model!r} is not supported; accepted: gpt2, llama")
    pre = get("ggml.pre")
    if model == "gpt2" and not pre:
        warn("GGUF: no tokenizer.ggml.pre; text is split as for 'default', perhaps not as the model knows it")
        pre = "default"
    names = _listed(get, "tokens", str)
    if not names or not isinstance(get("chat_template", ""), str):
        raise InputError("GGUF: tokenizer.ggml.tokens is empty, or tokenizer.chat_template no text")
    names = [name or f"[EMPTY_{i}]" for i, name in enumerate(names)]
    kinds = _listed(get, "token_type", int, len(names), [_NORMAL] * len(names))
    kinds = [_CONTROL if name in _END_NAMES | _GGUF_END_NAMES else kind for name, kind in zip(names, kinds)]
    vocab = {name: i for i, name in enumerate(names)}
    if len(vocab) < len(names):
        twice = next(name for i, name in enumerate(names) if vocab[name] != i)
        raise InputError(f"GGUF: the token {twice!r} is in tokenizer.ggml.tokens twice")
    roles = _roles(get, model, names)
    if model == "gpt2":
        bpe = _byte_level(_SAME.get(pre, pre), vocab, _listed(get, "merges", str))
    else:
        scores = _listed(get, "scores", (int, float), len(names), [0.0] * len(names))
        pieces = {name: score for name, score, kind in zip(names, scores, kinds) if kind == _NORMAL}
        bpe = _sentencepiece(vocab, pieces, roles["unk_token"], get("ggml.add_space_prefix", True))
    added = [
        AddedToken(name, special=kind == _CONTROL, normalized=False)
        for name, kind in zip(names, kinds, strict=True)
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    bpe.add_tokens(added)
    if get("ggml.add_eos_token"):
        raise InputError(
            "GGUF: tokenizer.ggml.add_eos_token = True is not supported: a prompt would end before its reply"
        )
    if get("ggml.add_bos_token", model == "llama" or _SAME.get(pre, pre) == "llama-bpe"):
        if "bos_token" not in roles:
            raise InputError("GGUF: BOS is to stand before a text, but tokenizer.ggml.bos_token_id is missing")
        bos = roles["bos_token"]
        bpe.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, vocab[bos])]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, clean_up_tokenization_spaces=False, chat_template=get("chat_template"), **roles
    )
    stops = {i for key in ("eot", "eom") if (i := get(f"ggml.{key}_token_id")) in range(len(names))}
    named = {i for name, i in vocab.items() if name in _GGUF_END_NAMES}
    return tokenizer, stops | named | end_ids(tokenizer)


def _listed(get, name: str, kind: type | tuple, count: int | None = None, default: list | None = None) -> list:
    """A list of tokenizer.ggml.*, of `count` or more entries. Raises InputError for anything else."""
    value = get(f"ggml.{name}", default)
    if value is None:
        raise InputError(f"GGUF: the field 'tokenizer.ggml.{name}' is missing")
    if not isinstance(value, list) or not all(isinstance(entry, kind) for entry in value):
        raise InputError(f"GGUF: tokenizer.ggml.{name} is not a list of the right type")
    if count is not None and len(value) < count:
        raise InputError(f"GGUF: tokenizer.ggml.{name} has {len(value)} entries for {count} tokens")
    return value[:count]


def _roles(get, model: str, names: list[str]) -> dict[str, str]:
    """bos_token, eos_token, unk_token and pad_token, those that there are. A SentencePiece model has ids by default."""
    defaults = {"bos": 1, "eos": 2, "unknown": 0} if model == "llama" else {}
    roles = {}
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        i = get(f"ggml.{key}_token_id", default := defaults.get(key))
        if i is not None and i not in range(len(names)):
            taken = "none" if default is None else f"{default}, the default"
            warn(f"GGUF: tokenizer.ggml.{key}_token_id = {i} is no token of {len(names)}; taken: {taken}")
            i = default
        if i is not None and i in range(len(names)):
            roles[f"{role}_token"] = names[i]
    return roles


def _byte_level(pre: str, vocab: dict[str, int], merges: list[str]) -> Tokenizer:
    if pre not in _SPLITS:
        raise InputError(f"GGUF pre-tokenizer {pre!r} is not supported; accepted: {', '.join([*_SPLITS, *_SAME])}")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    if not all(len(pair) == 2 and {*pair, "".join(pair)} <= vocab.keys() for pair in pairs):
        raise InputError("GGUF: tokenizer.ggml.merges has an entry that is not two tokens which make a third")
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=pairs, ignore_merges=pre == "llama-bpe"))
    bpe.pre_tokenizer, bpe.decoder = _SPLITS[pre], decoders.ByteLevel()
    if pre == "qwen2":
        bpe.normalizer = normalizers.NFC()
    return bpe


def _sentencepiece(vocab: dict[str, int], pieces: dict[str, float], unknown: str, prefix: bool) -> Tokenizer:
    """pieces: those that text is merged into, with their scores: the best one is merged first."""
    merges = sorted(
        (-score, vocab[piece[:i]], vocab[piece[i:]], piece[:i], piece[i:])
        for piece, score in pieces.items()
        for i in range(1, len(piece))
        if piece[:i] in pieces and piece[i:] in pieces
    )
    pairs = [merge[3:] for merge in merges]
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    spaces = normalizers.Replace(" ", "▁")
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    bpe.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * prefix)
    return bpe


def _named_ends(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    added = tokenizer.added_tokens_decoder
    return {i for i, token in added.items() if token.special and token.content in _END_NAMES}


def end_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The ids that end a reply, as far as a tokenizer can say: its end token, and special ones of a known name."""
    return ({tokenizer.eos_token_id} - {None}) | _named_ends(tokenizer)


def from_folder(folder: Path) -> tuple[PreTrainedTokenizerBase, set[int]]:
    """The tokenizer of a Hugging Face directory, and the ids that end a reply."""
    if not (folder / "tokenizer.json").exists():
        raise InputError(f"{folder}: the tokenizer file tokenizer.json is missing")
    try:
        # Not AutoTokenizer: for some classes it builds a splitting of its own in place of tokenizer.json's.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    except Exception as e:  # the tokenizers library raises plain Exception for a damaged file
        raise InputError(f"{folder}: the tokenizer cannot be read ({first_line(e)})") from e
    return tokenizer, end_ids(tokenizer)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer's files so that transformers 4 and 5 both read them.

    Version 5 by itself names a class that 4 does not have, keeps where the files lay, and spells additional special
    tokens so that 4 stops at them.
    """
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    for name in ("backend", "is_local", "local_files_only"):
        settings.pop(name, None)
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int, name: str) -> None:
    """Raises InputError for a tokenizer that makes an id of text which a model of `rows` embeddings has no row for.

    Added tokens beyond the rows, as a padding token often is, are none of any text but their own: they are named in a
    warning, and a prompt that has one is refused.
    """
    added, spare = tokenizer.added_tokens_decoder, []
    beyond = sorted((i, token) for token, i in tokenizer.get_vocab().items() if i >= rows)
    for i, token in beyond:
        if i in added:
            spare.append(token)
        elif i in tokenizer.encode(tokenizer.decode([i]), add_special_tokens=False):
            raise InputError(
                f"{name}: the tokenizer has {len(tokenizer)} tokens, the model {rows} embeddings; "
                f"{token!r} has the id {i}; accepted: ids below {rows}"
            )
    if spare:
        warn(f"{name}: no embedding for {', '.join(map(repr, spare[:5]))}; a prompt with such a token is refused")


def require_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises InputError for a tokenizer that cannot render a conversation."""
    if not tokenizer.chat_template:
        raise InputError("this checkpoint has no chat template; accepted: raw prompts, as texts (--chat_template no)")


# What a chat template may end in: its own refusals come through jinja, what it does with a message of another form
# does not.
TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict], tools: list | None = None, **options) -> str:
    """The text that the chat template makes of a conversation. Raises one of TEMPLATE_ERRORS."""
    return tokenizer.apply_chat_template(list(messages), tools=tools, tokenize=False, **options)


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], tools: list[dict] | None = None
) -> list[int]:
    """Token ids of a conversation, ready for the assistant's reply.

    Roles, the system's and those of tools too, are the template's business: it renders them, ignores them, or
    refuses them, which is an InputError in its own words.
    """
    require_template(tokenizer)
    try:
        text = render(tokenizer, messages, tools, add_generation_prompt=True)
    except TEMPLATE_ERRORS as e:
        raise InputError(f"the chat template refuses these messages: {first_line(e)}") from e
    return encode_text(tokenizer, text, special_tokens=False)


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str, special_tokens: bool = True) -> list[int]:
    """Token ids of a text. Raises InputError for one that is not valid Unicode."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as e:
        raise InputError(f"the text is not valid Unicode (character {e.start})") from None
    return tokenizer.encode(text, add_special_tokens=special_tokens)


class TextStream:
    """Text of a growing list of token ids, in pieces that are whole characters.

    "".join of all pieces and of `flush()` is the text that `decode` gives.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, after: Sequence[int] = ()):
        """after: tokens before the first of the list, see `decode`."""
        self._decode, self._ids, self._shown = partial(decode, tokenizer, after=after), [], ""

    def add(self, ids: Sequence[int]) -> str:
        self._ids.extend(ids)
        text = self._decode(self._ids)
        # A character can span tokens: until it is whole it decodes to U+FFFD, which is held back.
        return self._emit(text.rstrip("\ufffd"))

    def flush(self) -> str:
        return self._emit(self._decode(self._ids))

    def _emit(self, text: str) -> str:
        if len(text) <= len(self._shown):
            return ""
        piece, self._shown = text[len(self._shown) :], text
        return piece


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], after: Sequence[int] = ()) -> str:
    """Text of token ids, special ones left out; as it stands behind the tokens `after`, of which the last few do.

    It matters to SentencePiece, which drops the space that a text begins with: of a prompt and its reply together that
    is the prompt's, of the reply alone it is the reply's own.
    """
    text_of = lambda ids: tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    tail = list(after[-64:])
    before, whole = text_of(tail), text_of([*tail, *ids])
    # Where a character spans the two, neither has it whole.
    apart = before and "\ufffd" not in before and whole.startswith(before)
    return whole[len(before) :] if apart else text_of(ids)
