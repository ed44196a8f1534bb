"""A table of n-grams out of a model's own replies: after the last tokens of a text, the tokens that came next there.

It is made once (`experiments/ngrams.py`) and drafts for the model that wrote the replies. Shape key: H buckets.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

ORDER = 4  # tokens of the longest context
RANKS = 8
SLOTS = 4  # contexts of one bucket


@struct.dataclass
class NgramTable:
    """Contexts of 1 to ORDER tokens, each in the bucket of its hash, known by another hash of 32 bits.

    Two contexts may share both: then one drafts for the other, and drafts are verified.
    """

    keys: Array  # uint32[H, SLOTS]; 0: nothing stands here
    ranked: Array  # uint16 or int32 [H, SLOTS, RANKS]: what came next, the likeliest first; the last one repeated


def hashes(context: Array, order: int) -> tuple[Array, Array]:
    """Two hashes uint32[...] of the last `order` tokens of context int32[..., ORDER]; the second is never 0.

    context: of jax or of NumPy.
    """
    xp = jnp if isinstance(context, Array) else np
    first, second = (xp.full(context.shape[:-1], seed + order, xp.uint32) for seed in (0x9E3779B1, 0x85EBCA6B))
    for back in range(order, 0, -1):
        token = context[..., -back].astype(xp.uint32)
        first = (first ^ token) * xp.uint32(0x01000193)
        first = first ^ (first >> xp.uint32(15))
        second = (second + token) * xp.uint32(0xCC9E2D51)
        second = second ^ (second >> xp.uint32(13))
    return first, second | xp.uint32(1)


def following(table: NgramTable, context: Array) -> Array:
    """What came after the longest known end of context int32[..., ORDER], the likeliest first: int32[..., RANKS].

    A context reaches back to the first -1. -1 where nothing is known.
    """
    found = jnp.full((*context.shape[:-1], RANKS), -1, jnp.int32)
    for order in range(1, ORDER + 1):
        bucket, key = hashes(context, order)
        bucket = (bucket & jnp.uint32(len(table.keys) - 1)).astype(jnp.int32)
        same = table.keys[bucket] == key[..., None]
        known = same.any(axis=-1) & (context[..., -order:] >= 0).all(axis=-1)
        ranked = table.ranked[bucket, jnp.argmax(same, axis=-1)].astype(jnp.int32)
        found = jnp.where(known[..., None], ranked, found)
    return found


@dataclasses.dataclass(frozen=True)
class Contexts:
    """The contexts of one length, each a row, in the order of their numbers; and what followed them."""

    tokens: np.ndarray  # int[C, order]
    suffix: np.ndarray  # int[C]: the number of the context without its first token, among those of order - 1
    total: np.ndarray  # int[C]: how often it came
    kinds: np.ndarray  # int[C]: how many tokens followed it
    pairs: np.ndarray  # int[P], rising: a context's number * V + a token that followed it
    times: np.ndarray  # int[P]: how often


def count(texts: Iterable[tuple[Sequence[int], Sequence[int]]], vocab_size: int) -> list[Contexts]:
    """How often each token followed each context of 1 to ORDER tokens.

    texts: (the end of a prompt, the reply to it), token ids; the first is context alone.
    """
    texts = [(len(before), np.array([*before, *reply], np.int64)) for before, reply in texts]
    tokens = np.concatenate([text for _, text in texts])
    place = np.concatenate([np.arange(len(text)) for _, text in texts])  # of a token in its text
    answers = np.concatenate([np.arange(len(text)) >= begins for begins, text in texts])
    number, found = np.zeros(len(tokens), np.int64), []  # of the context before each token
    for order in range(1, ORDER + 1):
        at = np.flatnonzero(answers & (place >= order))
        shorter = len(found[-1].total) if found else 1
        contexts, number[at] = np.unique(tokens[at - order] * shorter + number[at], return_inverse=True)
        first, suffix = contexts[:, None] // shorter, contexts % shorter
        rows = np.concatenate([first, found[-1].tokens[suffix]], axis=1) if found else first
        pairs, times = np.unique(number[at] * vocab_size + tokens[at], return_counts=True)
        of, many = pairs // vocab_size, len(contexts)
        total = np.bincount(of, times, many).astype(np.int64)
        found.append(Contexts(rows, suffix, total, np.bincount(of, minlength=many), pairs, times))
    return found


def ranked(counts: list[Contexts], vocab_size: int, least: int) -> list[np.ndarray]:
    """What may follow each context, the likeliest first, the last one repeated: int[C, RANKS] for each length.

    All ends of a context count together, by Witten and Bell's interpolation. -1 for contexts of two tokens or more that
    came less than `least` times.
    """
    best, shares = [], []
    for level, found in enumerate(counts):
        of, token = np.divmod(found.pairs, vocab_size)
        weight = found.total / (found.total + found.kinds)
        share = weight[of] * found.times / found.total[of]
        kept = (found.total >= least) | (level == 0)
        entries = [(of, token, share)]
        if level:
            shorter = np.searchsorted(counts[level - 1].pairs, found.suffix[of] * vocab_size + token)
            share = (1 - weight[of]) * shares[-1][shorter] + share
            # What never followed the whole context stays in the order that the shorter one gives it.
            tokens, odds = (part[found.suffix] for part in best[-1])
            of_context = np.broadcast_to(np.arange(len(kept))[:, None], tokens.shape)
            new = (tokens >= 0) & ~np.isin(of_context * vocab_size + tokens, found.pairs)
            entries = [(of, token, share), (of_context[new], tokens[new], ((1 - weight)[:, None] * odds)[new])]
        shares.append(share)
        of, token, share = (np.concatenate(parts) for parts in zip(*entries, strict=True))
        of, token, share = (part[kept[of]] for part in (of, token, share))
        order = np.lexsort((token, -share, of))
        of, token, share = of[order], token[order], share[order]
        rank = np.arange(len(of)) - np.searchsorted(of, of)
        top = rank < RANKS
        tokens, odds = np.full((len(kept), RANKS), -1), np.zeros((len(kept), RANKS))
        tokens[of[top], rank[top]], odds[of[top], rank[top]] = token[top], share[top]
        best.append((tokens, odds))
    last = lambda tokens: np.maximum((tokens >= 0).sum(axis=1) - 1, 0)[:, None]
    return [np.where(tokens >= 0, tokens, np.take_along_axis(tokens, last(tokens), axis=1)) for tokens, _ in best]


def make_table(
    texts: Iterable[tuple[Sequence[int], Sequence[int]]], vocab_size: int, least: int, buckets: int
) -> tuple[NgramTable, int]:
    """(the table in NumPy, how many contexts found no place) of contexts that came `least` times or more, or of one
    token. texts: see `count`; buckets: a power of two. Where a bucket is full, the contexts that came most often
    stay."""
    counts = count(texts, vocab_size)
    kept = [(found.total >= least) | (level == 0) for level, found in enumerate(counts)]
    best = np.concatenate([rows[k] for rows, k in zip(ranked(counts, vocab_size, least), kept, strict=True)])
    total = np.concatenate([found.total[k] for found, k in zip(counts, kept, strict=True)])
    known = [found.tokens[k] for found, k in zip(counts, kept, strict=True)]
    both = [hashes(np.pad(rows, ((0, 0), (ORDER - rows.shape[1], 0))), rows.shape[1]) for rows in known]
    first, second = (np.concatenate(parts) for parts in zip(*both, strict=True))
    bucket = (first & np.uint32(buckets - 1)).astype(np.int64)
    # Those that came most often first; of equals by their tokens, a beginning before what it begins.
    columns = np.concatenate([np.pad(rows, ((0, 0), (0, ORDER - rows.shape[1])), constant_values=-1) for rows in known])
    order = np.lexsort((*columns.T[::-1], -total, bucket))
    slot = np.arange(len(order)) - np.searchsorted(bucket[order], bucket[order])
    order, slot = order[slot < SLOTS], slot[slot < SLOTS]
    keys = np.zeros((buckets, SLOTS), np.uint32)
    tokens = np.zeros((buckets, SLOTS, RANKS), np.uint16 if vocab_size <= 2**16 else np.int32)
    keys[bucket[order], slot], tokens[bucket[order], slot] = second[order], best[order]
    return NgramTable(keys, tokens), len(total) - len(order)
