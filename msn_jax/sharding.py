"""The mesh and the one table from logical array axes to mesh axes."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from msn_jax.config import MeshConfig
from msn_jax.errors import InputError, first_line

MESH_AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axes it is split over. None (or an axis not listed) is replicated.
LOGICAL_AXES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
}


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence | None = None) -> Mesh:
    """A mesh of `data * fsdp * tensor` devices.

    Auto axes on purpose: the compiler places activations, and `constrain` corrects it where it matters.
    Raises InputError where there are fewer devices.
    """
    devices = jax.devices() if devices is None else devices
    n = data * fsdp * tensor
    if n > len(devices):
        raise InputError(f"mesh {data} x {fsdp} x {tensor} needs {n} devices; there are {len(devices)}")
    return jax.make_mesh((data, fsdp, tensor), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices[:n])


def check_mesh(mesh: Mesh) -> None:
    """Raise InputError for a mesh that `make_mesh` would not have made."""
    if tuple(mesh.axis_names) != MESH_AXES or set(mesh.axis_types) != {AxisType.Auto}:
        axes = ", ".join(f"{name} ({kind})" for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True))
        raise InputError(f"a mesh with the axes {axes}; accepted: one of msn_jax.make_mesh(data=, fsdp=, tensor=)")


def mesh_sizes(config: MeshConfig, devices: int) -> tuple[int, int, int]:
    """(data, fsdp, tensor) for so many devices, -1 filled in. Raises InputError where they do not come out even."""
    sizes = [config.data, config.fsdp, config.tensor]
    known = math.prod(n for n in sizes if n != -1)
    if -1 in sizes and devices % known == 0:
        sizes[sizes.index(-1)] = devices // known
    if math.prod(sizes) != devices:
        shape = ", ".join(f"{axis} {n}" for axis, n in zip(MESH_AXES, (config.data, config.fsdp, config.tensor)))
        raise InputError(f"mesh of {shape}: does not lay out {devices} devices; accepted: sizes with that product")
    return tuple(sizes)


def check_batch(rows: int, accumulate: int, mesh: Mesh) -> None:
    """Raises InputError where a batch does not divide over the mesh."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % (ways * accumulate):
        raise InputError(
            f"train.batch_size = {rows}: does not divide over the mesh; accepted: a multiple of {ways * accumulate} "
            f"(data {mesh.shape['data']} x fsdp {mesh.shape['fsdp']} x train.accumulate {accumulate})"
        )


def start_processes(config: MeshConfig) -> None:
    """Join the other processes of a run that has several: by its config, on a TPU pod, or by the environment."""
    on_pod = "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
    if not (config.distributed or on_pod or "JAX_COORDINATOR_ADDRESS" in os.environ):
        return  # jax.distributed would raise on a lone machine
    number = lambda name: int(os.environ[name]) if name in os.environ else None
    try:
        jax.distributed.initialize(num_processes=number("JAX_NUM_PROCESSES"), process_id=number("JAX_PROCESS_ID"))
    except (ValueError, RuntimeError) as e:
        raise InputError(
            f"mesh.distributed: the other processes cannot be joined ({first_line(e)}); on one machine give "
            "--mesh.distributed false"
        ) from e


def spec(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """The PartitionSpec of an array with these logical axes.

    An axis whose size does not divide over its mesh axes is replicated (SmolLM2 has 3 kv heads).
    """
    parts = []
    for axis, size in zip(axes, shape, strict=True):
        names = LOGICAL_AXES.get(axis) if axis else None
        names = (names,) if isinstance(names, str) else names or ()
        ways = 1
        for name in names:
            ways *= mesh.shape[name]
        parts.append(names if ways > 1 and size % ways == 0 else None)
    return PartitionSpec(*parts)


def sharding(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, spec(axes, shape, mesh))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pin `x` to the sharding of its logical axes on the mesh in context (`jax.set_mesh`); no mesh, no effect."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes, x.shape, mesh))
