"""How fast HIQL learns and is judged, and beside what; a part of `python -m experiments.bench`.

`hiql` times updates of OGBench's medium point maze: many updates of all seeds in one compiled
program with the data on the device, against a loop of the usual structure, in which NumPy draws the
goals, each update is a call of a compiled function, and seeds come one after the other. Both make
the same update.
`attempts` times attempts at the maze's tasks with a random policy, nearly all of which last to the
horizon: compiled, all side by side, against OGBench's own environment where it is installed.

What is counted: `updates_per_second`, of all implementations; `attempts_per_second`, of all
attempts; `ratio` as everywhere: seconds over those of `jaxalign` in the same turn.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import statistics as stats
import sys
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import offline, real_envs, seed_axis
from experiments.measuring import COMPILED, Column, Thunk, Variant, measure, show, summary
from experiments.offline import Experiment
from experiments.ogbench_settings import settings
from jaxalign.core import mesh as meshes
from jaxalign.core.state import TrainState
from jaxalign.core.types import UserError
from jaxalign.data.trajectories import Trajectories
from jaxalign.methods import hiql
from jaxalign.ops.goals import Batch

TASK = "pointmaze-medium-navigate"


@dataclasses.dataclass(frozen=True)
class Bench:
    """Sizes and comparisons."""

    case: Literal["hiql", "attempts"]
    widths: tuple[int, ...] = (512, 128)  # of three hidden layers
    batch: int = 1024
    updates: int = 30  # of each seed, in a turn
    learners: int = 2  # seeds, that learn at once here and one after the other in the loop
    attempts: int = 50  # at each of the five tasks
    real_attempts: int = 2  # the same of the real environment, which is slow
    data_episodes: int = 100
    repeats: int = 7  # of every implementation, in turns
    seed: int = 0

    def __post_init__(self) -> None:
        for name in (
            "batch",
            "updates",
            "learners",
            "attempts",
            "real_attempts",
            "data_episodes",
            "repeats",
        ):
            if getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)}: must be at least 1")


def updates() -> Bench:
    """Updates, against loops in which NumPy draws the goals."""
    return Bench("hiql")


def attempts() -> Bench:
    """Attempts at the maze's tasks, against OGBench's own environment."""
    return Bench("attempts", widths=(512,), repeats=3)


CASES = {"hiql": updates, "attempts": attempts}


class Problem(NamedTuple):
    """What all implementations are given. state: of all seeds, not donated."""

    lab: offline.Lab
    config: hiql.Config
    state: TrainState


def make_problem(bench: Bench, width: int) -> Problem:
    """The maze's data, and networks that know nothing."""
    hidden = (width, width, width)
    config = settings(TASK, hidden=hidden, batch=bench.batch)["hiql"]
    experiment = Experiment(
        task=TASK, data_episodes=bench.data_episodes, arms=("hiql",), hiql=config
    )
    lab = offline.make_lab(experiment, bench.learners)
    return Problem(lab, config, offline.start_state(hiql, config, lab.data, seeds_of(bench)))


def seeds_of(bench: Bench) -> list[int]:
    """The seeds that learn."""
    return list(range(bench.seed, bench.seed + bench.learners))


# --- updates --------------------------------------------------------------------------------------


def compiled_updates(problem: Problem, bench: Bench) -> Variant:
    """All updates of a turn as one program."""
    start, rows = seed_axis.spread(problem.state, bench.learners, problem.lab.mesh)
    train = offline.make_training(hiql, problem.config, seeds_of(bench), bench.updates, rows)
    key = jax.device_put(jax.random.key(bench.seed), meshes.replicated(problem.lab.mesh))

    def prepare(turn: int) -> Thunk:
        state = jax.block_until_ready(jax.tree.map(jnp.copy, start))
        return lambda: jax.block_until_ready(train(state, problem.lab.data, key))

    return Variant(COMPILED, prepare, lambda _: bench.learners * bench.updates)


def loop(problem: Problem, bench: Bench) -> Variant:
    """NumPy draws a batch, a compiled function updates on one device, and so on, seed by seed."""
    data = jax.tree.map(np.asarray, problem.lab.data)
    one = jax.tree.map(lambda leaf: leaf[0] if leaf.ndim else leaf, problem.state)
    update = jax.jit(functools.partial(hiql.update, problem.config), donate_argnums=0)

    def prepare(turn: int) -> Thunk:
        rng = np.random.default_rng(turn)
        states = [jax.tree.map(jnp.copy, one) for _ in range(bench.learners)]
        jax.block_until_ready(states)

        def learn() -> list[TrainState]:
            key = jax.random.key(turn)
            for seed in range(bench.learners):
                for _ in range(bench.updates):
                    batch = jax.device_put(draw(data, problem.config, rng))
                    states[seed], _ = update(states[seed], batch, key)
            return jax.block_until_ready(states)

        return learn

    return Variant("loop", prepare, lambda _: bench.learners * bench.updates)


