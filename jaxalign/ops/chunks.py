"""Functions of rows, a chunk of the rows at a time, where all at once would not fit.

Dimensions: B rows, M chunks.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxalign.core.types import Array


def map_chunks(function: Callable[[Array], Array], rows: Array, chunk: int) -> Array:
    """`function(rows)`, `[B, ...]`, of at most `chunk` rows at once.

    rows: `[B, ...]`; rows of zeros fill the last chunk.
    On a mesh every chunk has rows of all devices, so none is sent, if `chunk` is a multiple of the
    devices that B lies over and divides B.
    """
    count = len(rows)
    if count <= chunk:
        return function(rows)
    short = -count % chunk
    if short:
        rows = jnp.concatenate([rows, jnp.zeros((short, *rows.shape[1:]), rows.dtype)])
    apart = rows.reshape(chunk, -1, *rows.shape[1:])  # [chunk, M, ...]

    def one(i: Array) -> Array:
        return function(jax.lax.dynamic_index_in_dim(apart, i, 1, keepdims=False))

    # By number: turning the axes round would copy all rows.
    out = jax.lax.map(one, jnp.arange(apart.shape[1])).swapaxes(0, 1)
    return out.reshape(-1, *out.shape[2:])[:count]
