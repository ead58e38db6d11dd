"""The rows of a batch stay on their devices while a network is traced.

Parameters may lie in parts over the very axis that a batch is spread over (`fsdp`). The partitioner
then has a choice at every product: to bring the parameter's parts together, or to cut the
activations along their features and add them up over the devices, which sends far more once rows
are many. `lying` takes the choice away: layers keep their outputs as the batch lies, and so
parameters are what is sent (ZeRO, Rajbhandari et al. 2020, stage 3). Decoding, which computes one
token a row at a time, is better off without.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Generator
from contextvars import ContextVar

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxalign.core.types import Array

_rows: ContextVar[NamedSharding | None] = ContextVar("rows", default=None)


@contextlib.contextmanager
def lying(rows: NamedSharding | None) -> Generator[None]:
    """Around the tracing of a program, or as its decorator, below `jax.jit`.

    rows: how the leading axis of batches lies on a mesh; None leaves all to the partitioner.
    """
    token = _rows.set(rows)
    try:
        yield
    finally:
        _rows.reset(token)


def keep(x: Array) -> Array:
    """The output of a layer `[B, ...]` as the batch lies; the other axes may lie as they like."""
    rows = _rows.get()
    if rows is None or not rows.spec:
        return x
    axes = rows.spec[0]
    names = (axes,) if isinstance(axes, str) else axes
    if x.ndim == 0 or x.shape[0] % math.prod(rows.mesh.shape[name] for name in names):
        return x  # not of the batch
    free = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
    where = NamedSharding(rows.mesh, PartitionSpec(axes, *free))
    return jax.lax.with_sharding_constraint(x, where)
