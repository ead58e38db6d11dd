"""Convolutions as matrix products, and when attention is cuDNN's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.core import cost
from jaxalign.models import convolution


@pytest.mark.parametrize(
    ("window", "stride", "padding", "shape"),
    [
        (3, 1, (1, 1), (4, 6)),
        (3, 1, (1, 1), (8, 10)),  # so many pixels that a CPU convolves
        (3, 2, (0, 1), (10, 8)),
        (3, 2, (1, 1), (4, 6)),
        (3, 2, (0, 1), (6, 4)),
        (1, 1, (0, 0), (3, 2)),
    ],
)
def test_a_convolution_is_the_same_sum_on_every_backend(
    window, stride, padding, shape, monkeypatch
):
    """Values and both gradients; the second time as on an accelerator."""
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(2, *shape, 3)), jnp.float32)
    kernel = jnp.asarray(random.normal(size=(window, window, 3, 5)), jnp.float32)

    def run(x, kernel):
        out = convolution.convolve(x, kernel, stride, padding)
        return (out * jnp.cos(jnp.arange(out.size)).reshape(out.shape)).sum(), out

    def both():
        return jax.value_and_grad(lambda *a: run(*a), (0, 1), has_aux=True)(x, kernel)

    with jax.default_matmul_precision("highest"):
        ours = both()
        monkeypatch.setattr(jax.lax, "platform_dependent", lambda *a, cpu, default: default(*a))
        theirs = both()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), ours, theirs)


def test_a_convolution_by_hand():
    """A kernel that is 1 at one place moves the picture by that much."""
    x = jnp.arange(12.0).reshape(1, 3, 4, 1)
    kernel = jnp.zeros((3, 3, 1, 1)).at[0, 2].set(1.0)  # from one row above, one column right
    out = convolution.convolve(x, kernel, 1, (1, 1))[0, :, :, 0]
    np.testing.assert_array_equal(out, [[0, 0, 0, 0], [1, 2, 3, 0], [5, 6, 7, 0]])


def convolutions(function, *arguments, platform: str) -> int:
    """How many there are in the program, that of another platform also made on a CPU."""
    traced = jax.jit(function).trace(*arguments)
    return traced.lower(lowering_platforms=(platform,)).as_text().count("stablehlo.convolution")


@pytest.mark.parametrize(("side", "on_cpu"), [(8, 1), (7, 0)])
def test_gradients_on_a_cpu_are_no_convolutions(side, on_cpu):
    """XLA:CPU's own are very slow inside loops, and for few pixels; accelerators get theirs."""
    x, kernel = jnp.zeros((1, side, side, 2)), jnp.zeros((3, 3, 2, 2))

    def loss(x, kernel):
        return jnp.sin(convolution.convolve(x, kernel, 1, (1, 1))).sum()

    both = jax.value_and_grad(loss, (0, 1))
    for platform, forward, all_three in (("cpu", on_cpu, on_cpu), ("tpu", 1, 3), ("cuda", 1, 3)):
        assert convolutions(loss, x, kernel, platform=platform) == forward
        assert convolutions(both, x, kernel, platform=platform) == all_three, platform


@pytest.mark.parametrize("argument", [0, 1])
def test_a_gradient_that_nobody_asks_for_costs_nothing(argument):
    """Kernels are frozen under adapters: then one product for the pictures' gradient is all."""
    x, kernel = jnp.ones((2, 4, 6, 3)), jnp.ones((3, 3, 3, 5))

    def loss(x, kernel):
        return jnp.sin(convolution.convolve(x, kernel, 1, (1, 1))).sum()

    forward = cost.count(loss, x, kernel).flops
    assert cost.count(jax.grad(loss, argument), x, kernel).flops == 2 * forward
    assert cost.count(jax.grad(loss, (0, 1)), x, kernel).flops == 3 * forward
