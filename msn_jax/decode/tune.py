"""Trees chosen by measurement: what a pass costs on this device, what each draft is worth on these prompts.

Prompts are decoded once with a wide tree, the survey, which notes for every cycle which of its nodes were right. Trees
are grown from that (grow.py). In the end the prompts are decoded with these trees, with the default ones and with none,
in turns, and the fastest are kept.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from msn_jax.config import DecodeConfig
from msn_jax.decode import loop, tree_file
from msn_jax.decode.grow import FROM, Cycles, build, candidates
from msn_jax.decode.source import Seen, Source
from msn_jax.decode.sources import drafters, with_made_sources
from msn_jax.decode.sources.retrieval import retrieve
from msn_jax.decode.tree import (
    DRAFT_MODEL,
    EAGLE,
    JACOBI,
    MEDUSA,
    NAMES,
    NGRAMS,
    RECYCLING,
    RETRIEVAL,
    ROOT,
    TreeSet,
    TreeSpec,
    likely,
    with_noise,
)
from msn_jax.decode.tree_sets import TREE_SETS, USES, tree_set
from msn_jax.errors import InputError
from msn_jax.records import machine

BATCHES = (1, 2, 4, 8, 32)
NODES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)  # sizes of trees: what a pass of others costs is not known
ROUNDS = 6  # in which each of them is timed again
CHUNK = 64  # tokens of a prefill pass
WORTHLESS = 3.5  # no tree pays for a pass that takes so many times that of one token
RACE = 12  # prompts, and at least one batch, that are decoded in the end
ODDS = (0.45, 0.15, 0.08, 0.05, 0.035, 0.03, 0.025, 0.02)  # of candidates by rank, for the shape of a wide tree


class Survey(Source):
    """Drafts nothing. Carry bool[B, cycles, M]: which nodes of each pass were right, for greedy decoding; by forwards.
    The confidence of a row stands in int32[B, cycles]."""

    name = "survey"

    def init(self, cfg, ask, batch, slots):
        return jnp.zeros((batch, slots, ask.drafts), bool), jnp.zeros(batch, jnp.int32)

    def level(self, weights, carry, scratch, at, tokens):
        return jnp.full((len(tokens), len(at.nodes)), -1, jnp.int32), scratch

    def observe(self, weights, carry, seen: Seen, ask):
        parents = np.maximum(seen.tree.parents, 0)
        wrong = (~seen.valid | (seen.tokens != seen.greedy[:, parents])).at[:, 0].set(False)
        return ~(wrong[:, None, :] & seen.tree.ancestors[None]).any(axis=2)[:, : ask.drafts]

    def update(self, weights, carry, news, text, live):
        right, passes = carry
        rows = jnp.arange(len(passes))
        old = right[rows, passes]
        return right.at[rows, passes].set(jnp.where(live[:, None], news, old)), passes + live.astype(jnp.int32)


def strongest(lm) -> str:
    """The source that is asked after every token: the one that was made for this model, or recycling."""
    known = ((EAGLE, lm.eagle), (MEDUSA, lm.heads), (DRAFT_MODEL, lm.draft), (NGRAMS, lm.ngrams))
    return next((name for name, own in known if own is not None), RECYCLING)


def _noise(lm) -> int:
    """Noise tokens in a row that its adapter knows."""
    return 0 if lm.drafter is None else len(lm.drafter.noise_embed)


def survey_tree(depths: int, known: str = RECYCLING, alone: bool = False) -> TreeSpec:
    """Every source beside every other: a tree of the source `known`, a long chain of the best continuation and a short
    one of the second, each with `known` under it; with an adapter for `depths` noise tokens its candidates too.
    n-grams stand in the long chain too, where nothing was retrieved; and `known` where the noise predicts nothing, but
    not with `alone`, for trees of one source."""
    parents, sources = [-1], [(ROOT, 0)]

    def hang(parent: int, *wants: tuple[str, int]) -> int:
        parents.append(parent)
        sources.append(wants[0] if len(wants) == 1 else wants)
        return len(parents) - 1

    # Recycling learns more from this wide tree than it would from a small one; n-grams are worth what they seem.
    tree = likely("", 64, ODDS, known)
    for node in range(1, tree.size):
        hang(tree.parents[node], tree.sources[node])
    for rank, length in ((0, 15), (1, 4)):
        node = 0
        for place in range(length):
            node = hang(node, (RETRIEVAL, rank), *([(NGRAMS, 0)] if known == NGRAMS and rank == 0 else []))
            for candidate in range(2 if place < 3 else 0):
                hang(node, (known, candidate))
    if depths:
        ahead = lambda parent, rank: hang(parent, (JACOBI, rank), *([] if alone else [(known, rank)]))
        firsts = [ahead(0, rank) for rank in range(8)]
        for first in firsts[:3]:
            for rank in range(3):
                second = ahead(first, rank)
                for third in range(2):
                    ahead(second, third)
                    hang(second, (known, third))
            for candidate in range(2):
                hang(hang(first, (known, candidate)), (known, 0))
    hang(0, ("survey", 0))
    return with_noise(TreeSpec("survey", tuple(parents), tuple(sources), twins=True), {0: depths})


def survey(lm, prompts: Sequence[list[int]], max_new_tokens: int, batch: int = 4, alone: bool = False) -> Cycles:
    """Decode the prompts (token ids) greedily with the survey's tree. alone: see `survey_tree`."""
    tree = survey_tree(_noise(lm), strongest(lm), alone)
    trees = TreeSet("survey", (tree,), (0,), sources=(Survey(),))
    slots = _slots([trees], prompts, max_new_tokens)
    right, match = [], []
    for at in range(0, len(prompts), batch):
        part = prompts[at : at + batch]
        state, _ = decoded(lm, trees, part, max_new_tokens, batch, slots)
        seen, forwards, accepted = jax.device_get((state.drafts["survey"][0], state.forwards, state.accepted))
        for row, prompt in enumerate(part):
            passes = int(forwards[row]) - 1  # the last one was cut by the limit or a stop
            root = len(prompt) - 1 + np.r_[0, np.cumsum(accepted[row, :passes])][:passes]
            right.append(seen[row, :passes])
            match.append(_matches(state.tokens[row], jnp.asarray(np.resize(root, slots)))[:passes])
    return Cycles(tree, np.concatenate(right), np.concatenate(match))


