"""The plane: a point goes where it is told; and what learners of skills are given of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.envs import plane, pointmaze
from jaxalign.rollout import episodes

KEY = jax.random.key(0)


def path(environment, action, count=3):
    """Observations `[T+1, E, O]` under an action that is held."""
    held = jnp.tile(jnp.array([action]), (count, 1))

    @jax.jit
    def run(world):
        start = environment.reset(world, count, KEY)
        step = functools.partial(environment.step, world)
        return episodes.unroll(
            step, environment.observe, lambda seen, key: held, start, KEY, environment.steps
        ).observations

    return run(environment.world)


def test_a_point_moves_a_fifth_of_its_clipped_action():
    walked = path(plane.environment(), [0.5, -7.0])
    assert walked.shape == (201, 3, 2)
    np.testing.assert_array_equal(walked[0], np.zeros((3, 2)))
    np.testing.assert_allclose(walked[1], np.tile([[0.1, -0.2]], (3, 1)), rtol=1e-6)
    np.testing.assert_allclose(walked[-1], np.tile([[20.0, -40.0]], (3, 1)), rtol=1e-4)


def test_the_maze_without_a_goal():
    environment = pointmaze.environment("pointmaze-large", steps=30)
    walked = np.asarray(path(environment, [1.0, 0.0], count=50))
    assert walked.shape == (31, 50, 2)
    start = np.asarray(environment.world.start[0])
    assert abs(walked[0] - start[None]).max() <= 1 and walked[0].std() > 0.3
    assert (walked[-1, :, 0] > walked[0, :, 0] + 3).all()
    # Walls end the map on all sides, as far from the middle as the normaliser says.
    rows, columns = environment.world.walls.shape
    corners = np.asarray(pointmaze.centre(jnp.array([[0, 0], [rows - 1, columns - 1]])))
    edges = corners + np.array([[-2.0, -2.0], [2.0, 2.0]])
    seen = (edges - environment.offset[None]) / environment.scale[None]
    np.testing.assert_allclose(seen, [[-1, -1], [1, 1]], atol=1e-6)


def test_observations_are_places():
    for environment in (plane.environment(), pointmaze.environment("pointmaze-medium")):
        state = environment.reset(environment.world, 4, KEY)
        seen = environment.observe(state)
        assert seen.shape == (4, environment.observation_size) == (4, environment.action_size)
        np.testing.assert_array_equal(environment.place(seen), seen)
        there = jnp.arange(8.0).reshape(4, 2)
        goal = environment.goal_observation(seen, there)
        np.testing.assert_array_equal(environment.place(goal), there)
        assert environment.offset.shape == environment.scale.shape == (2,)
