"""Data sets `navigate` and `stitch` of OGBench's point mazes, made again by the same rules.

Source: Park et al., "OGBench: Benchmarking Offline Goal-Conditioned RL" (ICLR 2025), where it
describes the data sets of its mazes. An oracle walks along shortest paths: its action is the unit
vector to the centre of the next cell, plus normal noise of standard deviation 0.5 on each axis,
clipped to [-1, 1]. Within the goal's cell, and where no path leads to the goal, it keeps to the
centre of its cell. Portals are no part of its paths; it falls into them.

- navigate: starts in any free cell; goals in cells that are no corridors (a corridor has walls on
  two opposite sides and none on the other two); a new goal whenever one is reached.
- stitch: short episodes; starts in any free cell, the goal exactly four cells away (in the start's
  own cell where there is none), kept even after it is reached.

A validation set has a tenth as many episodes as its training set. The episodes of a chunk run side
by side in one compiled program.

Departures: another stream of random numbers, so the sets equal the published ones in distribution
only. Everything is float32.

Dimensions: N stored states, E episodes of a chunk, L states of an episode, R rows and C columns of
cells, F free cells. A cell (i, j) has the number i * C + j.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.core.types import Array, UserError
from jaxalign.envs import pointmaze
from jaxalign.envs.pointmaze import Maze, State
from jaxalign.rollout.episodes import unroll

NOISE = 0.5
STITCH_CELLS = 4
CHUNK = 250
NEIGHBOURS = ((-1, 0), (0, -1), (1, 0), (0, 1))

Arrays = dict[str, np.ndarray]


class Recipe(NamedTuple):
    """How a data set is made.

    maze: its name.
    kind: the rules.
    episodes: of the training set.
    length: L, the states of an episode.
    """

    maze: str
    kind: Literal["navigate", "stitch"]
    episodes: int
    length: int


RECIPES = {
    "pointmaze-medium-navigate": Recipe("pointmaze-medium", "navigate", 1000, 1001),
    "pointmaze-medium-stitch": Recipe("pointmaze-medium", "stitch", 5000, 201),
    "pointmaze-large-navigate": Recipe("pointmaze-large", "navigate", 1000, 1001),
    "pointmaze-large-stitch": Recipe("pointmaze-large", "stitch", 5000, 201),
    "pointmaze-giant-navigate": Recipe("pointmaze-giant", "navigate", 500, 2001),
    "pointmaze-giant-stitch": Recipe("pointmaze-giant", "stitch", 5000, 201),
    "pointmaze-teleport-navigate": Recipe("pointmaze-teleport", "navigate", 1000, 1001),
    "pointmaze-teleport-stitch": Recipe("pointmaze-teleport", "stitch", 5000, 201),
}


class Guide(NamedTuple):
    """What the oracle knows of a maze, and where episodes may start and end; all are cells (i, j).

    towards: `[R*C, R*C, 2] i32`, by the goal's cell and the oracle's: the cell to walk to.
    starts: `[F, 2] i32`, the free cells.
    goals: `[R*C, G, 2] i32`, by the oracle's cell: where its next goal may be. Only the first
        `choices` `[R*C] i32` count.
    """

    towards: Array
    starts: Array
    goals: Array
    choices: Array


def recipe(name: str) -> Recipe:
    """The recipe of a data set by OGBench's name for it, as "pointmaze-medium-navigate-v0".

    Raises: UserError if there is none.
    """
    plain = name.removesuffix("-v0")
    if plain not in RECIPES:
        raise UserError(f"data set {name!r} has no recipe: use one of {', '.join(RECIPES)}")
    return RECIPES[plain]


def episodes(recipe: Recipe, split: Literal["train", "val"]) -> int:
    """How many episodes a split has."""
    return recipe.episodes if split == "train" else max(1, recipe.episodes // 10)


def generate(
    recipe: Recipe, seed: int, split: Literal["train", "val"] = "train"
) -> Iterator[Arrays]:
    """A data set in OGBench's compact layout, chunk by chunk, so that the caller can show progress.

    A chunk has whole episodes, at most CHUNK: observations `[N, 2] f32`, actions `[N, 2] f32` (that
    of an episode's last state leads nowhere), terminals `[N] bool`, true at last states. The same
    recipe, seed and split give the same arrays.
    Raises: UserError if the episodes are none or have fewer than two states.
    """
    if recipe.episodes < 1 or recipe.length < 2:
        raise UserError(
            f"{recipe.episodes} episodes of {recipe.length} states: at least 1 episode of 2 states "
            "is needed"
        )
    maze = pointmaze.make(recipe.maze)
    guide = make_guide(np.asarray(maze.walls), recipe.kind)
    key = jax.random.fold_in(jax.random.key(seed), ("train", "val").index(split))
    total, lanes = episodes(recipe, split), min(CHUNK, recipe.episodes)
    for first in range(0, total, lanes):
        observations, actions = _walk(
            maze, guide, jax.random.fold_in(key, first), recipe.kind, lanes, recipe.length
        )
        kept = min(lanes, total - first)
        terminals = np.tile(np.arange(recipe.length) == recipe.length - 1, kept)
        yield {
            "observations": _episode_major(observations, kept),
            "actions": _episode_major(actions, kept),
            "terminals": terminals,
        }


def join(chunks: Iterable[Arrays]) -> Arrays:
    """The chunks of a data set as one."""
    chunks = list(chunks)
    return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}


# --- maps ----------------------------------------------------------------------------------------


def make_guide(walls: np.ndarray, kind: Literal["navigate", "stitch"]) -> Guide:
    """The tables of a maze with walls `[R, C] bool`."""
    free = np.argwhere(~walls)
    steps = {tuple(cell): distances(walls, cell) for cell in free}
    everywhere = [int(cell[0]) * walls.shape[1] + int(cell[1]) for cell in free]
    if kind == "stitch":
        goals = [np.argwhere(steps[tuple(cell)] == STITCH_CELLS) for cell in free]
        goals = [ends if len(ends) else cell[None] for ends, cell in zip(goals, free, strict=True)]
    else:
        goals = [np.array([cell for cell in free if not _is_corridor(walls, cell)])] * len(free)
    towards = np.zeros((walls.size, walls.size, 2), np.int32)
    choices = np.ones(walls.size, np.int32)
    table = np.zeros((walls.size, max(map(len, goals)), 2), np.int32)
    for number, cell, ends in zip(everywhere, free, goals, strict=True):
        towards[number, everywhere] = _next_cells(walls, steps[tuple(cell)])
        table[number, : len(ends)] = ends
        choices[number] = len(ends)
    return Guide(*map(jnp.asarray, (towards, free.astype(np.int32), table, choices)))


def distances(walls: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Cells on the shortest path from `start` (i, j) to every cell, `[R, C]`; -1 where none."""
    steps = np.full(walls.shape, -1)
    steps[tuple(start)] = 0
    queue = deque([tuple(start)])
    while queue:
        cell = queue.popleft()
        for neighbour in _free_neighbours(walls, cell):
            if steps[neighbour] < 0:
                steps[neighbour] = steps[cell] + 1
                queue.append(neighbour)
    return steps


def _next_cells(walls: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """From each free cell, `[F, 2]`, the one nearest to a goal, given its distances `[R, C]`.

    Of several the first in the order of NEIGHBOURS; the cell itself at the goal, or without a path.
    """
    nearest = []
    for cell in map(tuple, np.argwhere(~walls)):
        nearest.append(min((cell, *_free_neighbours(walls, cell)), key=lambda c: steps[c]))
    return np.array(nearest)


def _free_neighbours(walls: np.ndarray, cell: tuple[int, ...]) -> list[tuple[int, int]]:
    # Mazes have walls all round, so every free cell has four neighbours.
    around = [(cell[0] + di, cell[1] + dj) for di, dj in NEIGHBOURS]
    return [neighbour for neighbour in around if not walls[neighbour]]


def _is_corridor(walls: np.ndarray, cell: np.ndarray) -> bool:
    up, left, down, right = (walls[cell[0] + di, cell[1] + dj] for di, dj in NEIGHBOURS)
    return up == down and left == right and up != left


# --- episodes ------------------------------------------------------------------------------------


@partial(jax.jit, static_argnames=("kind", "lanes", "length"))
def _walk(
    maze: Maze, guide: Guide, key: Array, kind: str, lanes: int, length: int
) -> tuple[Array, Array]:
    """Observations and actions of E = lanes episodes, `[L, E, 2] f32` each."""
    start_key, key = jax.random.split(key)
    state = begin(maze, guide, start_key, lanes)
    step = _step_to_new_goals if kind == "navigate" else _step
    record = unroll(
        partial(step, maze, guide), _sight, partial(oracle, maze, guide), state, key, length
    )
    return record.observations[0][:-1], record.actions


def begin(maze: Maze, guide: Guide, key: Array, lanes: int) -> State:
    """The first states of E = lanes episodes."""
    start_key, goal_key, place_key = jax.random.split(key, 3)
    start = jax.random.choice(start_key, guide.starts, (lanes,))
    goal = _draw_goals(maze, guide, start, jax.random.split(goal_key, lanes))
    return pointmaze.place(pointmaze.centre(start), pointmaze.centre(goal), place_key)


def _draw_goals(maze: Maze, guide: Guide, cell: Array, key: Array) -> Array:
    """Cells `[E, 2]` of the next goals of balls in cells `[E, 2]`."""
    number = _numbers(maze, cell)
    draw = jax.vmap(lambda k, choices: jax.random.randint(k, (), 0, choices))
    return guide.goals[number, draw(key, guide.choices[number])]


def _numbers(maze: Maze, cell: Array) -> Array:
    return cell[:, 0] * maze.walls.shape[1] + cell[:, 1]


def _sight(state: State) -> tuple[Array, Array, Array]:
    # The oracle knows where the ball is even in the step in which a portal hides it.
    return state.observation, pointmaze.position(state), state.goal


def oracle(maze: Maze, guide: Guide, sight: tuple[Array, Array, Array], key: Array) -> Array:
    """Actions `[E, 2]` towards the next cells, with noise.

    sight: what is observed (and not looked at), position and goal, `[E, 2] f32` each.
    """
    _, position, goal = sight
    own, end = (_numbers(maze, pointmaze.cell(place)) for place in (position, goal))
    way = pointmaze.centre(guide.towards[end, own]) - position
    direction = way / (jnp.linalg.norm(way, axis=1, keepdims=True) + 1e-6)
    return jnp.clip(direction + NOISE * jax.random.normal(key, direction.shape), -1.0, 1.0)


def _step(maze: Maze, guide: Guide, state: State, action: Array) -> State:
    return pointmaze.step(maze, state, action)


def _step_to_new_goals(maze: Maze, guide: Guide, state: State, action: Array) -> State:
    """A step, after which balls that have reached their goals get other ones."""
    state = pointmaze.step(maze, state, action)
    keys = jax.vmap(lambda k: jax.random.split(k, 3))(state.key)
    cells = _draw_goals(maze, guide, pointmaze.cell(state.observation), keys[:, 0])
    goal = pointmaze.near(pointmaze.centre(cells), keys[:, 1])
    goal = jnp.where(pointmaze.success(state)[:, None], goal, state.goal)
    return state._replace(goal=goal, key=keys[:, 2])


def _episode_major(path: Array, kept: int) -> np.ndarray:
    """`[L, E, 2]` as `[kept * L, 2]`, one episode after the other."""
    return np.asarray(path).swapaxes(0, 1)[:kept].reshape(-1, path.shape[-1])
