"""A ring of transitions on the device: new rows overwrite the oldest, batches are drawn at random.

All functions are pure and can be mapped over seeds. Donate the buffer where it is written to, or
each write copies it.

Dimensions: N rows of the buffer, R rows of a write.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.core.types import Array, UserError
from jaxalign.ops.skills import Transitions


class Buffer(NamedTuple):
    """data: leaves `[N, ...]`. at: `[] i32`, the next row to write. size: `[] i32`, rows filled."""

    data: Transitions
    at: Array
    size: Array


def create(example: Transitions, capacity: int) -> Buffer:
    """An empty buffer of N = capacity rows.

    example: one row, or its shapes and types (`jax.ShapeDtypeStruct`).
    Raises: UserError if the capacity is not positive.
    """
    if capacity < 1:
        raise UserError(f"buffer capacity = {capacity}: must be at least 1; raise it")
    data = jax.tree.map(lambda row: jnp.zeros((capacity, *row.shape), row.dtype), example)
    # Two arrays, as one that two fields share could not be donated.
    return Buffer(data, jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def write(buffer: Buffer, rows: Transitions) -> Buffer:
    """The buffer with R rows more, leaves `[R, ...]`, in one piece.

    Raises: UserError unless R divides N, so that no piece has to be cut at the end of the ring.
    """
    capacity, count = len(buffer.data.terminal), len(rows.terminal)
    if capacity % count:
        raise UserError(
            f"buffer capacity = {capacity}: must be a multiple of the {count} rows written at "
            f"once; try {max(count, capacity - capacity % count)}"
        )
    # After writes of other lengths the rest of the ring may be too short: begin it anew.
    start = jnp.where(buffer.at + count > capacity, 0, buffer.at)
    data = jax.tree.map(
        lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, start, axis=0),
        buffer.data,
        rows,
    )
    return Buffer(data, (start + count) % capacity, jnp.maximum(buffer.size, start + count))


def sample(buffer: Buffer, key: Array, count: int) -> Transitions:
    """Rows, leaves `[count, ...]`, uniform with replacement; of zeros while the buffer is empty."""
    index = jax.random.randint(key, (count,), 0, buffer.size)
    return jax.tree.map(lambda leaf: leaf[index], buffer.data)