def _slots(sets: Sequence[TreeSet], prompts: Sequence[list[int]], max_new_tokens: int) -> int:
    width = max(trees.width for trees in sets)
    return loop.bucket(max(loop.slots_needed(len(p), max_new_tokens, width, CHUNK) for p in prompts))


def decoded(
    lm, trees: TreeSet, prompts: Sequence[list[int]], max_new_tokens: int, batch: int, slots: int
) -> tuple[loop.DecodeState, float]:
    """The loop's last state and the seconds of its passes, of `batch` prompts at most, greedily; rows without a prompt
    are done from the start."""
    trees, rows = with_made_sources(trees, lm), [*prompts, *[[0]] * (batch - len(prompts))]
    settings = DecodeConfig(max_new_tokens=max_new_tokens)
    state = loop.init_state(lm.cfg, trees, rows, settings, lm.stop_ids, slots=slots, dtype=lm.dtype, backend=lm.backend)
    state = state.replace(done=jnp.arange(batch) >= len(prompts))
    return _timed_run(lm, loop.prefill(lm.params, state, cfg=lm.cfg, chunk=CHUNK), trees, 2**31 - 1)


def _timed_run(lm, state: loop.DecodeState, trees: TreeSet, cycles: int) -> tuple[loop.DecodeState, float]:
    """The state after so many cycles at most, and their seconds."""
    state = jax.block_until_ready(state)
    start = time.perf_counter()
    state, _ = loop.run(lm.params, state, cycles, drafters(lm), cfg=lm.cfg, trees=trees)
    return jax.block_until_ready(state), time.perf_counter() - start


def race(lm, sets: Sequence[TreeSet], prompts: Sequence[list[int]], max_new_tokens: int, batch: int) -> list[float]:
    """Seconds of the passes with each set, over the same prompts, batch by batch in turns. The replies are the same."""
    prompts, slots = prompts[: max(batch, RACE)], _slots(sets, prompts, max_new_tokens)
    for trees in sets:
        decoded(lm, trees, prompts[:batch], max_new_tokens, batch, slots)  # compiles
    seconds = [0.0] * len(sets)
    for at in range(0, len(prompts), batch):
        for i, trees in enumerate(sets):
            seconds[i] += decoded(lm, trees, prompts[at : at + batch], max_new_tokens, batch, slots)[1]
    return seconds


@jax.jit
def _matches(tokens, roots):
    return jax.lax.map(lambda root: retrieve(tokens[None], root[None], 1)[1][0], roots)


