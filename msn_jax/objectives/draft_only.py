"""What a draft-only adapter learns: to say at noise, hung under a token of a reply, what the frozen model says there.

The noise of depth j under an anchor is to predict, without the tokens between, the distribution that the clean model
has j places after the anchor.
"""

from __future__ import annotations

from dataclasses import replace

from jax import Array

from msn_jax.adapters import Parts
from msn_jax.config import NoiseConfig, RunConfig
from msn_jax.model_config import ModelConfig
from msn_jax.objectives.scores import COUNT, next_labels
from msn_jax.objectives.streams import divergence_sums, draw_anchors, hung_embeddings, two_streams, weighted
from msn_jax.params import DraftAdapter, Params


def drafted(
    params: Params,
    cfg: ModelConfig,
    adapter: DraftAdapter,
    batch: dict[str, Array],
    anchors: Array,
    remat: str = "none",
    dtype=None,
) -> tuple[Array, Array]:
    """`two_streams` of the frozen model, with the adapter at its noise."""
    noise = hung_embeddings(adapter.noise_embed, anchors)
    return two_streams(params, cfg, batch, anchors, noise, (None, adapter.layers), remat, dtype)


def draw(key: Array, batch: dict[str, Array], noise: NoiseConfig, step: Array | int) -> tuple[Array, Array]:
    """(what counts bool[B, T], anchors int32[B, A]) of a batch."""
    _, counts = next_labels(batch)
    return counts, draw_anchors(key, counts, noise.anchors)


def loss_sums(
    parts: Parts,
    cfg: ModelConfig,
    batch: dict[str, Array],
    counts: Array,
    anchors: Array,
    *,
    noise: NoiseConfig,
    remat: str = "none",
    head_chunk: int = 128,
    dtype=None,
) -> tuple[Array, tuple[Array, Array]]:
    """Divergence of the noise's predictions from the clean model's, see __init__.py; row 0 of the sums is empty.

    top-k: how often the clean model's best token, which greedy decoding asks for, is among the k best of the noise.
    Logits of head_chunk noise tokens a row exist at one time.
    """
    adapter = DraftAdapter(parts.adapter, parts.noise_embed)
    clean, hung = drafted(parts.weights, cfg, adapter, batch, anchors, remat, dtype)
    sums = divergence_sums(parts.weights, cfg, clean, hung, counts, anchors, noise.loss, head_chunk)
    return weighted(sums, noise.decay), (sums[:, COUNT].sum(), sums)


def held_out(
    parts: Parts, cfg: ModelConfig, batch: dict[str, Array], key: Array, *, noise: NoiseConfig, **settings
) -> tuple[Array, Array]:
    """The sums of the noise, twice: nothing is learnt of clean text. Its loss is the KL divergence, for all losses."""
    plain = replace(noise, loss="kl")
    drawn = draw(key, batch, plain, 0)
    return (loss_sums(parts, cfg, batch, *drawn, noise=plain, **settings)[1][1],) * 2


def flops(run: RunConfig, frozen: int, trained: int) -> int:
    """Those of inline.py, without a backward pass through the clean text."""
    hung = run.train.batch_size * run.noise.anchors * run.noise.length
    return 2 * frozen * run.train.batch_size * run.data.max_tokens + (4 * frozen + 6 * trained) * hung
