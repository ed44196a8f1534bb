"""EAGLE-3 (Li et al. 2025): a trained head of one layer reads what the model made of each token, and drafts on from its
own output."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from msn_jax.cache import KVCache, init_cache, waiting_for, write_cache
from msn_jax.decode.source import Ask, At, Source, Text, Weights
from msn_jax.decode.sources.draft_model import CHUNK
from msn_jax.decode.sources.recycling import largest
from msn_jax.decode.tree import EAGLE
from msn_jax.eagle import joined, layer_config, run_eagle, taps
from msn_jax.linear import linear
from msn_jax.model import attention_over_cache, best_token, causal_mask, embed, final_norm
from msn_jax.model_config import ModelConfig


@struct.dataclass
class Read:
    """What the head knows of the text. Its last entry joins the root with the features of the token before."""

    cache: KVCache  # its own keys and values, of one layer; length: how many entries are read
    out: Array  # [B, D]: its output at the last entry
    top: Array  # int32[B, R]: the best candidates after the root


@dataclasses.dataclass(frozen=True)
class Eagle(Source):
    """Rank r is the r-th likeliest token after what stands above a node, as the head has it.

    Carry: Read. A pass over the new tokens, with the features that the model has given them, makes the candidates of
    depth 1; each depth below takes one more pass, over all of the tree that stands above it, in which the output of
    the node above stands in for features. Before the first token's features there are no drafts.
    `own` of its weights: an EagleDrafter. dtype: of its cache; activations: see `activation_dtype`.
    """

    dtype: Any
    activations: Any
    name = EAGLE
    by_parent = True

    def taps(self, cfg: ModelConfig) -> tuple[int, ...]:
        return taps(cfg)

    def init(self, cfg, ask: Ask, batch: int, slots: int) -> Read:
        cache = init_cache(layer_config(cfg), batch, slots, self.dtype)
        out = jnp.zeros((batch, cfg.embed), self.activations)
        return Read(cache, out, jnp.full((batch, ask.ranks), -1, jnp.int32))

    def read(self, weights: Weights, carry: Read, text: Text, live: Array, ask: Ask) -> Read:
        slots = text.tokens.shape[1]
        upto = lambda entries: jnp.where(live, entries, carry.cache.length)  # of a row that is done nothing is read
        few, chunk = min(ask.drafts, slots), min(CHUNK, slots)

        def some(cache: KVCache, count: int, most: Array) -> tuple[KVCache, Array]:
            start = jnp.minimum(cache.length, slots - count)
            at = start[:, None] + np.arange(count)[None]
            features = jnp.take_along_axis(text.features[:, 0], at[:, :, None], axis=1).astype(self.activations)
            tokens = jnp.take_along_axis(text.tokens, jnp.minimum(at + 1, slots - 1), axis=1)
            x, cache = joined(weights.own.head, weights.cfg, features), cache.replace(length=start)
            out, new = self._run(weights, cache, tokens, x, at, causal_mask(count))
            cache = write_cache(cache, (new,), waiting_for(out[:, 0, 0], start))
            return cache.replace(length=jnp.minimum(start + count, most)), out

        # As many as a pass may emit are left, so that the last pass has the root's entry in it.
        before = upto(jnp.maximum(text.last - 1, 0))
        unread = lambda cache: (before + 1 - cache.length).max() > few
        cache = jax.lax.while_loop(unread, lambda cache: some(cache, chunk, before)[0], carry.cache)
        root = text.last - 1 - jnp.minimum(cache.length, slots - few)
        cache, out = some(cache, few, upto(text.last))
        out = jnp.take_along_axis(out, jnp.clip(root, 0, few - 1)[:, None, None], axis=1)
        best = self._best(weights, out, ask.ranks)[:, 0]
        return Read(cache, out[:, 0], jnp.where((text.last > 0)[:, None], best, -1))

    def level(self, weights: Weights, carry: Read, scratch, at: At, tokens: Array) -> tuple[Array, Any]:
        """The scratch holds the outputs [B, D] of all nodes so far."""
        tree, parents, ranks = at.tree, at.parents, int(at.rank.max()) + 1
        outs = dict(scratch) or {0: carry.out}
        above = np.flatnonzero(tree.ancestors[parents].any(axis=0))[1:]  # the root is read
        while any(node not in outs for node in above):
            rows = np.array([node for node in above if tree.parents[node] in outs])
            x = jnp.stack([outs[tree.parents[node]] for node in rows], axis=1)
            positions = carry.cache.length[:, None] - 1 + tree.depth[rows][None]
            mask = jnp.asarray(tree.ancestors[np.ix_(rows, rows)])
            out, _ = self._run(weights, carry.cache, jnp.maximum(tokens[:, rows], 0), x, positions, mask)
            outs |= {node: out[:, i] for i, node in enumerate(rows)}
        best = [carry.top[:, None, :ranks]] if parents[0] == 0 else []
        if parents[-1] > 0:
            ends = parents[parents > 0]
            below = self._best(weights, jnp.stack([outs[node] for node in ends], axis=1), ranks)
            there = (tokens[:, ends] >= 0) & (carry.cache.length > 0)[:, None]
            best.append(jnp.where(there[:, :, None], below, -1))
        return at.ranked(jnp.concatenate(best, axis=1)), outs

    def _run(self, weights: Weights, cache: KVCache, tokens: Array, x: Array, positions: Array, mask: Array):
        """The head over tokens [B, T] with x [B, T, D]; mask bool[T, T]: who sees whom beside the cache."""
        attend = partial(
            attention_over_cache, mask=mask[None], cached=(cache.k[0], cache.v[0]), length=cache.length, oldest=None
        )
        rows = embed(weights.model, tokens).astype(self.activations)
        return run_eagle(weights.own.head, weights.cfg, rows, x, positions, attend)

    def _best(self, weights: Weights, out: Array, ranks: int) -> Array:
        """The best R candidates after entries whose output is out [B, T, D], int32[B, T, R]; -1 beyond U."""
        logits = linear(final_norm(weights.model, weights.cfg, out), weights.own.rows, dtype=jnp.float32)
        most = min(ranks, logits.shape[-1])
        best = best_token(logits)[..., None] if most == 1 else largest(logits, most)
        ids = weights.own.head.vocabulary[best]
        return jnp.pad(ids, ((0, 0), (0, 0), (0, ranks - most)), constant_values=-1)
