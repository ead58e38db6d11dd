"""Skills: their laws, what one-hot vectors become in rewards, and which skill leads along."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.core.types import UserError
from jaxalign.ops import skills

KEY = jax.random.key(0)


def test_skills_are_uniform_on_the_sphere():
    z = np.asarray(skills.sample(KEY, 20_000, 3, False))
    np.testing.assert_allclose(np.linalg.norm(z, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(z.mean(0), 0, atol=0.02)
    np.testing.assert_allclose(np.cov(z.T), np.eye(3) / 3, atol=0.01)
    # Archimedes: each coordinate of a point of the sphere is uniform.
    np.testing.assert_allclose(np.quantile(z[:, 0], [0.25, 0.75]), [-0.5, 0.5], atol=0.02)
    np.testing.assert_array_equal(skills.evenly(KEY, 5, 3, False), skills.sample(KEY, 5, 3, False))


def test_one_hot_skills_are_equally_likely_and_shown_in_turn():
    drawn = np.asarray(skills.sample(KEY, 8_000, 4, True))
    assert set(drawn.ravel()) == {0, 1} and (drawn.sum(1) == 1).all()
    assert ((drawn.sum(0) - 2_000) ** 2 / 2_000).sum() < 16.3  # chi-square, 3 degrees, 0.1 %
    shown = np.asarray(skills.evenly(KEY, 10, 4, True))
    np.testing.assert_array_equal(shown.sum(0), [3, 3, 2, 2])


def test_rewards_of_latent_steps():
    move = jnp.array([[3.0, -1.0, 2.0]])
    own = jnp.array([[0.0, 0.0, 1.0]])
    np.testing.assert_allclose(skills.centred(own), [[-0.5, -0.5, 1]], rtol=1e-6)
    np.testing.assert_allclose(skills.reward(move, own, True), [2 - (3 - 1) / 2], rtol=1e-6)
    slant = jnp.array([[0.6, 0.8, 0.0]])
    np.testing.assert_allclose(skills.reward(move, slant, False), [1.8 - 0.8], rtol=1e-6)
    twice = skills.reward(jnp.stack([move, 2 * move]), own[None], True)
    np.testing.assert_allclose(twice, [[1], [2]], rtol=1e-6)


def test_the_skill_that_leads_along():
    vector = jnp.array([[3.0, 4.0], [-2.0, 0.0], [0.0, 0.0]])
    np.testing.assert_allclose(
        skills.along(vector, False), [[0.6, 0.8], [-1, 0], [0, 0]], rtol=1e-6
    )
    np.testing.assert_array_equal(skills.along(vector, True), [[0, 1], [0, 1], [1, 0]])


@pytest.mark.parametrize(("size", "discrete"), [(0, False), (1, True), (-3, True)])
def test_skills_need_room(size, discrete):
    with pytest.raises(UserError, match=f"skill_size = {size}: .*skills need at least"):
        skills.check_size(size, discrete)
    skills.check_size(2 if discrete else 1, discrete)
