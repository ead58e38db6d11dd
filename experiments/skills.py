"""Unsupervised skills: episodes, the replay buffer and gradient steps as one compiled program.

In an epoch every seed walks E episodes, each with a skill of its own, writes them into its buffer
and takes G gradient steps on batches of it. All seeds of a run, and several epochs, are one
program; where the physics is stepped by MuJoCo on the host (`experiments.skills_host`) the gradient
steps are.

Dimensions: S seeds, E episodes of an epoch, T steps of an episode, G gradient steps of an epoch, N
rows of the buffer, K skills shown, O observation, A action, D skill, P coordinates of a place.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import seed_axis, skill_worlds
from experiments.skill_evaluation import Shown, film, numbers, show, walk
from jaxalign.core import distributed, limits
from jaxalign.core import mesh as meshes
from jaxalign.core import metrics as sinks
from jaxalign.core.loop import Hook
from jaxalign.core.state import TrainState
from jaxalign.core.types import Array, PyTree, UserError
from jaxalign.envs.environment import Environment
from jaxalign.methods import csf, diayn, lsd, metra, uniform
from jaxalign.methods.csf import Config as CSF
from jaxalign.methods.diayn import Config as DIAYN
from jaxalign.methods.lsd import Config as LSD
from jaxalign.methods.metra import Config as METRA
from jaxalign.methods.uniform import Config as Uniform
from jaxalign.ops import coverage
from jaxalign.ops import skills as skill_ops
from jaxalign.ops.skills import Transitions
from jaxalign.rollout import buffer as buffers
from jaxalign.rollout.buffer import Buffer
from jaxalign.rollout.episodes import Episodes

METHODS: Mapping[str, types.ModuleType] = {
    "metra": metra,
    "lsd": lsd,
    "diayn": diayn,
    "csf": csf,
    "random": uniform,
}


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What a run does; every field is a flag of the command line."""

    environment: str = "plane"
    physics: Literal["host", "exact", "fast"] = "host"  # of MuJoCo's environments
    arms: tuple[str, ...] = ("metra", "diayn", "random")
    metra: METRA = METRA()
    lsd: LSD = LSD()
    diayn: DIAYN = DIAYN()
    csf: CSF = CSF()
    random: Uniform = Uniform()
    environments: int = 8  # side by side, of each seed: the episodes of an epoch
    epochs: int = 1000
    updates: int = 50  # gradient steps of an epoch
    at_once: int = 10  # epochs in a dispatch, and in a row of metrics
    buffer: int = 1_000_000  # transitions
    warm_up: int = 10_000  # transitions before the first gradient step
    evaluate_every: int = 100  # epochs
    shown: int = 48  # skills of an evaluation
    goals: int = 50  # of an evaluation
    goal_radius: float = 1.0
    save_every: int = 100  # epochs
    mesh: str = "data=-1"
    tensorboard: bool = False
    wandb: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        limits.known("arms", self.arms, METHODS)
        positive = ("environments", "epochs", "updates", "at_once", "evaluate_every", "shown")
        for name in (*positive, "goals", "save_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)}: must be at least 1")
        if self.warm_up < 0 or self.goal_radius <= 0:
            raise UserError(
                f"warm_up = {self.warm_up}, goal_radius = {self.goal_radius}: the first must not "
                "be negative, the second must be positive"
            )
        for name in ("epochs", "evaluate_every", "save_every"):
            if getattr(self, name) % self.at_once:
                raise UserError(
                    f"{name} = {getattr(self, name)}: must be a multiple of at_once = "
                    f"{self.at_once}, the epochs in a dispatch"
                )


class Lab(NamedTuple):
    """What all arms share. world: the environment's arrays, on the devices."""

    environment: Environment
    world: PyTree
    mesh: jax.sharding.Mesh


class Memory(NamedTuple):
    """What a seed remembers beside its networks: `TrainState.extra` during a run.

    own: what the method remembers. visited: the cells of all training episodes so far.
    """

    own: PyTree
    buffer: Buffer
    visited: Array


