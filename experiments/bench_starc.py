"""How fast reward distances are, and beside what; a part of `python -m experiments.bench`.

`starc` judges pairs of rewards of random processes as figure 1 does at (l2, l2): VAL's distance and
the exact regret. Beside it stands the same for one pair as literal NumPy: values by sweeps until
they change by less than 1e-8, best and worst policies by value iteration, returns by Monte Carlo
with as many rollouts from every state as there are actions, each as long as the discount reaches
1e-5. `val` is the distance alone. The batch is the number of pairs in one program.

What is counted: `pairs_per_second`, and `pair_ratio`, the other's seconds a pair over those of
`jaxalign`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import starc_worlds
from experiments.measuring import COMPILED, Column, Thunk, Variant, measure, show, summary
from jaxalign.core.types import Array, UserError
from jaxalign.ops import starc, tabular
from jaxalign.ops.tabular import MDP


@dataclasses.dataclass(frozen=True)
class Bench:
    """Sizes and comparisons."""

    case: Literal["starc", "val"]
    batches: tuple[int, ...] = (1, 16, 128)  # pairs in a program
    states: int = 32
    actions: int = 4
    discount: float = 0.95
    loops: bool = True  # compare with NumPy
    repeats: int = 7  # of every implementation, in turns
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.batches, default=0) < 1 or self.repeats < 1:
            raise UserError(
                f"batches = {self.batches}, repeats = {self.repeats}: must be at least 1"
            )


def judged() -> Bench:
    """Distance and exact regret of pairs of rewards."""
    return Bench("starc")


def distance() -> Bench:
    """The distance alone."""
    return Bench("val")


CASES = {"starc": judged, "val": distance}


class Problem(NamedTuple):
    """A process, and pairs of rewards `[B, S, A, S]`."""

    mdp: MDP
    first: Array
    second: Array


def make_problem(bench: Bench, batch: int) -> Problem:
    """Rewards as in figure 1."""
    k_process, *keys = jax.random.split(jax.random.key(bench.seed), 3)
    mdp = starc_worlds.random_process(k_process, bench.states, bench.actions, bench.discount)
    draw = jax.jit(jax.vmap(starc_worlds.random_reward, (0, None)))
    return Problem(mdp, *(draw(jax.random.split(k, batch), mdp) for k in keys))


@functools.partial(jax.jit, static_argnames="with_regret")
def judge(problem: Problem, with_regret: bool) -> tuple[Array, Array]:
    """VAL's distance and the mutual regret of each pair, `[B]` both; regret 0 where not asked."""
    mdp, first, second = problem
    apart = starc.distance(mdp, first, second)
    if not with_regret:
        return apart, jnp.zeros_like(apart)
    one, two = (starc.canonical(mdp, r)[..., 0] for r in (first, second))
    own = [tabular.extremes(mdp, r) for r in (one, two)]
    return apart, tabular.mutual_regret(mdp, one, own[0], two, own[1])


# --- literal NumPy --------------------------------------------------------------------------------


def loop_values(transition: np.ndarray, reward: np.ndarray, discount: float) -> np.ndarray:
    """V `[S]` of the uniform policy, by sweeps over all states."""
    values = np.zeros(len(transition))
    for _ in range(10_000):
        new = np.array(
            [(t * (r + discount * values)).sum(1).mean()
             for t, r in zip(transition, reward, strict=True)]
        )  # fmt: skip
        if np.abs(new - values).max() < 1e-8:
            return new
        values = new
    return values


def loop_canonical(transition: np.ndarray, reward: np.ndarray, discount: float) -> np.ndarray:
    """VAL `[S, A, S]`, standardised in l2."""
    values = loop_values(transition, reward, discount)
    mean = (transition * (reward + discount * values)).sum(-1) - values[:, None]
    canonical = np.repeat(mean[..., None], len(values), axis=-1)
    length = np.sqrt((canonical**2).sum())
    return canonical / length if length else canonical


