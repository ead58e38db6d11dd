"""Offline goal-conditioned RL: a data set on the device, arms trained on it, and how far they get.

All seeds of a run are one compiled program, a thousand or so updates at a time: goals are drawn,
networks updated and, in the point mazes, tasks attempted without leaving the device. Other tasks
are attempted in OGBench's real environments (`experiments.real_envs`).

Dimensions: S seeds, N stored states, O observation, A action, E attempts side by side.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import types
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import offline_data, ogbench_settings, seed_axis, sweep
from experiments.offline_report import last_evaluations
from experiments.ogbench_settings import METHODS, TASKS
from experiments.real_envs import RealEnvironments as Real
from jaxalign.core import distributed, limits
from jaxalign.core import mesh as meshes
from jaxalign.core import metrics as sinks
from jaxalign.core.loop import Hook
from jaxalign.core.state import TrainState
from jaxalign.core.types import Array, Params, PyTree, UserError
from jaxalign.data import ogbench_play, trajectories
from jaxalign.data.trajectories import Trajectories
from jaxalign.envs import pointmaze
from jaxalign.methods.crl import Config as CRL
from jaxalign.methods.gcbc import Config as GCBC
from jaxalign.methods.gciql import Config as GCIQL
from jaxalign.methods.gcivl import Config as GCIVL
from jaxalign.methods.hiql import Config as HIQL
from jaxalign.methods.qrl import Config as QRL
from jaxalign.ops import goals
from jaxalign.rollout import episodes


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What a run does; every field is a flag of the command line."""

    task: str = "pointmaze-medium-navigate"
    data: str = ""  # folder of OGBench's files, TASK-v0.npz; without one the data are made here
    data_episodes: int = 0  # of data made here; 0: as many as OGBench's have
    data_seed: int = 0
    arms: tuple[str, ...] = ("hiql", "gcbc")
    gcbc: GCBC = GCBC()
    gcivl: GCIVL = GCIVL()
    gciql: GCIQL = GCIQL()
    qrl: QRL = QRL()
    crl: CRL = CRL()
    hiql: HIQL = HIQL()
    sweep: tuple[str, ...] = ()  # numbers side by side, as low_alpha=1,3 expectile=0.7,0.9
    updates: int = 1_000_000
    at_once: int = 1000  # updates in a dispatch, and in a row of metrics
    evaluate_every: int = 100_000  # updates
    attempts: int = 50  # at each of the five tasks
    real: bool = False  # attempts in the real environment too, after the last update
    save_every: int = 100_000  # updates
    mesh: str = "data=-1"
    tensorboard: bool = False
    wandb: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        limits.known("arms", self.arms, METHODS)
        for name in ("updates", "at_once", "evaluate_every", "attempts", "save_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)}: must be at least 1")
        for name in ("updates", "evaluate_every", "save_every"):
            if getattr(self, name) % self.at_once:
                raise UserError(
                    f"{name} = {getattr(self, name)}: must be a multiple of at_once = "
                    f"{self.at_once}, the updates in a dispatch"
                )
        for arm in self.arms:
            sweep.variants(self.sweep, getattr(self, arm), arm)  # or say what is wrong
        if self.data_episodes < 0:
            raise UserError(f"data_episodes = {self.data_episodes}: must not be negative")


class Row(NamedTuple):
    """One of the learners that are trained as one program.

    arm: its name among the results, with the numbers that are varied. seed: of its own.
    """

    arm: str
    numbers: Mapping[str, float]
    seed: int
    directory: Path


class Lab(NamedTuple):
    """What all arms share.

    data: on the devices. provenance: where the data come from. maze: None where tasks are attempted
    in real environments only.
    """

    data: Trajectories
    provenance: Mapping[str, Any]
    maze: pointmaze.Maze | None
    mesh: jax.sharding.Mesh


def check(config: Experiment, seeds: int) -> None:
    """Raises UserError for what is wrong with a run of so many seeds; nothing is written yet."""
    ogbench_settings.split(config.task)
    mesh = seed_axis.make_mesh(config.mesh, seeds * settings_of(config))
    for arm in config.arms:
        meshes.check_divisible(f"{arm}.batch", getattr(config, arm).batch, mesh)
    if config.real or not offline_data.in_maze(config.task):
        ogbench_play.require_packages(f"the environment of {config.task}")


