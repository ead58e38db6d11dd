"""What can be said of MuJoCo's environments without MuJoCo; the physics is in tests/parity."""

from __future__ import annotations

import functools
import importlib.util
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.core.types import UserError
from jaxalign.envs import mujoco, mujoco_host, plane
from jaxalign.rollout import episodes

SIZES = {"ant": (29, 2), "half-cheetah": (18, 1), "quadruped": (57, 2), "humanoid": (55, 2)}


@pytest.fixture
def world():
    """A body with a root quaternion and one joint, and two poses to start from."""
    starts = jnp.array([[0, 0, 0, 1, 0, 0, 0, 0], [5, 5, 5, 0, 1, 0, 0, 5]], jnp.float32)
    model = SimpleNamespace(nq=8, nv=7, na=2, qpos0=starts[0])
    return mujoco.World(model=model, blank=None, starts=starts)


@pytest.fixture
def without(monkeypatch):
    """Makes packages look as if they were not installed."""
    mujoco.library.cache_clear()
    mujoco.compiler.cache_clear()
    find_spec = importlib.util.find_spec

    def hide(*names):
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: None if name in names else find_spec(name)
        )
        for name in names:
            monkeypatch.setitem(sys.modules, name, None)

    yield hide
    mujoco.library.cache_clear()
    mujoco.compiler.cache_clear()


@pytest.mark.parametrize("name", mujoco.RECIPES)
def test_normalisers_are_of_the_published_sizes(name):
    size, axes = SIZES[name]
    offset, scale = mujoco.normaliser(name)
    assert offset.shape == scale.shape == (size,)
    assert offset.dtype == scale.dtype == np.float32
    assert np.all(scale > 0)
    assert mujoco.find(name).place == axes


def test_ants_normaliser_is_metras():
    """The paper's code has constants that were measured in the same way, with an older MuJoCo."""
    offset, scale = mujoco.normaliser("ant")
    np.testing.assert_allclose(offset[:4], [0.0049, 0.0113, 0.7022, 0.8455], atol=0.025)
    np.testing.assert_allclose(scale[:4], [0.6247, 0.6196, 0.1718, 0.2863], rtol=0.02)


def test_reset_adds_noise_to_starts(world):
    state = mujoco.reset(world, 4000, jax.random.key(0), noise=0.1)
    far = np.asarray(state.position[:, 0]) > 2
    assert abs(far.mean() - 0.5) < 0.05
    around = np.asarray(state.position[:, [0, 1, 2, 7]]) - 5.0 * far[:, None]
    assert np.abs(around).max() <= 0.1 + 1e-6
    np.testing.assert_allclose(around.std(0), 0.1 / 3**0.5, rtol=0.05)
    turn = np.asarray(state.position[:, 3:7])
    np.testing.assert_allclose(np.linalg.norm(turn, axis=1), 1, rtol=1e-6)
    np.testing.assert_array_equal(np.abs(turn).argmax(1), far.astype(int))
    np.testing.assert_allclose(state.velocity.std(0), 0.1, rtol=0.05)
    assert state.velocity.shape == state.acceleration.shape == (4000, 7)
    np.testing.assert_array_equal(state.activation, np.zeros((4000, 2)))


def test_reset_without_noise_is_a_start(world):
    state = mujoco.reset(world, 20, jax.random.key(1), noise=0)
    choices = np.asarray(world.starts)
    assert {int(row[0]) for row in state.position} == {0, 5}
    for row in np.asarray(state.position):
        assert np.any(np.all(row == choices, axis=1))
    np.testing.assert_array_equal(state.velocity, np.zeros((20, 7)))


def test_the_place_comes_first():
    state = mujoco.State(
        jnp.arange(6.0).reshape(2, 3), 10 + jnp.arange(4.0).reshape(2, 2), jnp.ones((2, 1)), None
    )
    seen = mujoco.observe(state)
    np.testing.assert_array_equal(seen, [[0, 1, 2, 10, 11, 1], [3, 4, 5, 12, 13, 1]])
    np.testing.assert_array_equal(mujoco.place(seen, size=2), [[0, 1], [3, 4]])
    moved = mujoco.goal_observation(seen, jnp.array([[7.0], [8.0]]))
    np.testing.assert_array_equal(moved, [[7, 1, 2, 10, 11, 1], [8, 4, 5, 12, 13, 1]])


@pytest.mark.parametrize("number", [np.nan, np.inf, -2e10])
def test_what_blew_up_is_back_at_rest(world, number):
    shapes = [(3, 8), (3, 7), (3, 2), (3, 7)]
    fine = mujoco.State(*(jnp.full(shape, 2.0) for shape in shapes))
    broken = fine._replace(velocity=fine.velocity.at[1, 4].set(number))
    mended = mujoco._restored(world, broken)
    rest = [np.asarray(world.starts[0]), np.zeros(7), np.zeros(2), np.zeros(7)]
    for leaf, whole, calm in zip(mended, fine, rest, strict=True):
        np.testing.assert_array_equal(leaf[1], calm)
        np.testing.assert_array_equal(leaf[::2], whole[::2])


def test_errors_name_what_there_is():
    with pytest.raises(UserError, match=r"'spider' is unknown: use one of ant, half-cheetah, quad"):
        mujoco.environment("spider")
    with pytest.raises(UserError, match=r"physics 'quick' is unknown: use one of exact, fast"):
        mujoco.environment("ant", "quick")
    with pytest.raises(UserError, match=r"0 environments, 2 threads: each must be at least 1"):
        mujoco_host.HostEnvironments("ant", 0, 2)


@pytest.mark.parametrize(
    ("make", "hidden"),
    [
        (mujoco.environment, "mujoco"),
        (functools.partial(mujoco_host.HostEnvironments, count=1, threads=1), "mujoco"),
    ],
)
def test_a_missing_package_is_told(make, hidden, without):
    without(hidden)
    with pytest.raises(UserError, match=rf"need {hidden}, .*pip install 'jaxalign\[mujoco\]'"):
        make("ant")


# --- paths on the host ---------------------------------------------------------------------------


class Plane:
    """The empty plane as environments on the host."""

    def __init__(self, count):
        self.observation = np.zeros((count, 2), np.float32)

    def step(self, action):
        self.observation = np.asarray(plane.step((), jnp.asarray(self.observation), action))
        return self.observation


@jax.jit
def policy(observation, key):
    return 0.1 * observation + jax.random.normal(key, observation.shape)


def test_host_paths_are_the_compiled_ones():
    key = jax.random.key(3)
    start = plane.reset((), 4, key)
    compiled = jax.jit(episodes.unroll, static_argnums=(0, 1, 2, 5))(
        functools.partial(plane.step, ()), plane.observe, policy, start, key, 7
    )
    seen, actions = mujoco_host.unroll(Plane(4), policy, key, 7)
    np.testing.assert_allclose(seen, compiled.observations, atol=1e-6)
    np.testing.assert_allclose(actions, compiled.actions, atol=1e-6)


def test_paths_have_a_length():
    with pytest.raises(UserError, match=r"episode length 0: it must be at least 1"):
        mujoco_host.unroll(Plane(1), policy, jax.random.key(0), 0)
