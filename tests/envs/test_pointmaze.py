"""Point mazes: paths that MuJoCo took (stored), what must hold anywhere, portals."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.core.types import UserError
from jaxalign.envs import pointmaze

GOLDEN = Path(__file__).parents[1] / "golden" / "pointmaze.npz"
ENTRIES = [(20.0, 12.0), (0.0, 16.0)]
EXITS = [(24.0, 0.0), (0.0, 20.0), (36.0, 20.0)]


@pytest.fixture(scope="module", params=pointmaze.MAPS)
def maze(request):
    return pointmaze.make(request.param)


@pytest.fixture(scope="module")
def golden():
    """Paths `[4, T+1, E, 2]` and actions `[4, T, E, 2]` of MuJoCo's mazes, pressed into walls."""
    with np.load(GOLDEN) as stored:
        return dict(stored)


def states(position, goal=(0.0, 0.0), seed=0):
    position = jnp.asarray(position, jnp.float32).reshape(-1, 2)
    goal = jnp.broadcast_to(jnp.asarray(goal, jnp.float32).reshape(-1, 2), position.shape)
    return pointmaze.at(position, goal, jax.random.split(jax.random.key(seed), len(position)))


@jax.jit
def step(maze, state, action):
    return pointmaze.step(maze, state, action)


@jax.jit
def follow(maze, state, actions):
    """Observations `[T, E, 2]` after each action."""

    def body(state, action):
        state = pointmaze.step(maze, state, action)
        return state, state.observation

    return jax.lax.scan(body, state, actions)[1]


def wall_distance(maze, position):
    """From each point `[N, 2]` to the nearest wall, over all the walls."""
    centres = np.asarray(pointmaze.centre(jnp.argwhere(maze.walls)))
    outside = np.abs(np.asarray(position)[:, None] - centres[None]) - pointmaze.UNIT / 2
    return np.linalg.norm(np.maximum(outside, 0), axis=2).min(1)


def test_open_loop_is_mujocos(golden):
    for index, name in enumerate(pointmaze.MAPS):
        path, actions = golden["path"][index], golden["actions"][index]
        ours = follow(pointmaze.make(name), states(path[0]), actions)
        np.testing.assert_allclose(ours, path[1:], rtol=0, atol=1e-4)


def test_one_step_is_mujocos(golden):
    for index, name in enumerate(pointmaze.MAPS):
        path, actions = golden["path"][index], golden["actions"][index].reshape(-1, 2)
        before, after = path[:-1].reshape(-1, 2), path[1:].reshape(-1, 2)
        pushed = np.abs(after - before - 0.2 * actions).max(1) > 1e-5
        assert 0.3 < pushed.mean() < 0.9
        ours = step(pointmaze.make(name), states(before), actions).observation
        np.testing.assert_allclose(ours, after, rtol=0, atol=1e-5)


def test_a_ball_that_touches_nothing_moves_by_a_fifth_of_the_action(maze):
    middle = maze.start
    for action in ([1.0, -0.3], [0.0, 0.0], [-0.7, 0.25]):
        actions = jnp.tile(jnp.array([action]), (5, 1))
        moved = step(maze, states(middle), actions).observation
        np.testing.assert_allclose(moved, np.asarray(middle) + 0.2 * np.array(action), atol=4e-6)


def test_actions_are_clipped(maze):
    wild, tame = (
        step(maze, states(maze.start), jnp.tile(jnp.array([action]), (5, 1)))
        for action in ([7.0, -2.0], [1.0, -1.0])
    )
    np.testing.assert_array_equal(wild.observation, tame.observation)


def test_balls_stay_out_of_walls_and_get_about(maze):
    """Held actions from every cell: nobody is ever deeper in a wall than a single push."""
    free = np.argwhere(~np.asarray(maze.walls))
    start = jnp.tile(pointmaze.centre(jnp.asarray(free)), (4, 1))
    held = jnp.clip(1.5 * jax.random.normal(jax.random.key(0), (15, len(start), 2)), -1, 1)
    path = np.asarray(follow(maze, states(start), jnp.repeat(held, 10, axis=0)))
    distance = wall_distance(maze, path.reshape(-1, 2))
    assert distance.min() > 0.5
    assert np.mean(distance < pointmaze.RADIUS) > 0.01
    assert np.linalg.norm(path[-1] - np.asarray(start), axis=1).max() > 8


def test_pressing_on_a_wall_ends_at_the_wall():
    """Right of cell (1, 2) of the medium maze is a wall. The ball comes to rest a little within it:
    each step presses it in by 0.2, of which the physics gives back all but a few centimetres."""
    maze = pointmaze.make("pointmaze-medium")
    assert maze.walls[1, 3]
    path = follow(maze, states([[4.0, 0.0]]), jnp.tile(jnp.array([[[1.0, 0.0]]]), (40, 1, 1)))
    face = 2 * pointmaze.UNIT - pointmaze.UNIT / 2
    assert -0.1 < face - pointmaze.RADIUS - path[-1, 0, 0] < 0
    assert path[-1, 0, 1] == 0


