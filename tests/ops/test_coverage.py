"""Cells counted along paths made by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.ops import coverage

cells = jax.jit(coverage.cells, static_argnums=1)


def seen(places, half_width=4):
    """The cells as the integers of their lower corners."""
    grid = np.asarray(cells(jnp.asarray(places, jnp.float32), half_width))
    assert grid.shape == (2 * half_width,) * np.shape(places)[-1]
    assert coverage.count(grid) == grid.sum()
    return [tuple(int(i) - half_width for i in cell) for cell in np.argwhere(grid)]


def test_a_cell_holds_its_lower_edges_and_not_its_upper_ones():
    assert seen([[0.0, 0.0], [0.99, 0.5], [0.5, 0.0]]) == [(0, 0)]
    assert seen([[1.0, 0.0], [0.0, 1.0]]) == [(0, 1), (1, 0)]


def test_negative_coordinates():
    assert seen([[-0.01, -1.0], [-1.0, -0.5], [-1.01, 0.2]]) == [(-2, 0), (-1, -1)]


def test_what_lies_outside_is_left_out():
    outside = [[4.0, 0.0], [0.0, -4.01], [1e9, 1e9], [-1e9, 0], [np.nan, 0], [np.inf, -np.inf]]
    assert seen(outside) == []
    assert seen([*outside, [3.99, -4.0]]) == [(3, -4)]


def test_one_coordinate_and_rows_of_any_shape():
    assert seen([[[0.2], [0.7]], [[-3.5], [2.0]]]) == [(-4,), (0,), (2,)]


def test_paths_unite():
    rng = np.random.default_rng(0)
    paths = np.cumsum(rng.normal(size=(5, 40, 2)), axis=1).astype(np.float32)
    expected = {tuple(np.floor(p)) for p in paths.reshape(-1, 2)}
    inside = {cell for cell in expected if all(-16 <= c < 16 for c in cell)}
    assert len(inside) > 50
    assert set(seen(paths, 16)) == inside
    each = jax.vmap(lambda path: coverage.cells(path, 16))(jnp.asarray(paths))
    np.testing.assert_array_equal(each.any(0), cells(jnp.asarray(paths), 16))
    assert coverage.count(each[0] | each[1]) == len(
        {c for p in paths[:2] for c in map(tuple, np.floor(p)) if c in inside}
    )


@pytest.mark.parametrize("half_width", [1, 128])
def test_the_grid_is_as_wide_as_asked(half_width):
    corner = np.float32(half_width) - 0.5
    assert seen([[corner, -corner]], half_width) == [(half_width - 1, -half_width)]
