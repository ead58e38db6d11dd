"""Functions of rows, each device of a mesh computing its own, without leave to do it otherwise."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxalign.core.types import PyTree


def on_own_rows(
    function: Callable[..., PyTree], rows: NamedSharding | None, whole: int = 0
) -> Callable[..., PyTree]:
    """`function(*arguments)`, whose results have the leading axis of its arguments, B.

    rows: how B lies on a mesh; None calls the function as it is. Where B cannot be shared out every
        device computes all of it.
    whole: so many of the first arguments are the same for all rows. Their gradients are summed over
        the devices once, after all that `function` does with them.
    """
    if rows is None or not rows.spec:
        return function
    names = rows.spec[0] if isinstance(rows.spec[0], tuple) else (rows.spec[0],)
    parts = math.prod(rows.mesh.shape[name] for name in names)

    def run(*arguments: Any) -> PyTree:
        shared = all(len(leaf) % parts == 0 for leaf in jax.tree.leaves(arguments[whole:]))
        spec = rows.spec if shared else PartitionSpec()
        specs = (PartitionSpec(),) * whole + (spec,) * (len(arguments) - whole)
        return jax.shard_map(
            function,
            mesh=rows.mesh,
            in_specs=specs,
            out_specs=spec,
            axis_names=set(names),
            check_vma=False,
        )(*arguments)

    return run