def loop_policy(transition: np.ndarray, reward: np.ndarray, discount: float) -> np.ndarray:
    """Actions `[S]` of a best policy, by value iteration to 1e-5."""
    values = np.zeros(len(transition))
    while True:
        action_values = (transition * (reward + discount * values)).sum(-1)
        new = action_values.max(1)
        if np.abs(new - values).max() < 1e-5:
            return action_values.argmax(1)
        values = new


def loop_return(
    transition: np.ndarray,
    reward: np.ndarray,
    discount: float,
    policy: np.ndarray,
    rng: np.random.Generator,
) -> float:
    """J of a policy `[S]`, the mean over rollouts from every state."""
    states, actions, _ = transition.shape
    steps = math.ceil(math.log(1e-5) / math.log(discount))
    total = 0.0
    for start in range(states):
        for _ in range(actions):
            s, weight = start, 1.0
            for _ in range(steps):
                a = policy[s]
                following = rng.choice(states, p=transition[s, a])
                total += weight * reward[s, a, following]
                s, weight = following, weight * discount
    return total / (states * actions)


def loop_regret(
    transition: np.ndarray, one: np.ndarray, two: np.ndarray, discount: float, seed: int
) -> float:
    """Mutual regret."""
    rng = np.random.default_rng(seed)
    earn = functools.partial(loop_return, transition, discount=discount, rng=rng)
    best = [loop_policy(transition, r, discount) for r in (one, two)]
    lost = []
    for reward, own, other in ((one, best[0], best[1]), (two, best[1], best[0])):
        worst = loop_policy(transition, -reward, discount)
        top, bottom, chosen = (earn(reward, policy=policy) for policy in (own, worst, other))
        lost.append((top - chosen) / (top - bottom) if top > bottom else 0.0)
    return float(np.mean(lost))


def loop_judge(problem: Problem, discount: float, with_regret: bool, seed: int) -> list[float]:
    """The first pair's distance and regret."""
    transition = np.asarray(problem.mdp.transition, np.float64)
    transition /= transition.sum(-1, keepdims=True)
    pair = [np.asarray(r[0], np.float64) for r in (problem.first, problem.second)]
    one, two = (loop_canonical(transition, r, discount) for r in pair)
    apart = float(np.sqrt(((one - two) ** 2).sum()))
    regret = loop_regret(transition, pair[0], pair[1], discount, seed) if with_regret else 0.0
    return [apart, regret]


# --- what is timed --------------------------------------------------------------------------------


def variants(bench: Bench, problem: Problem) -> list[Variant]:
    """All pairs as one program, and one pair as NumPy."""
    with_regret = bench.case == "starc"

    def compiled(turn: int) -> Thunk:
        return lambda: jax.block_until_ready(judge(problem, with_regret))

    def numpy(turn: int) -> Thunk:
        return lambda: loop_judge(problem, bench.discount, with_regret, turn)

    found = [Variant(COMPILED, compiled, lambda _: len(problem.first))]
    if bench.loops:
        found.append(Variant("numpy", numpy, lambda _: 1, "one pair"))
    return found


COLUMNS = {
    "pairs": Column("pairs"),
    "implementation": Column("implementation"),
    "median s": Column("median_seconds", "{:.5f}"),
    "pairs/s": Column("pairs_per_second", "{:.1f}"),
    "pair ratio": Column("pair_ratio", "{:.0f}"),
    "compile s": Column("compile_seconds", "{:.1f}"),
    "": Column("note"),
}


def run(bench: Bench) -> list[dict[str, Any]]:
    """Measures and prints; returns the lines."""
    lines = []
    for batch in bench.batches:
        timings = measure(variants(bench, make_problem(bench, batch)), bench.repeats)
        ours = timings[COMPILED].median / batch
        for name, timing in timings.items():
            pairs = timing.counts[0]
            lines.append(
                {
                    "case": bench.case,
                    "pairs": pairs,
                    "implementation": name,
                    **summary(timings, name),
                    "pairs_per_second": pairs / timing.median,
                    "pair_ratio": timing.median / pairs / ours,
                    "note": "" if name == COMPILED else f"one pair, beside {batch} in one program",
                }
            )
    show(lines, COLUMNS)
    return lines