def test_an_environment_does_not_depend_on_its_neighbours():
    """All touch, and they are more than one block, so that several are gathered."""
    maze = pointmaze.make("pointmaze-large")
    lanes = 2 * pointmaze.BLOCK + 11
    offset = jnp.linspace(-1.3, 1.3, lanes)
    start = jnp.stack([jnp.full(lanes, -1.29), offset], axis=1)
    action = jnp.tile(jnp.array([[-1.0, 0.4]]), (lanes, 1))
    together = step(maze, states(start), action).observation
    assert np.all(np.asarray(together)[:, 0] > -1.45)
    alone = [step(maze, states(row), action[:1]).observation[0] for row in start[::12]]
    np.testing.assert_allclose(together[::12], alone, rtol=0, atol=1e-6)


def test_it_can_be_mapped_over_seeds():
    maze = pointmaze.make("pointmaze-teleport")
    batches = [pointmaze.reset(maze, jnp.arange(5), jax.random.key(seed)) for seed in (0, 1)]
    action = jnp.full((5, 2), 0.9)
    many = jax.jit(jax.vmap(pointmaze.step, in_axes=(None, 0, None)))(
        maze, jax.tree.map(lambda *rows: jnp.stack(rows), *batches), action
    )
    for seed, batch in enumerate(batches):
        expected = step(maze, batch, action).observation
        np.testing.assert_allclose(many.observation[seed], expected, rtol=0, atol=1e-6)


# --- tasks ---------------------------------------------------------------------------------------


def test_reset_spreads_over_a_square_around_the_task(maze):
    task = jnp.arange(2000) % 5
    state = pointmaze.reset(maze, task, jax.random.key(0))
    for middle, drawn in [(maze.start, pointmaze.position(state)), (maze.goal, state.goal)]:
        noise = np.asarray(drawn - middle[task])
        assert np.abs(noise).max() <= 1
        np.testing.assert_allclose(noise.mean(0), 0, atol=0.05)
        np.testing.assert_allclose(noise.std(0), 3**-0.5, atol=0.03)
        assert abs(np.corrcoef(noise.T)[0, 1]) < 0.08
    start_noise = np.asarray(pointmaze.position(state) - maze.start[task])
    goal_noise = np.asarray(state.goal - maze.goal[task])
    assert abs(np.corrcoef(start_noise[:, 0], goal_noise[:, 0])[0, 1]) < 0.08
    np.testing.assert_array_equal(pointmaze.observe(state), pointmaze.position(state))


def test_tasks_are_in_free_cells(maze):
    for places in (maze.start, maze.goal):
        assert places.shape == (5, 2)
        assert not maze.walls[tuple(pointmaze.cell(places).T)].any()


def test_success_is_within_one_metre():
    state = states([[0.0, 0.0], [0.0, 0.99], [0.8, 0.61], [1.0, 0.0], [-0.7, -0.71]])
    np.testing.assert_array_equal(pointmaze.success(state), [True, True, False, True, True])


def test_cells_and_centres():
    cells = jnp.array([[0, 0], [1, 2], [7, 10]])
    np.testing.assert_array_equal(pointmaze.centre(cells), [[-4, -4], [4, 0], [36, 24]])
    for shift in ([1.99, -1.99], [-2.0, 1.99]):
        points = pointmaze.centre(cells) + jnp.array([shift])
        np.testing.assert_array_equal(pointmaze.cell(points), cells)


def test_an_unknown_maze():
    with pytest.raises(UserError, match=r"'pointmaze-tiny' is unknown: use one of pointmaze-med"):
        pointmaze.make("pointmaze-tiny")


# --- portals -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teleport():
    return pointmaze.make("pointmaze-teleport")


def test_portals_are_where_they_should_be(teleport):
    np.testing.assert_array_equal(teleport.entries, ENTRIES)
    np.testing.assert_array_equal(teleport.exits, EXITS)


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_portal_leads_to_each_exit_equally_often(teleport, entry):
    lanes = 1200
    start = jnp.tile(jnp.array([entry]) + jnp.array([[0.0, 0.5]]), (lanes, 1))
    state = step(teleport, states(start), jnp.zeros((lanes, 2)))
    np.testing.assert_allclose(state.observation, start, atol=1e-6)  # seen before it vanishes
    exits, counts = np.unique(np.asarray(pointmaze.position(state)), axis=0, return_counts=True)
    np.testing.assert_array_equal(exits, sorted(EXITS))
    expected = lanes / 3
    assert np.sum((counts - expected) ** 2) / expected < 13.8  # chi-square, 2 degrees, 0.1 %
    again = step(teleport, state, jnp.zeros((lanes, 2)))
    np.testing.assert_array_equal(again.observation, pointmaze.position(state))


def test_a_portal_reaches_one_and_a_half_metres(teleport):
    x, y = ENTRIES[0]
    state = states([[x, y - 1.71], [x, y - 1.69]])
    after = step(teleport, state, jnp.tile(jnp.array([[0.0, 1.0]]), (2, 1)))
    gone = np.any(np.asarray(pointmaze.position(after) != after.observation), axis=1)
    np.testing.assert_array_equal(gone, [False, True])


def test_success_is_judged_before_the_portal(teleport):
    state = states([ENTRIES[0]], goal=ENTRIES[0])
    assert pointmaze.success(step(teleport, state, jnp.zeros((1, 2))))[0]
    elsewhere = [
        step(teleport, states([ENTRIES[0]], goal=EXITS[0], seed=s), jnp.zeros((1, 2)))
        for s in range(8)
    ]
    assert not any(pointmaze.success(state)[0] for state in elsewhere)
    np.testing.assert_array_equal(
        max(map(float, (pointmaze.position(s)[0, 0] == EXITS[0][0] for s in elsewhere))), 1.0
    )
