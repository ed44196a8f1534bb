"""The loop with a real model: torch's tokens, methods that agree, what is timed."""

import dataclasses

import numpy as np
import pytest
from conftest import GOLDENS

from msn_jax import generate
from msn_jax.decode import TREE_SETS, loop, run

pytestmark = pytest.mark.slow


def test_smollm2_writes_what_torch_writes(smollm2):
    golden = np.load(GOLDENS / "smollm2.npz")
    prompt, expected = golden["greedy_prompt"].tolist(), golden["greedy_tokens"].tolist()
    for method in ("ar", "tr-jacobi"):
        (result,) = generate(smollm2, [prompt], method=method, max_new_tokens=len(expected))
        assert result.tokens == expected
        assert sum(result.accepted) == len(result.tokens) and len(result.accepted) == result.forwards


def test_smollm2_methods_agree(smollm2):
    # A prompt with much to copy, so that long paths are accepted.
    prompt = "The colours, over and over: red, green, blue, yellow, red, green, blue, yellow, red, green,"
    plain = generate(smollm2, [prompt], method="ar", max_new_tokens=48)[0]
    fast = generate(smollm2, [prompt], method="tr-jacobi", max_new_tokens=48)[0]
    assert fast.tokens == plain.tokens and fast.text == plain.text
    assert plain.forwards == len(plain.tokens) and fast.forwards < 0.5 * plain.forwards
    warm = dict(max_new_tokens=48, temperature=0.8, seed=11)
    assert (
        generate(smollm2, [prompt], method="tr-jacobi", **warm)[0].tokens
        == generate(smollm2, [prompt], method="ar", **warm)[0].tokens
    )


@pytest.mark.parametrize("batch", [1, 2])
def test_every_tree_has_run_before_the_clock_starts(shallow, monkeypatch, batch):
    passes = []

    def counted(*args, **settings):
        state, progress = run(*args, **settings)
        passes.append(state.passes.tolist())
        return state, progress

    monkeypatch.setattr(loop, "run", counted)
    shallow = dataclasses.replace(shallow)  # of which no program has run yet
    trees = TREE_SETS["adaptive"]
    for max_new_tokens, warmed in ((3, len(trees.trees)), (2, 0)):  # a program is run for this once
        passes.clear()
        settings = dict(batch_size=batch, max_new_tokens=max_new_tokens)
        generate(shallow, [list(range(40))] * batch, method="tr-jacobi", tree="adaptive", **settings)
        assert len(passes) == warmed + 1
        assert passes[:warmed] == [[int(a == b) for a in range(warmed)] for b in range(warmed)]


def test_the_shortest_prompt_may_fill_its_slots(shallow):
    shallow = dataclasses.replace(shallow)  # what runs before the clock must fit them too
    settings = dict(tree="adaptive", max_new_tokens=247)  # 1 + 247 + 8 that a pass may write: the smallest bucket
    (plain,) = generate(shallow, [[3]], method="ar", max_new_tokens=247)
    (drafted,) = generate(shallow, [[3]], method="tr-jacobi", **settings)
    assert drafted.tokens == plain.tokens
