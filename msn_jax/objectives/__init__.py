"""What a run learns, an objective a file; `objective_of` is the one place that chooses.

Each module has three functions. `parts` is the model (see adapters.Parts), its weights in the dtype of products;
`noise` the run's NoiseConfig; `settings` are remat, head_chunk and dtype of TrainConfig.

draw(key, batch, noise, step) -> a tuple of arrays [B, ...]: what is drawn anew at each step.
loss_sums(parts, cfg, batch, *drawn, noise=..., **settings) -> (loss float32[], (divisor float32[], sums)): the loss
    summed over a part of the batch, the count it is to be divided by, and what it is made of (scores.py).
held_out(parts, cfg, batch, key, *, noise, **settings) -> (sums of clean text, sums of noise), the same for each call.
flops(run, frozen, trained) -> of a step in products with weights, from the numbers of frozen and of trained weights.
"""

from __future__ import annotations

from types import ModuleType

from msn_jax.config import RunConfig
from msn_jax.objectives import beside, draft_layers, draft_only, eagle, inline, medusa


def objective_of(run: RunConfig) -> ModuleType:
    """The module that says what the run learns."""
    modules = {"inline": inline, "beside": beside, "draft_only": draft_only, "draft_layers": draft_layers}
    return (modules | {"medusa": medusa, "eagle": eagle})[run.objective]
