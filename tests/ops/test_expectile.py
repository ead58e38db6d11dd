"""Expectile losses by hand, and the expectile they lead to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.ops import expectile


def test_weight_goes_by_the_advantage_and_not_by_the_error():
    advantage, error = jnp.array([1.0, 0.0, -1.0]), jnp.array([-2.0, 3.0, 1.0])
    # An advantage of zero counts as good.
    expected = [0.7 * 4, 0.7 * 9, 0.3 * 1]
    np.testing.assert_allclose(expectile.expectile_loss(advantage, error, 0.7), expected, rtol=1e-6)


@pytest.mark.parametrize("tau", [0.5, 0.7, 0.9])
def test_the_minimum_is_the_expectile(tau):
    x = jnp.asarray(np.random.default_rng(0).normal(size=500), jnp.float32)
    gradient = jax.jit(jax.grad(lambda m: expectile.expectile_loss(x - m, x - m, tau).mean()))
    m = 0.0
    for _ in range(200):
        m = m - 0.3 * gradient(m)
    m, x = float(m), np.asarray(x)
    above, below = np.maximum(x - m, 0).mean(), np.maximum(m - x, 0).mean()
    assert tau * above == pytest.approx((1 - tau) * below, rel=1e-3)
    assert m == pytest.approx(x.mean(), abs=1e-3) if tau == 0.5 else m > x.mean() + 0.2


def test_twin_loss_by_hand():
    # One item a column: a step that went well, one that went badly, and one at its goal.
    value = jnp.array([[-3.0, -3.0, -1.0], [-5.0, -1.0, -2.0]])
    slow_value = jnp.array([[-4.0, -2.0, -1.0], [-6.0, -2.0, -1.0]])
    slow_next = jnp.array([[-2.0, -8.0, -7.0], [-4.0, -4.0, -9.0]])
    reward, mask = jnp.array([-1.0, -1.0, 0.0]), jnp.array([1.0, 1.0, 0.0])
    loss = expectile.twin_value_loss(value, slow_value, slow_next, reward, mask, 0.5, 0.7)
    # best = -3, -5, 0 against means -5, -2, -1: weights .7, .3, .7; targets by head as below.
    errors = np.array([[-2 + 3, -5 + 3, 0 + 1], [-3 + 5, -3 + 1, 0 + 2]])
    np.testing.assert_allclose(loss, (np.array([[0.7, 0.3, 0.7]]) * errors**2).sum(0), rtol=1e-6)
