"""The mesh and the one table from logical array axes to mesh axes."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

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
    """
    devices = jax.devices() if devices is None else devices
    n = data * fsdp * tensor
    if n > len(devices):
        raise ValueError(f"mesh {data} x {fsdp} x {tensor} needs {n} devices; there are {len(devices)}")
    return jax.make_mesh((data, fsdp, tensor), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices[:n])


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
