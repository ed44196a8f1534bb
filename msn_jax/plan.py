"""What a run takes on an accelerator, found by compiling it for one that is not there.

XLA:TPU compiles for a described slice without a TPU (the `tpu` extra, on any machine), reports the memory of each
chip, and fails where the program does not fit.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import re
import time
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from msn_jax import train_step
from msn_jax.adapters import declare_trained
from msn_jax.cache import cache_spec
from msn_jax.config import DecodeConfig, RunConfig
from msn_jax.decode import loop
from msn_jax.decode.tree import TreeSet
from msn_jax.decode.tree_sets import tree_set
from msn_jax.errors import InputError, first_line
from msn_jax.io import hf
from msn_jax.io.gguf import GGUFSource
from msn_jax.io.loading import resolve
from msn_jax.linear import Int8Weight
from msn_jax.model import QUERY_BLOCK
from msn_jax.model_config import ModelConfig
from msn_jax.params import Params, declare, parameter_count, shaped
from msn_jax.shapes import SHAPES
from msn_jax.sharding import MESH_AXES, check_batch, make_mesh, mesh_sizes, sharding

GIB = 2**30


class Chip(NamedTuple):
    """A TPU by its bytes of memory, bytes a second of it, and cycles a second of its cores."""

    memory: int
    bandwidth: float
    clock: float


# Google Cloud TPU documentation; the clock is the peak in bfloat16 over twice the multipliers of its matrix units.
CHIPS = {
    "v4": Chip(32 * GIB, 1228e9, 1.05e9),
    "v5e": Chip(16 * GIB, 819e9, 1.5e9),
    "v5p": Chip(95 * GIB, 2765e9, 1.75e9),
    "v6e": Chip(32 * GIB, 1640e9, 1.75e9),
}


def topology_devices(name: str):
    """The devices of a described TPU slice, such as v5e:2x4.

    Raises InputError for an unknown slice, or without libtpu.
    """
    from jax.experimental import topologies

    topology_shape(name)
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except RuntimeError as e:  # jax's own without libtpu, else XLA's
        hint = "in the checkout: pip install -e '.[tpu]'" if "libtpu" in str(e) or "tpu" in str(e).lower() else ""
        raise InputError(f"--topology {name}: cannot compile for it ({first_line(e)}) {hint}".rstrip()) from e


def topology_shape(name: str) -> tuple[int, ...]:
    """Chips of a slice along each side: v5e:2x4 -> (2, 4). Raises InputError for a name that is none."""
    if not re.fullmatch(r"v\d\w*:\d+x\d+(x\d+)?", name) or name.split(":")[0] not in CHIPS:
        raise InputError(f"--topology {name}: accepted: {', '.join(CHIPS)} and a shape, such as v5e:2x4")
    return tuple(int(n) for n in name.split(":")[1].split("x"))


def decode_state(cfg: ModelConfig, trees: TreeSet, mesh, batch: int, slots: int, dtype) -> loop.DecodeState:
    """A DecodeState as shapes: the cache placed on the mesh, the small arrays on every chip."""

    def everywhere(a):
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding((None,) * a.ndim, a.shape, mesh))

    settings = DecodeConfig(max_new_tokens=1)
    small = dataclasses.replace(cfg, layers=1)
    new = partial(loop.init_state, slots=slots, dtype=dtype, backend="tpu")
    state = jax.eval_shape(lambda: new(small, trees, [[0]] * batch, settings, ()))
    state = jax.tree.map(everywhere, state)
    cache = shaped(cache_spec(cfg, batch, slots), mesh, dtype)
    return state.replace(cache=cache.replace(length=state.cache.length))


def cache_copies(hlo: str, shape: tuple[int, ...]) -> list[str]:
    """Instructions of a compiled module, outside its entry, that copy an array of this shape."""
    body = hlo[: hlo.index("\nENTRY ")]
    dims = re.escape(f"[{','.join(map(str, shape))}]")
    return re.findall(rf"^.*= \(?\w+{dims}\S* copy(?:-start)?\(.*$", body, re.MULTILINE)


def estimated_seconds(compiled: jax.stages.Compiled, chip: str) -> float:
    """One run of a compiled module by XLA:TPU's own estimates, without collectives: the longer of what its operations
    take at the chip's clock and of what its arguments (weights and cache) take to read.

    XLA reads weights ahead, while other operations compute, so the two times are not added. Its `cost_analysis` does
    not serve: it counts reads of fast memory as reads of the slow one. A loop's body counts once.
    """
    cycles = sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', str(compiled.as_text()))))
    read = compiled.memory_analysis().argument_size_in_bytes
    return max(cycles / CHIPS[chip].clock, read / CHIPS[chip].bandwidth)


def widened_weights(hlo: str, params: Params) -> int:
    """How many bfloat16 arrays a compiled module writes of an int8 one of a weight's size (on one chip).

    int8 weights should need none: each is widened inside the product that takes it.
    """
    is_rounded = lambda w: isinstance(w, Int8Weight)
    weights = [w.values for w in jax.tree.leaves(params, is_leaf=is_rounded) if is_rounded(w)]
    sizes = {math.prod(w.sharding.shard_shape(w.shape)) for w in weights}
    # Only the result of a fusion is an array, not what it computes on its way.
    fused = re.sub(r"^%?fused_computation.*?^}", "", hlo, flags=re.MULTILINE | re.DOTALL)
    lines = re.findall(r"^\s*(?:ROOT )?(%\S+) = (\(.*?\)|\S+) ([\w-]+)\((.*)", fused, re.MULTILINE)

    def of_size(kind: str, result: str) -> set[int]:
        found = re.findall(rf"\b{kind}\[([\d,]+)\]", result)
        return {math.prod(map(int, shape.split(","))) for shape in found} & sizes

    # Of a weight's size may be an activation too: rows of a table for so many tokens, or what a product comes to.
    int8, wide = {}, 0
    for name, result, operation, operands in lines:
        given = operation in ("parameter", "get-tuple-element")
        of = sizes if given else set().union(*(int8.get(name, ()) for name in re.findall(r"%[\w.-]+", operands)))
        int8[name] = of_size("s8", result) & of
        product = operation in ("convolution", "dot") or "kind=kOutput" in operands
        wide += not given and not product and bool(of_size("bf16", result) & of)
    return wide


def lower_cycle(params: Params, state: loop.DecodeState, cfg: ModelConfig, trees: TreeSet) -> jax.stages.Lowered:
    """One cycle of the decode loop by itself: a loop's cost says nothing of the cost of a trip."""
    step = partial(jax.jit, static_argnames=("cfg", "trees"), donate_argnames="state")(loop.step)
    return step.lower(params, state, cfg=cfg, trees=trees)


