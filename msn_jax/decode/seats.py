"""Single rows of a running state: a prompt is seated, read in chunks, started, and makes room for the next one.

Each function is one small compiled program; which row is a traced value. The other rows stay as they are.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from msn_jax.cache import KVCache, waiting_for
from msn_jax.config import MOST_LOGPROBS, DecodeConfig
from msn_jax.decode import verify
from msn_jax.decode.loop import DecodeState, sampling_of
from msn_jax.decode.source import ask
from msn_jax.decode.sources import sources_of
from msn_jax.decode.tree import TreeSet
from msn_jax.model import forward, unembed
from msn_jax.model_config import ModelConfig
from msn_jax.params import Params
from msn_jax.sharding import constrain


@struct.dataclass
class Seat:
    """What a row is to decode."""

    tokens: Array  # int32[S]: the prompt, right-padded
    length: Array  # int32[]: of the prompt
    limit: Array  # int32[]
    request: Array  # int32[]
    sampling: verify.Sampling  # of scalars


def seat_of(prompt: list[int], decode: DecodeConfig, request: int, slots: int) -> Seat:
    tokens = np.zeros(slots, np.int32)
    tokens[: len(prompt)] = prompt
    number = lambda n: np.asarray(n, np.int32)
    limit = number(len(prompt) + decode.max_new_tokens)
    return Seat(tokens, number(len(prompt)), limit, number(request), sampling_of(decode))


@partial(jax.jit, donate_argnames="state")
def place(state: DecodeState, row: Array, seat: Seat) -> DecodeState:
    """The state with a prompt in a row that is done. It stays done until `start`, after its prefill.

    Its length is that of the whole prompt from now on: what the passes of other rows write into a done row lies
    above its length, and so never over what prefill has stored.
    """
    put = lambda of_rows, of_row: of_rows.at[row].set(of_row)
    return state.replace(
        tokens=put(state.tokens, seat.tokens),
        cache=state.cache.replace(length=put(state.cache.length, seat.length - 1)),
        limit=put(state.limit, seat.limit),
        request=put(state.request, seat.request),
        sampling=jax.tree.map(put, state.sampling, seat.sampling),
        done=put(state.done, True),
        stopped=put(state.stopped, False),
        forwards=put(state.forwards, 0),
        accepted=put(state.accepted, jnp.zeros_like(state.accepted[0])),
    )


def _forward_row(params, cache, tokens, row, start, *, cfg, chunk, dtype):
    """`forward` of tokens[row, start : start + chunk]."""
    part = jax.lax.dynamic_slice(tokens, (row, start), (1, chunk))
    of_row = lambda kv: jax.lax.dynamic_slice_in_dim(kv, row, 1)
    alone = KVCache(jax.tree.map(of_row, cache.k), jax.tree.map(of_row, cache.v), start[None])
    return forward(params, cfg, part, (start + jnp.arange(chunk))[None], None, alone, dtype=dtype, taps=cache.taps)


@partial(jax.jit, static_argnames=("cfg", "chunk", "dtype"), donate_argnames="cache")
def prefill_row(
    params: Params, cache: KVCache, tokens: Array, row: Array, start: Array, *, cfg: ModelConfig, chunk: int, dtype=None
) -> KVCache:
    """`loop.prefill_chunk` of one row of tokens int32[B, S]: keys and values of tokens[row, start : start + chunk]."""
    _, new, *features = _forward_row(params, cache, tokens, row, start, cfg=cfg, chunk=chunk, dtype=dtype)
    at = waiting_for(new[-1][1][:, 0, 0, 0], start[None])[0]

    def store(old, kv):
        written = jax.lax.dynamic_update_slice(old, kv.astype(old.dtype), (row, 0, at, 0))
        return constrain(written, "batch", "kv_heads", None, None)

    k, v = zip(*new, strict=True)
    kept = store(cache.features, features[0][:, None]) if features else None
    return cache.replace(k=jax.tree.map(store, cache.k, k), v=jax.tree.map(store, cache.v, v), features=kept)


@partial(jax.jit, static_argnames=("cfg", "chunk", "dtype"))
def logprobs_row(
    params: Params, cache: KVCache, tokens: Array, row: Array, start: Array, *, cfg: ModelConfig, chunk: int, dtype=None
) -> tuple[Array, Array, Array]:
    """Log-probabilities of the tokens at start + 1 .. start + chunk of a row, and of the MOST_LOGPROBS likeliest there.

    The cache must hold the row before `start`. Returns (float32[chunk], ids int32[chunk, n], float32[chunk, n]).
    """
    hidden, *_ = _forward_row(params, cache, tokens, row, start, cfg=cfg, chunk=chunk, dtype=dtype)
    logprobs = jax.nn.log_softmax(unembed(params, cfg, hidden)[0], axis=-1)
    emitted = jax.lax.dynamic_slice(tokens, (row, start + 1), (1, chunk))[0]
    top, ids = jax.lax.top_k(logprobs, min(MOST_LOGPROBS, cfg.vocab_size))
    return jnp.take_along_axis(logprobs, emitted[:, None], axis=1)[:, 0], ids, top


@partial(jax.jit, static_argnames=("cfg", "trees", "shared"), donate_argnames="state")
def start(state: DecodeState, row: Array, *, cfg: ModelConfig, trees: TreeSet, shared: frozenset) -> DecodeState:
    """The state whose row decodes from now on. Its sources of drafts begin anew, but for those named in `shared`."""
    slots = state.tokens.shape[1]
    put = lambda of_rows, of_row: of_rows.at[row].set(of_row[0])
    drafts = dict(state.drafts)
    for source in sources_of(trees):
        if source.name not in shared:
            drafts[source.name] = jax.tree.map(put, drafts[source.name], source.init(cfg, ask(trees, source), 1, slots))
    return state.replace(drafts=drafts, done=state.done.at[row].set(False))


@partial(jax.jit, donate_argnames="state")
def end(state: DecodeState, row: Array) -> DecodeState:
    """The state whose row is done."""
    return state.replace(done=state.done.at[row].set(True))


@partial(jax.jit, static_argnames=("cfg", "trees", "shared", "slots"))
def resize(state: DecodeState, *, cfg: ModelConfig, trees: TreeSet, shared: frozenset, slots: int) -> DecodeState:
    """The state with so many slots, which must hold every row that is not done."""
    B, old = state.tokens.shape

    def fitted(x: Array, axis: int) -> Array:
        if slots < old:
            return jax.lax.slice_in_dim(x, 0, slots, axis=axis)
        return jnp.pad(x, [(0, slots - old if dim == axis else 0) for dim in range(x.ndim)])

    def into(fresh: Array, known: Array) -> Array:
        common = tuple(slice(0, min(sizes)) for sizes in zip(fresh.shape, known.shape, strict=True))
        return known if fresh.shape == known.shape else fresh.at[common].set(known[common])

    def remembered(source) -> Any:
        known = state.drafts[source.name]
        if source.name in shared:
            return known
        return jax.tree.map(into, source.init(cfg, ask(trees, source), B, slots), known)

    kv = lambda x: constrain(fitted(x, 2), "batch", "kv_heads", None, None)
    cache = state.cache.replace(
        k=jax.tree.map(kv, state.cache.k),
        v=jax.tree.map(kv, state.cache.v),
        features=jax.tree.map(kv, state.cache.features),
        length=jnp.minimum(state.cache.length, slots - trees.width - 1),  # of rows that were done long ago
    )
    return state.replace(
        tokens=fitted(state.tokens, 1),
        accepted=fitted(state.accepted, 1),
        cache=cache,
        drafts={source.name: remembered(source) for source in sources_of(trees)},
    )
