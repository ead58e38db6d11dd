"""Functions of rows, each device of a mesh computing its own, without leave to do it otherwise."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxalign.core.types import Array, PyTree


def axes(rows: NamedSharding) -> tuple[str, ...]:
    """The mesh's axes over which rows are spread."""
    names = (rows.spec[0] if rows.spec else None) or ()
    return names if isinstance(names, tuple) else (names,)


def parts(rows: NamedSharding) -> int:
    """How many parts rows are spread in."""
    return math.prod(rows.mesh.shape[name] for name in axes(rows))


def pinned(x: Array, rows: NamedSharding | None) -> Array:
    """x `[B, ...]` with its own rows on each device. rows: how B lies; where B does not divide, or
    nobody knows, x stays as it is.
    """
    if rows is None or len(x) % parts(rows):
        return x
    return jax.lax.with_sharding_constraint(x, rows)


def on_own_rows(
    function: Callable[..., PyTree], rows: NamedSharding | None, whole: int = 0
) -> Callable[..., PyTree]:
    """`function(*arguments)`, whose results have the leading axis of its arguments, B.

    rows: how B lies on a mesh; None calls the function as it is. Where B cannot be shared out every
        device computes all of it.
    whole: so many of the first arguments are the same for all rows. Their gradients are summed over
        the devices once, after all that `function` does with them.
    """
    if rows is None or not axes(rows):
        return function
    count = parts(rows)

    def run(*arguments: Any) -> PyTree:
        shared = all(len(leaf) % count == 0 for leaf in jax.tree.leaves(arguments[whole:]))
        spec = rows.spec if shared else PartitionSpec()
        specs = (PartitionSpec(),) * whole + (spec,) * (len(arguments) - whole)
        return jax.shard_map(
            function,
            mesh=rows.mesh,
            in_specs=specs,
            out_specs=spec,
            axis_names=set(axes(rows)),
            check_vma=False,
        )(*arguments)

    return run
