"""N-grams of the model's own earlier replies (as REST, He et al. 2023, drafts from a store), in a table made once."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array

from msn_jax.decode.source import At, Source, Text
from msn_jax.decode.tree import NGRAMS
from msn_jax.ngrams import ORDER, following


class Ngrams(Source):
    """No carry. Rank r is the r-th likeliest token after the longest known end of what stands above a node.

    `own` of its weights: an NgramTable.
    """

    name = NGRAMS
    by_parent = True

    def begin(self, weights, carry, text: Text, ask) -> tuple[Array, None]:
        at = text.last[:, None] - np.arange(ORDER - 1, 0, -1)[None]
        before = jnp.take_along_axis(text.tokens, jnp.maximum(at, 0), axis=1)
        return jnp.where(at >= 0, before, -1), None

    def level(self, weights, carry, scratch: Array, at: At, tokens: Array) -> tuple[Array, Array]:
        text = jnp.concatenate([scratch, tokens], axis=1)  # what stands before the root, and the tree
        context = []
        for parent in at.parents:
            path = at.tree.path[parent, : at.tree.depth[parent] + 1]
            context.append(np.concatenate([np.arange(ORDER - 1), ORDER - 1 + path])[-ORDER:])
        return at.ranked(following(weights.own, text[:, np.stack(context)])), scratch
