"""What a pass costs by its number of tree nodes, beside one token and the memory-bandwidth floor.

    python benchmarks/step_cost.py --ckpt smollm2-135m-instruct
    python benchmarks/step_cost.py --adapter DIR --nodes 1 --trees ahead8,ahead16
    python benchmarks/step_cost.py --adapter DIR --nodes 1 --trees found,recycle8 --drafts

All sizes take turns in one process. The floor is the time to read every weight and cached key and value once, at
the best rate that any of several plain reads reaches in the same run. --drafts sets each of --trees beside its largest
tree with the same drafts every time: the difference is what choosing a tree and drafting for it cost.
"""

from __future__ import annotations

import argparse
import os
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from msn_jax import DecodeConfig, InputError, init, kernels, load
from msn_jax.decode import TreeSet, init_state, loop, tree_set
from msn_jax.decode.source import At, Source
from msn_jax.decode.sources import drafters
from msn_jax.decode.tree import JACOBI, PROBES, ROOT, TreeSpec, chain
from msn_jax.io.loading import DTYPES
from msn_jax.params import declare, round_params
from msn_jax.records import print_record
from msn_jax.shapes import SHAPES
from msn_jax.terminal import run_command


class Constant(Source):
    """The same drafts every time, for which there is nothing to do."""

    name = "constant"

    def level(self, weights, carry, scratch, at: At, tokens):
        return jnp.broadcast_to(jnp.asarray(at.nodes, jnp.int32), (len(tokens), len(at.nodes))), scratch


def constant(tree: TreeSpec) -> TreeSet:
    """A tree of the same shape, probes included, with constant drafts."""
    names = [
        own if {kind for kind, _ in wants} & {ROOT, *PROBES} else (Constant.name, 0)
        for own, wants in zip(tree.sources, tree.wants, strict=True)
    ]
    spec = TreeSpec(f"{tree.name} constant", tree.parents, tuple(names))
    return TreeSet(spec.name, (spec,), (0,), sources=(Constant(),))


def measure(programs: dict, rounds: int) -> dict[str, np.ndarray]:
    """Seconds of each call, the programs taking turns; the first round is thrown away."""
    times = {name: [] for name in programs}
    for _ in range(rounds + 1):
        for name, call in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            times[name].append(time.perf_counter() - start)
    return {name: np.array(t[1:]) for name, t in times.items()}


def read_bytes_per_s(rounds: int, size: int = 2**27) -> float:
    """The best rate of a sum and of matrix-vector products in both layouts, over `size` float32 numbers."""
    flat = jnp.ones(size, jnp.float32)
    tall = [flat[i : i + 2**22].reshape(-1, 1024) for i in range(0, size, 2**22)]
    left, right = jnp.ones(tall[0].shape[0]), jnp.ones(1024)
    total = jax.jit(jnp.sum)
    rows, columns = jax.jit(lambda ms, v: [m @ v for m in ms]), jax.jit(lambda ms, v: [v @ m for m in ms])
    reads = {
        "sum": lambda: total(flat),
        "rows": lambda: rows(tall, right),
        "columns": lambda: columns(tall, left),
    }
    return max(4 * size / np.median(t) for t in measure(reads, rounds).values())


