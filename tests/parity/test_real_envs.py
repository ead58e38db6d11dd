"""Tries in OGBench's real environments: what they start from, how they end, and what goes wrong."""

from __future__ import annotations

import numpy as np
import pytest

from experiments import real_envs
from jaxalign.core.types import UserError
from jaxalign.data import ogbench_play

pytest.importorskip("mujoco")
pytest.importorskip("ogbench")

pytestmark = pytest.mark.parity


@pytest.fixture(autouse=True)
def _no_display(monkeypatch):
    """Nothing is drawn; the search for a display warns where there is none."""
    monkeypatch.setenv("MUJOCO_GL", "disabled")


def make(name):
    import gymnasium
    import ogbench  # noqa: F401

    return gymnasium.make(f"{name}-v0", disable_env_checker=True)


@pytest.fixture(scope="module")
def medium():
    with real_envs.RealEnvironments("pointmaze-medium", workers=2, each=5) as environments:
        yield environments


def straight(observation, goal):
    """Straight to the goal, whatever stands between."""
    return np.clip(5 * (goal - observation), -1, 1)


def on_the_way(maze, observation, goal):
    """Along the shortest way through the maze; near its end straight on."""
    pairs = zip(observation, goal, strict=True)
    towards = np.array([maze.get_oracle_subgoal(*pair)[0] for pair in pairs])
    near = np.linalg.norm(goal - observation, axis=1) < 2
    return straight(observation, np.where(near[:, None], goal, towards))


def recording(seen, policy):
    def act(observation, goal):
        assert observation.dtype == goal.dtype == np.float32
        seen.extend(zip(map(bytes, observation), map(bytes, goal), strict=True))
        return policy(observation, goal)

    return act


def test_the_maze_is_solved_by_who_knows_the_way_and_left_unsolved_elsewhere(medium):
    maze = make("pointmaze-medium").unwrapped
    third = np.array(maze.task_infos[2]["goal_xy"])
    counts = []

    def act(observation, goal):
        assert observation.shape == goal.shape == (10, 2)
        refused = np.linalg.norm(goal - third, axis=1) < 1.5
        return np.where(refused[:, None], 0.0, on_the_way(maze, observation, goal))

    success = medium.evaluate(act, episodes=2, seed=0, progress=counts.append)
    assert success.dtype == bool
    assert success.tolist() == [[True] * 2, [True] * 2, [False] * 2, [True] * 2, [True] * 2]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (0, 10)
    assert len(counts) == 1001  # the refused tries last until the horizon


def test_actions_where_no_try_is_left_do_not_matter():
    """A policy may divide by the length of what it sees, which is zero there."""
    with real_envs.RealEnvironments("pointmaze-medium", workers=1, each=5) as environments:
        maze = make("pointmaze-medium").unwrapped

        def act(observation, goal):
            action = on_the_way(maze, observation, goal)
            return np.where(observation.any(axis=1)[:, None], action, np.nan)

        assert environments.evaluate(act, episodes=1, seed=0).all()


def test_tries_start_where_the_environment_of_that_seed_starts(medium):
    seen = []

    class Enough(Exception):
        pass

    def look(observation, goal):
        seen.append((observation.copy(), goal.copy()))
        raise Enough

    for seed in (4, 4, 5):
        with pytest.raises(Enough):
            medium.evaluate(look, episodes=2, seed=seed)
    np.testing.assert_array_equal(seen[0], seen[1])
    assert not np.array_equal(seen[0], seen[2])
    # The processes take the tries by turns, the tasks being numbered first.
    maze = make("pointmaze-medium")
    for row, (task, number) in enumerate([(1, 0), (3, 0), (5, 0), (2, 1), (4, 1), (2, 0)]):
        words = np.random.SeedSequence((4, task, number)).generate_state(1)
        np.random.seed(words[0])
        maze.unwrapped.action_space.seed(int(words[0]))
        observation, info = maze.reset(seed=int(words[0]), options={"task_id": task})
        np.testing.assert_array_equal(seen[0][0][row], observation.astype(np.float32))
        np.testing.assert_array_equal(seen[0][1][row], info["goal"].astype(np.float32))


@pytest.mark.parametrize(
    ("name", "size", "shapes"),
    [("pointmaze-teleport", 2, ((1, 5), (2, 2))), ("cube-single", 5, ((1, 1), (2, 1)))],
)
def test_tries_do_not_depend_on_the_number_of_processes(name, size, shapes):
    """Portals and scenes draw numbers; yet all states of all tries are the same."""

    def act(observation, goal):
        return straight(observation, goal)[:, :size]

    runs = []
    for workers, each in shapes:
        seen: list[tuple[bytes, bytes]] = []
        with real_envs.RealEnvironments(name, workers, each) as environments:
            success = environments.evaluate(recording(seen, act), episodes=1, seed=1)
        runs.append((set(seen), success.tolist()))
    assert runs[0][1] == runs[1][1]
    # Rows of zeros stand for no try.
    rows = [{row for row in seen if any(row[0])} for seen, _ in runs]
    assert rows[0] == rows[1]
    assert len(rows[0]) > 300


def test_a_process_that_dies_is_told():
    with real_envs.RealEnvironments("pointmaze-medium", workers=2, each=1) as environments:

        def act(observation, goal):
            environments._processes[1].kill()
            environments._processes[1].join()
            return straight(observation, goal)

        with pytest.raises(UserError, match="pointmaze-medium died with exit code -9") as caught:
            environments.evaluate(act, episodes=1, seed=0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pointmaze-medum", "did you mean 'pointmaze-medium'"),
        ("cube-single-v0", "did you mean 'cube-single'"),
        ("visual-cube-single", "did you mean 'cube-single'"),
        ("chess", r"use one of pointmaze-medium, .*puzzle-4x6"),
    ],
)
def test_an_unknown_environment_is_told(name, message):
    with pytest.raises(UserError, match=message):
        real_envs._make(name)


def test_what_a_process_finds_wrong_is_told_here():
    with pytest.raises(UserError, match="did you mean 'cube-double'"):
        real_envs.RealEnvironments("cube-doubel", workers=2, each=1)


def test_wrong_actions_are_told_and_the_environments_stay_usable(medium):
    with pytest.raises(UserError, match=r"another shape, \(5, 3\): give .* of shape \(5, 2\)"):
        medium.evaluate(lambda observation, goal: np.zeros((5, 3)), 1, 0)
    with pytest.raises(UserError, match="numbers that are not finite"):
        medium.evaluate(lambda observation, goal: np.full((5, 2), np.nan), 1, 0)
    with pytest.raises(UserError, match="give 1 or more"):
        medium.evaluate(straight, 0, 0)
    assert medium.evaluate(straight, 1, 0).shape == (5, 1)


def test_missing_packages_are_told(monkeypatch):
    monkeypatch.setattr(ogbench_play.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"'scene' needs ogbench .*'jaxalign\[ogbench\]'"):
        real_envs.RealEnvironments("scene")
