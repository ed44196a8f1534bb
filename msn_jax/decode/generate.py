"""Whole prompts in, results out: the public functions around an engine."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Never

import jax
import jax.numpy as jnp
import numpy as np

from msn_jax.config import DecodeConfig
from msn_jax.decode import loop
from msn_jax.decode.engine import UNTIL_DONE, Engine, check_length
from msn_jax.decode.prompts import encode, shown
from msn_jax.decode.request import Request, Result, result_of
from msn_jax.decode.stops import StopTexts
from msn_jax.decode.verify import near_tie, penalised, seen_tokens
from msn_jax.errors import InputError
from msn_jax.io.loading import LM
from msn_jax.io.tokenizer import TextStream
from msn_jax.model import forward, unembed

STREAM_CYCLES = 4  # passes between two looks at a streamed text


def _refuse_unknown(settings: Mapping[str, Any]) -> None:
    """Raise InputError for settings that are no field of DecodeConfig."""
    for name in settings:
        known = ", ".join(field.name for field in dataclasses.fields(DecodeConfig))
        raise InputError(f"{name} is no setting; accepted: {known}")


def _texts(stop: Any) -> Any:
    """One text or several as the list of a setting; what is neither stays, to be refused."""
    return [stop] if isinstance(stop, str) else list(stop) if isinstance(stop, Iterable) else stop


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
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    stop: Sequence[str] = (),
    logprobs: int | None = None,
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
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=_texts(stop),
        logprobs=logprobs,
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

    def __init__(self, lm: LM, prompt: str | Sequence, decode: DecodeConfig, engine: Engine | None = None):
        """engine: of `stream_engine`, where another answer goes on from what this one has read."""
        ids = encode(lm, prompt)
        _check_lengths(lm, [ids], decode)
        self._text, self._stops = TextStream(lm.tokenizer, after=ids), StopTexts(decode.stop)
        self.request = Request(ids, decode)
        own = contextlib.nullcontext(engine) if engine else stream_engine(lm, decode, keep=False)
        self._cycles = _one_streamed(own, self.request)
        self.text = ""  # so far

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        while self.result is None:
            try:
                piece, _ = self._stops.add(self._text.add(next(self._cycles)))
            except StopIteration as end:
                self.result = end.value
                piece = self._stops.add(self._text.flush())[0] + self._stops.flush()
            if piece:
                self.text += piece
                return piece
        raise StopIteration

    def close(self) -> None:
        """Leave the answer where it is."""
        self._cycles.close()


def stream_engine(lm: LM, decode: DecodeConfig, *, keep: bool) -> Engine:
    """An engine for one answer after the other as they come. keep: see `Engine`."""
    return _engine(lm, decode, 1, STREAM_CYCLES, keep)


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
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    stop: Sequence[str] = (),
    logprobs: int | None = None,
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
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=_texts(stop),
        logprobs=logprobs,
    )
    return Stream(lm, prompt, decode)


def generate_batches(
    lm: LM,
    prompts: Sequence[list[int]],
    decode: DecodeConfig,
    *,
    ids: Sequence | None = None,
) -> Iterator[list[Result]]:
    """Results in input order, `decode.batch_size` at a time.

    A row whose reply is done takes the next prompt at once, so that a batch may be ready with the one before it.
    """
    _check_lengths(lm, prompts, decode)
    size = min(decode.batch_size, len(prompts))
    engine = _engine(lm, decode, size)  # here: the call itself refuses, not its first result
    numbered = zip(prompts, range(len(prompts)) if ids is None else ids, strict=True)
    requests = [Request(prompt, decode, number, id_) for number, (prompt, id_) in enumerate(numbered)]
    return _in_order(engine, requests, size)


def _check_lengths(lm: LM, prompts: Sequence[list[int]], decode: DecodeConfig) -> None:
    for number, prompt in enumerate(prompts, 1):
        check_length(lm, prompt, decode.max_new_tokens, f"prompt {number}")


def _engine(lm: LM, decode: DecodeConfig, rows: int, cycles: int = UNTIL_DONE, keep: bool = False) -> Engine:
    what = dict(method=decode.method, tree=decode.tree, batch_size=decode.batch_size)
    return Engine(lm, rows=rows, cycles=cycles, keep=keep, **what)


def _in_order(engine: Engine, requests: list[Request], size: int) -> Iterator[list[Result]]:
    """Results in input order, `size` at a time; nothing runs on the device while their reader has them."""
    if not requests:
        return
    with engine:
        for request in requests:
            engine.submit(request)
        for at in range(0, len(requests), size):
            batch = requests[at : at + size]
            while not all(request.finished for request in batch):
                engine.step()
                engine.collect()
            yield [result_of(engine.lm, request, engine.method) for request in batch]


def _one_streamed(own: AbstractContextManager[Engine], request: Request) -> Generator[list[int], None, Result]:
    """The new ids of every few passes, while the next ones run; returns the result. The reader's time counts too."""
    sent = 0
    with own as engine:
        engine.submit(request)
        try:
            while not request.finished:
                engine.step()
                yield request.tokens[sent:]
                sent = len(request.tokens)
        except GeneratorExit:  # its reader has left
            request.cancelled = True
            engine.step()
            raise
        except BaseException:  # in the midst of a step: what the engine holds may be half done, or given away
            engine.close()
            raise
    return result_of(engine.lm, request, engine.method)


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
    seen = seen_tokens(tokens, jnp.full(1, length - 1), cfg.vocab_size)
    logits = penalised(logits, seen, sampling.repetition_penalty[None])
    return near_tie(logits[0], jnp.int32(length), jnp.int32(request), sampling)
