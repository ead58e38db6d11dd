"""MuJoCo's walkers compiled by MJX, against the C library.

A program takes up to a minute to compile: there are four.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.envs import mujoco, mujoco_host

pytest.importorskip("mujoco.mjx")
pytest.importorskip("gymnasium")

pytestmark = [pytest.mark.parity, pytest.mark.timeout(900)]

ENVIRONMENTS, STEPS = 16, 30


class Path:
    """What the C library makes of random actions: seen `[T+1, E, O]`, actions `[T, E, A]`."""

    def __init__(self, name):
        host = mujoco_host.HostEnvironments(name, ENVIRONMENTS, 1)
        draw = np.random.default_rng(1).uniform
        shape = (STEPS, ENVIRONMENTS, host.action_size)
        # Beyond the range for a few, which is clipped.
        self.actions = np.float32(draw(-1.05, 1.05, shape))
        self.seen = np.stack([host.reset(3), *(host.step(action) for action in self.actions)])
        self.model, self.recipe = host.model, mujoco.RECIPES[name]

    def states(self, rows):
        """MJX's states of what is seen, `[..., O]`."""
        nq, nv = self.model.nq, self.model.nv
        position, velocity, activation = jnp.split(jnp.asarray(rows), [nq, nq + nv], axis=-1)
        return mujoco.State(position, velocity, activation, jnp.zeros_like(velocity))

    def errors(self, after):
        """Of the positions and of the velocities after one step, `[T, E]` each, at most."""
        error = np.abs(np.stack(after) - self.seen[1:])
        position, velocity = np.split(error, [self.model.nq], axis=-1)
        return position.max(-1), velocity.max(-1)

    def near_floor(self):
        """Where, within a step, a limb is near the floor, and where one that is nearly upright.

        The friction of a capsule within 30 degrees of upright has other axes in MJX.
        """
        times = [range(STEPS), range(ENVIRONMENTS)]
        marks = [[self._near_floor(t, lane) for lane in times[1]] for t in times[0]]
        return np.moveaxis(np.array(marks), -1, 0)

    def _near_floor(self, time, lane):
        library, model = mujoco.library(), self.model
        data = library.MjData(model)
        data.qpos[:], data.qvel[:] = np.split(self.seen[time, lane], [model.nq])
        data.ctrl[:] = np.clip(self.actions[time, lane], -1, 1)
        limbs = model.geom_type == library.mjtGeom.mjGEOM_CAPSULE
        radius, half = model.geom_size[limbs, :2].T
        near = upright = False
        for _ in range(self.recipe.substeps + 1):
            library.mj_kinematics(model, data)
            steep = np.abs(data.geom_xmat[limbs, 8])
            low = data.geom_xpos[limbs, 2] - steep * half - radius < 0.06
            near, upright = near | np.any(low), upright | np.any(low & (steep > 0.84))
            library.mj_step(model, data)
        return near, upright


@pytest.fixture(scope="module")
def ant():
    environment = mujoco.environment("ant")
    return environment, jax.jit(environment.step)


@pytest.fixture(scope="module")
def cheetah():
    """Its program steps two seeds of eight environments."""
    environment = mujoco.environment("half-cheetah")
    return environment, jax.jit(jax.vmap(environment.step, in_axes=(None, 0, 0)))


