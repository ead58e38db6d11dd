"""Rows stay on their devices: what is sent of a network whose matrices lie in parts."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxalign.core.mesh import batch_sharding, make_mesh, shardings
from jaxalign.models import layout
from jaxalign.models.dense import Dense

WIDTH, ROWS = 16, 64


class Net:
    """Two layers, whose matrices lie over `fsdp` along their outputs."""

    def __init__(self, mesh):
        self.rows = batch_sharding(mesh)
        first, second = Dense(2 * WIDTH), Dense(WIDTH)
        key, x = jax.random.key(0), jnp.ones((1, WIDTH))
        params = {"a": first.init(key, x), "b": second.init(key, jnp.ones((1, 2 * WIDTH)))}
        where = shardings(params, mesh, ((r"kernel$", P(None, "fsdp")),))
        self.params = jax.device_put(params, where)
        self.x = jax.device_put(
            jax.random.normal(key, (ROWS, 3, WIDTH)), NamedSharding(mesh, self.rows.spec)
        )

        def loss(params, x):
            hidden = jax.nn.relu(first.apply(params["a"], x))
            return (second.apply(params["b"], hidden) ** 2).mean()

        self.loss = loss

    def gradient(self, rows):
        return jax.jit(layout.lying(rows)(jax.grad(self.loss)))


def sent(text: str) -> list[int]:
    """Numbers of each array that is summed or gathered."""
    found = re.findall(r"= (.*?) (?:all-reduce|all-gather|all-to-all)(?:-start)?\(", text)
    shapes = [shape for each in found for shape in re.findall(r"f32\[([\d,]*)\]", each)]
    return [int(np.prod([int(n) for n in shape.split(",") if n])) for shape in shapes]


@pytest.fixture(scope="module")
def net():
    return Net(make_mesh({"data": 2, "fsdp": 4}))


def test_parameters_are_sent_and_activations_are_not(net):
    text = net.gradient(net.rows).lower(net.params, net.x).compile().as_text()
    assert max(sent(text)) == 2 * WIDTH * WIDTH  # a matrix


def test_the_numbers_are_the_same(net):
    kept, free = (net.gradient(rows)(net.params, net.x) for rows in (net.rows, None))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), kept, free)


def test_what_is_no_batch_is_left_alone(net):
    odd = jnp.ones((3, WIDTH))
    with layout.lying(net.rows):
        assert layout.keep(odd) is odd
        assert layout.keep(net.x) is not net.x
    assert layout.keep(net.x) is net.x
