"""What EAGLE's head learns beside a frozen model: the model's next tokens, from its own output where it will have
nothing better in decoding. This is the training-time test of EAGLE-3 (Li et al. 2025).

Step 0 reads the model's features at every place of a row. Step j reads the output of step j - 1 in their place, and
the tokens one further on; it sees the keys of step 0 up to its place and those of its own chain of steps.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from msn_jax.adapters import Parts
from msn_jax.config import NoiseConfig, RunConfig
from msn_jax.eagle import EagleHead, joined, rows_of, run_eagle, taps
from msn_jax.linear import HIGHEST, linear
from msn_jax.model import MASKED, REMAT, causal_attention, causal_mask, embed, final_norm, forward, unembed
from msn_jax.model_config import ModelConfig
from msn_jax.objectives.scores import COUNT, draw_nothing, next_labels
from msn_jax.objectives.streams import weighted
from msn_jax.params import Params
from msn_jax.sharding import constrain

draw = draw_nothing


def loss_sums(
    parts: Parts,
    cfg: ModelConfig,
    batch: dict[str, Array],
    *,
    noise: NoiseConfig,
    steps: int,
    remat: str = "none",
    head_chunk: int = 512,
    dtype=None,
) -> tuple[Array, tuple[Array, Array]]:
    """Cross entropy against the model's own distribution among the draft vocabulary, see __init__.py.

    Row 0 of the sums is empty, row j + 1 that of step j; top-k is how often the model's best token is among the k best.
    A place whose best token the draft vocabulary lacks counts as missed, and teaches nothing, as published.
    """
    params, segments = parts.weights, batch["segment_ids"]
    seen = forward(
        params, cfg, batch["tokens"], batch["positions"], segments=segments, remat=remat, dtype=dtype, taps=taps(cfg)
    )
    hidden, _, features = jax.lax.stop_gradient(seen)
    head = parts.heads.cast(params.embed.dtype)
    rows = jax.lax.stop_gradient(rows_of(params, cfg, head.ids))
    inside = jnp.full(cfg.vocab_size, -1, jnp.int32).at[head.ids].set(jnp.arange(len(rows), dtype=jnp.int32))
    best = inside[_best_tokens(params, cfg, hidden, head_chunk)]

    _, counts = next_labels(batch)
    sums, there = [], jnp.ones_like(counts)
    for j, out in enumerate(unrolled(head, params, cfg, batch, features, steps, remat), 1):
        there &= _later(counts, j) & (_later(segments, j) == segments)
        places = out, _later(hidden, j), _later(best, j), there
        sums.append(_scores(params, cfg, rows, *places, head_chunk))
    sums = jnp.stack([jnp.zeros(4), *sums])
    return weighted(sums, noise.decay), (sums[:, COUNT].sum(), sums)


def unrolled(
    head: EagleHead,
    params: Params,
    cfg: ModelConfig,
    batch: dict[str, Array],
    features: Array,
    steps: int,
    remat: str = "none",
) -> list[Array]:
    """What the head makes of every place in each step, [B, T, D]; features [B, T, 3D] of the model."""
    x, text, chain, outs = joined(head, cfg, features), None, (), []

    @REMAT[remat]
    def step(x, tokens, positions, text, chain):
        if text is None:
            attend = partial(causal_attention, segments=batch["segment_ids"])
        else:
            attend = lambda q, k, v: chain_attention(q, text, (*chain, (k, v)), batch["segment_ids"])
        return run_eagle(head, cfg, embed(params, tokens).astype(x.dtype), x, positions, attend)

    for j in range(steps):
        x, kv = step(x, _later(batch["tokens"], j + 1), batch["positions"] + j, text, chain)
        text, chain = (kv, ()) if text is None else (text, (*chain, kv))
        outs.append(x)
    return outs


def chain_attention(q: Array, text: tuple[Array, Array], chain: tuple[tuple[Array, Array], ...], segments: Array):
    """Attention of one step: over step 0 up to each place, and over the steps since at that place. [B, T, N, H]

    q [B, T, K, G, H]; text: keys and values [B, K, T, H] of step 0; chain: those of the steps since, this one's last.
    """
    B, T, K, G, H = q.shape
    dot = partial(jnp.einsum, precision=HIGHEST if q.dtype == jnp.float32 else None, preferred_element_type=jnp.float32)
    rows = (q * H**-0.5).transpose(0, 2, 3, 1, 4)
    seen = causal_mask(T)[None] & (segments[:, :, None] == segments[:, None, :])
    past = jnp.where(seen[:, None, None], dot("bkgth,bkuh->bkgtu", rows, text[0]), MASKED)
    near = jnp.stack([dot("bkgth,bkth->bkgt", rows, k) for k, _ in chain], axis=-1)
    top = jax.lax.stop_gradient(jnp.maximum(past.max(axis=-1, keepdims=True), near.max(axis=-1, keepdims=True)))
    past, near = jnp.exp(past - top), jnp.exp(near - top)
    out = dot("bkgtu,bkuh->bkgth", past.astype(q.dtype), text[1])
    for i, (_, v) in enumerate(chain):
        out = out + near[..., i, None] * v.astype(jnp.float32)[:, :, None]
    out = out / (past.sum(axis=-1, keepdims=True) + near.sum(axis=-1, keepdims=True))
    return out.astype(q.dtype).transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, H)


def _later(x: Array, by: int) -> Array:
    """x [B, T, ...] as it is so many places on, zeros beyond the end."""
    by = min(by, x.shape[1])
    return jnp.pad(x[:, by:], ((0, 0), (0, by)) + ((0, 0),) * (x.ndim - 2))


def _chunks(x: Array, chunk: int) -> Array:
    """x [B, T, ...] in parts of up to `chunk` places, padded: [parts, B, chunk, ...]."""
    chunk = min(chunk, x.shape[1])
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % chunk)) + ((0, 0),) * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(len(x), -1, chunk, *x.shape[2:]), 1, 0)


def _best_tokens(params: Params, cfg: ModelConfig, hidden: Array, chunk: int) -> Array:
    """The model's best token after each place, int32[B, T]."""

    def best(hidden):
        logits = constrain(unembed(params, cfg, hidden), "batch", None, "vocab")
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    found = jax.lax.map(best, _chunks(hidden, chunk))
    return jnp.moveaxis(found, 0, 1).reshape(len(hidden), -1)[:, : hidden.shape[1]]


