"""Tokens a pass of a model that was just trained: all questions in one batch, by each method."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.spec_bench import parse_method
from experiments.statistics import by_question, mat_interval
from msn_jax import DecodeConfig
from msn_jax.answers import repeated_4grams
from msn_jax.decode.generate import generate_batches
from msn_jax.decode.prompts import encode
from msn_jax.io.loading import LM, Beside, with_adapter


def with_trained(lm: LM, trained: Any, dtype: str) -> LM:
    """The model as it decodes with what was trained beside its float32 weights, in a dtype."""
    trained = jax.tree.map(np.asarray, trained)  # off whatever devices it was trained on
    stays = isinstance(trained, Beside)
    lm = lm if stays else with_adapter(lm, trained)  # merged before the weights are rounded
    params, drafter = jax.tree.map(lambda x: jnp.asarray(x, dtype), (lm.params, lm.drafter))
    lm = dataclasses.replace(lm, params=params, drafter=drafter)
    return with_adapter(lm, trained) if stays else lm


def measure(lm: LM, questions: list[dict], methods: str, max_new_tokens: int) -> dict:
    """All questions in one batch by each method: answers in the form of spec_bench, and tokens a pass."""
    prompts = [encode(lm, [{"role": "user", "content": q["turns"][0]}]) for q in questions]
    base = DecodeConfig(max_new_tokens=max_new_tokens)
    answers, figures, plain = [], {}, None
    for method in methods.split(","):
        config = dataclasses.replace(parse_method(method, base), batch_size=len(prompts))
        # One program of plain decoding for all arms.
        model = (
            dataclasses.replace(lm, drafter=None, heads=None, eagle=None, draft=None) if config.method == "ar" else lm
        )
        (results,) = generate_batches(model, prompts, config)
        plain = plain or results
        for question, result in zip(questions, results, strict=True):
            answers.append(
                {
                    "question_id": question["question_id"],
                    "method": method,
                    "tokens": len(result.tokens),
                    "forwards": result.forwards,
                    "rep4_frac": round(repeated_4grams(result.tokens), 4),
                }
            )
        sums = by_question({"answers": answers}, method)
        same = sum(a.tokens == b.tokens for a, b in zip(results, plain, strict=True))
        figures[method] = {"mat_no_loops": mat_interval(sums) if sums else None, "same_as_first": same}
        figures[method] |= {"seconds": sum(r.seconds for r in results), "outputs": len(results)}
    return {"methods": figures, "answers": answers}


def shown(speed: dict) -> str:
    """Tokens a pass without loops by method, with the interval, and how many outputs are those of the first method."""
    parts = []
    for method, figures in speed["methods"].items():
        mat = figures["mat_no_loops"]
        parts.append(f"{method} " + ("{:.3f} ({:.3f} to {:.3f})".format(*mat) if mat else "all loop"))
    return ", ".join(parts) + f"; same {[f['same_as_first'] for f in speed['methods'].values()]}"