def tree_plan(shape: str, topology: str, tree: str, batch: int, dtype: str = "bfloat16") -> dict[str, float]:
    """What a cycle with this tree takes on a slice, all its chips along the tensor axis.

    shape: one of SHAPES; its whole context is in the cache.
    """
    devices, cfg, trees = topology_devices(topology), SHAPES[shape], tree_set("tr-jacobi", tree)
    slots, mesh = loop.bucket(cfg.max_position), make_mesh(tensor=len(devices), devices=devices)
    params = shaped(declare(cfg), mesh, dtype)
    with jax.set_mesh(mesh):
        state = decode_state(cfg, trees, mesh, batch, slots, params.embed.dtype)
        compiled = lower_cycle(params, state, cfg, trees).compile()
    chip = topology.split(":")[0]
    read = compiled.memory_analysis().argument_size_in_bytes
    return {"slots": slots, "argument_bytes": read, "estimated_s": estimated_seconds(compiled, chip)}


def plan_decode(
    ckpt: str | None, topology: str, tree: str | None, dtype: str = "bfloat16", batches: tuple[int, ...] = (1, 8)
) -> None:
    """Compile prefill and the decode loop for a slice; print memory and cost, then one JSON line.

    ckpt: a named shape (see SHAPES) or a checkpoint, of which only the config is read. dtype: of the weights.
    """
    devices = topology_devices(topology)
    chip = topology.split(":")[0]
    name = ckpt or "llama-3-8b"
    cfg = SHAPES[name] if name in SHAPES else read_config(name)
    mesh = make_mesh(tensor=len(devices), devices=devices)
    single = tree_set("ar")
    slots, chunk = loop.bucket(cfg.max_position), 512
    params = shaped(declare(cfg), mesh, dtype)
    weights, dtype = dtype, params.embed.dtype
    kv = sharding(("batch", "kv_heads", None, None), (1, cfg.kv_heads, slots, cfg.head_dim), mesh)
    print(f"{name} in {weights}, {slots} cache slots")
    print(f"{topology}: {len(devices)} chips of {CHIPS[chip].memory / 2**30:.0f} GiB, tensor-sharded")
    heads = f"{'weights+cache':>14} {'temporaries':>12} {'of a chip':>9} {'estimate':>9} {'copies':>6}"
    print(f"{'program':<12} {'batch':>5} {heads}", flush=True)
    rows = {}
    with jax.set_mesh(mesh):
        for batch in batches:
            trees = tree_set("tr-jacobi", tree, "tpu", batch=batch)
            state = decode_state(cfg, trees, mesh, batch, slots, dtype)
            scalar = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding((), (), mesh))
            shape = kv.shard_shape((batch, cfg.kv_heads, slots, cfg.head_dim))
            for program, lowered in {
                "prefill": loop.prefill_chunk.lower(params, state.cache, state.tokens, scalar, cfg=cfg, chunk=chunk),
                "loop": loop.run.lower(params, state, scalar, cfg=cfg, trees=trees),
                "cycle": lower_cycle(params, state, cfg, trees),
                "one token": lower_cycle(params, decode_state(cfg, single, mesh, batch, slots, dtype), cfg, single),
            }.items():
                try:
                    compiled = lowered.compile()
                except jax.errors.JaxRuntimeError as e:
                    what = f"{program}, batch {batch}: does not compile for {topology}"
                    raise InputError(f"{what}: {first_line(e)}") from e
                memory, seconds = compiled.memory_analysis(), estimated_seconds(compiled, chip)
                args, temp = memory.argument_size_in_bytes, memory.temp_size_in_bytes
                row = {
                    "argument_bytes": args,
                    "temp_bytes": temp,
                    "chip_frac": (args + temp) / CHIPS[chip].memory,
                    # A loop's cost counts its body once, whatever the trips: it would only mislead.
                    "estimated_s": None if program == "loop" else seconds,
                    "cache_copies": len(cache_copies(compiled.as_text(), shape)) if program == "loop" else None,
                }
                if weights == "int8":
                    row["widened_weights"] = widened_weights(compiled.as_text(), params)
                rows[f"{program} x{batch}"] = row
                time = "" if program == "loop" else f"{1e3 * seconds:.2f} ms"
                copies = "" if row["cache_copies"] is None else row["cache_copies"]
                print(
                    f"{program:<12} {batch:>5} {args / 2**30:>10.2f} GiB {temp / 2**30:>8.2f} GiB"
                    f" {row['chip_frac']:>8.0%} {time:>9} {copies:>6}",
                    flush=True,
                )
            ratio = rows[f"cycle x{batch}"]["estimated_s"] / rows[f"one token x{batch}"]["estimated_s"]
            rows[f"cycle x{batch}"]["ratio_to_one_token"] = ratio
            tree_nodes = f"{trees.name} ({trees.trees[-1].size} nodes)"
            print(
                f"batch {batch}: a cycle of {tree_nodes} costs {ratio:.2f} of one token by XLA's estimate", flush=True
            )
    if weights == "int8":
        wide = sum(row["widened_weights"] for row in rows.values())
        print(f"weights that a program writes out in bfloat16: {wide or 'none'}")
    run = {"model": name, "dtype": weights, "topology": topology, "chips": len(devices), "slots": slots}
    print(json.dumps({**run, "programs": rows}))


