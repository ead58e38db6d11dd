"""How fast skills are learned, and beside what; a part of `python -m experiments.bench`.

`metra` times whole epochs of METRA in a point maze: episodes, buffer and gradient steps of all
seeds in one compiled program, against a loop of the usual structure, in which the policy, the
environment and each update are a call of a compiled function, the buffer is NumPy's, and seeds come
one after the other. Both walk the same environment and make the same update.

Each number of seeds is measured with each number of episodes side by side; there are as many
gradient steps for a transition in all. What is counted: `steps_per_second`, of the environments of
all seeds, and `updates_per_second`, gradient steps of all seeds; `ratio` as everywhere: seconds
over those of `jaxalign` in the same turn.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import seed_axis, skills
from experiments.measuring import COMPILED, Column, Thunk, Variant, measure, show, summary
from experiments.skills import Experiment, Lab
from jaxalign.core.state import TrainState
from jaxalign.core.types import UserError
from jaxalign.methods import metra
from jaxalign.ops.skills import Transitions
from jaxalign.rollout.episodes import Episodes


@dataclasses.dataclass(frozen=True)
class Bench:
    """Sizes and comparisons."""

    case: Literal["metra"]
    environment: str = "pointmaze-medium"
    learners: tuple[int, ...] = (1, 4)  # seeds
    environments: tuple[int, ...] = (8, 32)  # episodes side by side, of each seed
    width: int = 64  # of two hidden layers
    updates: int = 50  # gradient steps for eight episodes
    epochs: int = 2  # in a turn
    buffer: int = 100  # epochs that the buffer holds
    repeats: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("width", "updates", "epochs", "buffer", "repeats"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)}: must be at least 1")
        if not self.learners or min(self.learners) < 1:
            raise UserError(f"learners = {self.learners}: give numbers of at least 1")
        if not self.environments or any(count % 8 or count < 8 for count in self.environments):
            raise UserError(f"environments = {self.environments}: give multiples of 8")


def epochs() -> Bench:
    """Whole epochs of METRA, against a loop on the host."""
    return Bench("metra")


CASES = {"metra": epochs}


class Problem(NamedTuple):
    """What all implementations are given. state: of all seeds, not donated."""

    lab: Lab
    config: Experiment
    seeds: list[int]
    state: TrainState


def make_problem(bench: Bench, learners: int, environments: int) -> Problem:
    """Learners before their first epoch; gradient steps begin with it."""
    own = metra.Config(hidden=(bench.width,) * 2)
    config = Experiment(
        environment=bench.environment,
        metra=own,
        environments=environments,
        epochs=bench.epochs,
        at_once=bench.epochs,
        evaluate_every=bench.epochs,
        save_every=bench.epochs,
        updates=bench.updates * environments // 8,
        warm_up=0,
    )
    lab = skills.make_lab(config, learners)
    rows = bench.buffer * environments * lab.environment.steps
    seeds = list(range(bench.seed, bench.seed + learners))
    state = skills.start_state(metra, own, lab.environment, rows, seeds)
    return Problem(lab, config, seeds, seed_axis.spread(state, learners, lab.mesh)[0])


def compiled(problem: Problem) -> Variant:
    """All of a turn as one program."""
    lab, config = problem.lab, problem.config
    train = skills.make_training(metra, config.metra, lab, config, problem.seeds)

    def prepare(turn: int) -> Thunk:
        key = jax.device_put(jax.random.key(turn), problem.state.step.sharding)
        state = jax.block_until_ready(jax.tree.map(jnp.copy, problem.state))
        return lambda: jax.block_until_ready(train(state, lab.world, key))

    return Variant(COMPILED, prepare, lambda _: 1)


class HostBuffer:
    """A ring of transitions in NumPy."""

    def __init__(self, data: Transitions) -> None:
        self.data, self.at, self.size = data, 0, 0

    def write(self, rows: Transitions) -> None:
        """Adds rows, which divide the ring."""
        end = self.at + len(rows.terminal)
        for stored, new in zip(self.data, rows, strict=True):
            stored[self.at : end] = new
        self.size, self.at = max(self.size, end), end % len(self.data.terminal)

    def sample(self, generator: np.random.Generator, count: int) -> Transitions:
        """Rows drawn with replacement."""
        index = generator.integers(self.size, size=count)
        return Transitions(*(leaf[index] for leaf in self.data))


def loop(problem: Problem) -> Variant:
    """Steps, transitions and updates one by one, seed by seed."""
    lab, config = problem.lab, problem.config
    own, environment = config.metra, lab.environment
    act = jax.jit(functools.partial(metra.act, own))
    step, observe = jax.jit(environment.step), jax.jit(environment.observe)
    reset = jax.jit(environment.reset, static_argnums=1)
    update = jax.jit(functools.partial(metra.update, own), donate_argnums=0)
    one = jax.tree.map(lambda leaf: leaf[0] if leaf.ndim else leaf, problem.state)
    learner = jax.device_put(skills.learner(one), jax.devices()[0])
    rows = jax.tree.map(np.array, one.extra.buffer.data)
    world = jax.device_put(lab.world, jax.devices()[0])

    def walk(state: TrainState, told: np.ndarray, key: jax.Array) -> Episodes:
        place, seen, actions = reset(world, config.environments, key), [], []
        for _ in range(environment.steps):
            seen.append(np.asarray(observe(place)))
            key, now = jax.random.split(key)
            actions.append(np.asarray(act(state, seen[-1], told, now)))
            place = step(world, place, actions[-1])
        seen.append(np.asarray(observe(place)))
        return Episodes(np.stack(seen), np.stack(actions), None)

    def learn(turn: int) -> TrainState:
        generator, key = np.random.default_rng(turn), jax.random.key(turn)
        state, buffer = jax.tree.map(jnp.copy, learner), HostBuffer(rows)
        for _ in range(config.epochs):
            told = draw(generator, config.environments, own.skill_size)
            key, walk_key, update_key = jax.random.split(key, 3)
            buffer.write(host_transitions(walk(state, told, walk_key), told))
            for _ in range(config.updates):
                state, _ = update(state, buffer.sample(generator, own.batch), update_key)
        return jax.block_until_ready(state)

    def prepare(turn: int) -> Thunk:
        return lambda: [learn(turn) for _ in problem.seeds]

    return Variant("loop", prepare, lambda _: 1)


def draw(generator: np.random.Generator, count: int, size: int) -> np.ndarray:
    """Skills `[count, D]` of unit length."""
    skill = generator.standard_normal((count, size)).astype(np.float32)
    return skill / np.linalg.norm(skill, axis=1, keepdims=True)


def host_transitions(walked: Episodes, told: np.ndarray) -> Transitions:
    """The rows `[T * E, ...]` of episodes with the skills `[E, D]`, in NumPy."""
    seen: Any = walked.observations
    steps, count = walked.actions.shape[:2]
    last = np.zeros((steps, count), np.float32)
    last[-1] = 1
    told = np.broadcast_to(told, (steps, *told.shape))
    rows = (seen[:-1], walked.actions, seen[1:], told, last)
    return Transitions(*(leaf.reshape(-1, *leaf.shape[2:]) for leaf in rows))


def run_size(bench: Bench, learners: int, environments: int) -> list[dict[str, Any]]:
    """Measures one size; a line for each implementation."""
    problem = make_problem(bench, learners, environments)
    variants = [compiled(problem), loop(problem)]
    timings = measure(variants, bench.repeats)
    config = problem.config
    episodes = learners * config.epochs
    steps = episodes * environments * problem.lab.environment.steps
    return [
        {
            "case": bench.case,
            "learners": learners,
            "environments": environments,
            "implementation": each.name,
            **summary(timings, each.name),
            "steps_per_second": steps / timings[each.name].median,
            "updates_per_second": episodes * config.updates / timings[each.name].median,
        }
        for each in variants
    ]


COLUMNS = {
    "seeds": Column("learners"),
    "episodes": Column("environments"),
    "implementation": Column("implementation"),
    "median s": Column("median_seconds", "{:.4f}"),
    "ratio": Column("ratio", "{:.2f}"),
    "cpu ratio": Column("cpu_ratio", "{:.2f}"),
    "compile s": Column("compile_seconds", "{:.1f}"),
    "peak MB": Column("peak_memory_bytes", "{:.0f}", 1e6),
    "steps/s": Column("steps_per_second", "{:.0f}"),
    "updates/s": Column("updates_per_second", "{:.0f}"),
}


def run(bench: Bench) -> list[dict[str, Any]]:
    """Measures and prints; returns the lines."""
    lines = [
        line
        for learners in bench.learners
        for environments in bench.environments
        for line in run_size(bench, learners, environments)
    ]
    show(lines, COLUMNS)
    return lines
