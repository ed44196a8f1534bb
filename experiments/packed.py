"""Training rows made once and kept on the device: a model's own replies or those of a file, packed side by side."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from msn_jax import DecodeConfig, InputError
from msn_jax.answers import LOOPS, repeated_4grams
from msn_jax.config import DataSource
from msn_jax.conversations import encode_example
from msn_jax.decode.generate import generate_batches
from msn_jax.decode.prompts import encode
from msn_jax.io.loading import LM
from msn_jax.rows import Unusable, read_rows, to_messages

Example = tuple[np.ndarray, np.ndarray]  # tokens int32[n], and which belong to a reply bool[n]


def conversations(files: list[Path], seed: int = 0) -> list[list[dict]]:
    """The conversations of all files, in a random order; rows that cannot be used, or that have tools, are left out."""
    found = []
    for row in (row for file in files for row in read_rows(DataSource(path=str(file)))):
        try:
            if not row.get("tools"):
                found.append(to_messages(row))
        except Unusable:
            continue
    return [found[i] for i in np.random.default_rng(seed).permutation(len(found))]


def encoded(lm: LM, talks: list[list[dict]], most: int) -> Iterator[Example]:
    """Conversations as examples, without those of more than `most` tokens."""
    for talk in talks:
        try:
            tokens, reply = encode_example(lm.tokenizer, talk, lm.stop_ids)
        except Unusable:
            continue
        if len(tokens) <= most:
            yield tokens, reply


def prompts_of(lm: LM, talks: list[list[dict]], most: int) -> list[tuple[list[dict], list[int]]]:
    """Each conversation up to its first reply, and its token ids, without those of more than `most`."""
    first = lambda talk: next(i for i, message in enumerate(talk) if message["role"] == "assistant")
    prompts = (talk[: first(talk)] for talk in talks)
    pairs = ((prompt, encode(lm, prompt)) for prompt in prompts)
    return [(prompt, ids) for prompt, ids in pairs if len(ids) <= most]


def own_examples(
    lm: LM,
    prompts: list[tuple[list[dict], list[int]]],
    decode: DecodeConfig,
    seconds: float,
    temperatures: list[float],
) -> Iterator[tuple[list[dict], Example]]:
    """Conversations of the model's own replies to all prompts, at one temperature after the other, while there is time.

    Replies that loop, or say nothing, are dropped. The last batch of a temperature is left out where it is not full.
    """
    end, size = time.perf_counter() + seconds, decode.batch_size
    for seed, temperature in enumerate(temperatures):
        settings = dataclasses.replace(decode, temperature=temperature, seed=seed)
        for at in range(0, max(len(prompts) - size, 0) + 1, size):
            if time.perf_counter() > end:
                return
            batch = prompts[at : at + size]
            results = next(generate_batches(lm, [ids for _, ids in batch], settings))
            for (prompt, ids), result in zip(batch, results, strict=True):
                if result.text.strip() and repeated_4grams(result.tokens) < LOOPS:
                    tokens = np.array(ids + result.tokens, np.int32)
                    reply = {"role": "assistant", "content": result.text}
                    yield [*prompt, reply], (tokens, np.arange(len(tokens)) >= len(ids))


def pack(examples: list[Example], width: int, bins: int = 64) -> dict[str, np.ndarray]:
    """Examples of up to `width` tokens as rows [N, width] in the form of data.batches, each in the fullest open row."""
    rows: list[list[Example]] = []
    open_rows: list[tuple[int, list[Example]]] = []  # room, examples
    for example in examples:
        n = len(example[0])
        fits = [i for i, (room, _) in enumerate(open_rows) if room >= n]
        if fits:
            i = min(fits, key=lambda i: open_rows[i][0])
            room, row = open_rows.pop(i)
        else:
            if len(open_rows) == bins:
                open_rows.pop(min(range(bins), key=lambda i: open_rows[i][0]))
            room, row = width, []
            rows.append(row)
        row.append(example)
        open_rows.append((room - n, row))
    shape = (len(rows), width)
    out = {name: np.zeros(shape, np.int32) for name in ("tokens", "segment_ids", "positions")}
    out["response"] = np.zeros(shape, bool)
    for packed, row in enumerate(rows):
        at = 0
        for number, (tokens, reply) in enumerate(row, 1):
            part = (packed, slice(at, at + len(tokens)))
            out["tokens"][part], out["response"][part] = tokens, reply
            out["segment_ids"][part], out["positions"][part] = number, np.arange(len(tokens))
            at += len(tokens)
    return out


def write_packed(file: Path, whole: dict[str, np.ndarray], held: dict[str, np.ndarray], examples: int) -> None:
    """Rows of `pack` to learn from and to hold out, with how many examples they hold, as a file that appears whole."""
    arrays = {f"{part}.{name}": x for part, rows in (("whole", whole), ("held", held)) for name, x in rows.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_suffix(".tmp").open("wb") as out:
        np.savez_compressed(out, examples=examples, **arrays)
    file.with_suffix(".tmp").rename(file)


def read_packed(file: Path, width: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], int]:
    """What write_packed wrote. Raises InputError for rows of another width."""
    with np.load(file) as arrays:
        parts = [{name: arrays[f"{part}.{name}"] for name in pack([], width)} for part in ("whole", "held")]
        if (found := parts[0]["tokens"].shape[1]) != width:
            raise InputError(f"{file}: rows of {found} tokens; accepted: of --tokens {width}, or another --out")
        return *parts, int(arrays["examples"])
