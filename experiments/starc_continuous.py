"""Reward distances in a continuous world where they are known: linear dynamics, quadratic rewards.

A point with position and velocity is pushed, and pushed about by noise. Rewards are quadratic in
state, action and next state, the policy is linear with noise, so values are quadratic too and all
distances follow from moments. Beside them stand the estimates from samples (`ops.starc_sampled`),
and those of an estimator that draws its rollouts for each reward anew.

Dimensions: N rewards, B samples, K next states of each, T steps of a rollout. y = (position,
velocity, 1) is the state, u = (y, action), w = (u, y').
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from experiments.starc_report import Result
from jaxalign.core import metrics
from jaxalign.core.types import Array
from jaxalign.ops import starc_sampled as sampled

DISCOUNT = 0.95
NEXT, STEPS = 8, 80  # K, T
PUSH = np.array([[1.0, 0.2, 0.0, 0.0], [0.0, 0.9, 0.0, 0.2], [0.0, 0.0, 1.0, 0.0]])  # u -> mean y'
NOISE = np.diag([0.05, 0.1, 0.0])  # of y', standard deviations
GAIN = np.array([-0.5, -0.5, 0.0])  # y -> mean action
SPREAD = 0.5  # of the action
FEATURES = ((0, 0), (0, 1), (1, 1), (0, 2), (1, 2))  # products of y's entries: all quadratics
ESTIMATES = ("rollouts", "lstd", "separate", "regression")


class Sizes(Protocol):
    """The fields of an experiment that this depends on."""

    @property
    def samples(self) -> int: ...
    @property
    def seed(self) -> int: ...


# --- rewards, as matrices of w --------------------------------------------------------------------


def form(**entries: float) -> np.ndarray:
    """A symmetric `[7, 7]` from products such as `pp=-1` or `Vp=2`.

    p, v, i, a: position, velocity, one, action; P, V: those of the next state.
    """
    at, matrix = {name: i for i, name in enumerate("pviaPVI")}, np.zeros((7, 7))
    for product, value in entries.items():
        one, two = (at[letter] for letter in product)
        matrix[one, two] += value / 2
        matrix[two, one] += value / 2
    return matrix


def shaping(potential: np.ndarray) -> np.ndarray:
    """discount P(y') - P(y) of a potential `[3, 3]`."""
    matrix = np.zeros((7, 7))
    matrix[4:, 4:] = DISCOUNT * potential
    matrix[:3, :3] -= potential
    return matrix


def rewards() -> dict[str, np.ndarray]:
    """By name, `[7, 7]`. The first three are equivalent; `opposite` is a shaped opposite."""
    base = form(pp=-1.0, vv=-0.1, aa=-0.1)
    potential = 3 * form(pp=1.0, pv=-0.5, vv=0.4, pi=1.0)[:3, :3]
    # (V' - E[V' | u]) p and its like have mean 0 whatever is done.
    moved = form(Vp=1.0, vp=-PUSH[1, 1], ap=-PUSH[1, 3]) + form(Pv=2.0, pv=-2.0, vv=-2 * PUSH[0, 1])
    return {
        "base": base,
        "shaped": base + shaping(potential),
        "redistributed": base + 3 * moved,
        "dear actions": base + form(aa=-0.9),
        "elsewhere": base + form(pi=1.0),
        "velocity": form(vi=1.0),
        "opposite": -base + shaping(potential),
    }


def nothings() -> np.ndarray:
    """`[Z, 7, 7]`: shaping and redistribution of about the base's size, equivalent to 0."""
    found = rewards()
    return np.stack([found["shaped"] - found["base"], found["redistributed"] - found["base"]]) / 3


# --- exact ----------------------------------------------------------------------------------------


def expected(reward: np.ndarray) -> np.ndarray:
    """r(u) as a form `[4, 4]`."""
    whole = np.concatenate([np.eye(4), PUSH])
    matrix = whole.T @ reward @ whole
    matrix[2, 2] += np.trace(reward[4:, 4:] @ NOISE @ NOISE.T)
    return matrix


def ahead(potential: np.ndarray) -> np.ndarray:
    """discount E[P(y') | u] - P(y) as a form `[4, 4]`."""
    return expected(shaping(potential))


def value(reward: np.ndarray) -> np.ndarray:
    """V of the policy as a form `[3, 3]`: a linear equation in its entries."""
    acting = np.concatenate([np.eye(3), GAIN[None]])

    def under_policy(matrix: np.ndarray) -> np.ndarray:
        result = acting.T @ matrix @ acting
        result[2, 2] += SPREAD**2 * matrix[3, 3]
        return result

    unit = np.eye(9).reshape(9, 3, 3)
    system = np.stack([-under_policy(ahead((e + e.T) / 2)).ravel() for e in unit], axis=1)
    right = under_policy(expected(reward)).ravel()
    solved = np.linalg.lstsq(system, right, rcond=None)[0].reshape(3, 3)
    return (solved + solved.T) / 2


def nodes() -> tuple[np.ndarray, np.ndarray]:
    """Points u `[125, 4]` and weights: exact for polynomials of degree 9 under the sampling law."""
    x, w = np.polynomial.hermite_e.hermegauss(5)
    grid = np.stack(np.meshgrid(x, x, x, indexing="ij"), -1).reshape(-1, 3)
    weight = np.prod(np.stack(np.meshgrid(w, w, w, indexing="ij"), -1).reshape(-1, 3), axis=1)
    return np.insert(grid, 2, 1.0, axis=1), weight / weight.sum()


def exact(minimal: bool) -> np.ndarray:
    """`[N, N]` distances by exact quadrature: VAL, or minimal over quadratic potentials."""
    points, weight = nodes()
    canonical = []
    for reward in rewards().values():
        matrix = expected(reward) + (0 if minimal else ahead(value(reward)))
        canonical.append(np.einsum("ni,ij,nj->n", points, matrix, points))
    rows = np.stack(canonical)
    if minimal:
        unit = [np.zeros((3, 3)) for _ in range(6)]
        for matrix, (i, j) in zip(unit, (*FEATURES, (2, 2)), strict=True):
            matrix[i, j] = matrix[j, i] = 1.0
        basis = np.stack([np.einsum("ni,ij,nj->n", points, ahead(m), points) for m in unit], 1)
        root = np.sqrt(weight)[:, None]
        fitted = np.linalg.lstsq(basis * root, rows.T * root, rcond=None)[0]
        rows = rows - (basis @ fitted).T
    rows = rows / np.sqrt((weight * rows**2).sum(1, keepdims=True))
    return np.sqrt((weight * (rows[:, None] - rows[None]) ** 2).sum(-1))


# --- from samples ---------------------------------------------------------------------------------


class World(NamedTuple):
    """The constants above, and N rewards `[N, 7, 7]`, as arrays that programs are given."""

    push: Array
    noise: Array
    gain: Array
    rewards: Array


def make_world(matrices: np.ndarray) -> World:
    """The world with these rewards."""
    return World(*(jnp.asarray(a, jnp.float32) for a in (PUSH, NOISE, GAIN, matrices)))


def earn(world: World, u: Array, y: Array) -> Array:
    """Rewards `[N, ...]` of u `[..., 4]` followed by y `[..., 3]`."""
    w = jnp.concatenate([u, y], -1)
    # All rewards in one product, the sum over w's entries after it.
    halves = w @ world.rewards.transpose(1, 0, 2).reshape(7, -1)
    halves = halves.reshape(*w.shape[:-1], len(world.rewards), 7)
    return jnp.moveaxis((halves * w[..., None, :]).sum(-1), -1, 0)


def move(world: World, u: Array, key: Array) -> Array:
    """A next state `[..., 3]` after u `[..., 4]`."""
    mean = u @ world.push.T
    return mean + jax.random.normal(key, mean.shape) @ world.noise.T


def act(world: World, y: Array, key: Array) -> Array:
    """u `[..., 4]`: the state with an action of the policy."""
    action = y @ world.gain + SPREAD * jax.random.normal(key, y.shape[:-1])
    return jnp.concatenate([y, action[..., None]], -1)


def value_of(world: World, y: Array, key: Array) -> Array:
    """Returns `[N, ...]` of one rollout from each state `[..., 3]`."""

    def step(carry: tuple[Array, Array], t: Array) -> tuple[tuple[Array, Array], None]:
        y, total = carry
        k_act, k_move = jax.random.split(jax.random.fold_in(key, t))
        u = act(world, y, k_act)
        following = move(world, u, k_move)
        return (following, total + DISCOUNT**t * earn(world, u, following)), None

    start = jnp.zeros((len(world.rewards), *y.shape[:-1]))
    return jax.lax.scan(step, (y, start), jnp.arange(STEPS))[0][1]


def features(y: Array) -> Array:
    """`[..., F]` of states `[..., 3]`."""
    return jnp.stack([y[..., i] * y[..., j] for i, j in FEATURES], -1)


@functools.partial(jax.jit, static_argnames="size")
def estimates(world: World, key: Array, size: int) -> dict[str, Array]:
    """Canonical rewards `[N, B]` of each estimator; `separate` too sees the same s, a and s'."""
    k_state, k_next, k_roll, k_own, k_follow = jax.random.split(key, 5)
    drawn = jax.random.normal(k_state, (size, 3))
    u = jnp.concatenate([drawn[:, :2], jnp.ones((size, 1)), drawn[:, 2:]], -1)
    many = jnp.broadcast_to(u[:, None], (size, NEXT, 4))
    following = move(world, many, k_next)
    reward = earn(world, many, following).mean(-1)

    def rolled(world: World, key: Array) -> Array:
        # One key, so that both ends of a step are pushed about alike.
        here = value_of(world, many[..., :3], key).mean(-1)
        there = value_of(world, following, key).mean(-1)
        return jnp.stack([here, there])

    def alone(matrix: Array, key: Array) -> Array:
        return rolled(world._replace(rewards=matrix[None]), key)[:, 0]

    shared = rolled(world, k_roll)
    own = jax.lax.map(
        lambda each: alone(*each), (world.rewards, jax.random.split(k_own, len(world.rewards)))
    ).swapaxes(0, 1)
    visited = act(world, u[:, :3], jax.random.fold_in(k_follow, 0))
    visited = jnp.broadcast_to(visited[:, None], many.shape)
    after = move(world, visited, jax.random.fold_in(k_follow, 1))
    here, there = features(u[:, :3]), features(following).mean(1)
    followed = (earn(world, visited, after).mean(-1), here, features(after).mean(1))
    return {
        "rollouts": sampled.from_rollouts(reward, *shared, DISCOUNT),
        "lstd": sampled.by_lstd(reward, here, there, followed, DISCOUNT),
        "separate": sampled.from_rollouts(reward, *own, DISCOUNT),
        "regression": sampled.by_regression(reward, here, there, DISCOUNT),
    }


# --- the part -------------------------------------------------------------------------------------


def run(config: Sizes, folder: Path) -> Result:
    """Distances to the base reward, exact and estimated, for more and more samples."""
    names = list(rewards())
    world = make_world(np.concatenate([np.stack(list(rewards().values())), nothings()]))
    truth = {name: exact(name == "regression")[0] for name in ESTIMATES}
    sizes = [n for n in (64, 256, 1024, 4096, 16384) if n < config.samples] + [config.samples]
    (folder / "metrics.jsonl").unlink(missing_ok=True)
    sink = metrics.JsonLines(folder / "metrics.jsonl")
    found: dict[str, Array] = {}
    with metrics.Progress(len(sizes), "continuous") as bar:
        for step, size in enumerate(sizes):
            found = estimates(world, jax.random.fold_in(jax.random.key(config.seed), size), size)
            row: dict[str, float] = {"samples": size}
            for name in ESTIMATES:
                d = sampled.distances(found[name][: len(names)])[0]
                row[f"{name}/error"] = float(jnp.abs(d - truth[name])[1:].mean())
                row[f"{name}/shaped"] = float(d[names.index("shaped")])
            sink.write(step, row)
            bar.update(step + 1)
    sink.close()
    return _result(names, truth, found, config.samples)


def _result(
    names: list[str], truth: Mapping[str, np.ndarray], found: Mapping[str, Array], size: int
) -> Result:
    """The tables, from the largest sample."""
    count, key = len(names), jax.random.key(1)
    estimated = {
        name: jax.device_get(jax.jit(sampled.bootstrap)(found[name][:count], key))
        for name in ESTIMATES
    }
    floors = {
        name: np.asarray(sampled.noise_floor(found[name][:1], found[name][count:]))[0].max()
        for name in ESTIMATES
    }
    rows: list[list[Any]] = []
    numbers: dict[str, float] = {}
    for i, name in list(enumerate(names))[1:]:
        row: list[Any] = [name, f"{truth['rollouts'][i]:.3f}"]
        for estimator in ESTIMATES:
            if estimator == "regression":
                row.append(f"{truth[estimator][i]:.3f}")
            row.append(_cell(estimated[estimator], i))
            numbers[f"{name}/{estimator}"] = float(estimated[estimator].distance[0, i])
        rows.append(row)
    blank = [f"{floors[name]:.3f}" for name in ESTIMATES]
    rows.append(["noise floor", "", *blank[:3], "", blank[3]])
    numbers |= {f"noise floor/{name}": float(floors[name]) for name in ESTIMATES}
    table = {
        "title": "Continuous world: distance to the base reward",
        "columns": ["reward", "VAL, exact", "rollouts", "LSTD", "rollouts of its own",
                    "minimal, exact", "regression"],
        "rows": rows,
    }  # fmt: skip
    note = (
        f"Continuous: {size:,} states and actions, {NEXT} next states of each, rollouts of {STEPS} "
        f"steps, discount {DISCOUNT}; quadratic features. The second and third reward are "
        "equivalent to the base. Intervals: bootstrap over samples, which does not see what all "
        "samples get wrong alike. What is left of redistribution falls with next states, not with "
        "samples. Noise floor: the larger of the distances of the base to itself "
        "with shaping and with redistribution. Rollouts of its own: another set for each reward."
    )
    return Result(numbers, [table], [note])


def _cell(found: Any, i: int) -> dict[str, float]:
    ends = {"low": float(found.low[0, i]), "high": float(found.high[0, i])}
    return {"mean": float(found.distance[0, i]), **ends}
