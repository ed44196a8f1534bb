"""Decode loops compiled once for a tree set, a batch size and a number of slots, and run on any prompts that fit."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from msn_jax import DecodeConfig
from msn_jax.decode import loop, tree_set
from msn_jax.model import forward, unembed

ALL_CYCLES = 2**31 - 1


@dataclasses.dataclass
class Loop:
    """Prompts in, answers out, by one compiled loop. lm: with or without its drafter; arm: METHOD[:TREE]."""

    lm: object
    arm: str
    batch: int
    slots: int
    chunk: int
    max_new_tokens: int
    program: Any = None

    def __post_init__(self):
        method, _, tree = self.arm.partition(":")
        self.trees = tree_set(method, tree or None, self.lm.backend, self.lm.drafter is not None, self.batch)
        self.decode = DecodeConfig(method=method, max_new_tokens=self.max_new_tokens)

    def state(self, prompts: list[list[int]], max_new_tokens: int | None = None):
        decode = dataclasses.replace(self.decode, max_new_tokens=max_new_tokens or self.max_new_tokens)
        sizes = {"slots": self.slots, "dtype": self.lm.dtype, "backend": self.lm.backend}
        rows = [*prompts, *[[0]] * (self.batch - len(prompts))]
        state = loop.init_state(self.lm.cfg, self.trees, rows, decode, self.lm.stop_ids, **sizes)
        return state.replace(done=jnp.arange(self.batch) >= len(prompts))

    def lower(self):
        cycles = jnp.int32(1)
        lm = self.lm
        return loop.run.lower(lm.params, self.state([[0]]), cycles, lm.drafter, cfg=lm.cfg, trees=self.trees)

    def call(self, state, cycles: int):
        return jax.block_until_ready(self.program(self.lm.params, state, jnp.int32(cycles), self.lm.drafter))[0]

    def answers(self, prompts: list[list[int]]) -> tuple[list[dict], float, float]:
        """(tokens and forwards of each prompt, seconds of the loop, seconds of prefill)."""
        state = jax.block_until_ready(self.state(prompts))
        start = time.perf_counter()
        state = jax.block_until_ready(loop.prefill(self.lm.params, state, cfg=self.lm.cfg, chunk=self.chunk))
        prefilled = time.perf_counter()
        state = self.call(state, ALL_CYCLES)
        seconds = time.perf_counter() - prefilled
        host = jax.device_get({"tokens": state.tokens, "last": state.cache.length, "forwards": state.forwards})
        rows = [
            {
                "tokens": host["tokens"][i, len(prompt) : host["last"][i] + 1].tolist(),
                "forwards": int(host["forwards"][i]),
            }
            for i, prompt in enumerate(prompts)
        ]
        return rows, seconds, prefilled - start

    def fits(self, prompt: list[int]) -> bool:
        need = loop.slots_needed(len(prompt), self.max_new_tokens, self.trees.width, self.chunk)
        return need <= self.slots


def first_gaps(lm, texts: list[list[int]]) -> list[float]:
    """By how much the best score after each text is above the second, in one plain pass of the whole text."""
    if not texts:
        return []
    length = loop.bucket(max(map(len, texts)))
    tokens = np.zeros((len(texts), length), np.int32)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = text
    ends = np.array([len(text) - 1 for text in texts])

    @jax.jit
    def gaps(params, tokens, ends):
        positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
        hidden, _ = forward(params, lm.cfg, tokens, positions, dtype=lm.activations)
        last = jnp.take_along_axis(hidden, ends[:, None, None], axis=1)[:, 0]
        best, _ = jax.lax.top_k(unembed(params, lm.cfg, last), 2)
        return best[:, 0] - best[:, 1]

    return np.asarray(gaps(lm.params, jnp.asarray(tokens), jnp.asarray(ends))).tolist()
