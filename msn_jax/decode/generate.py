"""Prompts in, results out: batches, cache buckets, timing and streaming around the compiled loop."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Never

import jax
import jax.numpy as jnp
import numpy as np

from msn_jax.config import DecodeConfig
from msn_jax.decode import loop
from msn_jax.decode.prompts import encode, shown
from msn_jax.decode.tree import TreeSet
from msn_jax.decode.tree_sets import tree_set
from msn_jax.decode.verify import near_tie
from msn_jax.errors import InputError
from msn_jax.io.loading import LM
from msn_jax.io.tokenizer import TextStream
from msn_jax.io.tokenizer import decode as to_text
from msn_jax.model import forward, unembed

logger = logging.getLogger("msn_jax")

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


def _refuse_unknown(settings: Mapping[str, Any]) -> None:
    """Raise InputError for settings that are no field of DecodeConfig."""
    for name in settings:
        known = ", ".join(field.name for field in dataclasses.fields(DecodeConfig))
        raise InputError(f"{name} is no setting; accepted: {known}")


def generate(
    lm: LM,
    prompts: Sequence,
    *,
    method: str = "tr-jacobi",
    tree: str | None = None,
    max_new_tokens: int = 256,
    batch_size: int = 1,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    **unknown: Never,
) -> list[Result]:
    """Generate for each prompt: a text, a conversation, or token ids (see `encode`).

    The settings are those of DecodeConfig. Raises InputError, before any work, for settings or prompts that cannot be
    honoured.
    """
    _refuse_unknown(unknown)
    decode = DecodeConfig(
        method=method,
        tree=tree,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )
    if not isinstance(prompts, Iterable) or isinstance(prompts, (str, bytes, Mapping)):
        raise InputError(f"prompts is {shown(prompts)}; accepted: a list of prompts")
    rows = []
    for number, prompt in enumerate(prompts, 1):
        try:
            rows.append(encode(lm, prompt))
        except InputError as e:
            if isinstance(prompt, Mapping) and "role" in prompt:
                raise InputError(
                    "prompts is one conversation; accepted: a list of prompts, here [[{role, ...}]]"
                ) from e
            raise InputError(f"prompt {number}: {e}") from e
    return [result for batch in generate_batches(lm, rows, decode) for result in batch]


class Stream:
    """The text of an answer as it comes: an iterator of pieces, whole characters each, that add up to `.text`."""

    result: Result | None = None  # of the whole answer, when the iterator is at its end

    def __init__(self, lm: LM, prompt: str | Sequence, decode: DecodeConfig):
        ids = encode(lm, prompt)
        _check_lengths(lm, [ids], decode)
        self._text = TextStream(lm.tokenizer, after=ids)
        self._cycles = _one_streamed(lm, ids, decode, _trees(lm, decode))
        self.text = ""  # so far

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        while self.result is None:
            try:
                piece = self._text.add(next(self._cycles))
            except StopIteration as end:
                self.result, piece = end.value, self._text.flush()
            if piece:
                self.text += piece
                return piece
        raise StopIteration


def stream(
    lm: LM,
    prompt: str | Sequence,
    *,
    method: str = "tr-jacobi",
    tree: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    **unknown: Never,
) -> Stream:
    """The answer to one prompt, as an iterator of its text; its tokens are those of `generate(lm, [prompt])`.

    for piece in (answer := msn_jax.stream(lm, "What is a prime number?")): print(piece, end="", flush=True)
    Then `answer.result` is what `generate` gives. Raises InputError as that does, before the first piece.
    """
    _refuse_unknown(unknown)
    decode = DecodeConfig(
        method=method,
        tree=tree,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )
    return Stream(lm, prompt, decode)


def generate_batches(
    lm: LM,
    prompts: Sequence[list[int]],
    decode: DecodeConfig,
    *,
    ids: Sequence | None = None,
) -> Iterator[list[Result]]:
    """Results batch by batch, in input order."""
    _check_lengths(lm, prompts, decode)
    trees = _trees(lm, decode)
    ids = list(range(len(prompts))) if ids is None else ids
    size = min(decode.batch_size, len(prompts))
    # The checks above are for the call, not for the first result.
    return (
        _generate_batch(lm, prompts[at : at + size], ids[at : at + size], at, size, decode, trees)
        for at in range(0, len(prompts), max(size, 1))
    )


def _check_lengths(lm: LM, prompts: Sequence[list[int]], decode: DecodeConfig) -> None:
    for i, prompt in enumerate(prompts):
        if len(prompt) + decode.max_new_tokens > lm.cfg.max_position:
            raise InputError(
                f"prompt {i + 1} has {len(prompt)} tokens, with {decode.max_new_tokens} new ones "
                f"{len(prompt) + decode.max_new_tokens}; the model's context is {lm.cfg.max_position}"
            )


def _trees(lm: LM, decode: DecodeConfig) -> TreeSet:
    trees = tree_set(decode.method, decode.tree, lm.backend, lm.drafter is not None, decode.batch_size)
    depths = max(int(tree.noise_depth.max()) for tree in trees.trees)
    if lm.drafter is not None and depths > len(lm.drafter.noise_embed):
        raise InputError(
            f"tree {trees.name!r} has {depths} noise tokens in a row; "
            f"accepted by this adapter: up to {len(lm.drafter.noise_embed)}"
        )
    return trees


@dataclasses.dataclass
class _Ready:
    """Prompts that are read into the cache, and the compiled loop that goes on from there."""

    lm: LM
    trees: TreeSet
    state: loop.DecodeState
    prefill_seconds: float

    def run(self, cycles: int) -> loop.Progress:
        """Take up to so many cycles. Returns at once, while the device works."""
        self.state, progress = _run(self.lm, self.trees, self.state, cycles)
        return progress


def _run(lm: LM, trees: TreeSet, state: loop.DecodeState, cycles: int) -> tuple[loop.DecodeState, loop.Progress]:
    with _on_mesh(lm):
        return loop.run(lm.params, state, cycles, lm.drafter, cfg=lm.cfg, trees=trees)


def _on_mesh(lm: LM):
    """The context in which the model's arrays are spread as its weights are."""
    return contextlib.nullcontext() if lm.mesh is None else jax.set_mesh(lm.mesh)


