"""Tokenizers: from a Hugging Face directory or rebuilt from GGUF metadata; prompts in, streamed text out."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from msn_jax.errors import InputError, first_line, warn

# Control tokens that end a reply, by the names that published chat models give them.
_END_NAMES = {"<|im_end|>", "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|EOT|>", "</s>"}
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
    "starcoder": _splits(r"\p{N}", _GPT2_SPLIT),
    "llama-bpe": _splits(_LLAMA3_SPLIT),
    "qwen2": _splits(_LLAMA3_SPLIT.replace("{1,3}", "")),
    "deepseek-coder": _splits(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+", r"\p{N}"),
    "default": _splits(r"[\p{P}\$\+<=>\^~\|]+", _GPT2_SPLIT, r"\p{N}+", "[0-9][0-9][0-9]"),
}


def from_gguf(meta: dict[str, Any]) -> tuple[PreTrainedTokenizerBase, set[int]]:
    """The tokenizer in GGUF metadata, and the ids that end a reply.

    Byte-level pairs (`gpt2`) or SentencePiece pairs with byte fallback (`llama`).
    Raises InputError for a tokenizer model or pre-tokenizer that is not in the table above.
    """
    get = lambda name, default=None: meta.get(f"tokenizer.{name}", default)
    model = get("ggml.model")
    if model not in ("gpt2", "llama"):
        raise InputError(f"GGUF tokenizer model {model!r} is not supported; accepted: gpt2, llama")
    for name in ("tokens", "token_type", "merges" if model == "gpt2" else "scores"):
        if get(f"ggml.{name}") is None:
            raise InputError(f"GGUF: the field 'tokenizer.ggml.{name}' is missing")
    names, kinds = get("ggml.tokens"), get("ggml.token_type")
    vocab = {name: i for i, name in enumerate(names)}
    if model == "gpt2":
        bpe = _byte_level(get("ggml.pre", "gpt-2"), vocab, get("ggml.merges"))
    else:
        unknown = names[get("ggml.unknown_token_id", 0)]
        pieces = {name: score for name, score, kind in zip(names, get("ggml.scores"), kinds) if kind == _NORMAL}
        bpe = _sentencepiece(vocab, pieces, unknown, get("ggml.add_space_prefix", True))
    added = [
        AddedToken(name, special=kind == _CONTROL, normalized=False)
        for name, kind in zip(names, kinds, strict=True)
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    bpe.add_tokens(added)
    roles = {
        role: names[i]
        for role, key in (
            ("bos_token", "bos"),
            ("eos_token", "eos"),
            ("unk_token", "unknown"),
            ("pad_token", "padding"),
        )
        if (i := get(f"ggml.{key}_token_id")) is not None and i < len(names)
    }
    if get("ggml.add_bos_token", model == "llama") and "bos_token" in roles:
        bos = roles["bos_token"]
        bpe.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, vocab[bos])]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, clean_up_tokenization_spaces=False, chat_template=get("chat_template"), **roles
    )
    stops = {get(f"ggml.{key}_token_id") for key in ("eos", "eot", "eom")} - {None}
    return tokenizer, stops | _named_ends(tokenizer)


def _byte_level(pre: str, vocab: dict[str, int], merges: list[str]) -> Tokenizer:
    if pre not in _SPLITS:
        raise InputError(f"GGUF pre-tokenizer {pre!r} is not supported; accepted: {', '.join(_SPLITS)}")
    pairs = [tuple(merge.split(" ")) for merge in merges]
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
    except Exception as e:  # whatever the parsing of a damaged file runs into
        raise InputError(f"{folder}: the tokenizer cannot be read ({first_line(e)})") from None
    return tokenizer, end_ids(tokenizer)


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
        raise InputError("this checkpoint has no chat template; accepted: raw prompts (--chat_template no)")


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict], tools: list | None = None, **options) -> str:
    """The text that the chat template makes of a conversation. Raises what the template raises, whatever it is."""
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
    except Exception as e:  # templates raise their own messages through jinja
        raise InputError(f"the chat template refuses these messages: {first_line(e)}") from None
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
    # Not where a character spans the two: then neither has it whole.
    apart = before and "\ufffd" not in before and whole.startswith(before)
    return whole[len(before) :] if apart else text_of(ids)