def draw(data: Trajectories, config: hiql.Config, rng: np.random.Generator) -> Batch:
    """What `ops.goals.sample` draws, in NumPy."""
    goals, size = config.goals, config.batch
    i = data.valid[rng.integers(len(data.valid), size=size)]
    end = data.end[i]
    later = np.minimum(i + rng.geometric(1 - goals.discount, size=size), end)
    choice, anywhere = rng.random(size), data.valid[rng.integers(len(data.valid), size=size)]
    value_goal = np.where(choice < 1 - goals.value_random, later, anywhere)
    value_goal = np.where(choice < goals.value_current, i, value_goal)
    share = rng.random(size)
    future = np.round(np.minimum(i + 1, end) * share + end * (1 - share)).astype(int)
    same = rng.random(size) >= goals.actor_random
    other = data.valid[rng.integers(len(data.valid), size=size)]
    actor_goal = np.where(same, future, other)
    ahead = np.minimum(i + goals.subgoal_steps, end)
    target = np.where(same, np.minimum(ahead, actor_goal), ahead)
    reached = (value_goal == i).astype(np.float32)
    seen = data.observations
    return Batch(
        seen[i], data.actions[i], seen[i + 1], seen[value_goal], reached - 1, 1 - reached,
        seen[actor_goal], seen[ahead], seen[actor_goal], seen[target],
    )  # fmt: skip


def run_updates(bench: Bench, width: int) -> list[dict[str, Any]]:
    """Measures one width; a line for each implementation."""
    problem = make_problem(bench, width)
    variants = [compiled_updates(problem, bench), loop(problem, bench)]
    timings = measure(variants, bench.repeats)
    return [
        {
            "case": bench.case,
            "width": width,
            "batch": bench.batch,
            "implementation": each.name,
            **summary(timings, each.name),
            "learners": bench.learners,
            "updates_per_second": bench.learners * bench.updates / timings[each.name].median,
        }
        for each in variants
    ]


# --- attempts -------------------------------------------------------------------------------------


def compiled_attempts(problem: Problem, bench: Bench) -> Variant:
    """All attempts side by side, as one program."""
    one = jax.tree.map(lambda leaf: leaf[0], problem.state.params)
    run = jax.jit(functools.partial(offline.attempt, hiql, problem.config, bench.attempts))

    def prepare(turn: int) -> Thunk:
        return lambda: jax.block_until_ready(run(one, problem.lab.maze, jax.random.key(turn)))

    return Variant(COMPILED, prepare, lambda found: found.size)


def real_attempts(
    problem: Problem, bench: Bench, environments: real_envs.RealEnvironments
) -> Variant:
    """Attempts in OGBench's environment, in as many processes as there are cores."""
    one = jax.tree.map(lambda leaf: leaf[0], problem.state.params)
    act = jax.jit(functools.partial(hiql.act, problem.config))
    policy = functools.partial(offline.numpy_act, act, one, jax.random.key(0))

    def prepare(turn: int) -> Thunk:
        return lambda: environments.evaluate(policy, bench.real_attempts, turn)

    return Variant("ogbench", prepare, lambda found: found.size)


def run_attempts(bench: Bench, width: int) -> list[dict[str, Any]]:
    """Measures the judging; a line for each implementation."""
    problem = make_problem(bench, width)
    variants = [compiled_attempts(problem, bench)]
    if importlib.util.find_spec("ogbench") is None:
        print("ogbench is not installed: not compared with", file=sys.stderr)
        timings = measure(variants, bench.repeats)
    else:
        with real_envs.RealEnvironments("pointmaze-medium") as environments:
            variants.append(real_attempts(problem, bench, environments))
            timings = measure(variants, bench.repeats)
    lines = []
    for each in variants:
        count = stats.median(timings[each.name].counts)
        rate = count / timings[each.name].median
        line: dict[str, Any] = {"case": bench.case, "width": width, "batch": bench.batch}
        line |= {"implementation": each.name, **summary(timings, each.name)}
        lines.append({**line, "attempts": count, "attempts_per_second": rate})
    return lines


COLUMNS = {
    "width": Column("width"),
    "implementation": Column("implementation"),
    "median s": Column("median_seconds", "{:.4f}"),
    "ratio": Column("ratio", "{:.2f}"),
    "cpu ratio": Column("cpu_ratio", "{:.2f}"),
    "compile s": Column("compile_seconds", "{:.1f}"),
    "peak MB": Column("peak_memory_bytes", "{:.0f}", 1e6),
}


def run(bench: Bench) -> list[dict[str, Any]]:
    """Measures and prints; returns the lines."""
    of_width: Callable[[Bench, int], list[dict[str, Any]]]
    of_width = run_updates if bench.case == "hiql" else run_attempts
    lines = [line for width in bench.widths for line in of_width(bench, width)]
    rate = "updates" if bench.case == "hiql" else "attempts"
    show(lines, {**COLUMNS, f"{rate}/s": Column(f"{rate}_per_second", "{:.1f}")})
    return lines
