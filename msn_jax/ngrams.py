"""A table of n-grams out of a model's own replies: after the last tokens of a text, the tokens that came next there.

It is made once (`experiments/ngrams.py`) and drafts for the model that wrote the replies. Shape key: H buckets.
"""

from __future__ import annotations

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


def count(texts: Iterable[tuple[Sequence[int], Sequence[int]]]) -> list[dict[tuple[int, ...], dict[int, int]]]:
    """How often each token followed each context, by the context's length less 1.

    texts: (the end of a prompt, the reply to it), token ids; the first is context alone.
    """
    counts: list[dict] = [{} for _ in range(ORDER)]
    for before, reply in texts:
        text = [*before, *reply]
        for at in range(len(before), len(text)):
            for order in range(1, min(ORDER, at) + 1):
                after = counts[order - 1].setdefault(tuple(text[at - order : at]), {})
                after[text[at]] = after.get(text[at], 0) + 1
    return counts


def ranked(counts: list[dict], context: tuple[int, ...]) -> list[int]:
    """What may follow a context, the likeliest first: all its ends together, by Witten and Bell's interpolation."""
    share: dict[int, float] = {}
    for order in range(1, len(context) + 1):
        after = counts[order - 1][context[-order:]]
        total = sum(after.values())
        weight = total / (total + len(after))
        share = {token: (1 - weight) * p for token, p in share.items()}
        for token, n in after.items():
            share[token] = share.get(token, 0.0) + weight * n / total
    return sorted(share, key=lambda token: (-share[token], token))[:RANKS]


def make_table(counts: list[dict], vocab_size: int, least: int, buckets: int) -> tuple[NgramTable, int]:
    """(the table in NumPy, how many contexts found no place) of contexts that came `least` times or more, or of one
    token. buckets: a power of two. Where a bucket is full, the contexts that came most often stay."""
    kept = [(sum(after.values()), context) for part in counts for context, after in part.items()]
    kept = [(n, context) for n, context in kept if n >= least or len(context) == 1]
    kept.sort(key=lambda pair: (-pair[0], pair[1]))
    hashed = {}
    for order in range(1, ORDER + 1):
        contexts = [context for _, context in kept if len(context) == order]
        ends = np.full((len(contexts), ORDER), -1)
        ends[:, ORDER - order :] = np.array(contexts, int).reshape(-1, order)
        hashed |= zip(contexts, zip(*(h.tolist() for h in hashes(ends, order)), strict=True), strict=True)
    keys = np.zeros((buckets, SLOTS), np.uint32)
    tokens = np.zeros((buckets, SLOTS, RANKS), np.uint16 if vocab_size <= 2**16 else np.int32)
    used, lost = np.zeros(buckets, int), 0
    for _, context in kept:
        first, second = hashed[context]
        bucket = first & (buckets - 1)
        if used[bucket] == SLOTS:
            lost += 1
            continue
        best = ranked(counts, context)
        keys[bucket, used[bucket]] = second
        tokens[bucket, used[bucket]] = best + best[-1:] * (RANKS - len(best))
        used[bucket] += 1
    return NgramTable(keys, tokens), lost
