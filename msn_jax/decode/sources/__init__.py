"""The sources of drafts, one file each; source.py says what a source is."""

import dataclasses
from typing import Any

from msn_jax.decode.source import Source, Weights
from msn_jax.decode.sources.draft_model import DraftModel
from msn_jax.decode.sources.eagle import Eagle
from msn_jax.decode.sources.jacobi import Jacobi
from msn_jax.decode.sources.lookahead import Lookahead
from msn_jax.decode.sources.medusa import Medusa
from msn_jax.decode.sources.ngrams import Ngrams
from msn_jax.decode.sources.recycling import Recycling
from msn_jax.decode.sources.retrieval import Retrieval
from msn_jax.decode.tree import DRAFT_MODEL, EAGLE, JACOBI, MEDUSA, NGRAMS, TreeSet
from msn_jax.errors import InputError
from msn_jax.model_config import ModelConfig
from msn_jax.params import DraftAdapter, Params

SOURCES: tuple[Source, ...] = (Retrieval(), Jacobi(), Recycling(), Lookahead(), Medusa(), Ngrams())


Drafter = DraftAdapter | dict[str, Any]  # what sources have of their own, by name; an adapter alone is that of noise


def drafters(lm) -> Drafter | None:
    """What the sources have of their own in a loaded LM, as `loop.run` takes it."""
    small = lm.draft and lm.draft.params
    known = ((MEDUSA, lm.heads), (EAGLE, lm.eagle), (NGRAMS, lm.ngrams), (DRAFT_MODEL, small))
    others = {name: own for name, own in known if own is not None}
    return {JACOBI: lm.drafter, **others} if others else lm.drafter


def with_made_sources(trees: TreeSet, lm) -> TreeSet:
    """The trees with those of their sources that are made for one model: a smaller one that drafts, EAGLE's head."""
    made = []
    if DRAFT_MODEL in trees.names:
        made.append(DraftModel(lm.draft.cfg, lm.draft.dtype, lm.draft.activations))
    if EAGLE in trees.names:
        made.append(Eagle(lm.dtype, lm.activations))
    return dataclasses.replace(trees, sources=(*trees.sources, *made)) if made else trees


def sources_of(trees: TreeSet) -> tuple[Source, ...]:
    """Those that the trees name, in a fixed order. Raises InputError for a name that none has."""
    known = (*SOURCES, *trees.sources)
    missing = set(trees.names) - {name for s in known for name in (s.name, s.probe)}
    if missing:
        raise InputError(
            f"tree {trees.name!r} names the source {min(missing)!r}; accepted: with such a Source in its `sources`"
        )
    return tuple(s for s in known if s.name in trees.names or s.probe in trees.names)


def taps_of(trees: TreeSet, cfg: ModelConfig) -> tuple[int, ...]:
    """Layers whose inputs the cache keeps for the sources of these trees. Raises InputError where they differ."""
    wanted = {taps for source in sources_of(trees) if (taps := source.taps(cfg))}
    if len(wanted) > 1:
        raise InputError(f"tree {trees.name!r}: its sources read different layers; accepted: those of one alone")
    return wanted.pop() if wanted else ()


def weights_of(
    sources: tuple[Source, ...], params: Params, cfg: ModelConfig, drafter: Drafter | None
) -> dict[str, Weights]:
    """What each source may compute with, by its name."""
    own = drafter if isinstance(drafter, dict) else {JACOBI: drafter}
    return {source.name: Weights(params, own.get(source.name), cfg) for source in sources}
