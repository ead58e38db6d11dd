"""STARC's figure 1: how well each distance between two rewards foretells regret.

Skalse et al. 2024, section 5. On many random processes pairs of rewards are mixed in steps, and
each distance is correlated with what is lost by acting optimally for the wrong one of the two. Here
regret is exact, and beside it stands the worst that the other reward allows (`worst_regret`).

Departures: regret by exact evaluation, not by rollouts; the canonical forms of mixtures are
mixtures of canonical forms, as they are linear; two rows more than the paper's, for the exact
minimal ones; random numbers of our own.

Dimensions: W processes, P reward pairs of each, T steps of the mixture, C canonicalisations,
M norms (and none at all), K metrics, B = P T.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from experiments import starc_worlds
from jaxalign.core import distributed, metrics
from jaxalign.core import mesh as meshes
from jaxalign.core.loop import Preempted
from jaxalign.core.types import Array
from jaxalign.ops import starc, tabular
from jaxalign.ops.rows import on_own_rows
from jaxalign.ops.starc import CANONICALISATIONS, NORMS

ROWS = (*NORMS, "unnormalised")
L2 = NORMS.index("l2")
ROUNDING = 1e-4  # of regret: what its bounds were computed to
MANY = 2000  # resamplings of the processes

# Figure 1, read off its bars: rows norm, columns metric, both as in NORMS.
PAPER: Mapping[str, Sequence[Sequence[float]]] = {
    "val": (
        (0.873, 0.870, 0.749, 0.873, 0.870, 0.741),
        (0.804, 0.856, 0.858, 0.804, 0.856, 0.783),
        (0.708, 0.723, 0.756, 0.708, 0.723, 0.707),
        (0.873, 0.870, 0.749, 0.873, 0.870, 0.741),
        (0.804, 0.856, 0.858, 0.804, 0.856, 0.783),
        (0.707, 0.766, 0.816, 0.707, 0.766, 0.734),
    ),
    "val_potential": (
        (0.800, 0.240, 0.171, 0.876, 0.776, 0.685),
        (0.752, 0.782, 0.625, 0.767, 0.828, 0.677),
        (0.636, 0.634, 0.557, 0.653, 0.648, 0.624),
        (-0.035, -0.040, -0.044, 0.867, -0.037, 0.692),
        (0.112, 0.093, 0.065, 0.784, 0.845, 0.807),
        (0.077, 0.051, 0.024, 0.722, 0.073, 0.735),
    ),
    "minimal_potential": (
        (0.815, 0.576, 0.493, 0.718, 0.568, 0.489),
        (0.733, 0.778, 0.634, 0.746, 0.814, 0.637),
    ),
    "epic": (
        (0.814, 0.647, 0.542, 0.819, 0.622, 0.517),
        (0.734, 0.778, 0.634, 0.746, 0.814, 0.637),
        (0.620, 0.617, 0.554, 0.629, 0.630, 0.571),
        (0.749, 0.529, 0.436, 0.830, 0.730, 0.607),
        (0.680, 0.224, 0.129, 0.738, 0.823, 0.806),
        (0.642, 0.197, 0.052, 0.686, 0.692, 0.661),
    ),
    "dard": (
        (0.824, 0.453, 0.376, 0.861, 0.761, 0.654),
        (0.751, 0.782, 0.630, 0.767, 0.826, 0.675),
        (0.639, 0.637, 0.552, 0.657, 0.652, 0.632),
        (0.621, 0.241, 0.220, 0.835, 0.754, 0.679),
        (0.711, 0.178, 0.122, 0.774, 0.831, 0.708),
        (0.685, 0.319, 0.095, 0.713, 0.718, 0.698),
    ),
    "none": (
        (0.597, 0.352, 0.278, 0.515, 0.390, 0.353),
        (0.571, 0.618, 0.444, 0.579, 0.633, 0.513),
        (0.537, 0.538, 0.555, 0.537, 0.539, 0.487),
        (-0.045, -0.047, -0.048, 0.598, -0.047, 0.429),
        (-0.034, -0.043, -0.046, 0.573, 0.615, 0.622),
        (-0.035, -0.043, -0.046, 0.539, -0.040, 0.530),
    ),
}


class Sizes(Protocol):
    """The fields of an experiment that the figure depends on."""

    @property
    def worlds(self) -> int: ...
    @property
    def pairs(self) -> int: ...
    @property
    def steps(self) -> int: ...
    @property
    def states(self) -> int: ...
    @property
    def actions(self) -> int: ...
    @property
    def discount(self) -> float: ...
    @property
    def at_once(self) -> int: ...
    @property
    def seed(self) -> int: ...


class Points(NamedTuple):
    """What is known of each pair of rewards.

    distance: `[W, C, M, K, B]`. regret, worst, bound: `[W, B]`, the mean over both directions of
    the pair: what is lost, the most that could be, and the certificate of VAL's l2 distance. error:
    `[W, B]`, at most so much `worst` is too high. sampled: `[W, B]`, regret with the scatter that
    the paper's Monte Carlo has.
    """

    distance: Array
    regret: Array
    worst: Array
    bound: Array
    error: Array
    sampled: Array


# --- one process ----------------------------------------------------------------------------------


def one_world(
    key: Array, states: int, actions: int, discount: float, pairs: int, steps: int
) -> Points:
    """All pairs of one process; no leading W."""
    k_process, k_first, k_second, k_scatter = jax.random.split(key, 4)
    mdp = starc_worlds.random_process(k_process, states, actions, discount)
    draw = jax.vmap(starc_worlds.random_reward, (0, None))
    first, second = (draw(jax.random.split(k, pairs), mdp) for k in (k_first, k_second))
    weight = jnp.arange(1, steps + 1) / steps
    distance = [_distances(mdp, name, first, second, weight) for name in CANONICALISATIONS]
    # Policies earn alike under advantages, which are free of the digits that shaping takes up.
    one, two = (starc.canonical(mdp, r)[..., 0] for r in (first, second))
    canonical = (jnp.repeat(one, steps, axis=0), _mixed(one, two, weight))
    rewards = (jnp.repeat(first, steps, axis=0), _mixed(first, second, weight))
    return _judge(mdp, jnp.stack(distance), canonical, rewards, k_scatter)


def _mixed(first: Array, second: Array, weight: Array) -> Array:
    """`[B, ...]`: first `[P, ...]` moved to second, by each weight `[T]`."""
    share = weight.reshape(1, -1, *(1,) * (first.ndim - 1))
    mixed = first[:, None] + share * (second - first)[:, None]
    return mixed.reshape(-1, *first.shape[1:])


def _distances(
    mdp: tabular.MDP, name: starc.Canonicalisation, first: Array, second: Array, weight: Array
) -> Array:
    """`[M, K, B]`: distances of one canonicalisation."""
    one, two = (starc.canonical(mdp, r, name) for r in (first, second))
    far = _mixed(one, two, weight)

    def lengths(canonical: Array) -> Array:
        found = [starc.size(canonical, mdp.transition, norm) for norm in NORMS]
        return jnp.stack([*found, jnp.ones_like(found[0])])  # the last row: as they are

    def row(length: tuple[Array, Array]) -> Array:
        near, other = (_over(c, n) for c, n in zip((one, far), length, strict=True))
        apart = jnp.repeat(near, len(weight), axis=0) - other
        return jnp.stack([starc.size(apart, mdp.transition, metric) for metric in NORMS])

    return jax.lax.map(row, (lengths(one), lengths(far)))


def _over(canonical: Array, length: Array) -> Array:
    """canonical `[N, S, A, .]` over its length `[N]`; 0 stays 0."""
    return canonical / jnp.where(length > 0, length, 1)[:, None, None, None]


def _judge(
    mdp: tabular.MDP,
    distance: Array,
    canonical: tuple[Array, Array],
    rewards: tuple[Array, Array],
    key: Array,
) -> Points:
    """Regret and its bounds, each the mean over both directions.

    canonical: advantages of the uniform policy, `[B, S, A]` each. rewards: `[B, S, A, S]`.
    """
    own = [tabular.extremes(mdp, c) for c in canonical]
    regret = tabular.mutual_regret(mdp, canonical[0], own[0], canonical[1], own[1])
    val = distance[CANONICALISATIONS.index("val"), L2, L2]
    bounds, worst, sampled = [], [], []
    for here, there in ((0, 1), (1, 0)):
        one, two = canonical[here], canonical[there]
        bounds.append(tabular.regret_bound(mdp, one, tabular.spread(mdp, one, own[here]), val))
        worst.append(tabular.worst_regret(mdp, one, two))
        policies = (own[here].best, own[here].worst, own[there].best)
        scattered = _sampled_regret(
            mdp, one, rewards[here], policies, jax.random.fold_in(key, here)
        )
        sampled.append(scattered)
    return Points(
        distance,
        regret,
        (worst[0].value + worst[1].value) / 2,
        (bounds[0] + bounds[1]) / 2,
        (worst[0].error + worst[1].error) / 2,
        (sampled[0] + sampled[1]) / 2,
    )


def _sampled_regret(
    mdp: tabular.MDP,
    canonical: Array,
    reward: Array,
    occupancies: tuple[Array, Array, Array],
    key: Array,
) -> Array:
    """Regret `[B]` from returns with the scatter of the paper's: A rollouts from every state.

    occupancies: of a best, a worst and the judged policy. Within [0, 1], and 0 where scatter is all
    that tells best from worst.
    """
    noise = jax.random.normal(key, (3, len(reward)))
    returns = [
        tabular.earned(o, canonical) + n * _scatter(mdp, reward, o.argmax(-1))
        for o, n in zip(occupancies, noise, strict=True)
    ]
    best, worst, judged = returns
    width = best - worst
    known = width > _scatter(mdp, reward, occupancies[0].argmax(-1))
    return jnp.where(known, jnp.clip((best - judged) / jnp.where(known, width, 1), 0, 1), 0)


def _scatter(mdp: tabular.MDP, reward: Array, policy: Array) -> Array:
    """`[B]`: the standard error of the mean return of A rollouts from every state.

    reward: `[B, S, A, S]`. policy: `[B, S]`. The variance of the return from each state solves an
    equation like that of values, with the discount's square (Sobel 1982).
    """
    states, actions, _ = mdp.transition.shape
    rows = jnp.broadcast_to(jnp.arange(states)[None], policy.shape)
    chain = mdp.transition[rows, policy]
    earned = jnp.take_along_axis(reward, policy[:, :, None, None], axis=2)[:, :, 0]
    identity = jnp.broadcast_to(jnp.eye(states, dtype=chain.dtype), chain.shape)
    values = tabular.solve_dominant(identity - mdp.discount * chain, (chain * earned).sum(-1))
    target = earned + mdp.discount * values[:, None, :]
    centred = target - (chain * target).sum(-1, keepdims=True)
    spread = (chain * centred**2).sum(-1)
    variance = tabular.solve_dominant(identity - mdp.discount**2 * chain, spread)
    return jnp.sqrt(variance.mean(-1) / (states * actions))


# --- all processes --------------------------------------------------------------------------------


@functools.cache
def compiled(
    mesh: jax.sharding.Mesh, states: int, actions: int, discount: float, pairs: int, steps: int
) -> Any:
    """`keys [W] -> Points`, each device with its share of the processes."""
    one = functools.partial(
        one_world, states=states, actions=actions, discount=discount, pairs=pairs, steps=steps
    )
    each = functools.partial(jax.lax.map, one)
    # Batched solves would otherwise be gathered to every device.
    return jax.jit(on_own_rows(each, meshes.batch_sharding(mesh)))


def run(config: Sizes, folder: Path) -> Points:
    """All pairs, in batches that are kept in `folder/batches`, so that a run goes on where it was.

    In float64: of the generator's sparse rewards some are met with probability 1e-9 only, and
    behind shaping float32 has no digits left for those.
    """
    with jax.enable_x64(True):
        return _run(config, folder)


def _run(config: Sizes, folder: Path) -> Points:
    """`run`, at the precision that is set."""
    mesh = meshes.make_mesh()
    shape = (config.states, config.actions, config.discount, config.pairs, config.steps)
    evaluate = compiled(mesh, *shape)
    (folder / "batches").mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").unlink(missing_ok=True)  # written anew, in a moment
    sink = metrics.JsonLines(folder / "metrics.jsonl")
    key, parts = jax.random.key(config.seed), []
    count = config.worlds // config.at_once
    speed = (config.at_once * config.pairs * config.steps, "pairs")
    with metrics.Progress(count, "figure 1", speed=speed) as bar:
        for index in range(count):
            path = folder / "batches" / f"{index:04}.npz"
            if not path.exists():
                numbers = range(index * config.at_once, (index + 1) * config.at_once)
                keys = jnp.stack([jax.random.fold_in(key, number) for number in numbers])
                keys = distributed.put(keys, meshes.batch_sharding(mesh))
                save(path, distributed.fetch(evaluate(keys)))
            parts.append(load(path))
            known = joined(parts)
            shown = {
                name: correlation(known.distance[:, i, L2, L2], known.regret)
                for i, name in enumerate(CANONICALISATIONS)
            }
            sink.write(index, {"pairs": known.regret.size, **shown})
            bar.update(index + 1, val=shown["val"], epic=shown["epic"])
            if distributed.stop_is_due():
                raise Preempted(index + 1, saved=True)
    sink.close()
    return joined(parts)


def save(path: Path, points: Points) -> None:
    """One batch, in one piece."""
    with metrics.replacing(path) as temporary, open(temporary, "wb") as file:
        arrays: dict[str, Any] = {name: np.float32(x) for name, x in points._asdict().items()}
        np.savez(file, **arrays)


def load(path: Path) -> Points:
    """What `save` wrote."""
    with np.load(path) as arrays:
        return Points(**arrays)


def joined(parts: Sequence[Points]) -> Points:
    """Batches, one after the other."""
    return Points(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))  # ty: ignore[invalid-argument-type]


# --- what comes out -------------------------------------------------------------------------------


def correlation(x: Any, y: Any) -> float:
    """Pearson's, of all entries; 0 where one of them does not vary."""
    x, y = (np.asarray(a, np.float64).ravel() for a in (x, y))
    x, y = x - x.mean(), y - y.mean()
    length = np.sqrt((x**2).sum() * (y**2).sum())
    return float((x * y).sum() / length) if length > 0 else 0.0


