"""Point mazes of OGBench as pure functions: a ball that is pushed about between square walls.

Source: Park et al., "OGBench: Benchmarking Offline Goal-Conditioned RL" (ICLR 2025), environments
pointmaze-{medium,large,giant,teleport} of release 1.2.2, whose physics is MuJoCo's. The ball moves
0.2 of the action at once; MuJoCo then pushes it out of the walls for five Runge-Kutta steps of
0.02 s from rest. Of MuJoCo only that is left here which can act: contacts of a circle with squares,
each with a normal and a pyramid of friction, and the soft constraints that they make, solved by
Newton's method (Todorov, "Convex and analytically-invertible dynamics with contacts and
constraints", ICRA 2014; and the chapter "Computation" of MuJoCo's documentation). Mass, gravity and
the floor cancel or do not act.

Most balls touch no wall and stay where the action put them. Only those that touch are gathered, a
block at a time, and pushed.

Coordinates are (x, y) in metres; the centre of the cell in row i and column j is (4j - 4, 4i - 4).
An action is a row of 2 numbers in [-1, 1]; what lies outside is clipped. Episodes have 1000 steps.

Departures: actions are clipped here, not by the caller. Random numbers come from keys. Everything
is float32: 1e-5 from MuJoCo after one step, 1e-4 after 200 steps of one's own.

Dimensions: E environments side by side, R rows and C columns of cells, P entries and Q exits of
portals; in the physics, K balls of a block, 3 contacts, 9 rows of constraints.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.core.types import Array, UserError
from jaxalign.envs.environment import Environment

UNIT = 4.0  # the side of a cell
REACH = 0.2  # how far an action of 1 moves the ball
HORIZON = 1000
NOISE = 1.0  # starts and goals lie up to so far from a cell's centre, along each axis
PORTAL_RADIUS = 1.5
GOAL_RADIUS = 1.0

RADIUS = 0.7  # of the ball
SUBSTEPS, SECONDS = 5, 0.02
NEWTON = 4
BLOCK = 64
# MuJoCo's default contact: the time constant is raised to two steps, damping is critical.
SOFTEST, HARDEST, WIDTH = 0.9, 0.95, 0.001
STIFFNESS = 1 / (HARDEST * 2 * SECONDS) ** 2
DAMPING = 2 / (HARDEST * 2 * SECONDS)
# 1 / (mass * regulariser of a pyramid's edge), less the factor d / (1 - d) of the impedance d. The
# body's inverse weight is 2/3 of 1/mass, as it is free along two of three axes; friction is 1.
EDGE_WEIGHT = 3 / 8

# A wall is "#"; rows from i = 0 down.
MAPS = {
    "pointmaze-medium": (
        "########",
        "#..##..#",
        "#..#...#",
        "##...###",
        "#..#...#",
        "#.#..#.#",
        "#...#..#",
        "########",
    ),
    "pointmaze-large": (
        "############",
        "#....#.....#",
        "#.##.#.#.#.#",
        "#......#...#",
        "#.####.###.#",
        "#..#.#.....#",
        "##.#.#.#.###",
        "#..#...#...#",
        "############",
    ),
    "pointmaze-giant": (
        "################",
        "#.#......##....#",
        "#.#.##.#.#..##.#",
        "#...#..#...#...#",
        "#.###.######.#.#",
        "#...#...#....#.#",
        "###.#.#..#.#.###",
        "#...#..#...#...#",
        "#.#.#.######.#.#",
        "#.###...#...##.#",
        "#.....#...#....#",
        "################",
    ),
    "pointmaze-teleport": (
        "############",
        "#.....#.#..#",
        "##.#...#..##",
        "##.###.....#",
        "#....#.#.#.#",
        "#.##.#.#.#.#",
        "#.##.#.#.#.#",
        "#....#...#.#",
        "############",
    ),
}
# The five tasks: cells (i, j) of start and goal.
TASKS = {
    "pointmaze-medium": (
        ((1, 1), (6, 6)),
        ((6, 1), (1, 6)),
        ((5, 3), (4, 2)),
        ((6, 5), (6, 1)),
        ((2, 6), (1, 1)),
    ),
    "pointmaze-large": (
        ((1, 1), (7, 10)),
        ((5, 4), (7, 1)),
        ((7, 4), (1, 10)),
        ((3, 8), (5, 4)),
        ((1, 1), (5, 4)),
    ),
    "pointmaze-giant": (
        ((1, 1), (10, 14)),
        ((1, 14), (10, 1)),
        ((8, 14), (1, 1)),
        ((8, 3), (5, 12)),
        ((5, 9), (3, 8)),
    ),
    "pointmaze-teleport": (
        ((1, 10), (7, 1)),
        ((1, 1), (7, 10)),
        ((5, 6), (7, 10)),
        ((7, 1), (7, 10)),
        ((5, 6), (7, 1)),
    ),
}
# Cells of entries and exits of portals.
PORTALS = {"pointmaze-teleport": (((4, 6), (5, 1)), ((1, 7), (6, 1), (6, 10)))}


class Maze(NamedTuple):
    """One maze, to be passed to every function.

    walls: `[R, C] bool`.
    near: `[R, C] i32`, walls around a cell: bit 4 + 3 di + dj is the one di rows, dj columns away.
    start, goal: `[5, 2] f32`, cell centres of the five tasks.
    entries: `[P, 2] f32`, centres of the cells where portals start; P = 0 where there are none.
    exits: `[Q, 2] f32`, where they end.
    """

    walls: Array
    near: Array
    start: Array
    goal: Array
    entries: Array
    exits: Array


class State(NamedTuple):
    """E environments.

    cell: `[E, 2] i32`, cells (i, j). offset: `[E, 2] f32`, from their centres to the balls. Kept
        apart, as small numbers have small rounding errors; `position` puts them together.
    observation: `[E, 2] f32`, where the balls were last seen. Not where they are for one step after
        a portal: OGBench observes before it teleports, and judges success there too.
    goal: `[E, 2] f32`.
    key: `[E]` keys, one an environment: its fate does not hang on how many others there are.
    """

    cell: Array
    offset: Array
    observation: Array
    goal: Array
    key: Array


def make(name: str) -> Maze:
    """The maze of that name.

    Raises: UserError if there is none.
    """
    if name not in MAPS:
        raise UserError(f"maze {name!r} is unknown: use one of {', '.join(MAPS)}")
    walls = np.array([[square == "#" for square in row] for row in MAPS[name]])
    tasks = np.array(TASKS[name])
    entries, exits = (np.array(cells).reshape(-1, 2) for cells in PORTALS.get(name, ((), ())))
    places = map(centre, (tasks[:, 0], tasks[:, 1], entries, exits))
    return Maze(jnp.asarray(walls), jnp.asarray(_walls_near(walls)), *places)


def centre(cell: Array | np.ndarray) -> Array:
    """Centres (x, y), `[..., 2] f32`, of cells (i, j), `[..., 2] int`."""
    return UNIT * jnp.asarray(cell)[..., ::-1].astype(jnp.float32) - UNIT


def cell(position: Array) -> Array:
    """The cells (i, j), `[..., 2] i32`, of positions `[..., 2]` within the maze."""
    return jnp.floor(position[..., ::-1] / UNIT + 1.5).astype(jnp.int32)


def reset(maze: Maze, task: Array, key: Array) -> State:
    """Environments at the start of their tasks `[E] int`, counted from 0."""
    return place(maze.start[task], maze.goal[task], key)


def place(start: Array, goal: Array, key: Array) -> State:
    """Environments with start and goal near the given cell centres, `[E, 2] f32` each."""
    keys = jax.vmap(lambda k: jax.random.split(k, 3))(jax.random.split(key, start.shape[0]))
    return at(near(start, keys[:, 0]), near(goal, keys[:, 1]), keys[:, 2])


def at(position: Array, goal: Array, key: Array) -> State:
    """Environments with balls and goals at these positions, `[E, 2] f32`; keys `[E]`."""
    cells = cell(position)
    return State(cells, position - centre(cells), position, goal, key)


def near(middle: Array, key: Array) -> Array:
    """Points `[E, 2]` drawn around cell centres `[E, 2]` with keys `[E]`."""
    draw = jax.vmap(lambda k: jax.random.uniform(k, (2,), minval=-NOISE, maxval=NOISE))
    return middle + draw(key)


def step(maze: Maze, state: State, action: Array) -> State:
    """One step of E environments with actions `[E, 2]`."""
    offset = state.offset + REACH * jnp.clip(action, -1.0, 1.0)
    crossed = jnp.floor(offset / UNIT + 0.5)
    cells = state.cell + crossed[:, ::-1].astype(jnp.int32)
    offset = _out_of_walls(maze, cells, offset - UNIT * crossed)
    state = state._replace(cell=cells, offset=offset)
    state = state._replace(observation=position(state))
    return _through_portals(maze, state) if maze.entries.shape[0] else state


def position(state: State) -> Array:
    """Where the balls are, `[E, 2] f32`."""
    return centre(state.cell) + state.offset


def observe(state: State) -> Array:
    """What the agent sees: `[E, 2] f32`."""
    return state.observation


def success(state: State) -> Array:
    """Whether the ball was last seen at its goal, `[E] bool`."""
    return _distance(state.observation - state.goal) <= GOAL_RADIUS


# --- without a goal ------------------------------------------------------------------------------

STEPS = 200  # of an episode in which skills are learned


def environment(name: str, steps: int = STEPS) -> Environment:
    """A maze as learners of skills see it: episodes from the start of its first task, no goal.

    steps: T. What networks see is 0 in the middle of the map and at most 1 away from it.
    Raises: UserError if there is no such maze.
    """
    maze = make(name)
    shape = np.array(maze.walls.shape[::-1], np.float32)
    return Environment(
        name=name,
        observation_size=2,
        action_size=2,
        steps=steps,
        world=maze,
        reset=_reset_first_task,
        step=step,
        observe=observe,
        place=_seen_place,
        goal_observation=_seen_at,
        offset=UNIT * (shape - 1) / 2 - UNIT,
        scale=UNIT * shape / 2,
    )


def _reset_first_task(maze: Maze, count: int, key: Array) -> State:
    return reset(maze, jnp.zeros(count, jnp.int32), key)


def _seen_place(observation: Array) -> Array:
    """(x, y) `[..., 2]` of observations `[..., 2]`, which are that."""
    return observation


def _seen_at(observation: Array, place: Array) -> Array:
    """What is seen at places `[..., 2]`."""
    return place


def _walls_near(walls: np.ndarray) -> np.ndarray:
    """`Maze.near`; beyond the map all is wall."""
    (rows, columns), wide = walls.shape, np.pad(walls, 1, constant_values=True)
    near = np.zeros(walls.shape, np.int32)
    for bit, (i, j) in enumerate(np.ndindex(3, 3)):
        near |= wide[i : i + rows, j : j + columns].astype(np.int32) << bit
    return near


def _distance(difference: Array) -> Array:
    return jnp.sqrt(jnp.sum(difference**2, axis=-1))


def _through_portals(maze: Maze, state: State) -> State:
    """Balls near an entry go to a random exit."""
    gap = state.observation[:, None] - maze.entries[None]
    enters = jnp.any(_distance(gap) <= PORTAL_RADIUS, axis=1)[:, None]
    keys = jax.vmap(jax.random.split)(state.key)
    choice = jax.vmap(lambda k: jax.random.randint(k, (), 0, maze.exits.shape[0]))(keys[:, 0])
    return state._replace(
        cell=jnp.where(enters, cell(maze.exits[choice]), state.cell),
        offset=jnp.where(enters, 0.0, state.offset),
        key=keys[:, 1],
    )


# --- physics -------------------------------------------------------------------------------------


def _out_of_walls(maze: Maze, cells: Array, offset: Array) -> Array:
    """Offsets `[E, 2]` of balls, put there at rest, after the five steps of the physics."""
    # A ball is in one quadrant of its cell, and mirrored into the first. There it can touch three
    # squares: right, above, and above on the right.
    side = jnp.where(offset < 0, -1, 1)
    right, up = side[:, 0], 3 * side[:, 1]
    bits = 4 + jnp.stack([right, up, right + up])
    walls = (maze.near[cells[:, 0], cells[:, 1]][None] >> bits) & 1 == 1
    start = jnp.abs(offset).T
    touching = jnp.any(_contacts(start, walls)[1] < 0, axis=0)
    return side.astype(jnp.float32) * _push_touching(start, walls, touching).T


def _push_touching(start: Array, walls: Array, touching: Array) -> Array:
    """`_push` for the balls that touch, a block at a time."""
    block = min(BLOCK, touching.shape[0])

    def body(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        end, left = carry
        # May hold balls that do not touch: `_push` leaves those where they are.
        _, index = jax.lax.top_k(left.astype(jnp.float32), block)
        pushed = _push(start[:, index], walls[:, index])
        return end.at[:, index].set(pushed), left.at[index].set(False)

    return jax.lax.while_loop(lambda carry: jnp.any(carry[1]), body, (start, touching))[0]


def _push(position: Array, walls: Array) -> Array:
    """Where the contacts push balls at rest in five steps.

    position: `[2, K] f32`, in the first quadrant of a cell. walls: `[3, K] bool`.
    """

    def body(_: int, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        return _runge_kutta(*carry, walls)

    return jax.lax.fori_loop(0, SUBSTEPS, body, (position, jnp.zeros_like(position)))[0]


def _runge_kutta(position: Array, velocity: Array, walls: Array) -> tuple[Array, Array]:
    """One step of fourth order: position and velocity `[2, K]`.

    A loop over its stages, as written out they take longer to compile and are no faster.
    """

    def stage(carry: tuple[Array, ...], how: tuple[Array, Array]) -> tuple[tuple[Array, ...], None]:
        v, a, move, gain = carry
        ahead, share = SECONDS * how[0], SECONDS * how[1]
        q, v = position + ahead * v, velocity + ahead * a
        a = _acceleration(q, v, walls)
        return (v, a, move + share * v, gain + share * a), None

    # How far into the step each stage looks, with the rates of the one before; its share.
    stages = jnp.array([0.0, 0.5, 0.5, 1.0]), jnp.array([1.0, 2.0, 2.0, 1.0]) / 6
    zero = jnp.zeros_like(position)
    (_, _, move, gain), _ = jax.lax.scan(stage, (zero, zero, zero, zero), stages)
    return position + move, velocity + gain


def _contacts(position: Array, walls: Array) -> tuple[Array, Array]:
    """Normals `[2, 3, K]` out of the three squares, and gaps `[3, K]`, negative on contact."""
    half = UNIT / 2
    x, y = position
    # The nearest points: the square on the right ends where those above begin.
    beyond = jnp.maximum(position, half)
    nearest_x = jnp.stack([beyond[0], jnp.minimum(x, half), beyond[0]])
    nearest_y = jnp.stack([jnp.minimum(y, half), beyond[1], beyond[1]])
    away = jnp.stack([x[None] - nearest_x, y[None] - nearest_y])
    distance = jnp.sqrt(jnp.sum(away**2, axis=0))
    normal = away / jnp.maximum(distance, 1e-6)[None]
    return normal, jnp.where(walls, distance - RADIUS, 1.0)


def _acceleration(position: Array, velocity: Array, walls: Array) -> Array:
    """The acceleration `[2, K]` that the contacts make at position and velocity `[2, K]`.

    It minimises |a|^2 / 2 + sum over rows of weight * min(row . a - wanted, 0)^2 / 2. A contact has
    four rows, the edges of its pyramid: normal plus and minus tangent, and twice the normal alone,
    as the ball cannot follow the other tangent, which is vertical.
    """
    (nx, ny), gap = _contacts(position, walls)
    hardness = SOFTEST + (HARDEST - SOFTEST) * _sigmoid(jnp.abs(gap) / WIDTH)
    weight = jnp.where(gap < 0, EDGE_WEIGHT * hardness / (1 - hardness), 0.0)
    x = jnp.concatenate([nx - ny, nx + ny, nx])
    y = jnp.concatenate([ny + nx, ny - nx, ny])
    weight = jnp.concatenate([weight, weight, 2 * weight])
    push = jnp.tile(-STIFFNESS * hardness * gap, (3, 1))
    wanted = push - DAMPING * (x * velocity[0][None] + y * velocity[1][None])

    def newton(_: int, acceleration: tuple[Array, Array]) -> tuple[Array, Array]:
        ax, ay = acceleration
        w = jnp.where(x * ax[None] + y * ay[None] < wanted, weight, 0.0)
        xx, xy, yy = (jnp.sum(w * product, axis=0) for product in (x * x, x * y, y * y))
        bx, by = (jnp.sum(w * part * wanted, axis=0) for part in (x, y))
        determinant = (1 + xx) * (1 + yy) - xy * xy
        return ((1 + yy) * bx - xy * by) / determinant, ((1 + xx) * by - xy * bx) / determinant

    none = jnp.zeros_like(velocity[0])
    return jnp.stack(jax.lax.fori_loop(0, NEWTON, newton, (none, none)))


def _sigmoid(x: Array) -> Array:
    """MuJoCo's impedance between its two ends: two parabolas that meet at one half."""
    x = jnp.minimum(x, 1.0)
    return jnp.where(x < 0.5, 2 * x**2, 1 - 2 * (1 - x) ** 2)
