"""Requests in, tokens out: prompts that take turns in the rows of one compiled loop.

A row whose reply is done is given the next prompt between two calls of the loop, which returns as soon as a row is
done. Every request has the tokens that it has alone: its noise is keyed by its own seed and number.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from msn_jax.config import DecodeConfig
from msn_jax.decode import loop, seats
from msn_jax.decode.request import Request
from msn_jax.decode.sources import drafters, sources_of, with_made_sources
from msn_jax.decode.stops import tokens_until_stop
from msn_jax.decode.tree import DRAFT_MODEL, EAGLE, MEDUSA, NGRAMS, TreeSet
from msn_jax.decode.tree_sets import tree_set
from msn_jax.errors import InputError
from msn_jax.io.loading import LM
from msn_jax.io.tokenizer import decode as to_text

logger = logging.getLogger("msn_jax")

# Tokens of one prefill pass. On CPU 64 already run at the speed of the matrix products.
PREFILL_CHUNK = {"cpu": 64}
ACCELERATOR_CHUNK = 512
CHUNKS_BETWEEN = 4  # prefill passes between two calls of the loop, while other rows wait for it
CYCLES_BETWEEN = 4  # passes of a call while a prompt is half read, or a stop text is looked for
LOGPROBS_CHUNK = 64  # tokens whose log-probabilities one pass gives
UNTIL_DONE = 2**31 - 1
SMALL = 512  # slots that a reply is given at once, however short it may turn out
AHEAD = 256  # beyond them: new tokens that there is room for before the cache grows


class Engine:
    """The rows of a compiled loop, the requests in them and those that wait.

    One thread at a time is in `step`, `collect` and `close`; `submit`, and a request's `cancelled`, never wait for it.
    """

    def __init__(
        self,
        lm: LM,
        *,
        method: str = "tr-jacobi",
        tree: str | None = None,
        batch_size: int = 1,
        rows: int | None = None,
        cycles: int = UNTIL_DONE,
        keep: bool = False,
    ):
        """rows: of the loop, as many as `batch_size` unless there are fewer prompts; cycles: the most of one call.

        keep: rows that are free keep what they have read. A prompt that begins alike goes on from there, and the cache
        stays until `close`.
        Raises InputError for an impossible method or tree.
        """
        self.lm, self.method, self.cycles, self.keep = lm, method, cycles, keep
        self.trees = trees_of(lm, method, tree, batch_size)
        self.chunk = PREFILL_CHUNK.get(lm.backend, ACCELERATOR_CHUNK)
        self._lock = threading.Lock()
        self._waiting: deque[Request] = deque()
        self._rows: list[Request | None] = [None] * (rows or batch_size)
        self._read: dict[int, int] = {}  # of rows whose prompt is not all read: how far
        self._left: list[list[int]] = [[]] * self.size  # of rows that are free: the text that they have read
        self._state: loop.DecodeState | None = None
        self._shared: frozenset[str] = frozenset()  # sources whose memory all rows, and all calls, share
        # The call that runs: what it shows, when it began, its rows.
        self._call: tuple[loop.Progress, float, list[int]] | None = None

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def submit(self, request: Request) -> Request:
        """Have a request decoded by the next steps. Raises InputError where the model's context is too short."""
        check_length(self.lm, request.prompt, request.decode.max_new_tokens)
        self._waiting.append(request)
        return request

    @property
    def size(self) -> int:
        """Rows."""
        return len(self._rows)

    @property
    def waiting(self) -> int:
        """Requests that have no row yet."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests that have one."""
        return sum(row is not None for row in self._rows)

    @property
    def slots(self) -> int:
        """Of the cache, for each row; 0 when nothing runs."""
        return 0 if self._state is None else self._state.tokens.shape[1]

    def step(self) -> list[Request]:
        """Take what the last call of the loop made, seat who waits, read prompts, and call the loop again.

        Returns the requests that have new tokens or are finished, while the device works.
        """
        with self._lock, self._on_mesh():
            moved = list(dict.fromkeys([*self._collect(), *self._end_cancelled()]))  # each once
            if not self._waiting and not any(self._rows):
                if not self.keep:
                    self._release()
                return moved
            self._seat()
            self._prefill()
            self._run()
            return moved

    def collect(self) -> list[Request]:
        """What `step` returns, without the rest of it: waits for the device and leaves nothing running."""
        with self._lock, self._on_mesh():
            return self._collect()

    def close(self) -> list[Request]:
        """Let go of everything on the device. Returns the requests that are not finished; they never will be."""
        with self._lock:
            left = [request for request in (*self._rows, *self._waiting) if request is not None]
            self._waiting.clear()
            self._release()
            return left

    def _on_mesh(self):
        """The context in which the model's arrays are spread as its weights are."""
        return contextlib.nullcontext() if self.lm.mesh is None else jax.set_mesh(self.lm.mesh)

    def _release(self) -> None:
        if self._state is not None:
            for name in self._shared:
                self.lm.memory[name] = self._state.drafts[name]
        self._state, self._call, self._read = None, None, {}
        self._rows, self._left = [None] * self.size, [[]] * self.size

    def _collect(self) -> list[Request]:
        if self._call is None:
            return []
        progress, began, rows = self._call
        self._call, moved = None, []
        host = jax.device_get(progress)
        seconds = time.perf_counter() - began
        for row in rows:
            request = self._rows[row]
            request.seconds += seconds / len(rows)
            start = len(request.prompt) + len(request.tokens)
            known = len(request.tokens)
            request.tokens += host.tokens[row, start : host.last[row] + 1].tolist()
            stop = self._stop(request, known)
            if host.done[row] or stop:
                request.accepted = host.accepted[row, : host.forwards[row]].tolist()
                request.finish_reason = "stop" if host.stopped[row] else "length"
            if stop:
                request.end_at(stop)
            self._add_logprobs(row, request, known)
            if request.finished:
                if not host.done[row]:
                    self._state = seats.end(self._state, np.int32(row))
                self._leave(row, len(request.prompt) + len(request.tokens) - 1)
            moved.append(request)
        return moved

    def _stop(self, request: Request, known: int) -> int | None:
        """Tokens that a reply has when a stop text is whole in it, beyond those known before."""
        text_of = lambda tokens: to_text(self.lm.tokenizer, tokens, after=request.prompt)
        return tokens_until_stop(text_of, request.tokens, known, request.decode.stop)

    def _add_logprobs(self, row: int, request: Request, known: int) -> None:
        """Log-probabilities of the new tokens: one more pass over them, in chunks, so that others pay nothing."""
        if request.decode.logprobs is None:
            return
        began = time.perf_counter()
        at, end = len(request.prompt) + known - 1, len(request.prompt) + len(request.tokens) - 1
        while at < end:
            start = min(at, self.slots - LOGPROBS_CHUNK - 1)
            found = jax.device_get(self._logprobs(self._state, row, start))
            of_token, ids, top = (x[at - start : end - start].tolist() for x in found)
            request.logprobs += of_token
            pairs = (list(zip(*both, strict=True)) for both in zip(ids, top, strict=True))
            request.top_logprobs += [likeliest[: request.decode.logprobs] for likeliest in pairs]
            at = start + LOGPROBS_CHUNK
        request.seconds += time.perf_counter() - began

    def _logprobs(self, state: loop.DecodeState, row: int, start: int):
        sizes = dict(cfg=self.lm.cfg, chunk=LOGPROBS_CHUNK, dtype=state.activations)
        return seats.logprobs_row(self.lm.params, state.cache, state.tokens, np.int32(row), np.int32(start), **sizes)

    def _end_cancelled(self) -> list[Request]:
        gone = [request for request in list(self._waiting) if request.cancelled]  # others may be submitted meanwhile
        for request in gone:
            request.finish_reason = "cancelled"
            self._waiting.remove(request)
        for row, request in enumerate(self._rows):
            if request is not None and request.cancelled:
                self._state = seats.end(self._state, np.int32(row))
                request.finish_reason = "cancelled"
                self._leave(row, self._read.pop(row, len(request.prompt) + len(request.tokens) - 1))
                gone.append(request)
        return gone

    def _leave(self, row: int, read: int) -> None:
        """Free a row. read: tokens of its text whose keys and values it holds."""
        request, self._rows[row] = self._rows[row], None
        self._left[row] = [*request.prompt, *request.tokens][:read] if self.keep else []

    def _seat(self) -> None:
        """Give the rows that are free to those who wait longest, and the cache the size that all need."""
        came = []
        while self._waiting and self.running < self.size:
            request = self._waiting.popleft()
            free = [row for row, held in enumerate(self._rows) if held is None]
            # The row that has read most of the prompt already; among equals the one with least to lose.
            row = max(free, key=lambda row: (alike(self._left[row], request.prompt), -len(self._left[row])))  # noqa: B023
            self._rows[row], self._read[row] = request, 0
            came.append(row)
        self._fit()
        if any(request and request.decode.logprobs is not None for request in self._rows):
            self._warm_logprobs()
        for row in came:
            request = self._rows[row]
            seat = seats.seat_of(request.prompt, request.decode, request.number, self.slots)
            self._state = seats.place(self._state, np.int32(row), seat)
            self._read[row] = alike(self._left[row], request.prompt[:-1])
            self._left[row] = []

    def _fit(self) -> None:
        """Make the cache, or make it larger where a row has no room for another pass, or smaller where half will do."""
        held = [request for request in self._rows if request is not None]
        least = max(min(self._need(r), self._need(r, len(r.tokens) + 1)) for r in held)
        wanted = loop.bucket(max(self._wish(r) for r in held))
        if self._state is None:
            memory = self.lm.memory or {}
            names = memory.keys() & {source.name for source in sources_of(self.trees)}
            taken = {name: memory.pop(name) for name in names}
            self._shared = frozenset(taken)
            self._warm(wanted, jax.tree.map(jnp.zeros_like, taken))
            self._state = self._empty(wanted, taken)
        elif least > self.slots or 2 * wanted <= self.slots:
            self._warm(wanted, {name: jnp.zeros_like(self._state.drafts[name]) for name in self._shared})
            sizes = dict(trees=self.trees, shared=self._shared, slots=wanted)
            self._state = seats.resize(self._state, cfg=self.lm.cfg, **sizes)
            self._left = [left[: wanted - self.trees.width - 1] for left in self._left]  # as `resize` cuts them

    def _need(self, request: Request, new_tokens: int | None = None) -> int:
        """Slots for so many new tokens; None: for all that it may ask for."""
        new_tokens = request.decode.max_new_tokens if new_tokens is None else new_tokens
        return loop.slots_needed(len(request.prompt), new_tokens, self.trees.width, self.chunk)

    def _wish(self, request: Request) -> int:
        """Slots to go on with for a while."""
        most = self._need(request)
        return most if most <= SMALL else min(most, self._need(request, len(request.tokens) + AHEAD))

    def _prefill(self) -> None:
        """Read the prompts of new rows in chunks; only a few chunks at a time while other rows could go on."""
        left = CHUNKS_BETWEEN if self._live() else UNTIL_DONE
        for row, at in list(self._read.items()):
            request, begin = self._rows[row], at
            began, last = time.perf_counter(), len(request.prompt) - 1
            while at < last and left > 0:
                at = min(at, self.slots - self.chunk)  # what is read again stays as it is
                self._state = self._read_chunk(self._state, row, at)
                at, left = min(at + self.chunk, last), left - 1
            request.prefill_tokens += at - begin
            self._read[row] = at
            if at == last:
                self._state = self._start(self._state, row)
                del self._read[row]
            jax.block_until_ready((self._state.done, self._state.cache.v[-1]))
            request.prefill_seconds += time.perf_counter() - began

    def _read_chunk(self, state: loop.DecodeState, row: int, at: int) -> loop.DecodeState:
        sizes = dict(cfg=self.lm.cfg, chunk=self.chunk, dtype=state.activations)
        place = (np.int32(row), np.int32(at))
        return state.replace(cache=seats.prefill_row(self.lm.params, state.cache, state.tokens, *place, **sizes))

    def _start(self, state: loop.DecodeState, row: int) -> loop.DecodeState:
        return seats.start(state, np.int32(row), cfg=self.lm.cfg, trees=self.trees, shared=self._shared)

    def _live(self) -> list[int]:
        return [row for row, held in enumerate(self._rows) if held is not None and row not in self._read]

    def _run(self) -> None:
        rows = self._live()
        if rows:
            look = bool(self._read) or any(self._rows[row].decode.stop for row in rows)
            cycles = min(self.cycles, CYCLES_BETWEEN) if look else self.cycles
            began = time.perf_counter()
            self._state, progress = self._cycles(self._state, cycles, len(self._rows) - len(rows) + 1)
            self._call = progress, began, rows

    def _cycles(self, state: loop.DecodeState, cycles: int, enough: int) -> tuple[loop.DecodeState, loop.Progress]:
        lm, most, enough = self.lm, np.int32(cycles), np.int32(enough)
        return loop.run(lm.params, state, most, drafters(lm), enough, cfg=lm.cfg, trees=self.trees)

    def _empty(self, slots: int, memory: dict[str, Any]) -> loop.DecodeState:
        """A state whose rows are all done."""
        lm, rows = self.lm, len(self._rows)
        least, kind = DecodeConfig(max_new_tokens=1), dict(dtype=lm.dtype, backend=lm.backend)
        sizes = dict(slots=slots, memory=memory, **kind)
        state = loop.init_state(lm.cfg, self.trees, [[0]] * rows, least, lm.stop_ids, **sizes)
        return state.replace(done=jnp.ones(rows, bool))

    def _warm(self, slots: int, memory: dict[str, Any]) -> None:
        """Compile, and run once, what is timed later: XLA:CPU sets up the products of a program, and of each tree in
        it, when they first run (0.6 to 1 s for SmolLM2)."""
        program = (self.trees, len(self._rows), slots, self.chunk, self._shared)
        if program in self.lm.ran:
            return
        logger.info("compiling for %d x %d tokens", len(self._rows), slots)
        state = self._empty(slots, memory)
        seat = seats.seat_of([0], DecodeConfig(max_new_tokens=1), 0, slots)
        for tree in range(len(self.trees.trees)):
            state = seats.place(state, np.int32(0), seat)
            state = self._start(self._read_chunk(state, 0, 0) if tree == 0 else state, 0)
            state = state.replace(tree=jnp.int32(tree), passes=jnp.zeros_like(state.passes))
            state, _ = self._cycles(state, 1, enough=len(self._rows))
        jax.block_until_ready(state)
        self.lm.ran.add(program)

    def _warm_logprobs(self) -> None:
        program = "logprobs", self.size, self.slots
        if program not in self.lm.ran:
            jax.block_until_ready(self._logprobs(self._state, 0, 0))
            self.lm.ran.add(program)