def correlations(points: Points) -> np.ndarray:
    """`[C, M, K]`, of distance and regret."""
    sizes = points.distance.shape[1:4]
    cells = np.moveaxis(np.asarray(points.distance), 0, -2).reshape(np.prod(sizes), -1)
    return np.array([correlation(cell, points.regret) for cell in cells]).reshape(sizes)


def moments(x: Any, y: Any) -> np.ndarray:
    """`[W, 6]`: of each process the sums that a correlation is made of. x, y: `[W, B]`."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    return np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], -1).sum(1)


def _of_moments(sums: np.ndarray) -> np.ndarray:
    n, x, y, xx, yy, xy = np.moveaxis(sums, -1, 0)
    covariance, left, right = xy / n - x * y / n**2, xx / n - (x / n) ** 2, yy / n - (y / n) ** 2
    return covariance / np.sqrt(np.maximum(left * right, 1e-30))


def resampled(x: Any, y: Any, seed: int = 0) -> np.ndarray:
    """`[MANY]` correlations, each of as many processes drawn with replacement."""
    sums = moments(x, y)
    drawn = np.random.default_rng(seed).integers(len(sums), size=(MANY, len(sums)))
    return _of_moments(sums[drawn].sum(1))


def with_interval(x: Any, y: Any) -> dict[str, float]:
    """The correlation as a table's cell, with the 95 % interval over processes."""
    low, high = np.quantile(resampled(x, y), (0.025, 0.975))
    return {"mean": correlation(x, y), "low": float(low), "high": float(high)}