# All seeds write the same rows of their buffers.
AXES = seed_axis.OF._replace(extra=Memory(own=0, buffer=Buffer(0, None, None), visited=0))  # ty: ignore[invalid-argument-type]


def check(config: Experiment, seeds: int) -> None:
    """Raises UserError for what is wrong with a run of so many seeds; nothing is written yet."""
    environment = skill_worlds.make(config.environment, config.physics)
    seed_axis.make_mesh(config.mesh, seeds)
    rows = config.environments * environment.steps
    if config.buffer % rows:
        raise UserError(
            f"buffer = {config.buffer}: must be a multiple of the {rows} transitions of an epoch "
            f"({config.environments} episodes of {environment.steps} steps)"
        )
    for arm in config.arms:
        own = getattr(config, arm)
        if arm != "random" and config.buffer < own.batch:
            raise UserError(
                f"buffer = {config.buffer}: must hold a batch, {arm}.batch = {own.batch}"
            )


def make_lab(config: Experiment, seeds: int) -> Lab:
    """The lab of a run of so many seeds."""
    mesh = seed_axis.make_mesh(config.mesh, seeds)
    environment = skill_worlds.make(config.environment, config.physics)
    world = distributed.put(environment.world, meshes.replicated(mesh))
    return Lab(environment, world, mesh)


# --- an epoch -------------------------------------------------------------------------------------


def start_state(
    method: types.ModuleType,
    own: Any,
    environment: Environment,
    capacity: int,
    seeds: Sequence[int],
) -> TrainState:
    """Every seed's state before its first epoch, as one: `AXES` says along which axes."""

    def one(key: Array) -> TrainState:
        sizes = environment.observation_size, environment.action_size
        state = method.init(own, *sizes, environment.offset, environment.scale, key)
        observation, action = (jnp.zeros(size) for size in sizes)
        example = Transitions(
            observation, action, observation, jnp.zeros(own.skill_size), jnp.zeros(())
        )
        nowhere = coverage.cells(environment.place(observation[None]), skill_worlds.REACH)
        memory = Memory(state.extra, buffers.create(example, capacity), jnp.zeros_like(nowhere))
        return state._replace(extra=memory)

    keys = jax.vmap(jax.random.key)(np.asarray(seeds))
    return jax.jit(jax.vmap(one, out_axes=AXES))(keys)


def learner(state: TrainState) -> TrainState:
    """The state as its method knows it."""
    return state._replace(extra=state.extra.own)


def transitions(walked: Episodes, skills: Array, own: Any) -> Transitions:
    """The rows `[T * E, ...]` of episodes with the skills `[E, D]`."""
    before, after = walked.observations[:-1], walked.observations[1:]
    steps, count = walked.actions.shape[:2]
    last = jnp.zeros((steps, count)).at[-1].set(float(own.terminal_at_limit))
    skills = jnp.broadcast_to(skills[None], (steps, *skills.shape))
    rows = Transitions(before, walked.actions, after, skills, last)
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), rows)


def remember(
    environment: Environment, state: TrainState, walked: Episodes, skills: Array, own: Any
) -> TrainState:
    """The state with the episodes in its buffer, and their places visited."""
    memory = state.extra
    places = environment.place(walked.observations).reshape(-1, *_place_shape(environment))
    visited = memory.visited | coverage.cells(places, skill_worlds.REACH)
    buffer = buffers.write(memory.buffer, transitions(walked, skills, own))
    return state._replace(extra=memory._replace(buffer=buffer, visited=visited))


def _place_shape(environment: Environment) -> tuple[int, ...]:
    observation = jax.ShapeDtypeStruct((environment.observation_size,), jnp.float32)
    return jax.eval_shape(environment.place, observation).shape