def settings_of(config: Experiment) -> int:
    """How many variants each arm has."""
    arm = config.arms[0]
    return len(sweep.variants(config.sweep, getattr(config, arm), arm))


# --- data -----------------------------------------------------------------------------------------


def make_lab(config: Experiment, seeds: int) -> Lab:
    """The lab of a run of so many seeds; makes the data where they are not stored."""
    mesh = seed_axis.make_mesh(config.mesh, seeds * settings_of(config))
    arrays, provenance = offline_data.read(
        config.task, config.data, config.data_episodes, config.data_seed
    )
    maze = (
        pointmaze.make(offline_data.environment(config.task))
        if offline_data.in_maze(config.task)
        else None
    )
    data = trajectories.index(arrays)
    data, maze = distributed.put((data, maze), meshes.replicated(mesh))
    return Lab(data, provenance, maze, mesh)


# --- training -------------------------------------------------------------------------------------


def start_state(
    method: types.ModuleType, config: Any, data: Trajectories, seeds: Sequence[int]
) -> TrainState:
    """Every seed's state before its first update, as one: `seed_axis.OF` says along which axes."""
    sizes = data.observations.shape[1], data.actions.shape[1]
    keys = jax.vmap(jax.random.key)(np.asarray(seeds))
    state = jax.jit(jax.vmap(lambda key: method.init(config, *sizes, key)))(keys)
    return state._replace(step=jnp.zeros((), jnp.int32))


def make_training(
    method: types.ModuleType,
    config: Any,
    seeds: Sequence[int],
    updates: int,
    rows: jax.sharding.NamedSharding | None = None,
    numbers: Mapping[str, np.ndarray] = types.MappingProxyType({}),
) -> Callable[[TrainState, Trajectories, Array], tuple[TrainState, dict[str, Array]]]:
    """So many updates of every seed as one program; metrics `[S]` are means over them.

    A seed learns the same whichever others there are. The state is donated.
    rows: how batches lie on a mesh. numbers: of the settings `[S]`, where seeds differ in them.
    """

    def learn(
        state: TrainState, data: Any, key: Array, own: Mapping[str, Array]
    ) -> tuple[TrainState, dict[str, Array]]:
        settings = sweep.traced(config, own)

        def update(state: TrainState, i: Array) -> tuple[TrainState, dict[str, Array]]:
            sample_key, update_key = jax.random.split(jax.random.fold_in(key, i))
            batch = goals.sample(data, settings.goals, sample_key, config.batch)
            if rows is not None:
                batch = jax.lax.with_sharding_constraint(batch, rows)
            return method.update(settings, state, batch, update_key)

        state, log = jax.lax.scan(update, state, jnp.arange(updates))
        return state, {name: values.mean() for name, values in log.items()}

    def dispatch(
        state: TrainState, data: Trajectories, key: Array
    ) -> tuple[TrainState, dict[str, Array]]:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray(seeds))
        step = state.step + 1
        many = jax.vmap(learn, in_axes=(seed_axis.OF, None, 0, 0), out_axes=(seed_axis.OF, 0))
        state, log = many(state, data, keys, jax.tree.map(jnp.asarray, dict(numbers)))
        return state._replace(step=step), log

    return jax.jit(dispatch, donate_argnums=0)


# --- evaluation -----------------------------------------------------------------------------------


def attempt(
    method: types.ModuleType, config: Any, attempts: int, params: Params, maze: PyTree, key: Array
) -> Array:
    """Success `[TASKS, attempts] bool` of one seed's policy, with its modes as actions."""
    return episodes.evaluate(
        functools.partial(pointmaze.reset, maze),
        functools.partial(pointmaze.step, maze),
        pointmaze.success,
        lambda state: (pointmaze.observe(state), state.goal),
        lambda seen, key: method.act(config, params, *seen, key, 0.0),
        TASKS,
        attempts,
        pointmaze.HORIZON,
        key,
    ).success