def plan_train(run: RunConfig, topology: str | None) -> None:
    """Print what a training run is and what a step takes on each device, then one JSON line; train nothing.

    topology: a TPU slice to compile the step for; None: the bytes of state and activations on the devices that
    mesh.* names, marked as an estimate.
    """
    name = run.model.shape or run.model.ckpt or "model.scratch"
    if run.model.shape:
        cfg = SHAPES[run.model.shape]
    else:
        cfg = (
            ModelConfig.from_fields("model.scratch", run.model.scratch)
            if run.model.scratch
            else read_config(run.model.ckpt)
        )
    if topology and importlib.util.find_spec("libtpu") is None:
        topology_shape(topology)
        print(f"{topology}: not compiled for it, libtpu is not installed (in the checkout: pip install -e '.[tpu]')")
        count, topology = math.prod(topology_shape(topology)), None
    else:
        # -1, "the rest", is one device where none are there.
        count = abs(run.mesh.data * run.mesh.fsdp * run.mesh.tensor)
    if topology:
        devices, chip = topology_devices(topology), topology.split(":")[0]
        sizes = mesh_sizes(run.mesh, len(devices))
        mesh = make_mesh(*sizes, devices)
    else:
        sizes = mesh_sizes(run.mesh, count)
        mesh = AbstractMesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * 3)
    check_batch(run.train.batch_size, run.train.accumulate, mesh)
    state = train_step.state_shapes(cfg, run, mesh)
    batch = train_step.batch_shapes(run.train.batch_size, run.data.max_tokens, mesh)
    frozen = shaped(declare(cfg, stacked=True), mesh, jnp.dtype(run.train.dtype)) if run.frozen else None
    parameters = parameter_count(declare(cfg))
    trained = parameter_count(state.params)
    tokens = run.train.batch_size * run.data.max_tokens
    print(f"{name}: {parameters:,} parameters, {trained:,} trained")
    print(f"{run.train.dtype} computation, remat {run.train.remat}")
    print(f"mesh: data {sizes[0]} x fsdp {sizes[1]} x tensor {sizes[2]} = {math.prod(sizes)} devices")
    print(
        f"batch: {run.train.batch_size} x {run.data.max_tokens} = {tokens:,} tokens a step, in {run.train.accumulate}"
    )
    held = sum(
        math.prod(s.sharding.shard_shape(s.shape)) * s.dtype.itemsize for s in jax.tree.leaves((state, frozen, batch))
    )
    row = {"model": name, "parameters": parameters, "trained": trained, "mesh": sizes, "tokens_per_step": tokens}
    if topology:
        step = jax.jit(train_step.make_train_step(cfg, run), donate_argnums=0)
        start = time.perf_counter()
        with jax.set_mesh(mesh):
            try:
                memory = step.lower(state, frozen, batch).compile().memory_analysis()
            except jax.errors.JaxRuntimeError as e:
                raise InputError(f"the step does not compile for {topology}: {first_line(e)}") from e
        peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        row |= {
            "topology": topology,
            "argument_bytes": memory.argument_size_in_bytes,
            "temp_bytes": memory.temp_size_in_bytes,
            "chip_frac": peak / CHIPS[chip].memory,
            "compile_s": time.perf_counter() - start,
        }
        print(
            f"{topology}: {memory.argument_size_in_bytes / GIB:.2f} GiB of state and batch + "
            f"{memory.temp_size_in_bytes / GIB:.2f} GiB of temporaries = {peak / GIB:.2f} GiB a chip, "
            f"{peak / CHIPS[chip].memory:.0%} of {CHIPS[chip].memory / GIB:.0f} GiB (compiled by XLA:TPU)"
        )
    else:
        activations = activation_bytes(cfg, run, math.prod(sizes[:2]), sizes[2])
        row |= {"state_bytes": held, "activation_bytes": activations, "estimate": True}
        print(
            f"estimate: {held / GIB:.2f} GiB of state and batch + {activations / GIB:.2f} GiB of gradients and "
            f"activations = {(held + activations) / GIB:.2f} GiB a device"
        )
    print(json.dumps(row))


