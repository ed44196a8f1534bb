"""How fast a training step is: all weights, bfloat16, random tokens with noise, for each remat and batch size."""

from __future__ import annotations

import os
import time
from functools import partial

import jax
import numpy as np

from benchmarks.stages.stage import Stage, compile_all
from benchmarks.train_bench import make_batch, matmul_rate, place_batch, random_run
from msn_jax import train_step
from msn_jax.config import RunConfig
from msn_jax.errors import first_line
from msn_jax.io.loading import open_checkpoint
from msn_jax.shapes import SHAPES
from msn_jax.sharding import make_mesh

# (weights, attention, tokens a row, remat, rows), in order of worth. Some will not fit, which is a finding as well.
STEPS = (
    ("ckpt", "xla", 1024, "none", 32),
    ("ckpt", "cudnn", 1024, "none", 32),
    ("llama-3.2-1b", "cudnn", 1024, "dots", 16),
    ("llama-3.2-1b", "xla", 1024, "dots", 16),
    ("llama-3.2-1b", "cudnn", 1024, "none", 16),
    ("ckpt", "cudnn", 1024, "dots", 64),
    ("llama-3.2-1b", "cudnn", 1024, "full", 32),
    ("llama-3.2-1b", "cudnn", 1024, "dots", 32),
    ("ckpt", "cudnn", 1024, "full", 128),
    ("ckpt", "cudnn", 1024, "none", 64),
    ("llama-3.2-1b", "cudnn", 1024, "full", 64),
)
SMALL = (("ckpt", "xla", 64, "none", 1), ("ckpt", "xla", 64, "full", 2))
AT_ONE_TIME = 4  # programs that compile side by side


def run_of(ckpt: str, what: dict) -> RunConfig:
    return random_run(ckpt, what["tokens"], batch_size=what["rows"], dtype="bfloat16", remat=what["remat"])


def run(stage: Stage, args) -> None:
    mesh = make_mesh(fsdp=jax.device_count())
    rate_what = {"what": "matrix product", "dtype": "bfloat16"}
    if stage.row(**rate_what) is None:
        size = 1024 if jax.default_backend() == "cpu" else 8192
        stage.keep(rate_what, flops_per_s=matmul_rate("bfloat16", size))
    keys = [
        {"weights": name, "attention": attention, "tokens": tokens, "remat": remat, "rows": rows}
        for name, attention, tokens, remat, rows in (SMALL if stage.small else STEPS)
        if attention == "xla" or jax.default_backend() == "gpu"
    ]
    todo = stage.todo(keys)
    with jax.set_mesh(mesh):
        while todo and stage.left_s > 0:
            part, todo = todo[:AT_ONE_TIME], todo[AT_ONE_TIME:]
            measure(stage, part, args.ckpt, mesh)
    stage.leave_out(todo, "no time left")


def measure(stage: Stage, part: list[dict], ckpt: str, mesh) -> None:
    cfgs = {what["weights"]: SHAPES.get(what["weights"]) or open_checkpoint(ckpt).cfg for what in part}
    names = {str(what): what for what in part}

    def lower(what: dict):
        cfg, run = cfgs[what["weights"]], run_of(ckpt, what)
        os.environ["MSN_JAX_FLASH"] = "on" if what["attention"] == "cudnn" else "off"  # read when it is traced
        shapes = train_step.state_shapes(cfg, run, mesh)
        batch = train_step.batch_shapes(what["rows"], what["tokens"], mesh)
        return train_step.jit_train_step(cfg, run, mesh).lower(shapes, None, batch)

    start = time.monotonic()
    programs = compile_all({name: partial(lower, what) for name, what in names.items()})
    compile_s = time.monotonic() - start
    for name, program in programs.items():
        what = names[name]
        if isinstance(program, Exception):
            stage.keep(what, error=first_line(program))
            continue
        try:
            stage.keep(what, **step_figures(program, cfgs[what["weights"]], what, ckpt, mesh), compile_s=compile_s)
        except jax.errors.JaxRuntimeError as e:  # out of memory: a finding, and smaller ones may fit
            stage.keep(what, error=first_line(e))


def step_figures(program, cfg, what: dict, ckpt: str, mesh) -> dict:
    run = run_of(ckpt, what)
    state = train_step.init_state(cfg, run, mesh)
    batch = place_batch(make_batch(what["rows"], what["tokens"], cfg.vocab_size), mesh)
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        state, _ = jax.block_until_ready(program(state, None, batch))
        seconds.append(time.perf_counter() - start)
    step_s = float(np.median(seconds[1:]))
    parameters = sum(p.size for p in jax.tree.leaves(state.params))
    tokens = what["rows"] * what["tokens"]
    device = jax.devices()[0]
    peak = train_step.peak_flops(device.device_kind, "bfloat16")
    memory = program.memory_analysis()
    return {
        "parameters": parameters,
        "step_s": step_s,
        "tokens_per_s": tokens / step_s,
        "mfu": 6 * parameters * tokens / step_s / len(mesh.devices.flat) / peak if peak else None,
        "program_bytes": memory.temp_size_in_bytes + memory.argument_size_in_bytes if memory else None,
    }
