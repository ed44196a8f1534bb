"""Token Recycling (Luo et al. 2024): what the model last said after a token, drafted again after that token."""

from __future__ import annotations

import contextlib
import dataclasses
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from msn_jax.cache import waiting_for
from msn_jax.decode.source import Ask, At, Seen, Source, Text
from msn_jax.decode.tree import PROBES, RECYCLING
from msn_jax.errors import InputError, first_line

RANKS = 8  # candidates kept for each token
BLOCK = 128  # columns of logits that are looked through together


@struct.dataclass
class News:
    """The nodes of a pass, filled up to the most that any tree has."""

    tokens: Array  # int32[B, N]; -1: nothing was seen
    top: Array  # int32[B, N, RANKS]


class Recycling(Source):
    """Carry int32[B, V, RANKS], or int32[1, V, RANKS] shared by all rows: the best candidates after each token as the
    last pass that saw the token had them; -1 before.

    Every verified node teaches, the rejected ones too. Of two nodes with the same token the later one counts, and of
    two rows that share the table the later row.
    """

    name = RECYCLING
    by_parent = True

    def init(self, cfg, ask: Ask, batch: int, slots: int) -> Array:
        return jnp.full((batch, cfg.vocab_size, RANKS), -1, jnp.int32)

    def level(self, weights, carry: Array, scratch, at: At, tokens: Array) -> tuple[Array, tuple]:
        above = tokens[:, at.parents]
        rows = jnp.zeros_like(above) if len(carry) == 1 else jnp.arange(len(carry))[:, None]
        following = carry[rows, jnp.maximum(above, 0)]  # [B, parents, RANKS]
        return at.ranked(jnp.where(above[:, :, None] >= 0, following, -1)), scratch

    def observe(self, weights, carry, seen: Seen, ask: Ask) -> News:
        nodes = np.flatnonzero(~seen.tree.kind(*PROBES))
        tokens = jnp.where(seen.valid, seen.tokens, -1)[:, : len(nodes)]  # probes come last
        top = largest(seen.logits[:, : len(nodes)], RANKS)
        spare = ask.drafts - len(nodes)
        return News(
            jnp.pad(tokens, ((0, 0), (0, spare)), constant_values=-1), jnp.pad(top, ((0, 0), (0, spare), (0, 0)))
        )

    def update(self, weights, carry: Array, news: News, text: Text, live: Array) -> Array:
        tokens, top = jnp.where(live[:, None], news.tokens, -1), news.top
        if len(carry) == 1:
            tokens, top = tokens.reshape(1, -1), top.reshape(1, -1, RANKS)
        later = np.triu(np.ones((tokens.shape[1],) * 2, bool), 1)
        again = ((tokens[:, :, None] == tokens[:, None, :]) & later[None]).any(axis=2)
        where = jnp.where((tokens < 0) | again, carry.shape[1], tokens)  # beyond the table: dropped
        # The text's end is known when nothing reads drafts any more.
        where = waiting_for(text.last[:1, None], where)
        return carry.at[jnp.arange(len(carry))[:, None], where].set(top, mode="drop")


def largest(logits: Array, count: int) -> Array:
    """`jax.lax.top_k(logits, count)[1]` for logits [..., V]. int32[..., count]

    It looks for the `count` blocks with the largest maxima, and sorts these alone: XLA:CPU sorts a whole row.
    """
    V = logits.shape[-1]
    blocks = -(-V // BLOCK)
    if blocks <= 2 * count:
        return jax.lax.top_k(logits, count)[1]
    padded = jnp.pad(logits, [(0, 0)] * (logits.ndim - 1) + [(0, blocks * BLOCK - V)], constant_values=-jnp.inf)
    padded = padded.reshape(*logits.shape[:-1], blocks, BLOCK)
    best = jnp.sort(jax.lax.top_k(padded.max(axis=-1), count)[1], axis=-1)  # in order, so that ties fall as before
    within = jnp.take_along_axis(padded, best[..., None], axis=-2).reshape(*logits.shape[:-1], count * BLOCK)
    at = jax.lax.top_k(within, count)[1]
    return jnp.take_along_axis(best, at // BLOCK, axis=-1) * BLOCK + at % BLOCK


@contextlib.contextmanager
def kept_table(lm, path: str | Path | None):
    """The model with a table that all its requests share, read from a file and written back; None: as it is."""
    if path is None:
        yield lm
        return
    memory = {RECYCLING: read_table(path, lm.cfg.vocab_size)}
    yield dataclasses.replace(lm, memory=memory)
    write_table(path, memory[RECYCLING])


def read_table(path: str | Path, vocab_size: int) -> Array:
    """A table that rows share, int32[1, V, RANKS], as `write_table` left it; empty where there is no such file.

    Raises InputError for a file of something else, or of another vocabulary.
    """
    if not Path(path).exists():
        return jnp.full((1, vocab_size, RANKS), -1, jnp.int32)
    try:
        with np.load(path) as file:
            table = file[RECYCLING].astype(np.int32)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as e:
        raise InputError(f"draft memory {path}: cannot be read ({first_line(e)})") from e
    if table.shape != (vocab_size, RANKS) or table.min() < -1 or table.max() >= vocab_size:
        wanted = f"{vocab_size} rows of {RANKS} token ids"
        raise InputError(f"draft memory {path}: has shape {table.shape}; accepted: of the same vocabulary, {wanted}")
    return jnp.asarray(table)[None]


def write_table(path: str | Path, table: Array) -> None:
    """Keep a shared table for later; the file that was there stays until the new one is whole."""
    part = Path(f"{path}.partial")
    with part.open("wb") as file:
        np.savez_compressed(file, **{RECYCLING: np.asarray(table)[0]})
    part.replace(path)