def timed_pass(lm, nodes: int, batch: int, noise: int = 0, slots: int = 512, cycles: int = 4) -> Callable[[], float]:
    """Seconds of a cycle, measured at each call, with so many nodes of the source that is asked, `noise` of them noise,
    at half-full slots."""
    tree = with_noise(likely("cost", nodes - 1 - noise, ODDS, strongest(lm)), {0: noise})
    trees = with_made_sources(TreeSet("cost", (tree,), (0,)), lm)
    prompt = np.random.default_rng(0).integers(0, lm.cfg.vocab_size, slots // 2).tolist()
    settings = DecodeConfig(max_new_tokens=slots // 4)

    def measure() -> float:
        state = loop.init_state(
            lm.cfg, trees, [prompt] * batch, settings, (), slots=slots, dtype=lm.dtype, backend=lm.backend
        )
        state, seconds = _timed_run(lm, state, trees, cycles)
        return seconds / int(state.passes[0])

    measure()  # compiles
    return measure


def costs(lm, batch: int, noise: int = 0) -> dict[int, float]:
    """Seconds of a pass by its nodes, `noise` of them noise but in that of a root alone, up to where no tree can pay
    for it. The sizes are timed in turns, so that a machine that gets slower slows all of them; medians."""
    passes, times = {}, {}
    for nodes in NODES:
        if 1 < nodes <= 1 + noise:
            continue
        passes[nodes] = timed_pass(lm, nodes, batch, noise if nodes > 1 else 0)
        times[nodes] = [passes[nodes]()]
        if times[nodes][0] > WORTHLESS * times[NODES[0]][0]:
            break
    for _ in range(ROUNDS):
        for nodes, measure in passes.items():
            times[nodes].append(measure())
    return {nodes: float(np.median(seconds)) for nodes, seconds in times.items()}


def tune_to(path: str, lm, prompts: Sequence[list[int]], method: str = "tr-jacobi") -> None:
    """Tune on prompts (token ids) and write the sets to a file."""
    with contextlib.nullcontext() if lm.mesh is None else jax.set_mesh(lm.mesh):
        tree_file.write(path, *tune(lm, prompts, method=method))
    print(f"wrote {path}")


def tune(
    lm,
    prompts: Sequence[list[int]],
    batches: Sequence[int] = BATCHES,
    max_new_tokens: int = 64,
    say: Callable[[str], None] = print,
    method: str = "tr-jacobi",
) -> tuple[dict[int, TreeSet], dict[str, Any]]:
    """The best tree set for each batch size, and the figures behind them. prompts: token ids.

    method: of which drafts the trees may be. Raises InputError for one that has none in the survey.
    """
    uses, asked = USES[method], {RETRIEVAL, strongest(lm), *([JACOBI] if lm.drafter is not None else [])}
    if uses is not None and not asked & {*uses}:
        accepted = [name for name, own in USES.items() if own is None or asked & {*own}]
        raise InputError(
            f"no trees for {method}: {lm.name} has not what it drafts with; accepted: {', '.join(accepted)}"
        )
    say(f"decoding {len(prompts)} prompts with the widest tree, then timing passes of {NODES[0]} to {NODES[-1]} nodes")
    cycles, begins, noise = survey(lm, prompts, max_new_tokens, alone=uses is not None), FROM, _noise(lm)
    if uses is not None:
        # Without retrieval nothing chooses between trees.
        cycles, begins = cycles.only(uses), FROM if RETRIEVAL in uses else FROM[:1]
    say(f"surveyed {len(cycles.match)} passes of {len(prompts)} prompts")
    # Noise makes each pass of a set dearer, so that trees without it may be the faster ones.
    kinds = [] if uses == USES["jacobi"] and noise else [(cycles.only({*NAMES} - {JACOBI}), 0)]
    kinds += [(cycles, noise)] if noise and (uses is None or JACOBI in uses) else []
    ar, sets, by_batch = TREE_SETS["root"], {}, {}
    for batch in batches:
        found = []
        for seen, length in kinds:
            seconds = costs(lm, batch, length)
            trees, figures = build(seen, seconds, f"tuned{batch}", length, begins)
            cost_ms = {n: round(1e3 * s, 3) for n, s in seconds.items()}
            found.append((trees, {**figures, "noise": length, "cost_ms": cost_ms}))
        tuned, figures = max(found, key=lambda one: one[1]["ratio_to_one_token"])
        default = tree_set(method, None, lm.backend, lm.drafter is not None, batch, lm.ngrams is not None)
        rivals = {"none": ar, "default": default, "tuned": tuned}
        rivals = {name: trees for name, trees in rivals.items() if name == "none" or trees.trees != ar.trees}
        spent = dict(zip(rivals, race(lm, list(rivals.values()), prompts, max_new_tokens, batch), strict=True))
        taken = min(spent, key=spent.__getitem__)
        sets[batch], nodes = rivals[taken], [tree.size for tree in rivals[taken].trees]
        by_batch[batch] = {
            "taken": taken,
            "nodes": nodes,
            "seconds": {name: round(s, 3) for name, s in spent.items()},
            "tuned": figures,
        }
        speed = ", ".join(f"{name} {spent['none'] / s:.2f}" for name, s in spent.items())
        say(f"batch {batch}: trees of {', '.join(map(str, nodes))} nodes; speed on the first prompts: {speed}")
    return sets, {
        "ckpt": lm.name,
        "device": machine(lm.backend),
        "dtype": str(jnp.dtype(lm.dtype)),
        "method": method,
        "prompts": len(prompts),
        "batches": by_batch,
        "right_frac": candidates(cycles),
    }
