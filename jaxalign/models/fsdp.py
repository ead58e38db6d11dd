"""Parameters that lie in parts over the axis `fsdp`, gathered for the product that needs them.

Left to itself the partitioner may keep a matrix in parts and sum the products of all rows instead,
which costs more the more rows there are. Here each device has its own rows and, for a moment, the
whole matrix; of its gradient each device gets the sum of its part (Rajbhandari et al. 2020, ZeRO
stage 3).

Dimensions: B rows, S tokens, D width, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxalign.core.types import Array
from jaxalign.ops.rows import axes, parts, pinned

AXIS = "fsdp"


def shared(x: Array, rows: NamedSharding | None) -> NamedSharding | None:
    """How the rows of x `[B, S, ...]` lie where matrices shall be gathered for them; else None.

    That is on a mesh with `fsdp` that B divides into, and for more than one token of a row: sums
    for single tokens are less than the matrices. rows: how batches lie.
    """
    if rows is None or AXIS not in rows.mesh.axis_names:
        return None
    return None if len(x) % parts(rows) or x.shape[1] == 1 else rows


def product(spec: PartitionSpec, rows: NamedSharding | None) -> Callable[..., Array]:
    """`dot_general` of rows and a matrix that lies in parts, for `flax.linen.Dense`.

    spec: the matrix's rule. rows: of `shared`; None is JAX's own product.
    """
    if rows is None:
        return jax.lax.dot_general
    along = tuple(spec).index(AXIS)
    lies = PartitionSpec(*(AXIS if axis == AXIS else None for axis in spec))

    def own(x: Array, part: Array) -> Array:
        x, part = _together(x, part)
        return x @ jax.lax.all_gather(part, AXIS, axis=along, tiled=True)

    mapped = functools.partial(
        jax.shard_map,
        mesh=rows.mesh,
        in_specs=(rows.spec, lies),
        out_specs=rows.spec,
        axis_names=set(axes(rows)),
        check_vma=False,
    )

    def dot_general(x: Array, matrix: Array, *_: object, **__: object) -> Array:
        return mapped(own)(x, matrix)

    return dot_general


@jax.custom_vjp
def _together(*arrays: Array) -> tuple[Array, ...]:
    """The arrays, of which none has its gradient before all have.

    Else TPUs put the gradients of matrices off and keep what they are made of, or their whole sums
    over the devices, of all layers until the optimizer wants its part of them.
    """
    return arrays


def _forwards(*arrays: Array) -> tuple[tuple[Array, ...], None]:
    return arrays, None


def _backwards(_: None, gradients: tuple[Array, ...]) -> tuple[Array, ...]:
    return jax.lax.optimization_barrier(gradients)


_together.defvjp(_forwards, _backwards)


def dealt_out(x: Array, rows: NamedSharding | None) -> Array:
    """Rows `[B, ..., N]` of which each device has its part of N, each to its device.

    Each device makes its part for the rows of all of its `fsdp` group, and the parts are exchanged:
    looked up or multiplied by a table in parts, this moves far less than the table.
    rows: how batches lie; x stays as it is where B or N do not divide.
    """
    if rows is None or AXIS not in rows.mesh.axis_names:
        return x
    if len(x) % parts(rows) or x.shape[-1] % rows.mesh.shape[AXIS]:
        return x
    others = tuple(axis for axis in axes(rows) if axis != AXIS) or None
    made = PartitionSpec(others, *(None,) * (x.ndim - 2), AXIS)
    return pinned(jax.lax.with_sharding_constraint(x, NamedSharding(rows.mesh, made)), rows)


def whole_table(table: Array, rows: NamedSharding | None) -> Array:
    """The output table `[V, D]` with D whole on every device; of its gradient D lies in parts.

    rows: how batches lie.
    """
    if rows is None or AXIS not in rows.mesh.axis_names or table.shape[1] % rows.mesh.shape[AXIS]:
        return table
    tensor = rows.mesh.shape.get("tensor", 1)
    over = "tensor" if tensor > 1 and len(table) % tensor == 0 else None
    parted, whole = (NamedSharding(rows.mesh, PartitionSpec(over, along)) for along in (AXIS, None))
    (table,) = _together(jax.lax.with_sharding_constraint(table, parted))
    return jax.lax.with_sharding_constraint(table, whole)


def parted_table(table: Array, rows: NamedSharding | None) -> Array:
    """The output table `[V, D]` with V in parts, if V divides. rows: how batches lie."""
    if rows is None or AXIS not in rows.mesh.axis_names:
        return table
    over = tuple(axis for axis in ("tensor", AXIS) if axis in rows.mesh.axis_names)
    where = NamedSharding(rows.mesh, PartitionSpec(over))
    return table if len(table) % parts(where) else jax.lax.with_sharding_constraint(table, where)
