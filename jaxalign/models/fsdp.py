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
from jaxalign.ops.rows import axes, parts

AXIS = "fsdp"


def shared(x: Array, rows: NamedSharding | None) -> NamedSharding | None:
    """How the rows of x `[B, ...]` lie on a mesh with `fsdp`; None where they do not.

    rows: how batches lie.
    """
    if rows is None or AXIS not in rows.mesh.axis_names:
        return None
    return None if len(x) % parts(rows) else rows


def product(spec: PartitionSpec, rows: NamedSharding | None) -> Callable[..., Array]:
    """`dot_general` of rows and a matrix that lies in parts, for `flax.linen.Dense`.

    spec: the matrix's rule. rows: of `shared`; None is JAX's own product.
    """
    if rows is None:
        return jax.lax.dot_general
    along = tuple(spec).index(AXIS)
    lies = PartitionSpec(*(AXIS if axis == AXIS else None for axis in spec))

    def own(x: Array, part: Array) -> Array:
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


def pinned(x: Array, rows: NamedSharding | None) -> Array:
    """Activations of which each device has its own rows. rows: of `shared`."""
    return x if rows is None else jax.lax.with_sharding_constraint(x, rows)


def dealt_out(x: Array, rows: NamedSharding | None) -> Array:
    """Rows `[B, S, D]` looked up in a table whose D lies in parts, each to its device.

    Each device looks its part of D up for the rows of all of its `fsdp` group, and the parts are
    exchanged: far less than the table. rows: of `shared`.
    """
    if rows is None:
        return x
    others = tuple(axis for axis in axes(rows) if axis != AXIS)
    looked_up = NamedSharding(rows.mesh, PartitionSpec(others or None, None, AXIS))
    return pinned(jax.lax.with_sharding_constraint(x, looked_up), rows)


def whole_table(table: Array, rows: NamedSharding | None) -> Array:
    """The output table `[V, D]` with D whole on every device; of its gradient D lies in parts.

    rows: how batches lie.
    """
    if rows is None or AXIS not in rows.mesh.axis_names:
        return table
    over = "tensor" if "tensor" in rows.mesh.axis_names else None
    for spec in (PartitionSpec(over, AXIS), PartitionSpec(over, None)):
        table = jax.lax.with_sharding_constraint(table, NamedSharding(rows.mesh, spec))
    return table