def _scores(params, cfg, rows, out, hidden, best, there, chunk) -> Array:
    """The sums (scores.py) of one step, float32[4]: out, hidden [B, T, D]; best int32[B, T] by place in the draft
    vocabulary, -1 outside; there bool[B, T]."""

    @jax.checkpoint
    def score(part):
        out, hidden, best, there = part
        target = jax.nn.log_softmax(linear(hidden, rows, dtype=jnp.float32))
        logits = linear(final_norm(params, cfg, out), rows, dtype=jnp.float32)
        far = -(jnp.exp(target) * jax.nn.log_softmax(logits)).sum(axis=-1)
        wanted = jnp.take_along_axis(logits, jnp.maximum(best, 0)[..., None], axis=-1)
        rank = jax.lax.stop_gradient((logits > wanted).sum(axis=-1))
        columns = jnp.stack([far, *[(rank < k).astype(jnp.float32) for k in (1, 10)]], axis=-1)
        columns = jnp.where((best >= 0)[..., None], columns, 0)
        return jnp.where(there[..., None], jnp.pad(columns, ((0, 0), (0, 0), (1, 0)), constant_values=1), 0).sum((0, 1))

    return jax.lax.map(score, tuple(_chunks(x, chunk) for x in (out, hidden, best, there))).sum(axis=0)


def held_out(
    parts: Parts, cfg: ModelConfig, batch: dict[str, Array], key: Array, *, noise: NoiseConfig, **settings
) -> tuple[Array, Array]:
    """The sums of the steps, twice: nothing is learnt of clean text."""
    return (loss_sums(parts, cfg, batch, noise=noise, **settings)[1][1],) * 2


def flops(run: RunConfig, frozen: int, trained: int) -> int:
    """Forward alone through the frozen weights, there and back through the head in each step. (Not counted: the rows of
    the model's head.)"""
    return (2 * frozen + 6 * run.heads.count * trained) * run.train.batch_size * run.data.max_tokens
