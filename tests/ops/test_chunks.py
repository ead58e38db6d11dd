"""Functions of rows in chunks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxalign.core.mesh import make_mesh
from jaxalign.ops.chunks import map_chunks


def double(rows):
    assert len(rows) <= 4
    return jnp.stack([rows.sum(1), 2 * rows.sum(1)], axis=1)


@pytest.mark.parametrize("count", [1, 3, 4, 5, 8, 11])
def test_the_rows_keep_their_order(count):
    rows = jnp.arange(count * 3, dtype=jnp.float32).reshape(count, 3)
    whole = np.asarray(rows).sum(1)[:, None] * np.array([[1, 2]])
    np.testing.assert_array_equal(jax.jit(lambda r: map_chunks(double, r, 4))(rows), whole)


def test_no_row_leaves_its_device():
    mesh = make_mesh({"data": 4}, jax.devices()[:4])
    rows = jax.ShapeDtypeStruct(
        (16, 3), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("data"))
    )
    text = jax.jit(lambda r: map_chunks(double, r, 4)).lower(rows).compile().as_text() or ""
    assert text
    for word in ("all-gather", "all-to-all", "all-reduce", "collective-permute"):
        assert word not in text
