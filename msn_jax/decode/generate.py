"""Prompts in, results out: batches, cache buckets, timing and streaming around the compiled loop."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from msn_jax.config import DecodeConfig
from msn_jax.decode import loop
from msn_jax.decode.tree import TreeSet, tree_set
from msn_jax.decode.verify import near_tie
from msn_jax.errors import InputError
from msn_jax.io.loading import LM
from msn_jax.io.tokenizer import decode as to_text
from msn_jax.io.tokenizer import encode_chat, encode_text
from msn_jax.model import forward, unembed

# Tokens of one prefill pass. On CPU 64 already run at the speed of the matrix products.
PREFILL_CHUNK = {"cpu": 64}
ACCELERATOR_CHUNK = 512
STREAM_CYCLES = 4  # passes between two looks at a streamed text
_warm: set = set()  # programs that have run once in this process


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What became of one prompt. The fields of a row of decode.py --out."""

    id: Any
    prompt_tokens: int
    tokens: list[int]  # generated ids, the stop token included
    text: str  # of the tokens, as it stands behind the prompt; without special tokens
    finish_reason: str  # "stop" or "length"
    forwards: int  # model passes after prefill
    accepted: list[int]  # tokens that each pass emitted
    seconds: float  # generation without compilation; of a batch, its time over its size
    prefill_seconds: float
    method: str

    @property
    def mat(self) -> float:
        """Mean accepted tokens: tokens a pass."""
        return len(self.tokens) / self.forwards

    @property
    def tokens_per_s(self) -> float:
        return len(self.tokens) / self.seconds


def encode(lm: LM, prompt: str | Sequence) -> list[int]:
    """Token ids of a raw text, of a conversation (a list of role/content dicts), or of a list of ids as it is.

    Raises InputError for a prompt without a token.
    """
    if isinstance(prompt, str):
        ids = encode_text(lm.tokenizer, prompt)
    elif len(prompt) and isinstance(prompt[0], dict):
        ids = encode_chat(lm.tokenizer, prompt)
    else:
        ids = [int(i) for i in prompt]
    if any(not 0 <= i < lm.cfg.vocab_size for i in ids):
        raise InputError(f"a prompt has token ids outside 0 .. {lm.cfg.vocab_size - 1}")
    if not ids:
        raise InputError("the prompt is empty; accepted: at least one token")
    return ids


def generate(lm: LM, prompts: Sequence, **settings) -> list[Result]:
    """Generate for each prompt: a text, a conversation, or token ids (see `encode`).

    settings: the fields of DecodeConfig (method, tree, max_new_tokens, batch_size, temperature, top_k, top_p, seed).
    Raises InputError, before any work, for settings or prompts that cannot be honoured.
    """
    if isinstance(prompts, str):
        raise InputError("prompts is one text; accepted: a list of prompts")
    rows = [encode(lm, prompt) for prompt in prompts]
    return [result for batch in generate_batches(lm, rows, DecodeConfig(**settings)) for result in batch]


def generate_batches(
    lm: LM,
    prompts: Sequence[list[int]],
    decode: DecodeConfig,
    *,
    ids: Sequence | None = None,
    on_tokens: Callable[[list[int]], None] | None = None,
) -> Iterator[list[Result]]:
    """Results batch by batch, in input order.

    on_tokens (batch size 1 only) is called with the new ids every few passes, while the next ones run.
    """
    for i, prompt in enumerate(prompts):
        if len(prompt) + decode.max_new_tokens > lm.cfg.max_position:
            raise InputError(
                f"prompt {i + 1} has {len(prompt)} tokens, with {decode.max_new_tokens} new ones "
                f"{len(prompt) + decode.max_new_tokens}; the model's context is {lm.cfg.max_position}"
            )
    if on_tokens is not None and decode.batch_size != 1:
        raise InputError("streaming needs batch_size 1")
    trees = _trees(lm, decode)
    ids = list(range(len(prompts))) if ids is None else ids
    size = min(decode.batch_size, len(prompts))
    # The checks above are for the call, not for the first result.
    return (
        _generate_batch(lm, prompts[at : at + size], ids[at : at + size], at, size, decode, trees, on_tokens)
        for at in range(0, len(prompts), max(size, 1))
    )


def _trees(lm: LM, decode: DecodeConfig) -> TreeSet:
    trees = tree_set(decode.method, decode.tree, lm.backend, lm.drafter is not None)
    depths = max(int(tree.noise_depth.max()) for tree in trees.trees)
    if lm.drafter is not None and depths > len(lm.drafter.noise_embed):
        raise InputError(
            f"tree {trees.name!r} has {depths} noise tokens in a row; "
            f"accepted by this adapter: up to {len(lm.drafter.noise_embed)}"
        )
    return trees


