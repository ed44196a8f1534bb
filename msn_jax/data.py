"""Rows -> tokens and response mask -> packed batches that resume exactly.

Three stages: `load_examples` reads and encodes every source once (cached on disk), `batches` walks an endless,
shuffled, packed stream of them, and `held_out_batches` packs what was kept for evaluation.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import grain
import numpy as np
from datasets.exceptions import DatasetGenerationError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from msn_jax.config import DataConfig, DataSource
from msn_jax.conversations import CHATML, apply_template, encode_example
from msn_jax.errors import InputError
from msn_jax.rows import KEYS, Unusable, content_id, read_rows, silence, to_messages, tools_of

# Why a row is not used with all its replies.
LAST_ALONE = "earlier turns that the template rewrites"

_CACHED = datasets.Features(
    tokens=datasets.List(datasets.Value("int32")),
    response=datasets.List(datasets.Value("bool")),
    skipped=datasets.Value("string"),  # why the row, or a part of it, cannot be used; empty where all can
)


def train_tokenizer(rows: Iterable[dict[str, Any]], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with ChatML template, of at most `vocab_size` tokens, trained on usable rows.

    <|im_end|> ends a reply, <|endoftext|> pads. The same rows give the same tokenizer.
    Raises InputError where vocab_size has no room for all bytes and the special tokens.
    """
    special, alphabet = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < (least := len(special) + len(alphabet)):
        raise InputError(f"model.scratch.vocab_size = {vocab_size} is not possible; accepted: {least} or more")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=sorted(alphabet), show_progress=False
    )
    bpe.train_from_iterator(_contents(rows), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
    )


def _contents(rows: Iterable[dict[str, Any]]) -> Iterator[str]:
    for row in rows:
        try:
            yield from (message.get("content") or "" for message in to_messages(row))
        except Unusable:
            continue  # load_examples reads the same rows and counts the reasons


@dataclasses.dataclass(frozen=True)
class Examples:
    """Encoded conversations, end to end."""

    tokens: np.ndarray  # int32[N], of all examples together
    response: np.ndarray  # bool[N]: the token belongs to a reply
    ends: np.ndarray  # int64[n]: where each example ends

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        part = slice(self.ends[i - 1] if i else 0, self.ends[i])
        return {"tokens": self.tokens[part], "response": self.response[part]}

    @classmethod
    def join(cls, examples: Iterable[dict[str, np.ndarray]]) -> Examples:
        examples = list(examples)
        tokens = [np.zeros(0, np.int32), *(e["tokens"] for e in examples)]
        response = [np.zeros(0, bool), *(e["response"] for e in examples)]
        ends = np.cumsum([len(t) for t in tokens[1:]], dtype=np.int64)
        return cls(np.concatenate(tokens), np.concatenate(response), ends)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    """All sources, encoded. The dicts go by source, in the order of the config."""

    train: dict[str, Examples]
    held_out: dict[str, Examples]
    skipped: dict[str, dict[str, int]]  # rows that are not used, or not with all their replies, by reason
    weights: dict[str, float]

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """{source: {"train": examples, "held_out": examples}}"""
        return {name: {"train": len(self.train[name]), "held_out": len(self.held_out[name])} for name in self.train}

    @property
    def tokens(self) -> int:
        """Tokens of one epoch of all train examples."""
        return sum(len(examples.tokens) for examples in self.train.values())

    @property
    def digest(self) -> str:
        """A name for the train examples, so that a run is not resumed on others."""
        parts = (examples.tokens.tobytes() for examples in self.train.values())
        return hashlib.sha256(b"".join(parts)).hexdigest()

    @property
    def response_tokens(self) -> int:
        return sum(int(examples.response.sum()) for examples in self.train.values())