def weight_bytes(cfg, params) -> int:
    """Bytes of weights that a pass has to read."""
    whole = sum(a.nbytes for a in jax.tree.leaves(params))
    if cfg.tie_embeddings:
        return whole
    return whole - sum(a.nbytes for a in jax.tree.leaves(params.embed))  # only a row of it is read


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument(
        "--ckpt",
        default="smollm2-135m-instruct",
        help=f"a checkpoint, or with random weights: {', '.join(SHAPES)}",
    )
    p.add_argument("--nodes", default="1,2,4,8,16,32,64", help="chains of so many; ratios are to the first")
    p.add_argument("--slots", type=int, default=512, help="cache slots")
    p.add_argument("--filled", type=int, help="slots that are filled before the first pass; default: half of them")
    p.add_argument("--batch_size", type=int, default=1)
    p.add_argument("--dtype", default="float32", choices=DTYPES)
    p.add_argument("--rounds", type=int, default=30)
    p.add_argument("--trees", default="", help="names of trees to time as well, after the chains")
    p.add_argument("--drafts", action="store_true", help="time --trees with constant drafts too")
    p.add_argument("--adapter", nargs="+", action="extend", metavar="DIR", help="what --trees drafts with")
    args = p.parse_args()
    if args.ckpt in SHAPES:
        if args.adapter:
            raise InputError(f"--adapter: {args.ckpt} has random weights; accepted: with a checkpoint")
        cfg, drafter = SHAPES[args.ckpt], None
        params = init(jax.random.key(0), cfg, "bfloat16" if args.dtype == "int8" else args.dtype)
        params = round_params(params, declare(cfg)) if args.dtype == "int8" else params
    else:
        lm = load(args.ckpt, adapter=args.adapter, dtype=args.dtype)
        cfg, params, drafter = lm.cfg, lm.params, drafters(lm)

    filled = args.filled or args.slots // 2
    prompts = [[1] * filled] * args.batch_size
    programs, states, sets = {}, {}, {}
    for nodes in map(int, args.nodes.split(",")):
        tree = chain(nodes - 1, JACOBI)
        sets[str(nodes)] = TreeSet(tree.name, (tree,), (0,))
    named = {name: tree_set("tr-jacobi", name) for name in args.trees.split(",") if name}
    sets |= named
    if args.drafts:
        sets |= {f"{name} constant": constant(trees.trees[-1]) for name, trees in named.items()}
    for name, trees in sets.items():
        settings = DecodeConfig(max_new_tokens=args.slots - filled - 64)
        state = init_state(cfg, trees, prompts, settings, (), slots=args.slots, dtype=params.embed.dtype)
        state = state.replace(tree=jnp.int32(len(trees.trees) - 1))  # the largest, whatever is chosen
        cycle = partial(jax.jit, donate_argnums=1)(partial(loop.step, cfg=cfg, trees=trees))
        states[name] = state

        def call(name=name, cycle=cycle):
            # The text grows by a token or more a call, within the limit; the donated cache goes round.
            states[name] = cycle(params, states[name], drafter)
            return states[name].forwards

        programs[name] = call
    seconds = measure(programs, args.rounds)
    first = next(iter(seconds))
    bytes_per_s = read_bytes_per_s(args.rounds)

    weights = weight_bytes(cfg, params)
    cache = states[first].cache
    cached = sum(a.nbytes for a in jax.tree.leaves((cache.k, cache.v)))
    floor = (weights + cached) / bytes_per_s
    one = np.median(seconds[first])
    sizes = f"{weights / 1e6:.0f} MB of weights, {cached / 1e6:.0f} MB of cache"
    print(f"{sizes}, read at {bytes_per_s / 1e9:.1f} GB/s: floor {1e3 * floor:.1f} ms")
    wide = max(8, *map(len, seconds))
    print(f"{'nodes':>{wide}} {'ms a pass':>9} {'min':>7} {'to first':>8} {'to floor':>8}")
    rows = {}
    for name, t in seconds.items():
        # The ratio to the first is taken round by round: the machine's speed drifts, both drift with it.
        ratio = float(np.median(t / seconds[first]))
        rows[name] = {
            "ms": round(1e3 * float(np.median(t)), 2),
            "min_ms": round(1e3 * float(t.min()), 2),
            "ratio_to_first": round(ratio, 3),
            "ratio_to_floor": round(float(np.median(t)) / floor, 3),
        }
        row, drafts = rows[name], ""
        if args.drafts and name in named:
            # Round by round, as the ratio to the first.
            row["ratio_to_constant"] = round(float(np.median(t / seconds[f"{name} constant"])), 3)
            drafts = f"  {row['ratio_to_constant']:.3f} of constant drafts"
        figures = f"{row['ms']:>9.1f} {row['min_ms']:>7.1f} {ratio:>8.2f} {row['ratio_to_floor']:>8.2f}"
        print(f"{name:>{wide}} {figures}{drafts}")
    print_record(
        xla_flags=os.environ.get("XLA_FLAGS", ""),
        dtype=args.dtype,
        batch_size=args.batch_size,
        slots=args.slots,
        filled=filled,
        kernels=kernels.describe(),
        floor_ms=round(1e3 * floor, 2),
        read_gb_per_s=round(bytes_per_s / 1e9, 2),
        first_ms=round(1e3 * float(one), 2),
        nodes=rows,
    )


if __name__ == "__main__":
    run_command(main)