def _generate_batch(lm, prompts, ids, first, size, decode, trees, on_tokens) -> list[Result]:
    chunk = PREFILL_CHUNK.get(lm.backend, ACCELERATOR_CHUNK)
    need = max(loop.slots_needed(len(p), decode.max_new_tokens, trees.width, chunk) for p in prompts)
    slots = loop.bucket(need)
    # A short last batch is filled with rows that are done from the start, so that it runs the same program.
    fill = size - len(prompts)
    new_state = partial(loop.init_state, lm.cfg, trees, slots=slots, dtype=lm.dtype, backend=lm.backend)
    run = lambda state, cycles: loop.run(lm.params, state, cycles, lm.drafter, cfg=lm.cfg, trees=trees)

    # Compile, and run once, what is timed below: XLA:CPU sets up the products of a program, and of each tree in it,
    # when they first run (0.6 to 1 s for SmolLM2).
    layout = tuple((x.shape, x.dtype, x.sharding) for x in jax.tree.leaves((lm.params, lm.drafter)))
    program = (lm.cfg, size, slots, layout)
    decoding = (program, trees)
    if decoding not in _warm:
        one_cycle = dataclasses.replace(decode, max_new_tokens=1)  # or it may need more slots than the prompts
        for tree in range(len(trees.trees)):
            state = new_state([[0]] * size, one_cycle, lm.stop_ids).replace(tree=jnp.int32(tree))
            jax.block_until_ready(run(state, 1))
        _warm.add(decoding)
    requests = list(range(first, first + size))
    state = new_state([*prompts, *[[0]] * fill], decode, lm.stop_ids, requests=requests)
    state = state.replace(done=jnp.arange(size) >= len(prompts))
    if (program, chunk) not in _warm and max(map(len, prompts)) > 1:
        dtype = state.activations
        cache = loop.prefill_chunk(lm.params, state.cache, state.tokens, 0, cfg=lm.cfg, chunk=chunk, dtype=dtype)
        state = state.replace(cache=cache)
        _warm.add((program, chunk))
    jax.block_until_ready(state)
    start = time.perf_counter()
    state = jax.block_until_ready(loop.prefill(lm.params, state, cfg=lm.cfg, chunk=chunk))
    prefill_seconds = time.perf_counter() - start

    start = time.perf_counter()
    if on_tokens is None:
        state, _ = run(state, 2**31 - 1)
    else:
        shown = len(prompts[0])
        state, progress = run(state, STREAM_CYCLES)
        while True:
            state, following = run(state, STREAM_CYCLES)
            end = int(progress.last[0]) + 1
            on_tokens(np.asarray(progress.tokens)[0, shown:end].tolist())
            shown = end
            if progress.done.all():
                break
            progress = following
    jax.block_until_ready(state)
    seconds = time.perf_counter() - start

    host = jax.device_get(state.replace(cache=state.cache.length))
    results = []
    for row, (prompt, id_) in enumerate(zip(prompts, ids, strict=True)):
        tokens = host.tokens[row, len(prompt) : host.cache[row] + 1].tolist()
        results.append(
            Result(
                id=id_,
                prompt_tokens=len(prompt),
                tokens=tokens,
                text=to_text(lm.tokenizer, tokens, after=prompt),
                finish_reason="stop" if host.stopped[row] else "length",
                forwards=int(host.forwards[row]),
                accepted=host.accepted[row, : host.forwards[row]].tolist(),
                seconds=seconds / len(prompts),
                prefill_seconds=prefill_seconds / len(prompts),
                method=decode.method,
            )
        )
    return results


def is_near_tie(lm: LM, ids: Sequence[int], decode: DecodeConfig, request: int = 0) -> bool:
    """Whether rounding alone can decide the token after `ids`, see `verify.near_tie`."""
    length = loop.bucket(len(ids))
    tokens = np.zeros((1, length), np.int32)
    tokens[0, : len(ids)] = ids
    sampling = loop.sampling_of(decode)
    tie = _near_tie(lm.params, jnp.asarray(tokens), len(ids), request, sampling, cfg=lm.cfg, dtype=lm.activations)
    return bool(tie)


@partial(jax.jit, static_argnames=("cfg", "dtype"))
def _near_tie(params, tokens, length, request, sampling, *, cfg, dtype):
    hidden, _ = forward(params, cfg, tokens, jnp.arange(tokens.shape[1])[None], dtype=dtype)
    logits = unembed(params, cfg, jax.lax.dynamic_index_in_dim(hidden, length - 1, axis=1, keepdims=False))
    return near_tie(logits[0], jnp.int32(length), jnp.int32(request), sampling)