def _prefilled(lm: LM, prompts: list, first: int, size: int, decode: DecodeConfig, trees: TreeSet) -> _Ready:
    """Compile what is not compiled yet, and read the prompts."""
    chunk = PREFILL_CHUNK.get(lm.backend, ACCELERATOR_CHUNK)
    need = max(loop.slots_needed(len(p), decode.max_new_tokens, trees.width, chunk) for p in prompts)
    slots = loop.bucket(need)
    # A short last batch is filled with rows that are done from the start, so that it runs the same program.
    fill = size - len(prompts)
    new_state = partial(loop.init_state, lm.cfg, trees, slots=slots, dtype=lm.dtype, backend=lm.backend)

    # Compile, and run once, what is timed below: XLA:CPU sets up the products of a program, and of each tree in it,
    # when they first run (0.6 to 1 s for SmolLM2).
    layout = tuple((x.shape, x.dtype, x.sharding) for x in jax.tree.leaves((lm.params, lm.drafter)))
    program = (lm.cfg, size, slots, layout)
    decoding = (program, trees, lm.memory is None)
    with _on_mesh(lm):
        if decoding not in _warm:
            logger.info("compiling for %d x %d tokens", size, slots)
            one_cycle = dataclasses.replace(decode, max_new_tokens=1)  # or it may need more slots than the prompts
            for tree in range(len(trees.trees)):
                nothing = jax.tree.map(jnp.zeros_like, lm.memory)
                state = new_state([[0]] * size, one_cycle, lm.stop_ids, memory=nothing).replace(tree=jnp.int32(tree))
                jax.block_until_ready(_run(lm, trees, state, 1))
            _warm.add(decoding)
        requests = list(range(first, first + size))
        state = new_state([*prompts, *[[0]] * fill], decode, lm.stop_ids, requests=requests, memory=lm.memory)
        state = state.replace(done=jnp.arange(size) >= len(prompts))
        if (program, chunk) not in _warm and max(map(len, prompts)) > 1:
            dtype = state.activations
            cache = loop.prefill_chunk(lm.params, state.cache, state.tokens, 0, cfg=lm.cfg, chunk=chunk, dtype=dtype)
            state = state.replace(cache=cache)
            _warm.add((program, chunk))
        jax.block_until_ready(state)
        start = time.perf_counter()
        state = jax.block_until_ready(loop.prefill(lm.params, state, cfg=lm.cfg, chunk=chunk))
    return _Ready(lm, trees, state, time.perf_counter() - start)


def _generate_batch(lm, prompts, ids, first, size, decode, trees) -> list[Result]:
    ready = _prefilled(lm, prompts, first, size, decode, trees)
    start = time.perf_counter()
    ready.run(2**31 - 1)
    jax.block_until_ready(ready.state)
    return _results(ready, prompts, ids, decode, time.perf_counter() - start)


def _one_streamed(
    lm: LM, prompt: list[int], decode: DecodeConfig, trees: TreeSet
) -> Generator[list[int], None, Result]:
    """The new ids of every few passes, while the next ones run; returns the result. Its reader's time counts too."""
    ready = _prefilled(lm, [prompt], 0, 1, decode, trees)
    sent, start = len(prompt), time.perf_counter()
    progress = ready.run(STREAM_CYCLES)
    while True:
        following = ready.run(STREAM_CYCLES)
        end = int(progress.last[0]) + 1
        yield np.asarray(progress.tokens)[0, sent:end].tolist()
        sent = end
        if progress.done.all():
            break
        progress = following
    jax.block_until_ready(ready.state)
    return _results(ready, [prompt], [0], decode, time.perf_counter() - start)[0]


def _results(ready: _Ready, prompts: list, ids: Sequence, decode: DecodeConfig, seconds: float) -> list[Result]:
    memory = ready.lm.memory or {}
    for name in memory.keys() & ready.state.drafts.keys():  # what was there has been given away
        memory[name] = ready.state.drafts[name]
    host = jax.device_get(ready.state.replace(cache=ready.state.cache.length, drafts=None))
    results = []
    for row, (prompt, id_) in enumerate(zip(prompts, ids, strict=True)):
        tokens = host.tokens[row, len(prompt) : host.cache[row] + 1].tolist()
        results.append(
            Result(
                id=id_,
                prompt_tokens=len(prompt),
                tokens=tokens,
                text=to_text(ready.lm.tokenizer, tokens, after=prompt),
                finish_reason="stop" if host.stopped[row] else "length",
                forwards=int(host.forwards[row]),
                accepted=host.accepted[row, : host.forwards[row]].tolist(),
                seconds=seconds / len(prompts),
                prefill_seconds=ready.prefill_seconds / len(prompts),
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