def learn(
    method: types.ModuleType, own: Any, state: TrainState, count: Array, key: Array
) -> tuple[TrainState, dict[str, Array]]:
    """`count []` gradient steps; metrics are means over them, 0 without any, and their number."""
    buffer = state.extra.buffer

    def update(i: Array, state: TrainState) -> tuple[TrainState, dict[str, Array]]:
        draw_key, update_key = jax.random.split(jax.random.fold_in(key, i))
        batch = buffers.sample(buffer, draw_key, own.batch)
        return method.update(own, state, batch, update_key)

    def body(i: Array, carry: tuple) -> tuple:
        state, log = update(i, carry[0])
        return state, jax.tree.map(jnp.add, carry[1], log)

    start = learner(state)
    shapes = jax.eval_shape(update, jnp.int32(0), start)[1]
    log = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    done, log = jax.lax.fori_loop(0, count, body, (start, log))
    memory = state.extra._replace(own=done.extra)
    log = {name: total / jnp.maximum(count, 1) for name, total in log.items()}
    return done._replace(step=state.step, extra=memory), {**log, "updates": count}


def make_training(
    method: types.ModuleType, own: Any, lab: Lab, config: Experiment, seeds: Sequence[int]
) -> Callable[[TrainState, PyTree, Array], tuple[TrainState, dict[str, Array]]]:
    """`config.at_once` epochs of every seed as one program; metrics are `[S]`.

    A seed learns the same whichever others there are. The state is donated.
    """
    environment = lab.environment

    def epoch(
        world: PyTree, first: Array, key: Array, state: TrainState, i: Array
    ) -> tuple[TrainState, dict[str, Array]]:
        keys = jax.random.split(jax.random.fold_in(key, i), 3)
        skills = skill_ops.sample(keys[0], config.environments, own.skill_size, own.discrete)
        walked = walk(method, own, environment, learner(state), world, skills, keys[1], 1.0)
        state = remember(environment, state, walked, skills, own)
        count = updates_of(config, environment, first + i)
        return learn(method, own, state, count, keys[2])

    def many(state: TrainState, world: PyTree, key: Array) -> tuple[TrainState, dict[str, Array]]:
        first = state.step * config.at_once
        run = functools.partial(epoch, world, first, key)
        state, log = jax.lax.scan(run, state, jnp.arange(config.at_once))
        return state, {name: values[-1] for name, values in log.items()}

    def dispatch(
        state: TrainState, world: PyTree, key: Array
    ) -> tuple[TrainState, dict[str, Array]]:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray(seeds))
        step = state.step + 1
        both = jax.vmap(many, in_axes=(AXES, None, 0), out_axes=(AXES, 0))
        state, log = both(state, world, keys)
        return state._replace(step=step), log

    return jax.jit(dispatch, donate_argnums=0)


def updates_of(config: Experiment, environment: Environment, epoch: Array) -> Array:
    """Gradient steps of an epoch, `[] i32`: none until the buffer has warmed up.

    A traced number, so that one program serves both.
    """
    rows = config.environments * environment.steps
    return jnp.where((epoch + 1) * rows >= config.warm_up, config.updates, 0)


# --- evaluation -----------------------------------------------------------------------------------


# state of all seeds -> what they show, and {"NAME": [S]}
Evaluation = Callable[[TrainState], tuple[Shown, dict[str, Array]]]


def make_evaluation(
    method: types.ModuleType, own: Any, lab: Lab, config: Experiment, seeds: Sequence[int]
) -> Evaluation:
    """Shows and judges the skills of all seeds; with the same draws at every call."""

    def evaluate(
        state: TrainState, visited: Array, world: PyTree, key: Array
    ) -> tuple[Shown, dict[str, Array]]:
        shown = show(method, own, lab.environment, config, state, world, key)
        return shown, numbers(shown, visited, config.goal_radius)

    compiled = jax.jit(jax.vmap(evaluate, in_axes=(seed_axis.OF, 0, None, 0)))
    keys = jax.vmap(lambda seed: jax.random.key(10_000 + seed))(np.asarray(seeds))
    keys = distributed.put(keys, meshes.replicated(lab.mesh))
    return lambda state: compiled(learner(state), state.extra.visited, lab.world, keys)


