"""The sources of drafts, one file each; source.py says what a source is."""

from typing import Any

from msn_jax.decode.source import Source, Weights
from msn_jax.decode.sources.jacobi import Jacobi
from msn_jax.decode.sources.lookahead import Lookahead
from msn_jax.decode.sources.medusa import Medusa
from msn_jax.decode.sources.ngrams import Ngrams
from msn_jax.decode.sources.recycling import Recycling
from msn_jax.decode.sources.retrieval import Retrieval
from msn_jax.decode.tree import JACOBI, MEDUSA, NGRAMS, TreeSet
from msn_jax.model_config import ModelConfig
from msn_jax.params import DraftAdapter, Params

SOURCES: tuple[Source, ...] = (Retrieval(), Jacobi(), Recycling(), Lookahead(), Medusa(), Ngrams())


Drafter = DraftAdapter | dict[str, Any]  # what sources have of their own, by name; an adapter alone is that of noise


def drafters(lm) -> Drafter | None:
    """What the sources have of their own in a loaded LM, as `loop.run` takes it."""
    others = {name: own for name, own in ((MEDUSA, lm.heads), (NGRAMS, lm.ngrams)) if own is not None}
    return {JACOBI: lm.drafter, **others} if others else lm.drafter


def sources_of(trees: TreeSet) -> tuple[Source, ...]:
    """Those that the trees name, in a fixed order."""
    known = (*SOURCES, *trees.sources)
    return tuple(s for s in known if s.name in trees.names or s.probe in trees.names)


def weights_of(
    sources: tuple[Source, ...], params: Params, cfg: ModelConfig, drafter: Drafter | None
) -> dict[str, Weights]:
    """What each source may compute with, by its name."""
    own = drafter if isinstance(drafter, dict) else {JACOBI: drafter}
    return {source.name: Weights(params, own.get(source.name), cfg) for source in sources}
