"""Diagonal Gaussians against the density written out, and their samples' moments."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.ops import gaussian
from jaxalign.ops.gaussian import Gaussian


def test_log_density_is_that_of_independent_normals():
    rng = np.random.default_rng(0)
    mean, log_std, value = rng.normal(size=(3, 6, 4))
    std = np.exp(log_std)
    density = np.exp(-0.5 * ((value - mean) / std) ** 2) / (std * np.sqrt(2 * np.pi))
    ours = gaussian.log_density(Gaussian(jnp.array(mean), jnp.array(log_std)), jnp.array(value))
    np.testing.assert_allclose(ours, np.log(density).sum(-1), rtol=1e-4)


def test_samples_spread_with_the_temperature():
    mean = jnp.broadcast_to(jnp.array([[1.0, -2.0]]), (20_000, 2))
    law = Gaussian(mean, jnp.full_like(mean, np.log(0.5)))
    np.testing.assert_array_equal(gaussian.draw(law, jax.random.key(0), 0.0), mean)
    for temperature in (1.0, 3.0):
        x = gaussian.draw(law, jax.random.key(0), temperature)
        np.testing.assert_allclose(x.mean(0), [1, -2], atol=0.04)
        np.testing.assert_allclose(x.std(0), [0.5 * temperature] * 2, rtol=0.03)