def alike(left: list[int], right: list[int]) -> int:
    """How many tokens both have in common at their beginning."""
    return next((i for i, (a, b) in enumerate(zip(left, right)) if a != b), min(len(left), len(right)))


def trees_of(lm: LM, method: str, tree: str | None, batch_size: int) -> TreeSet:
    """The trees of a method with this model. Default trees have no more noise in a row than its adapter knows.

    Raises InputError where it has not what they draft with, or its adapter too little noise.
    """
    trees = tree_set(method, tree, lm.backend, lm.drafter is not None, batch_size, lm.ngrams is not None)
    ahead, have = trees.ask(MEDUSA)[0], 0 if lm.heads is None else len(lm.heads.bias)
    if ahead > have:
        raise InputError(
            f"tree {trees.name!r} asks for {ahead} Medusa heads; {lm.name} has {have}; "
            "accepted: --adapter with a directory of as many"
        )
    for name, own, what in ((NGRAMS, lm.ngrams, "from n-grams"), (EAGLE, lm.eagle, "by EAGLE heads")):
        if name in trees.names and own is None:
            raise InputError(
                f"tree {trees.name!r} drafts {what}, and {lm.name} has none; accepted: --adapter with some"
            )
    if DRAFT_MODEL in trees.names and lm.draft is None:
        raise InputError(
            f"tree {trees.name!r} drafts with a smaller model, and {lm.name} has none; "
            "accepted: --draft_ckpt or --draft_layers (draft= of load)"
        )
    trees = with_made_sources(trees, lm)
    if lm.drafter is None:
        return trees
    depths, known = max(int(spec.noise_depth.max()) for spec in trees.trees), len(lm.drafter.noise_embed)
    if depths <= known:
        return trees
    if tree is not None:
        raise InputError(
            f"tree {trees.name!r} has {depths} noise tokens in a row; accepted by this adapter: up to {known}"
        )
    return dataclasses.replace(trees, trees=tuple(spec.with_less_noise(known) for spec in trees.trees))


def check_length(lm: LM, prompt: Sequence[int], new_tokens: int, name: str = "the prompt") -> None:
    """Raise InputError for a prompt that leaves no room in the model's context for so many new tokens."""
    total = len(prompt) + new_tokens
    if total > lm.context:
        raise InputError(
            f"{name} has {len(prompt)} tokens, with {new_tokens} new ones {total}; the model's context is {lm.context}"
        )
