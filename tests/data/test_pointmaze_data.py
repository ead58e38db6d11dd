"""The oracle's data sets: layout, rules of starts and goals, statistics of noise and visits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.core.types import UserError
from jaxalign.data import pointmaze_data as data
from jaxalign.envs import pointmaze

MAZES = list(pointmaze.MAPS)
SMALL = data.Recipe("pointmaze-medium", "navigate", 60, 151)
# The medium maze's corridors, read off its map.
CORRIDORS = {(3, 3), (4, 5), (5, 1), (5, 6), (6, 2)}


@pytest.fixture(scope="module")
def navigate():
    return data.join(data.generate(SMALL, seed=0))


@pytest.fixture(scope="module")
def stitch():
    return data.join(data.generate(data.Recipe("pointmaze-medium", "stitch", 100, 201), seed=0))


def walls_of(name):
    return np.asarray(pointmaze.make(name).walls)


def cells_of(observations):
    return np.asarray(pointmaze.cell(jnp.asarray(observations)))


def all_distances(walls):
    """Shortest paths between all free cells, by Floyd and Warshall; infinite where none."""
    free = np.argwhere(~walls)
    apart = np.abs(free[:, None] - free[None]).sum(2)
    steps = np.where(apart <= 1, apart, np.inf)
    for middle in range(len(free)):
        steps = np.minimum(steps, steps[:, middle, None] + steps[None, middle])
    return free, steps


# --- tables --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAZES)
def test_the_guide_walks_one_cell_nearer(name):
    walls = walls_of(name)
    free, steps = all_distances(walls)
    towards = np.asarray(data.make_guide(walls, "navigate").towards)
    numbers = free @ [walls.shape[1], 1]
    index = {tuple(cell): number for number, cell in enumerate(free)}
    for end, end_number in enumerate(numbers):
        following = [index[tuple(cell)] for cell in towards[end_number, numbers]]
        far = np.isfinite(steps[end]) & (steps[end] > 0)
        np.testing.assert_array_equal(steps[end, following][far], steps[end][far] - 1)
        np.testing.assert_array_equal(np.array(following)[~far], np.flatnonzero(~far))


@pytest.mark.parametrize("name", MAZES)
def test_stitch_goals_are_four_cells_away(name):
    walls = walls_of(name)
    free, steps = all_distances(walls)
    guide = data.make_guide(walls, "stitch")
    lonely = 0
    for row, number in enumerate(free @ [walls.shape[1], 1]):
        goals = np.asarray(guide.goals[number, : guide.choices[number]]).tolist()
        expected = free[steps[row] == 4].tolist()
        lonely += not expected
        assert goals == (expected or [free[row].tolist()])
    assert lonely == (name == "pointmaze-teleport")  # one cell has no way out


def test_navigate_goals_are_no_corridors():
    walls = walls_of("pointmaze-medium")
    guide = data.make_guide(walls, "navigate")
    expected = {tuple(cell) for cell in np.argwhere(~walls).tolist()} - CORRIDORS
    for number in np.argwhere(~walls) @ [walls.shape[1], 1]:
        assert guide.choices[number] == len(expected)
        assert {tuple(cell) for cell in np.asarray(guide.goals[number]).tolist()} == expected


@pytest.mark.parametrize("kind", ["navigate", "stitch"])
def test_starts_and_goals_are_drawn_evenly(kind):
    maze = pointmaze.make("pointmaze-medium")
    walls = np.asarray(maze.walls)
    guide = data.make_guide(walls, kind)
    state = data.begin(maze, guide, jax.random.key(0), 5200)
    free = np.argwhere(~walls)
    counts = np.zeros(walls.shape)
    np.add.at(counts, tuple(cells_of(pointmaze.position(state)).T), 1)
    assert counts.sum() == counts[~walls].sum()
    expected = 5200 / len(free)
    assert np.sum((counts[~walls] - expected) ** 2) / expected < 55  # chi-square 25, 0.05 %
    _, steps = all_distances(walls)
    row = {tuple(cell): number for number, cell in enumerate(free.tolist())}
    ends = [row[tuple(cell)] for cell in cells_of(state.goal).tolist()]
    starts = [row[tuple(cell)] for cell in cells_of(pointmaze.position(state)).tolist()]
    if kind == "stitch":
        np.testing.assert_array_equal(steps[starts, ends], 4)
    else:
        share = np.bincount(ends, minlength=len(free)) / 5200
        used = np.array([tuple(cell) not in CORRIDORS for cell in free.tolist()])
        np.testing.assert_allclose(share, used / used.sum(), atol=0.012)


# --- the oracle ----------------------------------------------------------------------------------


def test_the_oracle_is_a_unit_vector_with_noise():
    """In the middle of (3, 2) with a goal in (3, 4), to the right: noise around (1, 0)."""
    maze = pointmaze.make("pointmaze-medium")
    guide = data.make_guide(np.asarray(maze.walls), "navigate")
    lanes = 20_000
    places = [jnp.tile(jnp.array([place]), (lanes, 1)) for place in ([99.0, 99.0], [4.0, 8.0])]
    goal = jnp.tile(jnp.array([[12.5, 8.5]]), (lanes, 1))
    actions = np.asarray(data.oracle(maze, guide, (*places, goal), jax.random.key(0)))
    assert np.abs(actions).max() == 1
    np.testing.assert_allclose(np.mean(actions[:, 0] == 1), 0.5, atol=0.015)
    np.testing.assert_allclose(np.median(actions[:, 1]), 0, atol=0.02)
    np.testing.assert_allclose(np.mean(np.abs(actions[:, 1]) == 1), 0.0455, atol=0.006)
    inside = np.quantile(actions[:, 1], [0.1587, 0.8413])  # one standard deviation
    np.testing.assert_allclose(inside, [-0.5, 0.5], atol=0.02)


def test_in_the_goals_cell_the_oracle_keeps_to_the_centre():
    maze = pointmaze.make("pointmaze-medium")
    guide = data.make_guide(np.asarray(maze.walls), "navigate")
    place = jnp.tile(jnp.array([[1.0, 0.0]]), (5000, 1))
    goal = jnp.tile(jnp.array([[1.0, 1.0]]), (5000, 1))
    actions = data.oracle(maze, guide, (place, place, goal), jax.random.key(0))
    np.testing.assert_allclose(np.median(actions, axis=0), [-1, 0], atol=0.03)


# --- data sets -----------------------------------------------------------------------------------


def test_the_layout_is_ogbenchs(navigate):
    states = 60 * 151
    assert navigate["observations"].shape == navigate["actions"].shape == (states, 2)
    assert navigate["observations"].dtype == navigate["actions"].dtype == np.float32
    assert navigate["terminals"].dtype == bool
    np.testing.assert_array_equal(
        np.flatnonzero(navigate["terminals"]), np.arange(150, states, 151)
    )


def test_moves_follow_actions(navigate):
    """Away from walls the next state is a fifth of the action further; nowhere is it far."""
    path, actions = (navigate[name].reshape(60, 151, 2) for name in ("observations", "actions"))
    moves = np.diff(path, axis=1)
    free = np.abs(moves - 0.2 * actions[:, :-1]).max(2) < 1e-5
    assert 0.9 < free.mean() < 1
    assert np.linalg.norm(moves, axis=2).max() < 0.45
    lengths = np.linalg.norm(actions, axis=2)
    assert 0.85 < lengths.mean() < 1.05


def test_every_free_cell_is_visited_and_no_wall(navigate):
    walls = walls_of("pointmaze-medium")
    visited = np.zeros(walls.shape, bool)
    visited[tuple(cells_of(navigate["observations"]).T)] = True
    np.testing.assert_array_equal(visited, ~walls)


def test_navigating_goes_on_to_further_goals():
    """Episodes of 600 steps are 120 m of walking: hardly anybody stays where the first goal was."""
    recipe = data.Recipe("pointmaze-medium", "navigate", 20, 601)
    path = data.join(data.generate(recipe, 0))["observations"].reshape(20, 601, 2)
    cells = [{tuple(cell) for cell in cells_of(episode[200:]).tolist()} for episode in path]
    assert np.median(list(map(len, cells))) > 8


def test_stitch_episodes_end_four_cells_from_their_start(stitch):
    free, steps = all_distances(walls_of("pointmaze-medium"))
    row = {tuple(cell): number for number, cell in enumerate(free.tolist())}
    path = stitch["observations"].reshape(100, 201, 2)
    ends = [[row[tuple(cell)] for cell in cells_of(path[:, at]).tolist()] for at in (0, -1)]
    assert np.mean(steps[tuple(ends)] == 4) > 0.97


def test_portals_carry_the_oracle_off():
    recipe = data.Recipe("pointmaze-teleport", "navigate", 60, 151)
    path = data.join(data.generate(recipe, 0))["observations"].reshape(60, 151, 2)
    maze = pointmaze.make(recipe.maze)
    episode, time = np.nonzero(np.linalg.norm(np.diff(path, axis=1), axis=2) > 0.5)
    assert len(time) > 20
    near_entry = np.linalg.norm(
        path[episode, time][:, None] - np.asarray(maze.entries)[None], axis=2
    )
    assert near_entry.min(1).max() <= 1.5 + 1e-5
    near_exit = np.linalg.norm(
        path[episode, time + 1][:, None] - np.asarray(maze.exits)[None], axis=2
    )
    assert near_exit.min(1).max() < 0.3
    assert set(near_exit.argmin(1)) == {0, 1, 2}


def test_a_seed_gives_one_data_set(navigate):
    again = data.join(data.generate(SMALL, seed=0))
    for name in navigate:
        np.testing.assert_array_equal(again[name], navigate[name])
    other = data.join(data.generate(SMALL, seed=1))
    assert not np.any(other["observations"] == navigate["observations"])


def test_validation_sets_are_a_tenth_and_their_own(navigate):
    held_out = data.join(data.generate(SMALL, 0, "val"))
    assert held_out["terminals"].sum() == data.episodes(SMALL, "val") == 6
    assert not np.any(held_out["observations"] == navigate["observations"][: 6 * 151])


def test_chunks_are_whole_episodes(monkeypatch):
    monkeypatch.setattr(data, "CHUNK", 8)
    recipe = data.Recipe("pointmaze-medium", "stitch", 20, 5)
    chunks = list(data.generate(recipe, 0))
    assert [chunk["terminals"].sum() for chunk in chunks] == [8, 8, 4]
    assert all(len(chunk["observations"]) == 5 * chunk["terminals"].sum() for chunk in chunks)
    together = data.join(chunks)["observations"].reshape(20, 5, 2)
    assert len(np.unique(together[:, 0], axis=0)) == 20


def test_recipes():
    assert data.recipe("pointmaze-giant-navigate-v0") == ("pointmaze-giant", "navigate", 500, 2001)
    assert data.recipe("pointmaze-medium-stitch") == ("pointmaze-medium", "stitch", 5000, 201)
    assert {recipe.maze for recipe in data.RECIPES.values()} == set(MAZES)
    with pytest.raises(UserError, match="data set 'antmaze-medium-navigate-v0' has no recipe: use"):
        data.recipe("antmaze-medium-navigate-v0")


@pytest.mark.parametrize(("episodes", "length"), [(0, 10), (3, 1)])
def test_a_recipe_needs_something_to_make(episodes, length):
    recipe = data.Recipe("pointmaze-medium", "stitch", episodes, length)
    with pytest.raises(UserError, match=f"{episodes} episodes of {length} states: at least"):
        next(data.generate(recipe, 0))
