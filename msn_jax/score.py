"""Log-likelihoods of given continuations: what multiple choice and perplexity are measured with."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from msn_jax.decode.loop import bucket
from msn_jax.errors import InputError
from msn_jax.io.loading import LM
from msn_jax.model import forward, unembed


def loglikelihoods(
    lm: LM, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], batch_size: int = 8
) -> list[tuple[float, bool]]:
    """For each (context, continuation), token ids both: log p(continuation | context), and whether it is greedy.

    The last token of a continuation is scored, but never read: all before it must fit the model's context.
    Raises InputError for an empty context or continuation, for what does not fit, and for an id without an embedding.
    """
    for i, (context, continuation) in enumerate(pairs):
        if not len(context) or not len(continuation):
            raise InputError(f"pair {i + 1} has an empty context or continuation; accepted: one token or more in each")
        if len(context) + len(continuation) > lm.cfg.max_position + 1:
            raise InputError(
                f"pair {i + 1} has {len(context) + len(continuation)} tokens; "
                f"the model's context is {lm.cfg.max_position}, and one more that is scored alone"
            )
        if not all(0 <= token < lm.cfg.vocab_size for token in (*context, *continuation)):
            raise InputError(f"pair {i + 1} has token ids outside 0 .. {lm.cfg.vocab_size - 1}")
    # Neighbours in length share a batch, so that little of it is padding.
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
    out: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
    for at in range(0, len(order), batch_size):
        rows = order[at : at + batch_size]
        longest = max(len(pairs[i][0]) + len(pairs[i][1]) - 1 for i in rows)
        most = max(len(pairs[i][1]) for i in rows)
        most = 8 if most <= 8 else bucket(most)
        width = next(size for size in (64, 128, bucket(longest)) if longest <= size)
        tokens = np.zeros((batch_size, width), np.int32)
        places, labels = np.zeros((batch_size, most), np.int32), np.full((batch_size, most), -1, np.int32)
        for row, i in enumerate(rows):
            context, continuation = pairs[i]
            n, m = len(context), len(continuation)
            tokens[row, : n + m - 1] = [*context, *continuation][:-1]
            places[row, :m], labels[row, :m] = np.arange(n - 1, n + m - 1), continuation
        scores, greedy = jax.device_get(_score(lm.params, tokens, places, labels, cfg=lm.cfg, dtype=lm.activations))
        for row, i in enumerate(rows):
            out[i] = float(scores[row]), bool(greedy[row])
    return out


def rolling_pairs(ids: Sequence[int], prefix: int, most: int) -> list[tuple[list[int], list[int]]]:
    """A text of any length as (context, continuation) pairs that each fit a context of `most` tokens.

    Every token is in one continuation, `prefix` is the context of the first, and the rest have as much of the text
    before them as fits: what lm-evaluation-harness calls rolling windows with a context_len of 1.
    """
    text, pairs = [prefix, *ids], []
    for at in range(1, len(text), most):
        end = min(at + most, len(text))
        pairs.append((text[max(end - most - 1, 0) : at], text[at:end]))
    return pairs


@partial(jax.jit, static_argnames=("cfg", "dtype"))
def _score(params, tokens, places, labels, *, cfg, dtype):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _ = forward(params, cfg, tokens, positions, dtype=dtype)

    def one(row):
        hidden, places, labels = row
        logits = unembed(params, cfg, hidden[places])
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(labels, 0)[:, None], axis=1)[:, 0]
        there = labels >= 0
        return jnp.where(there, picked, 0).sum(), ((jnp.argmax(logits, axis=1) == labels) | ~there).all()

    return jax.lax.map(one, (hidden, places, labels))