def activation_bytes(cfg: ModelConfig, run: RunConfig, rows_ways: int, tensor: int) -> int:
    """A rough count of what a step holds beside its state on one device: gradients, kept activations, logits."""
    size, trained = jnp.dtype(run.train.dtype).itemsize, declare_trained(cfg, run.lora, run.noise, run.heads)
    shards = rows_ways * tensor
    gradients = 4 * parameter_count(trained) // shards
    weights = size * parameter_count(declare(cfg)) // shards
    tokens = run.train.batch_size // run.train.accumulate // rows_ways * run.data.max_tokens
    heads = cfg.heads * cfg.head_dim // tensor
    one_layer = 4 * cfg.embed + 3 * heads + 3 * cfg.mlp // tensor
    kept = {"full": cfg.embed, "dots": 3 * cfg.embed + 2 * heads + 2 * cfg.mlp // tensor, "none": one_layer}
    query = min(run.data.max_tokens, QUERY_BLOCK[1])
    scores = 3 * 4 * tokens * query * cfg.heads // tensor
    logits = 3 * 4 * tokens // run.data.max_tokens * min(run.train.head_chunk, run.data.max_tokens) * cfg.vocab_size
    layer_weights = 2 * size * parameter_count(declare(cfg).layers[0])
    activations = size * tokens * (cfg.layers * kept[run.train.remat] + one_layer)
    if run.train.remat == "none":
        scores *= cfg.layers
    return gradients + weights + activations + scores + logits // tensor + layer_weights // tensor


def read_config(ckpt: str) -> ModelConfig:
    path = resolve(ckpt, ["config.json"])
    return GGUFSource(path).config if path.is_file() else hf.read_config(path)
