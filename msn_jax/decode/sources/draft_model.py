"""A smaller model as the draft (Leviathan et al. 2023), or the first layers of the model itself."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from msn_jax.cache import KVCache, init_cache, waiting_for, write_cache
from msn_jax.decode.source import Ask, At, Source, Text, Weights
from msn_jax.decode.sources.recycling import largest
from msn_jax.decode.tree import DRAFT_MODEL
from msn_jax.model import best_token, forward, unembed
from msn_jax.model_config import ModelConfig

CHUNK = 64  # tokens of a prompt that one pass reads


@struct.dataclass
class Read:
    """What the draft model knows of the text."""

    cache: KVCache  # its own keys and values; length: how far each row is read, the root included
    top: Array  # int32[B, R]: the best candidates after the root


@dataclasses.dataclass(frozen=True)
class DraftModel(Source):
    """Rank r is the r-th likeliest token after what stands above a node, as the smaller model has it.

    Carry: Read. A pass over the new tokens gives the candidates of depth 1; each depth below takes one more pass, over
    all of the tree that stands above it: a few more rows cost next to nothing, and its keys need no place.
    `own` of its weights: Params. cfg: of the smaller model; dtype: of its cache; activations: see `activation_dtype`.
    """

    cfg: ModelConfig
    dtype: Any
    activations: Any
    name = DRAFT_MODEL
    by_parent = True

    def init(self, cfg, ask: Ask, batch: int, slots: int) -> Read:
        return Read(init_cache(self.cfg, batch, slots, self.dtype), jnp.full((batch, ask.ranks), -1, jnp.int32))

    def read(self, weights: Weights, carry: Read, text: Text, live: Array, ask: Ask) -> Read:
        slots = text.tokens.shape[1]
        most = jnp.where(live, text.last, carry.cache.length)  # of a row that is done nothing is read
        few, chunk = min(ask.drafts, slots), min(CHUNK, slots)

        def some(cache: KVCache, count: int, most: Array) -> tuple[KVCache, Array]:
            start = jnp.minimum(cache.length, slots - count)
            at = start[:, None] + np.arange(count)[None]
            tokens, cache = jnp.take_along_axis(text.tokens, at, axis=1), cache.replace(length=start)
            hidden, new = forward(weights.own, self.cfg, tokens, at, None, cache, dtype=self.activations)
            cache = write_cache(cache, new, waiting_for(hidden[:, 0, 0], start))
            return cache.replace(length=jnp.minimum(start + count, most)), hidden

        # As many as a pass may emit are left, so that the last pass has the root in it.
        unread = lambda cache: (most + 1 - cache.length).max() > few
        cache = jax.lax.while_loop(unread, lambda cache: some(cache, chunk, most)[0], carry.cache)
        root = text.last - jnp.minimum(cache.length, slots - few)
        cache, hidden = some(cache, few, jnp.where(live, text.last + 1, most))
        hidden = jnp.take_along_axis(hidden, jnp.clip(root, 0, few - 1)[:, None, None], axis=1)
        return Read(cache, self._best(weights, hidden, ask.ranks)[:, 0])

    def level(self, weights: Weights, carry: Read, scratch, at: At, tokens: Array) -> tuple[Array, Any]:
        tree, parents, ranks = at.tree, at.parents, int(at.rank.max()) + 1
        above = np.flatnonzero(tree.ancestors[parents].any(axis=0))[1:]  # the root is read
        best = [carry.top[:, None, :ranks]] if parents[0] == 0 else []
        if len(above):
            positions = carry.cache.length[:, None] - 1 + tree.depth[above][None]
            mask = tree.ancestors[np.ix_(above, above)]
            known = jnp.maximum(tokens[:, above], 0)
            hidden, _ = forward(weights.own, self.cfg, known, positions, mask, carry.cache, dtype=self.activations)
            ends = np.searchsorted(above, parents[parents > 0])
            best.append(self._best(weights, hidden[:, ends], ranks))
        return at.ranked(jnp.concatenate(best, axis=1)), scratch

    def _best(self, weights: Weights, hidden: Array, ranks: int) -> Array:
        logits = unembed(weights.own, self.cfg, hidden)
        return best_token(logits)[..., None] if ranks == 1 else largest(logits, ranks)
