"""The decode loop: draft, one tree pass, verify, commit; the whole cycle one compiled program.

The text of a row is `tokens[: last + 1]`, where last = cache.length is the position of the root: the newest token,
known but not yet run through the model. A cycle runs the root and its drafts, keeps the keys and values of the
accepted path, and its last emitted token becomes the next root.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from msn_jax.cache import KVCache, init_cache, waiting_for, write_cache
from msn_jax.config import DecodeConfig
from msn_jax.decode import verify
from msn_jax.decode.source import Seen, Text, Weights, ask, fill
from msn_jax.decode.sources import Drafter, sources_of, taps_of, weights_of
from msn_jax.decode.tree import TreeSet, TreeSpec
from msn_jax.errors import InputError
from msn_jax.linear import activation_dtype
from msn_jax.model import best_token, forward, unembed
from msn_jax.model_config import ModelConfig
from msn_jax.params import Params
from msn_jax.shape_checks import check_shapes

MAX_STOP_IDS = 16


@struct.dataclass
class DecodeState:
    """All that a cycle reads and writes."""

    tokens: Array  # int32[B, S]: the text by position; unspecified beyond the root
    cache: KVCache  # keys and values of tokens[:, :length]; length is the position of the root
    drafts: dict[str, Any]  # what each source remembers, by name, see source.py
    limit: Array  # int32[B]: positions that a row may fill, prompt and new tokens
    done: Array  # bool[B]: a stop token was emitted or the limit reached
    stopped: Array  # bool[B]: by a stop token
    accepted: Array  # int32[B, S]: tokens that each pass of the row emitted
    forwards: Array  # int32[B]: passes of the row
    passes: Array  # int32[trees]: passes by tree
    tree: Array  # int32[]: the tree that every cycle runs; -1: each the best one
    request: Array  # int32[B]: index of the row among all prompts of the call
    stop_ids: Array  # int32[MAX_STOP_IDS], -1 unused
    sampling: verify.Sampling  # of each row, [B]
    activations: jnp.dtype = struct.field(pytree_node=False)  # see activation_dtype


@struct.dataclass
class Progress:
    """What a chunk shows to the outside: copies, since the state itself is given to the next chunk."""

    tokens: Array  # int32[B, S]
    last: Array  # int32[B]: position of the newest token
    done: Array  # bool[B]
    stopped: Array  # bool[B]
    forwards: Array  # int32[B]
    accepted: Array  # int32[B, S]


@struct.dataclass
class PassResult:
    """What a tree pass leaves for commit. E is that of the tree set, whichever tree ran."""

    kv: tuple  # per layer k, v [B, K, E, H] of the best path
    features: tuple  # [B, E, F] of the best path, where the cache keeps some
    emitted: Array  # int32[B, E]
    count: Array  # int32[B]: how many of them hold
    news: dict[str, Any]  # what each source is to remember


def slots_needed(prompt_tokens: int, max_new_tokens: int, width: int, chunk: int) -> int:
    """Cache slots for a row: its prompt in whole chunks, its text, and one path written at the very end."""
    return max(-(-(prompt_tokens - 1) // chunk) * chunk, prompt_tokens + max_new_tokens + width)


def bucket(slots: int) -> int:
    """The cache size that serves `slots`: 256, 512, 768, 1024, then two sizes for each doubling."""
    for size in (256, 512, 768, 1024):
        if slots <= size:
            return size
    size = 1024
    while size < slots:
        size = size * 3 // 2 if size & (size - 1) == 0 else size // 3 * 4
    return size


def init_state(
    cfg: ModelConfig,
    trees: TreeSet,
    prompts: list[list[int]],
    decode: DecodeConfig,
    stop_ids: tuple[int, ...],
    *,
    slots: int,
    requests: list[int] | None = None,
    memory: dict[str, Any] | None = None,
    dtype=jnp.float32,
    backend: str | None = None,
) -> DecodeState:
    """The state before prefill. prompts: token ids of each row, one or more; slots: see `slots_needed`.

    memory: what sources remember of earlier calls, by name. It is donated, as the state is.
    dtype: that of the weights; backend: where the loop is to run (None: jax's default).
    Raises InputError where the slots or the room for stop ids do not suffice.
    """
    B, memory = len(prompts), memory or {}
    if not B or not all(len(prompt) for prompt in prompts):
        raise InputError("prompts without a token; accepted: one row or more of one token or more")
    need = max(len(prompt) for prompt in prompts) + decode.max_new_tokens + trees.width
    if slots < need:
        raise InputError(f"{slots} cache slots; these prompts need {need}")
    if len(stop_ids) > MAX_STOP_IDS:
        raise InputError(f"{len(stop_ids)} stop ids; accepted: up to {MAX_STOP_IDS}")
    tokens = np.zeros((B, slots), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    stops = np.full(MAX_STOP_IDS, -1, np.int32)
    stops[: len(stop_ids)] = stop_ids
    cache = init_cache(cfg, B, slots, dtype, taps_of(trees, cfg))
    return DecodeState(
        tokens=jnp.asarray(tokens),
        cache=cache.replace(length=jnp.asarray(lengths - 1)),
        drafts={
            s.name: memory[s.name] if s.name in memory else s.init(cfg, ask(trees, s), B, slots)
            for s in sources_of(trees)
        },
        limit=jnp.asarray(lengths + decode.max_new_tokens),
        done=jnp.zeros(B, bool),
        stopped=jnp.zeros(B, bool),
        accepted=jnp.zeros((B, slots), jnp.int32),
        forwards=jnp.zeros(B, jnp.int32),
        passes=jnp.zeros(len(trees.trees), jnp.int32),
        tree=jnp.int32(-1),
        request=jnp.asarray(list(range(B)) if requests is None else requests, jnp.int32),
        stop_ids=jnp.asarray(stops),
        sampling=jax.tree.map(lambda x: jnp.broadcast_to(x, (B,)), sampling_of(decode)),
        activations=activation_dtype(dtype, backend or jax.default_backend()),
    )


def sampling_of(decode: DecodeConfig) -> verify.Sampling:
    """The traced part of the settings."""
    return verify.Sampling(
        temperature=jnp.float32(decode.temperature),
        top_k=jnp.int32(decode.top_k),
        top_p=jnp.float32(decode.top_p),
        min_p=jnp.float32(decode.min_p),
        repetition_penalty=jnp.float32(decode.repetition_penalty),
        seed=jnp.uint32(decode.seed),
    )


@partial(jax.jit, static_argnames=("cfg", "chunk", "dtype"), donate_argnames="cache")
def prefill_chunk(
    params: Params, cache: KVCache, tokens: Array, start: Array, *, cfg: ModelConfig, chunk: int, dtype=None
) -> KVCache:
    """Store keys and values of tokens[:, start : start + chunk]; the cache's lengths stay. dtype: see `forward`.

    Rows are right-padded: what a shorter row stores beyond its prompt lies above its length and is never read.
    """
    B = tokens.shape[0]
    part = jax.lax.dynamic_slice_in_dim(tokens, start, chunk, axis=1)
    positions = jnp.broadcast_to(start + jnp.arange(chunk), part.shape)
    starts = jnp.full(B, start, jnp.int32)
    alone = cache.replace(length=starts)
    _, new, *features = forward(params, cfg, part, positions, None, alone, dtype=dtype, taps=cache.taps)
    return write_cache(cache, new, waiting_for(new[-1][1][:, 0, 0, 0], starts), *features)


def prefill(params: Params, state: DecodeState, *, cfg: ModelConfig, chunk: int) -> DecodeState:
    """Run every prompt but its last token, the first root, in chunks of one shape.

    Raises InputError where the last chunk would not fit into the cache.
    """
    cache, slots = state.cache, state.tokens.shape[1]
    if -(-int(cache.length.max()) // chunk) * chunk > slots:
        raise InputError(f"{slots} cache slots do not hold prompts of {int(cache.length.max())} in chunks of {chunk}")
    for start in range(0, int(cache.length.max()), chunk):
        cache = prefill_chunk(params, cache, state.tokens, start, cfg=cfg, chunk=chunk, dtype=state.activations)
    return state.replace(cache=cache)


def text_of(state: DecodeState) -> Text:
    return Text(state.tokens, state.cache.length, state.request, state.sampling.seed, state.cache.features)


def tree_pass(
    params: Params,
    weights: dict[str, Weights],
    cfg: ModelConfig,
    trees: TreeSet,
    tree: TreeSpec,
    state: DecodeState,
    scratch: dict[str, Any],
) -> PassResult:
    """Draft, run and verify one tree. Reads the state, writes nothing. scratch: what each source began with."""
    sources, text, last = sources_of(trees), text_of(state), state.cache.length
    drafted = fill(tree, sources, weights, state.drafts, scratch, text.root)
    valid, tokens = drafted >= 0, jnp.broadcast_to(text.root[:, None], drafted.shape)
    added = {}
    for source in sources:
        own, carry = weights[source.name], state.drafts[source.name]
        probes = source.probes(own, carry, text, tree)
        tokens = tokens if probes is None else jnp.where(probes >= 0, probes, tokens)
        added |= source.added(own, tree)
    tokens = jnp.where(valid, drafted, tokens)

    positions = last[:, None] + tree.depth[None]
    added |= {"dtype": state.activations, "taps": state.cache.taps}
    hidden, new, *features = forward(params, cfg, tokens, positions, tree.ancestors, state.cache, **added)
    logits = unembed(params, cfg, hidden)

    greedy = best_token(logits)
    settled = state.request, state.sampling, state.tokens
    target = verify.targets(tree, logits, greedy, tokens, valid, last, *settled)
    best, emitted, count = verify.accept(tree, tokens, valid, target)
    seen = Seen(tokens, valid, hidden, logits, greedy, best, tree)

    spare = trees.width - tree.width
    path = jnp.pad(jnp.asarray(tree.path)[best], ((0, 0), (0, spare)))
    rows = path[:, None, :, None]
    return PassResult(
        kv=tuple((jnp.take_along_axis(k, rows, axis=2), jnp.take_along_axis(v, rows, axis=2)) for k, v in new),
        features=tuple(jnp.take_along_axis(x, path[:, :, None], axis=1) for x in features),
        emitted=jnp.pad(emitted, ((0, 0), (0, spare))),
        count=count,
        news={s.name: s.observe(weights[s.name], state.drafts[s.name], seen, ask(trees, s)) for s in sources},
    )


def commit(state: DecodeState, result: PassResult) -> DecodeState:
    """Write the accepted path: the only place where cache, text and counters change. Finished rows stay."""
    rows = jnp.arange(state.tokens.shape[0])
    last = state.cache.length
    kept, stopped = verify.cut(result.emitted, result.count, state.limit - last - 1, state.stop_ids)
    kept = jnp.where(state.done, 0, kept)
    cache = write_cache(state.cache, result.kv, waiting_for(result.emitted[:, 0], last), *result.features)
    after = last[:, None] + 1 + jnp.arange(result.emitted.shape[1])[None]
    inside = jnp.arange(result.emitted.shape[1])[None] < kept[:, None]
    old = jnp.take_along_axis(state.tokens, after, axis=1)
    count = jnp.where(state.done, state.accepted[rows, state.forwards], kept)
    last = last + kept
    return state.replace(
        tokens=state.tokens.at[rows[:, None], after].set(jnp.where(inside, result.emitted, old)),
        cache=cache.replace(length=last),
        done=state.done | stopped | (last + 1 >= state.limit),
        stopped=state.stopped | (stopped & ~state.done),
        accepted=state.accepted.at[rows, state.forwards].set(count),
        forwards=state.forwards + jnp.where(state.done, 0, 1),
    )


def step(
    params: Params, state: DecodeState, drafter: Drafter | None = None, *, cfg: ModelConfig, trees: TreeSet
) -> DecodeState:
    """One cycle: choose a tree, draft, run, verify, commit, remember. Pure; works under any jit and mesh.

    drafter: an adapter for the noise nodes of the trees (layers as a tuple), with an embedding for each noise depth;
    or by the name of a source what it has of its own.
    """
    keys = f"float[B, {cfg.kv_heads}, S, {cfg.head_dim}]"
    check_shapes(
        **{"state.tokens": (state.tokens, "int[B, S]"), "state.cache.k[0]": (state.cache.k[0], keys)},
        **{"state.limit": (state.limit, "int[B]"), "state.request": (state.request, "int[B]")},
    )
    sources, text, live = sources_of(trees), text_of(state), ~state.done
    weights = weights_of(sources, params, cfg, drafter)
    read = lambda s: s.read(weights[s.name], state.drafts[s.name], text, live, ask(trees, s))
    state = state.replace(drafts={s.name: read(s) for s in sources})
    scratch, confidence = {}, jnp.zeros(state.done.shape, jnp.int32)
    for source in sources:
        began = source.begin(weights[source.name], state.drafts[source.name], text, ask(trees, source))
        scratch[source.name], sure = began
        confidence = confidence if sure is None else jnp.maximum(confidence, sure)
    choice = jnp.where(state.tree < 0, choose(trees, confidence, live), state.tree)
    branches = [partial(tree_pass, params, weights, cfg, trees, tree) for tree in trees.trees]
    result = jax.lax.switch(choice, branches, state, scratch)
    after = commit(state, result)
    update = lambda s: s.update(weights[s.name], state.drafts[s.name], result.news[s.name], text_of(after), live)
    return after.replace(passes=state.passes.at[choice].add(1), drafts={s.name: update(s) for s in sources})


def choose(trees: TreeSet, confidence: Array, live: Array) -> Array:
    """The tree of a cycle, see TreeSet. confidence int32[B]; live bool[B]: rows that are not finished. int32[]"""
    score = jnp.asarray(trees.score)[:, confidence]
    return jnp.argmax(jnp.where(live[None], score, 0).sum(axis=1)).astype(jnp.int32)


@partial(jax.jit, static_argnames=("cfg", "trees"), donate_argnames="state")
def run(
    params: Params,
    state: DecodeState,
    cycles: Array,
    drafter: Drafter | None = None,
    enough: Array | None = None,
    *,
    cfg: ModelConfig,
    trees: TreeSet,
) -> tuple[DecodeState, Progress]:
    """Cycles until every row is done, at most `cycles` of them (0 compiles and does nothing).

    enough: int32[], it returns as soon as so many rows are done. It returns too where a row that is not done has no
    slots left for another pass: then `seats.resize` gives it some.
    The state is donated. To stream, call it with a few cycles at a time and print the progress of one chunk
    while the next one runs.
    """
    rows, slots = state.tokens.shape
    enough = rows if enough is None else enough

    def unfinished(carry):
        cycle, state = carry
        room = state.done | (state.cache.length + trees.width < slots)
        return (cycle < cycles) & (state.done.sum() < enough) & room.all()

    def cycle(carry):
        return carry[0] + 1, step(params, carry[1], drafter, cfg=cfg, trees=trees)

    _, state = jax.lax.while_loop(unfinished, cycle, (jnp.int32(0), state))
    return state, Progress(
        tokens=state.tokens,
        last=state.cache.length,
        done=state.done,
        stopped=state.stopped,
        forwards=state.forwards,
        accepted=state.accepted,
    )
