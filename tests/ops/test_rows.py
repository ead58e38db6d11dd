"""Functions of rows on a mesh: values and gradients are those of one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxalign.core import mesh as meshes
from jaxalign.ops.rows import on_own_rows


def scores(table, x, extra):
    """Sums over a loop, in which a gradient of `table` would be summed over devices each turn."""

    def turn(total, shift):
        return total + jnp.tanh(x @ table + shift[None]).sum(-1), None

    total, _ = jax.lax.scan(turn, jnp.zeros(len(x)), jnp.arange(3.0)[:, None])
    return total if extra is None else total * extra


@pytest.mark.parametrize("rows", [16, 8, 5])  # the last cannot be shared out
@pytest.mark.parametrize("axes", [{"data": 8}, {"data": 2, "fsdp": 4}])
def test_values_and_gradients_are_those_of_one_device(rows, axes):
    where = meshes.batch_sharding(meshes.make_mesh(axes))
    table, x = jax.random.normal(jax.random.key(0), (3, 6)), jnp.linspace(-1, 1, rows * 3)
    given = (table, x.reshape(rows, 3), jnp.arange(1.0, rows + 1))

    def run(rows):
        def total(*given):
            found = on_own_rows(scores, rows, whole=1)(*given)
            return (found * jnp.arange(len(found))).sum(), found

        return jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(*given)

    for ours, alone in zip(jax.tree.leaves(run(where)), jax.tree.leaves(run(None)), strict=True):
        np.testing.assert_allclose(ours, alone, rtol=1e-5, atol=1e-5)


def test_a_whole_arguments_gradient_is_summed_once():
    mesh = meshes.make_mesh({"data": 8})
    rows = meshes.batch_sharding(mesh)
    table = jax.ShapeDtypeStruct((3, 6), jnp.float32, sharding=NamedSharding(mesh, P()))
    x = jax.ShapeDtypeStruct((16, 3), jnp.float32, sharding=rows)

    def total(table, x):
        return on_own_rows(scores, rows, whole=1)(table, x, None).sum()

    text = jax.jit(jax.grad(total)).lower(table, x).compile().as_text()
    main = text[text.index("ENTRY") :]
    assert text.count(" all-reduce(") == main.count(" all-reduce(") == 1