def two_seeds(rows):
    return jax.tree.map(lambda leaf: leaf.reshape(2, len(leaf) // 2, *leaf.shape[1:]), rows)


def test_a_step_of_the_ant_is_mujocos(ant):
    environment, step = ant
    path = Path("ant")
    after = [
        environment.observe(step(environment.world, path.states(rows), action))
        for rows, action in zip(path.seen[:-1], path.actions, strict=True)
    ]
    position, velocity = path.errors(after)
    near, upright = path.near_floor()
    assert (near & ~upright).mean() > 0.1
    assert position[~upright].max() < 2e-5
    assert velocity[~upright].max() < 2e-3
    # Friction with other axes is other friction; what it does in a step is bounded.
    assert upright.mean() > 0.2
    assert np.median(position[upright]) < 1e-4
    assert position[upright].max() < 0.1


def test_a_step_of_the_half_cheetah_is_mujocos(cheetah):
    environment, step = cheetah
    path = Path("half-cheetah")
    observe = jax.vmap(environment.observe)
    after = [
        observe(step(environment.world, two_seeds(path.states(rows)), two_seeds(action)))
        for rows, action in zip(path.seen[:-1], path.actions, strict=True)
    ]
    position, velocity = path.errors([seen.reshape(ENVIRONMENTS, -1) for seen in after])
    assert position.max() < 1e-4
    assert velocity.max() < 1e-2
    assert np.median(position) < 1e-6


def test_ten_steps_of_the_half_cheetah_are_mujocos(cheetah):
    environment, step = cheetah
    path = Path("half-cheetah")
    state = two_seeds(path.states(path.seen[0]))
    for action in path.actions[:10]:
        state = step(environment.world, state, two_seeds(action))
    error = np.abs(state.position.reshape(ENVIRONMENTS, -1) - path.seen[10, :, :9])
    assert np.median(error.max(1)) < 5e-5
    assert error.max() < 5e-3


@pytest.mark.slow
def test_a_step_of_the_quadruped_is_mujocos():
    """It has what the others have not: activations, uneven ranges, limbs that touch each other."""
    environment = mujoco.environment("quadruped")
    assert environment.name == "quadruped-state"
    step, path = jax.jit(environment.step), Path("quadruped")
    after = [
        environment.observe(step(environment.world, path.states(rows), action))
        for rows, action in zip(path.seen[:10], path.actions, strict=False)
    ]
    error = np.abs(np.stack(after) - path.seen[1:11])
    position, velocity, activation = np.split(error, [23, 45], axis=-1)
    assert position.max() < 5e-4
    assert velocity.max() < 5e-2
    assert activation.max() < 1e-5
    assert np.median(position.max(-1)) < 2e-6


def test_one_that_blew_up_troubles_no_other(cheetah):
    environment, step = cheetah
    world = environment.world
    state = two_seeds(environment.reset(world, ENVIRONMENTS, jax.random.key(0)))
    action = jnp.zeros((2, ENVIRONMENTS // 2, 6))
    fine = step(world, state, action)
    broken = state._replace(velocity=state.velocity.at[1, 3, 2].set(1e12))
    mended = step(world, broken, action)
    others = np.ones((2, ENVIRONMENTS // 2), bool)
    others[1, 3] = False
    for leaf, same in zip(mended, fine, strict=True):
        np.testing.assert_array_equal(leaf[others], same[others])
    np.testing.assert_array_equal(mended.position[1, 3], world.model.qpos0)
    np.testing.assert_array_equal(mended.velocity[1, 3], np.zeros(9))


def test_the_record_of_an_environment(ant):
    environment, _ = ant
    assert environment.name == "ant"
    assert (environment.observation_size, environment.action_size) == (29, 8)
    assert (environment.steps, environment.offset.shape) == (200, (29,))
    state = environment.reset(environment.world, 6, jax.random.key(1))
    seen = environment.observe(state)
    assert seen.shape == (6, 29)
    np.testing.assert_array_equal(environment.place(seen), seen[:, :2])
    goal = environment.goal_observation(seen, jnp.full((6, 2), 7.0))
    np.testing.assert_array_equal(goal[:, 2:], seen[:, 2:])
    np.testing.assert_array_equal(goal[:, :2], np.full((6, 2), 7))


def test_fast_physics_is_another_simulator():
    fast, exact = (mujoco.environment("half-cheetah", physics) for physics in ("fast", "exact"))
    assert (fast.name, exact.name) == ("half-cheetah-fast", "half-cheetah")
    option = fast.world.model.opt
    assert (option.iterations, option.ls_iterations, option.integrator) == (1, 4, 0)
    assert exact.world.model.opt.iterations == 100
    path = Path("half-cheetah")
    step = jax.jit(fast.step)
    state = path.states(path.seen[0])
    for action in path.actions[:5]:
        state = step(fast.world, state, action)
    error = np.abs(state.position - path.seen[5, :, :9]).max()
    assert 1e-3 < error < 0.5