def ahead_of(points: Points, name: str, other: str) -> dict[str, float]:
    """By how much one correlation at (l2, l2) beats another on the same processes; as a cell."""
    both = [points.distance[:, CANONICALISATIONS.index(c), L2, L2] for c in (name, other)]
    drawn = [resampled(x, points.regret) for x in both]
    low, high = np.quantile(drawn[0] - drawn[1], (0.025, 0.975))
    mean = correlation(both[0], points.regret) - correlation(both[1], points.regret)
    return {"mean": mean, "low": float(low), "high": float(high)}


def numbers(points: Points) -> dict[str, float]:
    """The result, flat: correlation at (l2, l2) and best cell of each; how tight the bounds are."""
    table = correlations(points)
    flat = {f"{name}/l2-l2": float(table[i, L2, L2]) for i, name in enumerate(CANONICALISATIONS)}
    best = table[:, : len(NORMS)].max((1, 2))
    flat |= {f"{name}/best": float(best[i]) for i, name in enumerate(CANONICALISATIONS)}
    val = points.distance[:, CANONICALISATIONS.index("val"), L2, L2]
    sampled = [points.distance[:, i, L2, L2] for i in range(len(CANONICALISATIONS))]
    flat |= {
        f"{name}/l2-l2, sampled regret": correlation(x, points.sampled)
        for name, x in zip(CANONICALISATIONS, sampled, strict=True)
    }
    flat["val/worst regret"] = correlation(val, points.worst)
    real = np.isfinite(points.bound) & (points.worst > 0)
    flat["regret <= worst"] = float(np.mean(points.regret <= points.worst + ROUNDING))
    flat["worst <= bound"] = float(np.mean((points.worst <= points.bound + ROUNDING)[real]))
    flat["median bound / worst"] = float(np.median(points.bound[real] / points.worst[real]))
    return {**flat, "pairs": int(np.size(points.regret))}


