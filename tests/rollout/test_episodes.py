"""Episodes of a ball on a line, against a Python loop."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.core.types import UserError
from jaxalign.rollout.episodes import evaluate, unroll


class Ball(NamedTuple):
    """place, goal: `[E] f32`."""

    place: jax.Array
    goal: jax.Array


def step(ball, action):
    return ball._replace(place=ball.place + action[:, 0])


def observe(ball):
    return ball.place[:, None], ball.goal[:, None]


def success(ball):
    return ball.place == ball.goal


def one_ahead(inputs, key):
    """One forward, though the goal may lie behind."""
    return jnp.ones_like(inputs[0])


def drift(inputs, key):
    place, goal = inputs
    return 0.1 * (goal - place) + jax.random.normal(key, place.shape)


def reset(task, key):
    """Task k starts at 0 and has its goal at 2 k + 2."""
    return Ball(jnp.zeros(task.shape), 2.0 * task + 2.0)


def test_unroll_is_a_loop_of_steps():
    ball, key = Ball(jnp.arange(3.0), jnp.full(3, 5.0)), jax.random.key(4)
    record = jax.jit(lambda ball, key: unroll(step, observe, drift, ball, key, 6, success))(
        ball, key
    )
    for time, step_key in enumerate(jax.random.split(key, 6)):
        for ours, expected in zip(record.observations, observe(ball), strict=True):
            np.testing.assert_allclose(ours[time], expected, rtol=1e-5, atol=1e-6)
        action = drift(observe(ball), step_key)
        np.testing.assert_allclose(record.actions[time], action, rtol=1e-5, atol=1e-6)
        ball = step(ball, action)
    np.testing.assert_allclose(record.observations[0][6], ball.place[:, None], rtol=1e-5)
    assert record.observations[0].shape == record.observations[1].shape == (7, 3, 1)
    assert record.actions.shape == (6, 3, 1)
    assert len(np.unique(record.actions)) == 18  # another key at every step


def test_unroll_records_outcomes_after_the_steps():
    ball = Ball(jnp.zeros(2), jnp.array([1.0, 3.0]))
    record = unroll(step, observe, one_ahead, ball, jax.random.key(0), 4, success)
    np.testing.assert_array_equal(record.outcome.T, [[1, 0, 0, 0], [0, 0, 1, 0]])
    record = unroll(step, observe, one_ahead, ball, jax.random.key(0), 4)
    assert record.outcome is None


def run(tasks=4, episodes=3, horizon=6, policy=one_ahead, reset=reset):
    return jax.jit(
        lambda key: evaluate(reset, step, success, observe, policy, tasks, episodes, horizon, key)
    )(jax.random.key(0))


def test_evaluate_counts_goals_within_the_horizon():
    """Goals at 2, 4, 6 and 8, of which the last is too far. A goal that is passed counts."""
    found = run()
    np.testing.assert_array_equal(found.success, np.array([[1] * 3] * 3 + [[0] * 3], bool))
    np.testing.assert_array_equal(found.steps, np.repeat([[2], [4], [6], [6]], 3, axis=1))


def test_a_start_at_the_goal_is_no_success():
    found = run(reset=lambda task, key: Ball(jnp.zeros(task.shape), jnp.zeros(task.shape)))
    assert not found.success.any()


def test_evaluate_stops_when_all_have_succeeded():
    """A horizon of a billion steps would not end."""
    found = run(horizon=10**9)
    np.testing.assert_array_equal(found.steps[:, 0], [2, 4, 6, 8])


def test_episodes_and_steps_have_their_own_noise():
    def noisy(task, key):
        return reset(task, key)._replace(place=jax.random.normal(key, task.shape))

    def record_noise(inputs, key):
        return jnp.round(jax.random.uniform(key, inputs[0].shape))

    found = run(tasks=2, episodes=50, horizon=40, policy=record_noise)
    assert found.success.all()  # steps of 0 or 1 arrive at 2 and at 4
    assert len(np.unique(found.steps[1])) > 4
    assert not run(tasks=2, episodes=50, horizon=40, reset=noisy).success.any()


def test_numbers_must_be_positive():
    ball = Ball(jnp.zeros(1), jnp.zeros(1))
    with pytest.raises(UserError, match="episode length 0: it must be at least 1"):
        unroll(step, observe, one_ahead, ball, jax.random.key(0), 0)
    for name in ("tasks", "episodes", "horizon"):
        with pytest.raises(UserError, match=f"{name} 0: it must be at least 1"):
            run(**{name: 0})
