"""Weights and losses of policies, by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.ops import policy_extraction as pe


def test_weights_are_exponential_up_to_a_hundred():
    advantage = jnp.array([-2.0, 0.0, 0.5, 1.0, 50.0, 1000.0])
    expected = [np.exp(-6), 1, np.exp(1.5), np.exp(3), 100, 100]
    np.testing.assert_allclose(pe.awr_weight(advantage, 3.0), expected, rtol=1e-6)


def test_cloning_weighs_the_same_whatever_the_scale_of_values():
    q, density = jnp.array([-1.0, -2.0, 6.0]), jnp.array([-3.0, 1.0, 0.5])
    expected = -np.array([-1, -2, 6]) / 3 - 0.1 * np.array([-3, 1, 0.5])
    for scale in (1.0, 100.0):
        loss = pe.ddpg_bc_loss(scale * q, density, 0.1)
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
    # The divisor is a constant: the gradient of each item is that of -q / mean |q|.
    gradient = jax.grad(lambda q: pe.ddpg_bc_loss(q, density, 0.1).sum())(q)
    np.testing.assert_allclose(gradient, [-1 / 3] * 3, rtol=1e-5)
    assert np.isfinite(pe.ddpg_bc_loss(0 * q, density, 0.1)).all()