def make_evaluation(
    lab: Lab, config: Experiment, arm: str, seeds: Sequence[int], real: Real | None
) -> Callable[[Params], Array | np.ndarray]:
    """`params of all seeds -> success [S, TASKS, attempts]`; the same starts at every call.

    real: where tasks are attempted if not in a maze of our own.
    """
    method, own = METHODS[arm], getattr(config, arm)
    if lab.maze is None:
        return functools.partial(attempt_really, config, arm, seeds, real)
    compiled = jax.jit(
        jax.vmap(functools.partial(attempt, method, own, config.attempts), in_axes=(0, None, 0))
    )
    keys = jax.vmap(lambda seed: jax.random.key(10_000 + seed))(np.asarray(seeds))
    given = distributed.put((lab.maze, keys), meshes.replicated(lab.mesh))
    return lambda params: compiled(params, *given)


def attempt_really(
    config: Experiment, arm: str, seeds: Sequence[int], real: Real | None, params: Params
) -> np.ndarray:
    """Success `[S, TASKS, attempts]` in the real environment."""
    assert real is not None
    act = jax.jit(functools.partial(METHODS[arm].act, getattr(config, arm)))
    found, total = [], TASKS * config.attempts
    with sinks.Progress(len(seeds) * total, f"{arm} in OGBench", 0, (1, "attempts")) as bar:
        for i, seed in enumerate(seeds):
            own = jax.tree.map(lambda leaf, i=i: leaf[i], params)
            policy = functools.partial(numpy_act, act, own, jax.random.key(0))
            done = functools.partial(_count, bar, i * total)
            found.append(real.evaluate(policy, config.attempts, 10_000 + seed, done))
    return np.stack(found)


def _count(bar: sinks.Progress, before: int, done: int) -> None:
    bar.update(before + done)


@contextlib.contextmanager
def open_real(config: Experiment) -> Generator[Real | None, None, None]:
    """The real environments of a run, where it needs them."""
    if not config.real and offline_data.in_maze(config.task):
        yield None
        return
    with Real(offline_data.environment(config.task)) as environments:
        yield environments


def numpy_act(
    act: Callable[..., Array], params: Params, key: Array, observation: Any, goal: Any
) -> np.ndarray:
    """The modes of a policy `[B, A]`, on the host."""
    return np.asarray(act(params, observation, goal, key))


def rates(success: Array | np.ndarray, name: str = "success") -> dict[str, Any]:
    """Shares of attempts that succeed: `{"success": [S], "success/task1": [S], ...}`."""
    by_task = success.mean(-1)
    tasks = {f"{name}/task{i + 1}": by_task[:, i] for i in range(TASKS)}
    return {name: by_task.mean(-1), **tasks}


# --- one arm --------------------------------------------------------------------------------------


