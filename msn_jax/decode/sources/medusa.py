"""Medusa (Cai et al. 2024): what trained heads predict from the hidden state of the last accepted node."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from msn_jax.decode.source import Ahead, Ask, Seen
from msn_jax.decode.sources.recycling import largest
from msn_jax.decode.tree import MEDUSA
from msn_jax.heads import ahead
from msn_jax.model import unembed


class Medusa(Ahead):
    """Carry int32[B, J, R]: the best R candidates of each head for the place it looks ahead to, under the next root.

    `own` of its weights: MedusaHeads; places beyond theirs have no draft.
    """

    name = MEDUSA

    def observe(self, weights, carry, seen: Seen, ask: Ask) -> Array:
        hidden = jnp.take_along_axis(seen.hidden, seen.best[:, None, None], axis=1)[:, 0]
        rows = ahead(weights.own, hidden)[:, : ask.depths]
        top = largest(unembed(weights.model, weights.cfg, rows), ask.ranks)
        return jnp.pad(top, ((0, 0), (0, ask.depths - top.shape[1]), (0, 0)), constant_values=-1)
