"""Tasks over environments: what a choice earns, when goals change, what the high level is told."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.core.types import UserError
from jaxalign.envs import plane, skill_tasks
from jaxalign.envs.environment import Environment

KEY = jax.random.key(0)
E, HOLD = 3, 5


def straight(seen, skill, key):
    """A low level that goes where the skill points."""
    assert seen.shape == (E, 2) and skill.shape == (E, 2)
    return skill


@pytest.fixture(scope="module")
def task():
    return skill_tasks.make("plane-multi-goals", plane.environment())._replace(hold=HOLD)


@functools.cache
def stepper(hold):
    task = skill_tasks.make("plane-multi-goals", plane.environment())._replace(hold=hold)
    return jax.jit(functools.partial(skill_tasks.step, task, (), straight))


def test_each_step_within_the_radius_of_the_goal_earns_one(task):
    goals = np.array([[3.5, 0.0], [0.0, -3.1], [9.0, 9.0]], np.float32)
    skill = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], np.float32)
    state = skill_tasks.reset(task, (), E, KEY)._replace(aim=jnp.asarray(goals))
    after = stepper(HOLD)(state, jnp.asarray(skill))
    expected = np.zeros(E)
    place = np.zeros((E, 2))
    for _ in range(HOLD):
        place = place + 0.2 * skill
        expected += np.linalg.norm(place - goals, axis=1) <= 3.0
    assert expected.tolist() == [3, 0, 0]
    np.testing.assert_allclose(after.walker, place, rtol=1e-6)
    np.testing.assert_array_equal(after.reward, expected)


def test_a_goal_lasts_two_choices_and_the_next_is_set_around_the_walker(task):
    state = skill_tasks.reset(task, (), E, KEY)
    assert (np.abs(state.aim) <= 7.5).all()
    far = jnp.full((E, 2), 100.0)
    state = state._replace(walker=far)
    first = stepper(HOLD)(state, jnp.zeros((E, 2)))
    np.testing.assert_array_equal(first.aim, state.aim)
    second = stepper(HOLD)(first, jnp.zeros((E, 2)))
    assert int(second.count) == 2
    assert (np.abs(second.aim - far) <= 7.5).all() and np.ptp(second.aim) > 0
    # Goals of other episodes, and later ones, are other goals.
    assert len(np.unique(np.round(second.aim, 4))) == 2 * E


def test_what_is_told_is_the_way_to_the_goal(task):
    state = skill_tasks.reset(task, (), E, KEY)
    state = state._replace(walker=jnp.full((E, 2), 4.0), aim=jnp.full((E, 2), 11.5))
    np.testing.assert_allclose(skill_tasks.observe(task, state), [[4.0, 4.0, 1.0, 1.0]] * E)
    offset, scale = skill_tasks.normaliser(task)
    assert offset.shape == scale.shape == (4,) and offset.dtype == np.float32


def test_drawn_goals_fill_the_square():
    task = skill_tasks.make("plane-multi-goals", plane.environment())
    goals = np.asarray(skill_tasks.reset(task, (), 2000, KEY).aim)
    assert (np.abs(goals) <= 7.5).all()
    np.testing.assert_allclose(goals.mean(0), 0, atol=0.4)
    np.testing.assert_allclose(goals.std(0), 15 / 12**0.5, rtol=0.05)


def test_one_goal_lasts_the_episode():
    walker = jumper()
    task = skill_tasks.make("half-cheetah-goal", walker)._replace(hold=1)
    state = skill_tasks.reset(task, (), 4, KEY)
    assert state.aim.shape == (4, 1)
    goal, step = state.aim, obedient(task)
    for _ in range(task.choices - 1):
        state = step(state, jnp.zeros((4, 2)))
        np.testing.assert_array_equal(state.aim, goal)


def obedient(task):
    """Steps of a low level whose actions are the skills."""
    return jax.jit(functools.partial(skill_tasks.step, task, (), lambda seen, skill, key: skill))


def jumper():
    """A walker of which nothing is known but x and how high it is; an action says both."""
    return Environment(
        name="jumper",
        observation_size=2,
        action_size=2,
        steps=200,
        world=(),
        reset=lambda world, count, key: jnp.zeros((count, 2)),
        step=lambda world, state, action: jnp.stack([state[:, 0] + action[:, 0], action[:, 1]], 1),
        observe=lambda state: state,
        place=lambda seen: seen[..., :1],
        goal_observation=lambda seen, place: seen,
        offset=np.zeros(2, np.float32),
        scale=np.ones(2, np.float32),
    )


def test_hurdles_are_taken_once_forwards_and_high():
    task = skill_tasks.make("half-cheetah-hurdle", jumper())._replace(hold=1)
    state = skill_tasks.reset(task, (), 1, KEY)
    earned, told, step = [], [], obedient(task)
    high, low = 0.2, 0.0
    path = [(4, high), (-4, high), (4, high), (4, low), (-4, high), (4, high), (8, high), (14, low)]
    for move, height in path:
        state = step(state, jnp.array([[move, height]]))
        earned.append(float(state.reward[0]))
        told.append(float(skill_tasks.observe(task, state)[0, 2]) * skill_tasks.HURDLE_SCALE)
    # x = 4, 0, 4, 8, 4, 8, 16, 30: the hurdle at 7 is run into, later taken; then two at once.
    assert earned == [1, 0, 0, 0, 0, 1, 2, 0]
    np.testing.assert_allclose(told, [3, 3, 3, 3, 3, 3, 3, -3])


def test_an_unknown_task_is_named():
    with pytest.raises(UserError, match="control = 'moon': is none of plane-multi-goals"):
        skill_tasks.make("moon", plane.environment())