# --- one arm --------------------------------------------------------------------------------------


def train_arm(
    lab: Lab, config: Experiment, arm: str, directories: Mapping[int, Path], *, resume: bool
) -> None:
    """Trains one arm with all seeds, each of which leaves its numbers in its own folder.

    directories: of the arm, by seed. The checkpoints, buffers and all, lie in the first one.
    """
    method, own, seeds = METHODS[arm], getattr(config, arm), list(directories)
    step, evaluation = make_step(method, own, lab, config, seeds)
    state = start_state(method, own, lab.environment, config.buffer, seeds)
    state, _ = seed_axis.spread(state, len(seeds), lab.mesh)
    key = distributed.put(jax.random.key(config.seed), meshes.replicated(lab.mesh))
    rows = config.environments * lab.environment.steps

    def measure(state: TrainState, step: int) -> dict[str, Any]:
        epochs = step * config.at_once
        found = evaluation(state)[1]
        counted = {"epochs": epochs, "environment_steps": epochs * rows}
        counted["mean_coverage"] = found["coverage"].mean()
        return {**found, **counted}

    state = seed_axis.train(
        state,
        step,
        lab.world,
        key,
        config,
        arm,
        directories,
        Hook(config.evaluate_every // config.at_once, measure),
        steps=config.epochs // config.at_once,
        save_every=config.save_every // config.at_once,
        speed=(config.at_once * len(seeds) * rows, "environment steps"),
        shown="mean_coverage",
        resume=resume,
    )
    finish_arm(config, arm, directories, evaluation(state)[0])


def make_step(
    method: types.ModuleType, own: Any, lab: Lab, config: Experiment, seeds: Sequence[int]
) -> tuple[Callable[..., Any], Evaluation]:
    """Training and evaluation, with the physics compiled or on the host."""
    where: Any = sys.modules[__name__]
    if config.physics == "host" and skill_worlds.is_mujoco(config.environment):
        from experiments import skills_host as where  # it needs MuJoCo
    return (
        where.make_training(method, own, lab, config, seeds),
        where.make_evaluation(method, own, lab, config, seeds),
    )


def finish_arm(config: Experiment, arm: str, directories: Mapping[int, Path], shown: Shown) -> None:
    """Every seed's `result.json`, and the walks of its skills for the pictures: `skills.npz` with
    skill `[K, D]`, place `[T+1, K, P]` and, where there is one, latent `[T+1, K, D]`. Of MuJoCo's
    walkers the first seed also leaves `skills.gif`, where it can draw.
    """
    for i, (seed, directory) in enumerate(directories.items()):
        row = sinks.read_json_lines(directory / "metrics.jsonl")[-1]
        result = {name: value for name, value in row.items() if name != "step"}
        sinks.write_json(directory / "result.json", {"arm": arm, "seed": seed, **result})
        arrays = {"skill": shown.skills[i], "place": shown.places[i]}
        if shown.latents is not None:
            arrays["latent"] = shown.latents[i]
        stored: dict[str, Any] = distributed.fetch(arrays)
        with sinks.replacing(directory / "skills.npz") as temporary, temporary.open("wb") as file:
            np.savez(file, **stored)
        if i == 0 and skill_worlds.is_mujoco(config.environment):
            film(config.environment, distributed.fetch(shown.seen[i]), directory / "skills.gif")


def run_arms(
    lab: Lab, config: Experiment, directories: Mapping[int, Path], *, resume: bool
) -> None:
    """All arms, then each seed's `result.json` with "ARM/NUMBER" keys."""
    for arm in config.arms:
        own = {seed: directory / arm for seed, directory in directories.items()}
        train_arm(lab, config, arm, own, resume=resume)
    seed_axis.gather(directories, config.arms)
