"""State coverage: how many unit cells of the ground have been visited.

The measure of METRA (Park et al. 2024, section 5.3): cells of side 1 of (x, y), or of x alone, that
hold any visited place. A grid of bool keeps them, so grids of several times or policies unite by |.

Dimensions: P coordinates of a place (1 or 2), w half width of the grid; `...` any rows.
"""

from __future__ import annotations

import jax.numpy as jnp

from jaxalign.core.types import Array


def cells(places: Array, half_width: int) -> Array:
    """The visited cells, `[2w] * P bool`; entry i of an axis is the interval [i - w, i - w + 1).

    places: `[..., P] f32`. What lies outside of the grid, or is not a number, is left out.
    """
    size, axes = 2 * half_width, places.shape[-1]
    inside = jnp.all((places >= -half_width) & (places < half_width), axis=-1, keepdims=True)
    # Others get an index beyond the grid, which the scatter drops; a negative one would wrap.
    index = jnp.where(inside, jnp.floor(places) + half_width, size).astype(jnp.int32)
    grid = jnp.zeros((size,) * axes, bool)
    return grid.at[tuple(jnp.moveaxis(index, -1, 0))].max(True, mode="drop")


def count(grid: Array) -> Array:
    """How many cells of a grid `[2w] * P` were visited, `[] i32`."""
    return grid.sum(dtype=jnp.int32)
