"""What a pass costs by its number of nodes, beside the time to read the weights and the filled cache once.

Passes run inside the compiled loop, several a call, so that the figure is that of decoding and no call from Python
stands in it.
"""

from __future__ import annotations

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.stages.check import golden_prompts
from benchmarks.stages.loops import Loop
from benchmarks.stages.stage import Stage, compile_all
from benchmarks.step_cost import weight_bytes
from msn_jax import DecodeConfig, init, load
from msn_jax.decode import TreeSet, init_state, loop
from msn_jax.decode.prompts import encode
from msn_jax.decode.tree import JACOBI, chain
from msn_jax.errors import first_line
from msn_jax.shapes import SHAPES

NODES = (1, 2, 4, 8, 16, 32, 64, 96, 128)
ROUNDS = 5
# Passes of one call: so many that the call itself, some milliseconds of Python, does not count.
CYCLES = {"cpu": 8, "gpu": 64, "tpu": 64}
# (weights, dtype, slots, batch) in order of worth.
GROUPS = (
    ("ckpt", "bfloat16", 512, 1),
    ("llama-3-8b", "bfloat16", 512, 1),
    ("llama-3.2-1b", "bfloat16", 512, 1),
    ("llama-3-8b", "bfloat16", 4096, 8),
    ("ckpt", "float32", 512, 1),
    ("llama-3.2-1b", "bfloat16", 512, 8),
    ("ckpt", "bfloat16", 512, 8),
    ("llama-3-8b", "bfloat16", 512, 8),
    ("llama-3-8b", "bfloat16", 4096, 1),
    ("llama-3.2-1b", "float32", 512, 1),
    ("llama-3.2-1b", "bfloat16", 4096, 8),
    ("ckpt", "bfloat16", 4096, 8),
)
SMALL = (("ckpt", "bfloat16", 256, 1), ("ckpt", "float32", 256, 2))


def copy_bytes_per_s(size: int) -> float:
    """Bytes read and written a second by a plain copy with an addition, several in one program; the best of a few."""

    @jax.jit
    def copies(x):
        return jax.lax.fori_loop(0, 8, lambda i, x: x + jnp.float32(1), x)

    x, best = jnp.zeros(size // 4, jnp.float32), 0.0
    jax.block_until_ready(copies(x))
    for _ in range(4):
        start = time.perf_counter()
        jax.block_until_ready(copies(x))
        best = max(best, 8 * 2 * size / (time.perf_counter() - start))
    return best


@functools.lru_cache(maxsize=1)
def weights(name: str, dtype: str, ckpt: str):
    """(cfg, params) of the checkpoint or of a named shape. One at a time: the next takes its place."""
    if name != "ckpt":
        return SHAPES[name], init(jax.random.key(0), SHAPES[name], dtype)
    lm = load(ckpt, dtype=dtype)
    return lm.cfg, lm.params


def floor_bytes(cfg, params, filled: int, batch: int, itemsize: int) -> int:
    """Bytes that a pass has to read: every weight once, and the filled keys and values."""
    return weight_bytes(cfg, params) + 2 * cfg.layers * cfg.kv_heads * cfg.head_dim * filled * batch * itemsize


def measure_group(stage: Stage, todo: list[dict], cfg, params, bytes_per_s: float) -> None:
    """The passes of one group: compiled side by side, then timed in turns."""
    what = todo[0]
    slots, batch, dtype = what["slots"], what["batch"], what["dtype"]
    # Random tokens: few of the drafts are accepted, and the text stays away from its end.
    prompts = np.random.default_rng(0).integers(0, cfg.vocab_size, (batch, slots // 2)).tolist()
    decode = DecodeConfig(max_new_tokens=slots // 2 - max(what["nodes"] for what in todo) - 1)

    def chain_of(nodes: int) -> TreeSet:
        tree = chain(nodes - 1, JACOBI)
        return TreeSet(tree.name, (tree,), (0,))

    def fresh(nodes: int):
        return init_state(cfg, chain_of(nodes), prompts, decode, (), slots=slots, dtype=dtype)

    def lower(nodes: int):
        return loop.run.lower(params, fresh(nodes), jnp.int32(1), None, cfg=cfg, trees=chain_of(nodes))

    cycles = CYCLES[jax.default_backend()]
    programs = compile_all({what["nodes"]: functools.partial(lower, what["nodes"]) for what in todo})
    seconds = {nodes: [] for nodes in programs}
    passes = dict.fromkeys(programs, cycles)
    for round_ in range(ROUNDS + 1):
        for nodes, program in programs.items():
            if isinstance(program, Exception):
                continue
            state = jax.block_until_ready(fresh(nodes))
            start = time.perf_counter()
            state = jax.block_until_ready(program(params, state, jnp.int32(cycles), None)[0])
            if round_:
                seconds[nodes].append((time.perf_counter() - start) / cycles)
            passes[nodes] = min(passes[nodes], int(state.forwards.min()))
    floor_s = floor_bytes(cfg, params, slots // 2, batch, jnp.dtype(dtype).itemsize) / bytes_per_s
    for what in todo:
        nodes = what["nodes"]
        if isinstance(programs[nodes], Exception):
            stage.keep(what, error=first_line(programs[nodes]))
        elif passes[nodes] < cycles:
            stage.keep(what, error=f"a row was done after {passes[nodes]} of {cycles} passes")
        else:
            ms = 1e3 * float(np.median(seconds[nodes]))
            stage.keep(what, ms=ms, min_ms=1e3 * min(seconds[nodes]), floor_ms=1e3 * floor_s)


def keep_answers(stage: Stage, args) -> None:
    """Answers of the loop to a few prompts, twice: to compare with those under other flags of XLA."""
    what = {"what": "answers"}
    if stage.row(**what):
        return
    lm = load(args.ckpt, dtype="bfloat16")
    prompts = [encode(lm, prompt) for prompt in golden_prompts()[:4]]
    loop = Loop(lm, "tr-jacobi", len(prompts), 512, 64, 32 if stage.small else 64)
    loop.program = loop.lower().compile()
    first, second = (loop.answers(prompts)[0] for _ in range(2))
    stage.keep(what, tokens=[row["tokens"] for row in first], second_run_same=first == second)


def run(stage: Stage, args) -> None:
    """Every group, as far as the time goes. Under --graphs the first one alone."""
    if (row := stage.row(what="copy")) is None:
        size = 2**26 if stage.small or jax.default_backend() == "cpu" else 2**32
        stage.keep({"what": "copy"}, bytes_per_s=copy_bytes_per_s(size))
        row = stage.row(what="copy")
    nodes = (1, 8) if stage.small else NODES[::3] if args.graphs else NODES
    groups = SMALL if stage.small else GROUPS
    for name, dtype, slots, batch in groups[:1] if args.graphs else groups:
        keys = [{"weights": name, "dtype": dtype, "slots": slots, "batch": batch, "nodes": n} for n in nodes]
        todo = stage.todo(keys)
        if not todo:
            continue
        if stage.left_s < 0:
            stage.leave_out([{k: v for k, v in todo[0].items() if k != "nodes"}], "no time left")
            continue
        try:
            cfg, params = weights(name, dtype, args.ckpt)
            measure_group(stage, todo, cfg, params, row["bytes_per_s"])
        except jax.errors.JaxRuntimeError as e:  # it does not fit: the next, smaller group may
            stage.leave_out([{k: v for k, v in todo[0].items() if k != "nodes"}], first_line(e))
        if (name, dtype, slots, batch) == groups[0]:
            keep_answers(stage, args)