def load_examples(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, stop_ids: Iterable[int], vocab_size: int | None = None
) -> Corpus:
    """Read, encode and split all sources. Applies `config.chat_template` to the tokenizer.

    vocab_size: embeddings that the model has; a row with an id beyond them is skipped.

    Held-out examples are the same in every run, whatever its seed; a train example that is a copy of one, in
    whichever source, is skipped. Encoded rows are cached with the other caches of `datasets`: a template that prints
    today's date keeps the date of the first run.
    Raises InputError: a source that cannot be read, is listed twice, has no usable row or too few to hold out.
    """
    apply_template(tokenizer, config.chat_template)
    encoded, skipped, weights = {}, {}, {}
    for source in config.sources:
        name = source.path + ("" if source.split == "train" else f" ({source.split})")
        if name in encoded:
            raise InputError(f"data.sources lists {name} twice; accepted: once, with a weight")
        encoded[name], skipped[name] = _encode_source(
            source, tokenizer, sorted(stop_ids), config.max_tokens, vocab_size
        )
        weights[name] = source.weight
    chosen, held_out = {}, {}
    for name, examples in encoded.items():
        if len(examples) <= config.held_out:
            raise InputError(f"{name}: {len(examples)} usable rows are too few for data.held_out = {config.held_out}")
        chosen[name] = np.sort(np.random.default_rng(0).permutation(len(examples))[: config.held_out])
        held_out[name] = Examples.join(examples[i] for i in chosen[name])
    kept_texts = {held[i]["tokens"].tobytes() for held in held_out.values() for i in range(len(held))}
    train = {}
    for name, examples in encoded.items():
        rest = [examples[i] for i in np.setdiff1d(np.arange(len(examples)), chosen[name])]
        train[name] = Examples.join(e for e in rest if e["tokens"].tobytes() not in kept_texts)
        if copies := len(rest) - len(train[name]):
            skipped[name]["copy of a held-out row"] = copies
        if not len(train[name]):
            raise InputError(f"{name}: nothing is left to train on, all rows are copies of held-out rows")
    return Corpus(train=train, held_out=held_out, skipped=skipped, weights=weights)


def _encode_source(
    source: DataSource,
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: list[int],
    max_tokens: int,
    vocab_size: int | None,
) -> tuple[Examples, dict[str, int]]:
    """The usable rows of a source, and how many were skipped for which reason."""

    def encode():
        for row in tqdm(read_rows(source), desc=f"encoding {source.path}", unit=" rows", disable=None):
            try:
                messages = to_messages(row)
                tokens, response = encode_example(tokenizer, messages, stop_ids, tools_of(row))
                if len(tokens) > max_tokens:
                    raise Unusable("longer than max_tokens")
                if vocab_size is not None and tokens.max() >= vocab_size:
                    raise Unusable("a token that the model has no embedding for")
                learnt = np.count_nonzero(np.diff(response.astype(np.int8)) == 1)
                all_learnt = learnt == sum(message["role"] == "assistant" for message in messages)
                yield {"tokens": tokens, "response": response, "skipped": "" if all_learnt else LAST_ALONE}
            except Unusable as e:
                yield {"tokens": [], "response": [], "skipped": str(e)}

    # Tokenising makes about 900 rows/s of Dolly on one core, so the Arrow file that this writes is worth keeping.
    fingerprint = _fingerprint(source, tokenizer, stop_ids, max_tokens, vocab_size)
    silence()
    try:
        table = datasets.Dataset.from_generator(encode, features=_CACHED, fingerprint=fingerprint)
    except (DatasetGenerationError, OSError) as e:
        cause = e.__cause__ or e
        if isinstance(cause, OSError):
            cause = InputError(f"the cache of encoded rows cannot be written ({cause}); HF_DATASETS_CACHE moves it")
        raise cause from None
    skipped = collections.Counter(reason for reason in table["skipped"] if reason)
    lengths = np.concatenate([part.value_lengths().to_numpy() for part in table.data.column("tokens").chunks])
    if not lengths.any():
        reasons = ", ".join(f"{reason}: {count}" for reason, count in skipped.most_common())
        templates = [reason for reason in skipped if reason.startswith(("template", "generation"))]
        accepted = "another data.chat_template (plain, or a .jinja file)" if len(templates) == len(skipped) else KEYS
        raise InputError(f"{source.path}: none of its {len(table)} rows can be used ({reasons}); accepted: {accepted}")
    tokens, response = (_flat(table.data.column(name)) for name in ("tokens", "response"))
    return Examples(tokens, response, np.cumsum(lengths[lengths > 0], dtype=np.int64)), dict(skipped)


def _flat(column) -> np.ndarray:
    return np.concatenate([part.flatten().to_numpy(zero_copy_only=False) for part in column.chunks])


