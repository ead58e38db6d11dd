"""Parameters that lie in parts over the axis `fsdp`, gathered for the product that needs them.

Left to itself the partitioner may keep a matrix in parts and sum the products of all rows instead,
which costs more the more rows there are. Here each device has its own rows and, for a moment, the
whole matrix; of its gradient each device keeps its part (Rajbhandari et al. 2020, ZeRO stage 3).
"""

from __future__ import annotations

import functools

import jax
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from jaxalign.core.types import Array


def gathered(
    parameter: Array, spec: PartitionSpec, rows: NamedSharding | None, dtype: DTypeLike
) -> Array:
    """The parameter in `dtype`, whole along `fsdp`.

    spec: its rule, how it lies. rows: how the batch lies; without one, or without `fsdp` in its
        mesh, the parameter stays as it is.
    """
    if rows is None or "fsdp" not in rows.mesh.axis_names:
        return parameter
    whole, parts = _lie(spec, rows, without="fsdp"), _lie(spec, rows)
    # Said of the parts too, or the whole would be gathered before it is rounded.
    rounded = jax.lax.with_sharding_constraint(parameter.astype(dtype), parts)
    return _gather(rounded, whole, parts)


def pinned(x: Array, rows: NamedSharding | None) -> Array:
    """Activations of which each device has its own rows, where rows can be shared out."""
    return x if not _shared(x, rows) else jax.lax.with_sharding_constraint(x, rows)


def _shared(x: Array, rows: NamedSharding | None) -> bool:
    if rows is None:
        return False
    parts = rows.mesh.size // rows.shard_shape((rows.mesh.size,))[0]
    return len(x) % parts == 0


def dealt_out(x: Array, rows: NamedSharding | None) -> Array:
    """Rows `[B, S, D]` looked up in a table whose D lies in parts over `fsdp`, each to its device.

    Each device looks its part of D up for the rows of all of its `fsdp` group, and the parts are
    exchanged: far less than the table.
    """
    if rows is None or not _shared(x, rows) or "fsdp" not in rows.mesh.axis_names:
        return x
    others = tuple(axis for axis in rows.mesh.axis_names if axis not in ("fsdp", "tensor"))
    looked_up = NamedSharding(rows.mesh, PartitionSpec(others or None, None, "fsdp"))
    return pinned(jax.lax.with_sharding_constraint(x, looked_up), rows)


def _lie(spec: PartitionSpec, rows: NamedSharding, without: str = "") -> NamedSharding:
    axes = [axis for axis in rows.mesh.axis_names if axis != without]
    return NamedSharding(rows.mesh, PartitionSpec(*(a if a in axes else None for a in spec)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(x: Array, whole: NamedSharding, parts: NamedSharding) -> Array:
    return jax.lax.with_sharding_constraint(x, whole)


def _forward(x: Array, whole: NamedSharding, parts: NamedSharding) -> tuple[Array, None]:
    return jax.lax.with_sharding_constraint(x, whole), None


def _backward(whole: NamedSharding, parts: NamedSharding, _: None, gradient: Array) -> tuple[Array]:
    return (jax.lax.with_sharding_constraint(gradient, parts),)


_gather.defvjp(_forward, _backward)
