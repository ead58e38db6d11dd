"""Point mazes against OGBench's own environments, which MuJoCo moves in float64."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.data import pointmaze_data
from jaxalign.envs import pointmaze

pytest.importorskip("ogbench")
gymnasium = pytest.importorskip("gymnasium")

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("optimised")]

GOLDEN = Path(__file__).parents[1] / "golden" / "pointmaze.npz"
STEPS = 200


@pytest.fixture(scope="module", params=pointmaze.MAPS)
def pair(request):
    """A maze here and there."""
    name = request.param
    env = gymnasium.make(f"{name}-v0", terminate_at_goal=False, max_episode_steps=None).unwrapped
    env.reset(seed=0)
    return pointmaze.make(name), env


def held_actions(rng, steps, lanes, hold=10):
    """Actions that keep for a while, often along a diagonal: into walls and corners."""
    held = np.clip(1.5 * rng.normal(size=(-(-steps // hold), lanes, 2)), -1, 1)
    return held.repeat(hold, axis=0)[:steps].astype(np.float32)


def free_starts(rng, maze, lanes):
    free = np.argwhere(~np.asarray(maze.walls))
    centres = np.asarray(pointmaze.centre(free[rng.integers(len(free), size=lanes)]))
    return (centres + rng.uniform(-1, 1, size=(lanes, 2))).astype(np.float32)


def real_path(env, start, actions):
    """What the real environment observes, `[T, E, 2]`, and where it then is."""
    path, after = np.zeros((2, *actions.shape))
    for lane in range(actions.shape[1]):
        env.set_xy(start[lane].astype(np.float64))
        for time, action in enumerate(actions[:, lane].astype(np.float64)):
            path[time, lane] = env.step(action)[0]
            after[time, lane] = env.get_xy()
    return path, after


@jax.jit
def our_path(maze, start, actions):
    state = pointmaze.at(start, start, jax.random.split(jax.random.key(0), len(start)))

    def body(state, action):
        state = pointmaze.step(maze, state, action)
        return state, (state.observation, pointmaze.position(state))

    return jax.lax.scan(body, state, actions)[1]


def test_maps_tasks_and_constants(pair):
    maze, env = pair
    np.testing.assert_array_equal(maze.walls, env.maze_map)
    np.testing.assert_array_equal(maze.start, [task["init_xy"] for task in env.task_infos])
    np.testing.assert_array_equal(maze.goal, [task["goal_xy"] for task in env.task_infos])
    assert (env._maze_unit, env._noise) == (pointmaze.UNIT, pointmaze.NOISE)
    assert env._goal_tol == pointmaze.GOAL_RADIUS
    portals = env._teleport_info or dict(teleport_in_xys=[], teleport_out_xys=[])
    np.testing.assert_array_equal(maze.entries, np.reshape(portals["teleport_in_xys"], (-1, 2)))
    np.testing.assert_array_equal(maze.exits, np.reshape(portals["teleport_out_xys"], (-1, 2)))
    assert portals.get("teleport_radius", 1) * 1.5 == pointmaze.PORTAL_RADIUS


def test_horizon_is_the_registered_one():
    for name in pointmaze.MAPS:
        assert gymnasium.spec(f"{name}-v0").max_episode_steps == pointmaze.HORIZON


@pytest.mark.parametrize("seed", [0, 1])
def test_one_step(pair, seed):
    """From states that long walks lead to: free, pressed against a wall, or into a corner."""
    maze, env = pair
    rng = np.random.default_rng(seed)
    lanes = 600
    actions = held_actions(rng, 61, lanes)
    _, walked = our_path(maze, free_starts(rng, maze, lanes), actions[:60])
    start, action = np.asarray(walked[-1]), actions[60:]
    expected, _ = real_path(env, start, action)
    ours, _ = our_path(maze, start, action)
    touched = np.abs(expected[0] - start - 0.2 * action[0].astype(float)).max(1) > 1e-5
    assert 0.2 < touched.mean() < 0.8
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("seed", [0, 1])
def test_open_loop(pair, seed):
    """200 steps without correction. Behind a portal both stand at an exit, maybe not the same."""
    maze, env = pair
    rng = np.random.default_rng(seed)
    start, actions = free_starts(rng, maze, 10), held_actions(rng, STEPS, 10)
    np.random.seed(seed)  # its portals use the global generator
    expected, after = real_path(env, start, actions)
    ours, position = our_path(maze, start, actions)
    behind = np.abs(after - expected).max(2) > 1
    before = np.cumsum(behind, axis=0) - behind == 0
    difference = np.where(before[..., None], ours - expected, 0)
    np.testing.assert_allclose(difference, 0, atol=1e-4)
    assert behind.any() == bool(maze.entries.size)
    for places in (after, position):
        away = np.abs(places[behind & before][:, None] - np.asarray(maze.exits)[None]).max(2)
        np.testing.assert_array_equal(away.min(1, initial=np.inf), 0)


def test_the_stored_paths_are_mujocos():
    """The file that other tests rely on; to write it again, store what this test computes."""
    golden = np.load(GOLDEN)
    for index, name in enumerate(pointmaze.MAPS):
        env = gymnasium.make(f"{name}-v0", terminate_at_goal=False).unwrapped
        env.reset(seed=0)
        path = golden["path"][index]
        expected, _ = real_path(env, path[0], golden["actions"][index])
        np.testing.assert_allclose(path[1:], expected, rtol=0, atol=1e-9)


def test_the_oracle_walks_to_the_same_cells(pair):
    maze, env = pair
    walls = np.asarray(maze.walls)
    towards = np.asarray(pointmaze_data.make_guide(walls, "navigate").towards)
    free = np.argwhere(~walls)
    for goal in free[::7]:
        for start in free:
            number, goal_number = (int(c[0]) * walls.shape[1] + int(c[1]) for c in (start, goal))
            subgoal, _ = env.get_oracle_subgoal(*(env.ij_to_xy(cell) for cell in (start, goal)))
            ours = pointmaze.centre(towards[goal_number, number])
            np.testing.assert_array_equal(ours, subgoal)


def real_oracle_path(env, walls, goals, rng, steps):
    """One `navigate` episode in the real environment, with its own search for paths."""
    free = np.argwhere(~walls)
    task = dict(
        init_ij=tuple(free[rng.integers(len(free))]), goal_ij=goals[rng.integers(len(goals))]
    )
    observation, _ = env.reset(options=dict(task_info=task))
    path, actions = [observation], []
    for _ in range(steps):
        subgoal, _ = env.get_oracle_subgoal(env.get_xy(), env.cur_goal_xy)
        way = subgoal - env.get_xy()
        action = way / (np.linalg.norm(way) + 1e-6) + rng.normal(0, 0.5, size=2)
        actions.append(np.clip(action, -1, 1))
        observation, _, _, _, info = env.step(actions[-1])
        path.append(observation)
        if info["success"]:
            env.set_goal(goals[rng.integers(len(goals))])
    return np.array(path[:-1]), np.array(actions)


def visits(walls, observations):
    cells = np.asarray(pointmaze.cell(jnp.asarray(observations, jnp.float32)))
    return np.bincount(cells[:, 0] * walls.shape[1] + cells[:, 1], minlength=walls.size)


def test_the_data_are_those_of_the_real_environment():
    """Visits of cells, and how long actions and moves are, in short episodes here and there."""
    maze = pointmaze.make("pointmaze-medium")
    env = gymnasium.make(
        "pointmaze-medium-v0", terminate_at_goal=False, max_episode_steps=None
    ).unwrapped
    walls, rng = np.asarray(maze.walls), np.random.default_rng(0)
    guide = pointmaze_data.make_guide(walls, "navigate")
    goals = np.asarray(guide.goals[walls.shape[1] + 1]).tolist()
    np.random.seed(0)
    paths, actions = map(
        np.array,
        zip(*(real_oracle_path(env, walls, goals, rng, 150) for _ in range(80)), strict=True),
    )
    recipe = pointmaze_data.Recipe("pointmaze-medium", "navigate", 2000, 150)
    ours = pointmaze_data.join(pointmaze_data.generate(recipe, 0))
    our_paths = ours["observations"].reshape(2000, 150, 2)
    shares = [
        visits(walls, path) / path[..., 0].size
        for path in (paths.reshape(-1, 2), ours["observations"])
    ]
    assert np.abs(shares[0] - shares[1]).sum() / 2 < 0.12
    for theirs, mine in [
        (actions, ours["actions"]),
        (np.diff(paths, axis=1), np.diff(our_paths, axis=1)),
    ]:
        lengths, our_lengths = (np.linalg.norm(a, axis=-1).ravel() for a in (theirs, mine))
        quantiles = np.linspace(0.05, 0.95, 10)
        np.testing.assert_allclose(
            np.quantile(our_lengths, quantiles), np.quantile(lengths, quantiles), rtol=0.03
        )
