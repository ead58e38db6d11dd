"""MuJoCo's walkers on the host, against the environments of gymnasium and dm_control."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxalign.core.types import UserError
from jaxalign.envs import mujoco, mujoco_host

pytest.importorskip("mujoco")
pytest.importorskip("gymnasium")
pytest.importorskip("dm_control")

pytestmark = pytest.mark.parity


@pytest.fixture(autouse=True)
def _no_display(monkeypatch):
    """Nothing is drawn; the search for a display warns where there is none."""
    monkeypatch.setenv("MUJOCO_GL", "disabled")


def actions(steps, environments, seed=0):
    """Some beyond their range, which is clipped."""
    generator = np.random.default_rng(seed)
    return generator.uniform(-1.1, 1.1, (steps, environments.count, environments.action_size))


def start_of(environments, which):
    """Position and velocity of one environment, not rounded to float32 as what is seen of it."""
    size = environments.model.nq + environments.model.nv
    return environments._state[which, 1 : 1 + size].copy()


def suite_physics(name):
    from dm_control.suite import humanoid, quadruped

    return (humanoid.walk() if name == "humanoid" else quadruped.walk()).physics


@pytest.mark.parametrize(
    ("name", "official"), [("ant", "Ant-v5"), ("half-cheetah", "HalfCheetah-v5")]
)
def test_paths_are_gymnasiums(name, official, tmp_path, monkeypatch):
    import gymnasium

    monkeypatch.chdir(tmp_path)  # where MuJoCo logs what it says of gymnasium's file
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own files and spaces
        real = gymnasium.make(
            official, exclude_current_positions_from_observation=False, disable_env_checker=True
        ).unwrapped
    real.reset(seed=0)
    ours = mujoco_host.HostEnvironments(name, 3, 2)
    start = ours.reset(5)
    real.set_state(*np.split(start_of(ours, 1), [ours.model.nq]))
    size = ours.observation_size  # gymnasium's ant sees contact forces besides
    for move in actions(25, ours):
        theirs = real.step(np.clip(move[1], -1, 1))[0][:size]
        seen = ours.step(move)
        np.testing.assert_allclose(seen[1], theirs, atol=1e-5)
    assert np.abs(seen[1] - start[1]).max() > 0.1


@pytest.mark.parametrize("name", ["quadruped", "humanoid"])
def test_paths_are_the_suites(name):
    physics = suite_physics(name)
    ours = mujoco_host.HostEnvironments(name, 2, 1)
    start = ours.reset(5)
    with physics.reset_context():
        both = np.split(start_of(ours, 1), [ours.model.nq])
        physics.data.qpos[:], physics.data.qvel[:] = both
    low, high = np.array(ours.model.actuator_ctrlrange.T)
    repeat = 8 if name == "quadruped" else 10  # twice the suite's 0.02 s and 0.025 s
    for move in actions(12, ours):
        seen = ours.step(move)
        physics.set_control(low + (np.clip(move[1], -1, 1) + 1) / 2 * (high - low))
        physics.step(repeat)
        theirs = np.concatenate([physics.data.qpos, physics.data.qvel, physics.data.act])
        np.testing.assert_allclose(seen[1], theirs, atol=1e-5)
    assert np.abs(seen[1] - start[1]).max() > 0.1


def test_threads_change_nothing():
    paths = []
    for threads in (1, 3):
        environments = mujoco_host.HostEnvironments("ant", 7, threads)
        environments.reset(2)
        paths.append([environments.step(move) for move in actions(20, environments)])
        environments.close()
    np.testing.assert_array_equal(*paths)


def test_reset_is_a_function_of_the_seed():
    environments = mujoco_host.HostEnvironments("ant", 500, 1)
    first, other, again = (environments.reset(seed) for seed in (1, 2, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.any(np.all(first == other, axis=1))
    hinges, speed = first[:, 7:15], first[:, 15:]
    assert np.abs(hinges).max() <= 0.1
    np.testing.assert_allclose(hinges.std(0), 0.1 / 3**0.5, rtol=0.1)
    np.testing.assert_allclose(speed.std(0), 0.1, rtol=0.15)
    np.testing.assert_allclose(np.linalg.norm(first[:, 3:7], axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(first[:, :3].mean(0), [0, 0, 0.75], atol=0.02)


def test_a_quadruped_starts_on_its_feet():
    from dm_control.suite import quadruped

    physics, model = suite_physics("quadruped"), mujoco.load("quadruped")
    starts = mujoco.make_starts("quadruped", model)
    assert starts.shape == (mujoco.STARTS, 23)
    for start in starts[:5]:
        quadruped._find_non_contacting_height(physics, start[3:7])
        np.testing.assert_allclose(start, physics.data.qpos, atol=1e-9)


def test_a_humanoid_starts_in_the_air():
    physics, model = suite_physics("humanoid"), mujoco.load("humanoid")
    starts = mujoco.make_starts("humanoid", model)
    low, high = model.jnt_range[1:].T
    assert np.all((starts[:, 7:] >= low) & (starts[:, 7:] <= high))
    np.testing.assert_allclose(starts[:, 7:].mean(0), (low + high) / 2, atol=0.2)
    np.testing.assert_array_equal(starts[:, :3], np.tile([0, 0, 1.5], (mujoco.STARTS, 1)))
    for start in starts[:50]:
        with physics.reset_context():
            physics.data.qpos[:] = start
        assert physics.data.ncon == 0


@pytest.mark.parametrize("name", mujoco.RECIPES)
def test_normalisers_can_be_measured_again(name):
    rollouts = 200
    mean, deviation = mujoco_host.measure_normaliser(name, rollouts, seed=1)
    offset, scale = mujoco.normaliser(name)
    assert np.abs((mean - offset) / scale).max() < 4.5 / rollouts**0.5
    np.testing.assert_allclose(deviation, scale, rtol=0.25)


def test_unroll_asks_the_policy_and_records_what_was_seen():
    environments = mujoco_host.HostEnvironments("half-cheetah", 4, 2)
    start = environments.reset(3)

    @jax.jit
    def policy(observation, key):
        noise = jax.random.normal(key, (4, 6))
        return jnp.tanh(observation[:, :6] + noise)

    seen, moves = mujoco_host.unroll(environments, policy, jax.random.key(0), 9)
    assert (seen.shape, moves.shape) == ((10, 4, 18), (9, 4, 6))
    np.testing.assert_array_equal(environments.reset(3), start)
    np.testing.assert_array_equal(seen[0], start)
    for move, after in zip(np.asarray(moves), np.asarray(seen)[1:], strict=True):
        np.testing.assert_array_equal(environments.step(move), after)
    place = environments.place(seen)
    assert place.shape == (10, 4, 1)
    np.testing.assert_array_equal(environments.goal_observation(seen, place), seen)


DRAW = """
import sys
import numpy as np
from jaxalign.core.types import UserError
from jaxalign.envs import mujoco_host

walker = mujoco_host.HostEnvironments("ant", 1, 1)
poses = [walker.step(np.ones((1, 8)))[0, :15] for _ in range(4)]
try:
    mujoco_host.render("ant", np.stack(poses), sys.argv[1])
except UserError as error:
    print(error)
"""


def test_pictures_or_a_word_why_not(tmp_path):
    path = tmp_path / "ant.gif"
    done = subprocess.run(
        [sys.executable, "-c", DRAW, path],
        env={**os.environ, "MUJOCO_GL": "egl"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    if not path.exists():
        assert "need OpenGL without a display: set MUJOCO_GL=egl" in done.stdout
        return
    with Image.open(path) as picture:
        assert picture.n_frames == 4
        assert picture.size == (320, 240)
        assert picture.info["duration"] == 50
        assert np.asarray(picture.convert("L")).std() > 5


def test_pictures_without_opengl(monkeypatch):
    def fail(*_):
        raise RuntimeError("no display")

    monkeypatch.setattr(mujoco.library(), "Renderer", fail)
    with pytest.raises(UserError, match=r"pictures of 'ant' need OpenGL .* set MUJOCO_GL=egl"):
        mujoco_host.render("ant", np.zeros((1, 15)), "unused.gif")
