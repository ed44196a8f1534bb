"""Which drafts of a tree are the tokens that plain decoding would have emitted. Array maths, no model."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from msn_jax.decode.tree import TreeSpec

NEAR_TIE = 1e-3  # scores, or sums of probability, closer than this may fall either way in passes of different width


@struct.dataclass
class Sampling:
    """How the next token is drawn from logits. All traced: changing them compiles nothing.

    One value for all rows, [], or one for each, [B].
    """

    temperature: Array  # float32; 0 is greedy
    top_k: Array  # int32; 0 keeps all
    top_p: Array  # float32; 1 keeps all
    seed: Array  # uint32


def keep_top(logits: Array, top_k: Array, top_p: Array) -> Array:
    """Logits [..., V] with those outside top-k, then outside top-p, at -inf. A tie at the boundary is kept.

    top_k, top_p: one for all rows, or one for each [...].
    """
    limited = ((top_k > 0) | (top_p < 1)).any()
    top_k, top_p = (jnp.broadcast_to(x, logits.shape[:-1])[..., None] for x in (top_k, top_p))

    def cut(logits):
        ordered = -jnp.sort(-logits, axis=-1)
        V = logits.shape[-1]
        rank = jnp.broadcast_to(jnp.arange(V), logits.shape)
        kept = rank < jnp.where(top_k > 0, top_k, V)
        mass = jax.nn.softmax(jnp.where(kept, ordered, -jnp.inf), axis=-1)
        # The token that crosses top_p stays, and always the first; 1 keeps all, whatever the sum rounds to.
        kept &= (rank == 0) | (top_p >= 1) | (jnp.cumsum(mass, axis=-1) - mass < top_p)
        lowest = jnp.where(kept, ordered, jnp.inf).min(axis=-1, keepdims=True)
        return jnp.where(logits >= lowest, logits, -jnp.inf)

    return jax.lax.cond(limited, cut, lambda logits: logits, logits)


def sampling_scores(logits: Array, position: Array, request: Array, sampling: Sampling) -> Array:
    """Scores [B, V] whose argmax is the sampled token at `position` [B] of `request` [B].

    logits / T plus Gumbel noise after top-k and top-p (the Gumbel-max trick). The noise is a function of the
    seed, the request and the absolute position alone, so every method draws the same token there. At T = 0 they are
    the logits.
    """

    def noise(seed, request, position):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), request), position)
        return jax.random.gumbel(key, logits.shape[-1:], jnp.float32)

    temperature, seed = (jnp.broadcast_to(x, request.shape) for x in (sampling.temperature, sampling.seed))
    greedy = (temperature == 0)[:, None]
    scaled = keep_top(logits / jnp.where(greedy, 1, temperature[:, None]), sampling.top_k, sampling.top_p)
    return jnp.where(greedy, logits, scaled + jax.vmap(noise)(seed, request, position))


def near_tie(logits: Array, position: Array, request: Array, sampling: Sampling) -> Array:
    """Whether the token after one row of logits [V] could be another one for rounding alone. bool[]

    That is where the two best scores lie within NEAR_TIE, or where the edge of top-k or top-p does of a token whose
    coming or going changes the draw. position, request int32[].
    """

    def best_two(cut: Sampling) -> tuple[Array, Array]:
        return jax.lax.top_k(sampling_scores(logits[None], position[None], request[None], cut)[0], 2)

    def sampled():
        best, (token, _) = best_two(sampling)
        changes = lambda cut: best_two(cut)[1][0] != token
        wider, narrower = (jnp.where(sampling.top_p < 1, sampling.top_p + d, 1.0) for d in (NEAR_TIE, -NEAR_TIE))
        at_p = changes(sampling.replace(top_p=wider)) | changes(sampling.replace(top_p=narrower))
        ordered = -jnp.sort(-logits)
        k = jnp.clip(sampling.top_k, 1, ordered.size - 1)
        alike = (sampling.top_k > 0) & (ordered[k - 1] - ordered[k] < NEAR_TIE * sampling.temperature)
        at_k = alike & ((logits[token] <= ordered[k - 1]) | changes(sampling.replace(top_k=k + 1)))
        return (best[0] - best[1] < NEAR_TIE) | at_p | at_k

    def greedy():
        best, _ = jax.lax.top_k(logits, 2)
        return best[0] - best[1] < NEAR_TIE

    return jax.lax.cond(sampling.temperature > 0, sampled, greedy)


def targets(
    tree: TreeSpec,
    logits: Array,
    greedy: Array,
    tokens: Array,
    valid: Array,
    position: Array,
    request: Array,
    sampling: Sampling,
) -> Array:
    """The token that plain decoding emits after each node, int32[B, M].

    logits [B, M, V] and their argmax `greedy` [B, M]; tokens, valid [B, M]; position int32[B]: of the root.
    Sampling walks down from the root and draws only where it comes past; nodes that it misses get -1.
    """

    def sampled():
        parents = jnp.asarray(tree.parents)
        has_parent = (parents >= 0)[None]

        def draw(carry):
            depth, reached, out = carry
            # All nodes reached at one depth stand for the same text: any of them gives the row.
            row = jnp.take_along_axis(logits, jnp.argmax(reached, axis=1)[:, None, None], axis=1)[:, 0]
            drawn = jnp.argmax(sampling_scores(row, position + depth + 1, request, sampling), axis=-1)
            out = jnp.where(reached, drawn[:, None].astype(jnp.int32), out)
            reached = valid & (tokens == drawn[:, None]) & reached[:, parents] & has_parent
            return depth + 1, reached, out

        root = jnp.broadcast_to(jnp.arange(tree.size) == 0, tokens.shape)
        start = jnp.int32(0), root, jnp.full(tokens.shape, -1, jnp.int32)
        return jax.lax.while_loop(lambda carry: carry[1].any(), draw, start)[2]

    return jax.lax.cond((sampling.temperature > 0).any(), sampled, lambda: greedy)


def accept(tree: TreeSpec, tokens: Array, valid: Array, targets: Array) -> tuple[Array, Array, Array]:
    """The last node of the longest accepted path, and what the pass emits.

    A draft is accepted when it is the target of its parent and its parent is accepted. Returns (best int32[B],
    emitted int32[B, E], count int32[B]): the first count = depth[best] + 1 of a row's emitted tokens hold, the last
    of them the target of `best` itself, which no draft had to guess.
    """
    wrong = ~valid | (tokens != targets[:, jnp.asarray(tree.parents)])
    wrong = wrong.at[:, 0].set(False)
    accepted = ~(wrong[:, None, :] & tree.ancestors[None]).any(axis=2)
    best = jnp.argmax(jnp.where(accepted, tree.depth[None], -1), axis=1)
    emitted = jnp.take_along_axis(targets, jnp.asarray(tree.path)[best], axis=1)
    return best, emitted, jnp.asarray(tree.depth, jnp.int32)[best] + 1


def cut(emitted: Array, count: Array, remaining: Array, stop_ids: Array) -> tuple[Array, Array]:
    """How many of the first `count` [B] emitted tokens [B, E] a row keeps: none after a stop token or the limit.

    Returns (kept int32[B], stopped bool[B]: the last one kept is a stop token). stop_ids: int32[n], -1 unused.
    """
    kept = jnp.minimum(count, remaining)
    inside = jnp.arange(emitted.shape[1])[None] < kept[:, None]
    stop = inside & (emitted[:, :, None] == stop_ids[None, None]).any(axis=2)
    stopped = stop.any(axis=1)
    return jnp.where(stopped, jnp.argmax(stop, axis=1) + 1, kept).astype(jnp.int32), stopped