def tables(points: Points) -> list[dict[str, Any]]:
    """As RESULTS.md wants them: one row a canonicalisation, then every cell beside the paper's."""
    return [_summary(points), _ahead(points), _cells(points)]


def _summary(points: Points) -> dict[str, Any]:
    table, rows = correlations(points), []
    for i, name in enumerate(CANONICALISATIONS):
        distance = points.distance[:, i, L2, L2]
        best = np.unravel_index(table[i, : len(NORMS)].argmax(), (len(NORMS), len(NORMS)))
        n, m = int(best[0]), int(best[1])
        theirs = PAPER.get(name)
        rows.append(
            [
                name,
                with_interval(distance, points.regret),
                f"{theirs[1][1]:.3f}" if theirs else "left out",
                with_interval(points.distance[:, i, n, m], points.regret),
                f"{NORMS[n]}, {NORMS[m]}",
                f"{max(map(max, theirs)):.3f}" if theirs else "left out",
                with_interval(distance, points.sampled),
                with_interval(distance, points.worst),
            ]
        )
    columns = ["canonicalisation", "l2, l2", "paper", "best cell", "norm, metric", "paper's best"]
    return {
        "title": "Figure 1: correlation of distance and regret",
        "columns": [*columns, "l2, l2, sampled regret", "l2, l2, worst-case regret"],
        "rows": rows,
    }


def _ahead(points: Points) -> dict[str, Any]:
    rows = [
        [f"{name} - {other}", ahead_of(points, name, other)]
        for name, other in (("val", "epic"), ("val", "dard"), ("minimal", "val"))
    ]
    columns = ["difference", "correlation at (l2, l2)"]
    return {"title": "Figure 1: paired by process", "columns": columns, "rows": rows}


def _cells(points: Points) -> dict[str, Any]:
    table, rows = correlations(points), []
    for i, name in enumerate(CANONICALISATIONS):
        theirs = PAPER.get(name, ())
        for j, norm in enumerate(ROWS):
            cells = [f"{x:.3f}" for x in table[i, j]]
            if j < len(theirs):
                cells = [f"{c} ({p:.3f})" for c, p in zip(cells, theirs[j], strict=True)]
            rows.append([name, norm, *cells])
    title = "Figure 1: all norms (rows) and metrics (columns); in brackets the paper's"
    return {"title": title, "columns": ["canonicalisation", "norm", *NORMS], "rows": rows}