def _fingerprint(source: DataSource, tokenizer: PreTrainedTokenizerBase, *settings) -> str:
    """A name for the encoded rows that changes with everything they depend on."""
    files = ("rows.py", "data.py", "conversations.py", "io/tokenizer.py")
    code = [(Path(__file__).parent / name).read_text(encoding="utf-8") for name in files]
    special = sorted(tokenizer.special_tokens_map.items())
    vocabulary = tokenizer.backend_tokenizer.to_str()
    parts = (content_id(source), vocabulary, special, tokenizer.chat_template, settings, code)
    return hashlib.sha256(repr(parts).encode("utf-8")).hexdigest()[:32]


def longest_response(corpus: Corpus) -> int:
    """Tokens of the longest reply among the train examples. Noise of length L needs one of L + 1."""
    longest = 0
    for examples in corpus.train.values():
        # Replies of neighbours never touch: an example begins with its prompt.
        edges = np.flatnonzero(np.diff(examples.response, prepend=False, append=False))
        longest = max(longest, int((edges[1::2] - edges[::2]).max()))
    return longest


def batches(corpus: Corpus, config: DataConfig, batch_size: int, seed: int) -> grain.DatasetIterator:
    """An endless iterator of packed batches of the train examples, the same for the same seed.

    Each is {"tokens": int32[B, T], "segment_ids": int32[B, T] (0 padding, then 1, 2, ... by example), "positions":
    int32[B, T] (from 0 in each example), "response": bool[B, T]}, T = config.max_tokens. Sources are drawn in
    proportion to their weights, and each is shuffled anew every epoch. `get_state()` is a JSON-able dict of where
    the last yielded batch ends; after `set_state()` the next one follows. Every process packs all rows, which is cheap
    without tokenising, so that neither batches nor states depend on how many processes there are.
    """
    streams = [
        grain.MapDataset.source(examples).shuffle(seed=_seed(seed, number)).repeat()
        for number, examples in enumerate(corpus.train.values())
    ]
    mixed = grain.MapDataset.mix(streams, list(corpus.weights.values()))
    rows = _pack(mixed, config.max_tokens, config.packing_bins, seed=_seed(seed, len(streams)))
    return iter(grain.experimental.ThreadPrefetchIterDataset(rows.batch(batch_size), prefetch_buffer_size=2))


def _seed(seed: int, number: int) -> int:
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


def _pack(examples: grain.MapDataset, max_tokens: int, bins: int, seed: int | None) -> grain.IterDataset:
    """Packed rows; seed None keeps them in the order of their first example."""
    rows = grain.experimental.BestFitPackIterDataset(
        # Examples are in memory: threads that read ahead would cost more than they save.
        examples.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)),
        length_struct={"tokens": max_tokens, "response": max_tokens},
        num_packing_bins=bins,
        seed=seed or 0,
        shuffle_bins=seed is not None,
    )
    names = {
        "tokens": "tokens",
        "segment_ids": "tokens_segment_ids",
        "positions": "tokens_positions",
        "response": "response",
    }
    return rows.map(lambda row: {name: row[packed] for name, packed in names.items()})


def held_out_batches(corpus: Corpus, config: DataConfig, batch_size: int, count: int) -> list[dict[str, np.ndarray]]:
    """At most `count` packed batches of the held-out examples, in the form of `batches`, always the same.

    The sources take turns, so that each is in the first batches. The last batch is filled up with empty rows.
    Raises InputError where nothing was held out.
    """
    turns = itertools.zip_longest(*([held[i] for i in range(len(held))] for held in corpus.held_out.values()))
    examples = [example for turn in turns for example in turn if example is not None]
    if not examples:
        raise InputError("data.held_out = 0 leaves nothing to evaluate on; accepted: 1 or more")
    packed = _pack(grain.MapDataset.source(examples), config.max_tokens, bins=batch_size * count, seed=None)
    rows = list(itertools.islice(packed, batch_size * count))
    empty = {name: np.zeros_like(row) for name, row in rows[0].items()}
    rows += [empty] * (-len(rows) % batch_size)
    whole = [rows[at : at + batch_size] for at in range(0, len(rows), batch_size)]
    return [{name: np.stack([row[name] for row in batch]) for name in empty} for batch in whole]
