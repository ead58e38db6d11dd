"""Squashed actions against the change of variables in float64; targets and losses by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.ops import soft_actor_critic as sac
from jaxalign.ops.gaussian import Gaussian

KEY = jax.random.key(0)


def test_densities_of_squashed_actions():
    rng = np.random.default_rng(0)
    mean, log_std, before = rng.normal(size=(3, 20, 3))
    std = np.exp(log_std)
    normal = np.exp(-0.5 * ((before - mean) / std) ** 2) / (std * np.sqrt(2 * np.pi))
    expected = np.log(normal / (1 - np.tanh(before) ** 2 + 1e-6)).sum(-1)
    law = Gaussian(jnp.array(mean, jnp.float32), jnp.array(log_std, jnp.float32))
    np.testing.assert_allclose(
        sac.log_density(law, jnp.array(before, jnp.float32)), expected, rtol=1e-4
    )


def test_the_density_of_an_action_adds_up_to_one():
    """Along a line of actions: the sum of density times width."""
    edges = np.linspace(-1, 1, 20_001)
    action = (edges[1:] + edges[:-1]) / 2
    law = Gaussian(jnp.full((20_000, 1), 0.4), jnp.full((20_000, 1), -0.3))
    density = np.exp(sac.log_density(law, jnp.arctanh(jnp.array(action, jnp.float32))[:, None]))
    assert abs(density.sum() * 1e-4 - 1) < 1e-3


def test_samples_carry_their_density_and_stay_finite_at_the_bounds():
    law = Gaussian(jnp.array([[0.3, -30.0]]), jnp.array([[0.0, 0.0]]))
    action, density = sac.sample(law, KEY)
    before = law.mean + jax.random.normal(KEY, (1, 2))
    np.testing.assert_allclose(action, np.tanh(before), rtol=1e-6)
    np.testing.assert_allclose(density, sac.log_density(law, before), rtol=1e-6)
    assert action[0, 1] == pytest.approx(-1) and np.isfinite(density).all()
    slope = jax.grad(lambda mean: sac.sample(law._replace(mean=mean), KEY)[1].sum())(law.mean)
    assert np.isfinite(slope).all()


def test_the_temperature_of_an_action():
    law = Gaussian(jnp.array([[0.5]]), jnp.array([[0.2]]))
    np.testing.assert_allclose(sac.act(law, KEY, 0.0), np.tanh([[0.5]]), rtol=1e-6)
    np.testing.assert_array_equal(sac.act(law, KEY, 1.0), sac.sample(law, KEY)[0])


def test_targets_and_losses_by_hand():
    reward, terminal = jnp.array([1.0, 1.0]), jnp.array([0.0, 1.0])
    values, density = jnp.array([[5.0, 9.0], [4.0, 9.0]]), jnp.array([-2.0, 0.5])
    alpha = jnp.float32(0.25)
    target = sac.target(reward, terminal, 0.5, values, density, alpha)
    np.testing.assert_allclose(target, [1 + 0.5 * (4 + 0.5), 1])
    loss = sac.critic_loss(values, jnp.array([3.0, 8.0]))
    np.testing.assert_allclose(loss, [(4 + 1) / 2, (1 + 1) / 2])
    np.testing.assert_allclose(sac.actor_loss(values, density, alpha), [-4.5, -8.875])
    log_alpha = jnp.float32(-2.0)
    np.testing.assert_allclose(sac.temperature_loss(log_alpha, density, -1.0), [-6, -1])
    # Less random than wanted (entropy 0.5 below the target's 1): descent raises log alpha.
    few = jnp.array([-0.5])
    assert jax.grad(lambda a: sac.temperature_loss(a, few, 1.0).sum())(log_alpha) < 0
    assert sac.target_entropy(8) == -4
