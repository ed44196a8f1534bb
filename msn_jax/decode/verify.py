"""Which drafts of a tree are the tokens that plain decoding would have emitted. Array maths, no model."""

from __future__ import annotations

from collections.abc import Callable

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
    min_p: Array  # float32; 0 keeps all
    repetition_penalty: Array  # float32; 1 changes nothing
    seed: Array  # uint32


def keep_top(logits: Array, top_k: Array, top_p: Array, min_p: Array) -> Array:
    """Logits [..., V] with those outside top-k, then outside top-p, then below min-p at -inf.

    top-k keeps tokens with fewer than k above them (Fan et al. 2018). top-p keeps, of these, tokens with less than p of
    their mass above them (Holtzman et al. 2020). min-p keeps tokens with at least that share of the largest probability
    (Nguyen et al. 2024). So what ties with the last one stays too, and the largest always stays.
    top_k, top_p, min_p: one for all rows, or one for each [...].
    """
    top_k, top_p, min_p = (jnp.broadcast_to(x, logits.shape[:-1])[..., None] for x in (top_k, top_p, min_p))
    largest, total = logits.max(axis=-1, keepdims=True), lambda x: x.sum(axis=-1, keepdims=True)

    def at_k(kept):
        edge = _lowest(order, lambda above: total(above.astype(jnp.int32)) < top_k)
        return kept & ((order >= edge) | (top_k == 0))

    def at_p(kept):
        mass = jnp.where(kept, jnp.exp(logits - largest), 0)
        edge = _lowest(order, lambda above: total(jnp.where(above, mass, 0)) < top_p * total(mass))
        return kept & ((order >= edge) | (top_p >= 1))  # 1 keeps all, whatever the sum rounds to

    order = _ordered(logits)
    kept, all_kept = jnp.ones(logits.shape, bool), lambda kept: kept
    kept = jax.lax.cond((top_k > 0).any(), at_k, all_kept, kept)
    kept = jax.lax.cond((top_p < 1).any(), at_p, all_kept, kept)
    return jnp.where(kept & (logits >= largest + jnp.log(min_p)), logits, -jnp.inf)


def _ordered(x: Array) -> Array:
    """uint32 in the order of x float32."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, jnp.float32(0), x), jnp.uint32)  # there are two zeros
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _lowest(order: Array, few: Callable[[Array], Array]) -> Array:
    """The lowest number [..., 1] for which few(order > number) holds, at most the largest of `order`; found bit by bit.

    On a CPU this takes a tenth of the time of sorting a vocabulary of 49 thousand.
    """

    def bit(i, number):
        lower = number & ~(jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        return jnp.where(few(order > lower), lower, number)

    highest = jnp.full((*order.shape[:-1], 1), 2**32 - 1, jnp.uint32)
    return jnp.minimum(jax.lax.fori_loop(0, 32, bit, highest), order.max(axis=-1, keepdims=True))


def penalised(logits: Array, seen: Array, penalty: Array) -> Array:
    """Logits [B, V] with those of tokens that were seen, bool[B, V], made less likely (Keskar et al. 2019, CTRL).

    Positive ones are divided by the penalty [B], negative ones multiplied.
    """
    penalty = penalty[:, None]
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def seen_tokens(tokens: Array, last: Array, vocab: int) -> Array:
    """Which tokens a text tokens[: last + 1] has: bool[B, vocab] of tokens int32[B, S], last int32[B]."""
    B, S = tokens.shape
    inside = jnp.where(jnp.arange(S)[None] <= last[:, None], tokens, vocab)
    return jnp.zeros((B, vocab), bool).at[jnp.arange(B)[:, None], inside].set(True, mode="drop")


def sampling_scores(logits: Array, position: Array, request: Array, sampling: Sampling) -> Array:
    """Scores [B, V] whose argmax is the sampled token at `position` [B] of `request` [B].

    logits / T plus Gumbel noise after top-k, top-p and min-p (the Gumbel-max trick). The noise is a function of the
    seed, the request and the absolute position alone, so every method draws the same token there. At T = 0 they are
    the logits.
    """

    def noise(seed, request, position):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), request), position)
        return jax.random.gumbel(key, logits.shape[-1:], jnp.float32)

    temperature, seed = (jnp.broadcast_to(x, request.shape) for x in (sampling.temperature, sampling.seed))
    greedy = (temperature == 0)[:, None]
    scaled = logits / jnp.where(greedy, 1, temperature[:, None])
    scaled = keep_top(scaled, sampling.top_k, sampling.top_p, sampling.min_p)
    return jnp.where(greedy, logits, scaled + jax.vmap(noise)(seed, request, position))


def near_tie(logits: Array, position: Array, request: Array, sampling: Sampling) -> Array:
    """Whether the token after one row of logits [V] could be another one for rounding alone. bool[]

    It could where the two best scores lie within NEAR_TIE of each other, or where a token lies so close to the edge of
    top-k, top-p or min-p and the draw changes with it. The logits are those after the repetition penalty. position,
    request int32[].
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
        higher, lower = (jnp.minimum(sampling.min_p * jnp.exp(jnp.float32(d)), 1) for d in (NEAR_TIE, -NEAR_TIE))
        at_share = changes(sampling.replace(min_p=higher)) | changes(sampling.replace(min_p=lower))
        return (best[0] - best[1] < NEAR_TIE) | at_p | at_k | at_share

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
    text: Array,
) -> Array:
    """The token that plain decoding emits after each node, int32[B, M].

    logits [B, M, V] and their argmax `greedy` [B, M]; tokens, valid [B, M]; position int32[B]: of the root; text
    int32[B, S]: the tokens up to there. Sampling and the penalty need the tokens above a node, so they walk down from
    the root and draw only at the nodes that they reach; the others get -1.
    """
    rows, vocab = jnp.arange(len(tokens)), logits.shape[-1]
    penalty = jnp.broadcast_to(sampling.repetition_penalty, position.shape)
    penalises = (penalty != 1).any()

    def walked():
        parents = jnp.asarray(tree.parents)
        has_parent = (parents >= 0)[None]

        def draw(carry):
            depth, reached, seen, out = carry
            # All nodes reached at one depth stand for the same text: any of them gives the row.
            row = jnp.take_along_axis(logits, jnp.argmax(reached, axis=1)[:, None, None], axis=1)[:, 0]
            row = penalised(row, seen, penalty)
            drawn = jnp.argmax(sampling_scores(row, position + depth + 1, request, sampling), axis=-1)
            seen = seen.at[rows, drawn].set(True)
            out = jnp.where(reached, drawn[:, None].astype(jnp.int32), out)
            reached = valid & (tokens == drawn[:, None]) & reached[:, parents] & has_parent
            return depth + 1, reached, seen, out

        root = jnp.broadcast_to(jnp.arange(tree.size) == 0, tokens.shape)
        nothing = lambda: jnp.zeros((len(tokens), vocab), bool)
        seen = jax.lax.cond(penalises, lambda: seen_tokens(text, position, vocab), nothing)
        start = jnp.int32(0), root, seen, jnp.full(tokens.shape, -1, jnp.int32)
        return jax.lax.while_loop(lambda carry: carry[1].any(), draw, start)[3]

    return jax.lax.cond((sampling.temperature > 0).any() | penalises, walked, lambda: greedy)


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