def train_arm(
    lab: Lab,
    config: Experiment,
    arm: str,
    learners: Sequence[Row],
    real: Real | None,
    *,
    resume: bool,
) -> None:
    """Trains one arm, each of whose learners leaves its numbers in its own folder.

    The checkpoints lie in the first one's.
    """
    method, own, seeds = METHODS[arm], getattr(config, arm), [row.seed for row in learners]
    state = start_state(method, own, lab.data, seeds)
    state, rows = seed_axis.spread(state, len(seeds), lab.mesh)
    key = distributed.put(jax.random.key(config.seed), meshes.replicated(lab.mesh))
    numbers = sweep.stacked([row.numbers for row in learners])
    step = make_training(method, own, seeds, config.at_once, rows, numbers)
    evaluation = make_evaluation(lab, config, arm, seeds, real)

    def measure(state: TrainState, step: int) -> dict[str, Any]:
        found = rates(evaluation(state.params))
        counted = {"mean_success": found["success"].mean(), "updates": step * config.at_once}
        return {**found, **counted}

    state = seed_axis.train(
        state,
        step,
        lab.data,
        key,
        config,
        arm,
        {i: row.directory for i, row in enumerate(learners)},
        Hook(config.evaluate_every // config.at_once, measure),
        steps=config.updates // config.at_once,
        save_every=config.save_every // config.at_once,
        speed=(config.at_once * len(seeds), "updates"),
        shown="mean_success",
        resume=resume,
    )
    finish_arm(lab, config, arm, state, learners, real)


def finish_arm(
    lab: Lab,
    config: Experiment,
    arm: str,
    state: TrainState,
    learners: Sequence[Row],
    real: Real | None,
) -> None:
    """Every learner's `result.json`, and the walks of each variant's first for the pictures."""
    extra: dict[str, Any] = {}
    if config.real and lab.maze is not None:
        found = attempt_really(config, arm, [row.seed for row in learners], real, state.params)
        extra = rates(found, "real_success")
    for i, row in enumerate(learners):
        rows = sinks.read_json_lines(row.directory / "metrics.jsonl")
        result = {name: value for name, value in rows[-1].items() if name != "step"}
        result |= {name: float(values[i]) for name, values in extra.items()}
        result["success_last3"] = last_evaluations(rows, "success")
        about = {"arm": row.arm, "seed": row.seed, **row.numbers}
        sinks.write_json(row.directory / "result.json", {**about, **result})
        if lab.maze is not None and row.seed == learners[0].seed:
            params = jax.tree.map(lambda leaf, i=i: leaf[i], state.params)
            save_walks(lab, config, arm, params, row.directory)


def save_walks(lab: Lab, config: Experiment, arm: str, params: Params, directory: Path) -> None:
    """`walks.npz`: one attempt at each task, with values and subgoals over the maze where the
    method has them.

    position `[T+1, TASKS, 2]`, goal `[TASKS, 2]`, reached `[TASKS] i32` (the step, or the horizon);
    place `[P, 2]`, the free cells' centres; value `[TASKS, P]`; subgoal `[TASKS, P, 2]`.
    """
    method, own, maze = METHODS[arm], getattr(config, arm), lab.maze
    assert maze is not None
    place = pointmaze.centre(np.argwhere(~np.asarray(maze.walls))).astype(np.float32)

    @jax.jit
    def walk(params: Params, maze: pointmaze.Maze, place: Array, key: Array) -> dict[str, Array]:
        state = pointmaze.reset(maze, jnp.arange(TASKS), key)
        walked = episodes.unroll(
            functools.partial(pointmaze.step, maze),
            lambda state: (pointmaze.observe(state), state.goal),
            lambda seen, key: method.act(own, params, *seen, key, 0.0),
            state,
            key,
            pointmaze.HORIZON,
            pointmaze.success,
        )
        reached = jnp.where(walked.outcome.any(0), walked.outcome.argmax(0), pointmaze.HORIZON)
        found = {"position": walked.observations[0], "goal": state.goal, "reached": reached}
        far = jnp.repeat(state.goal, place.shape[0], axis=0)
        here = jnp.tile(place, (TASKS, 1))
        if hasattr(method, "value"):
            value = method.value(own, params, here, far)
            found["value"] = value.reshape(TASKS, -1)
        if hasattr(method, "subgoal"):
            chosen = method.subgoal(own, params, here, far, place)
            found["subgoal"] = place[chosen].reshape(TASKS, -1, 2)
        return found

    found = walk(params, maze, jnp.asarray(place), jax.random.key(20_000 + config.seed))
    arrays: dict[str, Any] = distributed.fetch(found)
    arrays |= {"place": place, "walls": np.asarray(maze.walls)}
    with sinks.replacing(directory / "walks.npz") as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def run_arms(
    lab: Lab, config: Experiment, directories: Mapping[int, Path], *, resume: bool
) -> None:
    """All arms, then each seed's `result.json` with "ARM/NUMBER" keys."""
    names: list[str] = []
    with open_real(config) as real:
        for arm in config.arms:
            found = sweep.variants(config.sweep, getattr(config, arm), arm)
            learners = [
                Row(name, numbers, seed, directory / name)
                for name, numbers in found.items()
                for seed, directory in directories.items()
            ]
            train_arm(lab, config, arm, learners, real, resume=resume)
            names += found
    data = {f"data/{name}": str(value) for name, value in lab.provenance.items()}
    seed_axis.gather(directories, names, data)
