"""Control with frozen skills: a high level learns which of them to pick, rewarded by a task.

    python -m experiments.downstream [plane | ant | half-cheetah-goal | half-cheetah-hurdle | tiny]
                                     [--skills RUN_DIR]

RUN_DIR is the work directory of a run of `experiments.metra`, from which the policies come, without
noise in their actions. An arm is the skills of one method; `random` picks those of the first arm at
random. Continuous skills are picked by soft actor-critic, one-hot ones by PPO. The i-th seed here
has the skills of the i-th seed there, again from the first one where those are fewer.

Walks, the high level's memory and its gradient steps are one compiled program, for all seeds of an
arm together. MuJoCo's walkers are compiled for it by MJX, which is meant for accelerators: skills
that were learned with physics "host" are tried in "exact".

Dimensions: S seeds, E episodes of an epoch, T choices of an episode, O observation (of the high
level), D skill.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import cli, metra, report, seed_axis, skill_worlds, skills
from jaxalign.core import distributed, places
from jaxalign.core import mesh as meshes
from jaxalign.core import metrics as sinks
from jaxalign.core.checkpoint import Checkpoints
from jaxalign.core.loop import Hook
from jaxalign.core.state import TrainState
from jaxalign.core.types import Array, PyTree, UserError
from jaxalign.envs import skill_tasks
from jaxalign.envs.skill_tasks import Choices, Task
from jaxalign.methods import skill_control_ppo, skill_control_sac, uniform
from jaxalign.methods.skill_control_ppo import Config as PPO
from jaxalign.methods.skill_control_sac import Config as SAC
from jaxalign.ops import skills as skill_ops
from jaxalign.rollout import episodes
from jaxalign.rollout.buffer import Buffer
from jaxalign.rollout.episodes import Episodes

RANDOM = "random"


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What a run does; every field is a flag of the command line."""

    control: str = "plane-multi-goals"  # the task
    skills: str = ""  # work directory of the run of experiments.metra that learned them
    preset: str = ""  # of experiments.metra; learns them here where no skills are given
    arms: tuple[str, ...] = ("metra", "diayn", RANDOM)
    sac: SAC = SAC()
    ppo: PPO = PPO()
    epochs: int = 10_000
    at_once: int = 10  # epochs in a dispatch, and in a row of metrics
    evaluate_every: int = 100  # epochs
    shown: int = 48  # episodes of an evaluation
    save_every: int = 1000  # epochs
    mesh: str = "data=-1"
    tensorboard: bool = False
    wandb: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        skill_tasks.find(self.control)
        if not self.arms or self.arms[0] == RANDOM:
            raise UserError(f"arms = {self.arms}: the first one must be of a method; give metra")
        for name in ("epochs", "at_once", "evaluate_every", "shown", "save_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)}: must be at least 1")
        for name in ("epochs", "evaluate_every", "save_every"):
            if getattr(self, name) % self.at_once:
                raise UserError(
                    f"{name} = {getattr(self, name)}: must be a multiple of at_once = "
                    f"{self.at_once}, the epochs in a dispatch"
                )


class Skills(NamedTuple):
    """Frozen skills of one method.

    method: its module. own: its config. state: of all seeds, as the method knows it.
    """

    method: types.ModuleType
    own: Any
    state: TrainState


class Chooser(NamedTuple):
    """What picks skills.

    method: its module. own: its config. at_random: whether its choice is overruled by a random one.
    """

    method: types.ModuleType
    own: Any
    at_random: bool


class Lab(NamedTuple):
    """What all arms share. world: the environment's arrays, on the devices."""

    task: Task
    world: PyTree
    mesh: jax.sharding.Mesh


# --- skills ---------------------------------------------------------------------------------------


def learn_skills(config: Experiment, seeds: Sequence[int], directory: Path) -> None:
    """Learns the skills that were not given, or what is left of it, in a run of its own."""
    asked = wanted_skills(config)
    directories = {seed: directory / f"seed-{seed}" for seed in seeds}
    if all((each / "result.json").exists() for each in directories.values()):
        return
    for seed, each in directories.items():
        each.mkdir(parents=True, exist_ok=True)
        own = dataclasses.asdict(dataclasses.replace(asked, seed=seed))
        sinks.write_json(each / "config.json", own)
    skills.run_arms(skills.make_lab(asked, len(seeds)), asked, directories, resume=True)


def wanted_skills(config: Experiment) -> skills.Experiment:
    """The experiment that learns the skills where none are given.

    Raises: UserError unless `preset` names one that learns them in the task's environment.
    """
    asked = metra.PRESETS[config.preset]() if config.preset in metra.PRESETS else None
    wanted = skill_tasks.find(config.control).environment
    if not isinstance(asked, skills.Experiment) or asked.environment != wanted:
        raise UserError(
            f"skills = '', preset = {config.preset!r}: {config.control} needs skills learned in "
            f"{wanted!r}; give as --skills the work directory of a run of experiments.metra"
        )
    return dataclasses.replace(asked, arms=tuple(arm for arm in config.arms if arm != RANDOM))


def find_skills(directory: Path, config: Experiment) -> tuple[skills.Experiment, dict[int, Path]]:
    """The experiment that learned skills, and its folders by seed.

    Raises: UserError where there is none, it was of another environment, or lacks an arm.
    """
    try:
        folders = sorted(directory.glob("seed-*"), key=lambda path: int(path.name[5:]))
        folders = folders or [directory]
        configs = [json.loads((folder / "config.json").read_text()) for folder in folders]
        experiment = _filled(skills.Experiment(), configs[0])
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"skills = {str(directory)!r}: no run of experiments.metra ({error}); give the "
            "--workdir of one"
        ) from None
    wanted = skill_tasks.find(config.control).environment
    if experiment.environment != wanted:
        raise UserError(
            f"skills = {str(directory)!r}: learned in {experiment.environment!r}, but "
            f"{config.control} needs those of {wanted!r}; give another run or task"
        )
    for arm in config.arms:
        if arm != RANDOM and not places.shared(folders[0] / arm / "ckpt").is_dir():
            raise UserError(f"arms: {directory} has no checkpoint of {arm!r}; leave it out")
    return experiment, {each["seed"]: folder for each, folder in zip(configs, folders, strict=True)}


def _filled(default: Any, values: Mapping[str, Any]) -> Any:
    """A config of the default's class with the values of a `config.json`."""
    changes = {}
    for name, value in values.items():
        there = getattr(default, name)
        nested = dataclasses.is_dataclass(there)
        changes[name] = _filled(there, value) if nested else value
        if isinstance(value, list):
            changes[name] = tuple(value)
    return type(default)(**changes)


def load_skills(
    experiment: skills.Experiment, folders: Mapping[int, Path], arm: str, count: int
) -> Skills:
    """The policies of an arm, for `count` seeds, from its newest checkpoint.

    The whole checkpoint is read, with its buffer of transitions. Raises: UserError without one.
    """
    method, own = skills.METHODS[arm], getattr(experiment, arm)
    environment = skill_worlds.make(experiment.environment, experiment.physics)
    start = functools.partial(
        skills.start_state, method, own, environment, experiment.buffer, list(folders)
    )
    path = next(iter(folders.values())) / arm / "ckpt"
    with contextlib.closing(Checkpoints(path)) as checkpoints:
        found = checkpoints.restore(jax.eval_shape(start))
    if found is None:
        raise UserError(f"{path}: holds no checkpoint; finish that run with --resume")
    state = skills.learner(found[0])._replace(opt_state={}, slow={})
    which = np.arange(count) % len(folders)
    return Skills(method, own, jax.tree.map(lambda leaf: leaf[which] if leaf.ndim else leaf, state))


# --- an epoch -------------------------------------------------------------------------------------


def chooser(config: Experiment, arm: str, own: Any) -> Chooser:
    """What picks the skills of an arm. own: the config of the method whose skills they are."""
    if own.discrete:
        method, chosen = skill_control_ppo, config.ppo
    else:
        method, chosen = skill_control_sac, config.sac
    return Chooser(method, chosen, arm == RANDOM)


def start_state(high: Chooser, own: Any, task: Task, seeds: Sequence[int]) -> TrainState:
    """Every seed's high level before its first epoch, as one: `axes` says along which axes."""
    offset, scale = skill_tasks.normaliser(task)

    def one(key: Array) -> TrainState:
        if high.at_random:
            return uniform.init(uniform.Config(), len(offset), own.skill_size, offset, scale, key)
        return high.method.init(high.own, len(offset), own.skill_size, offset, scale, key)

    keys = jax.vmap(jax.random.key)(np.asarray(seeds))
    return jax.jit(jax.vmap(one, out_axes=axes(high)))(keys)


def axes(high: Chooser) -> TrainState:
    """The axis of the seeds in each part of a high level's state. All fill their buffers alike."""
    if high.at_random or high.method is not skill_control_sac:
        return seed_axis.OF
    extra = {"offset": 0, "scale": 0, "buffer": Buffer(0, None, None)}  # ty: ignore[invalid-argument-type]
    return seed_axis.OF._replace(extra=extra)


def walk(
    high: Chooser,
    low: Skills,
    task: Task,
    state: TrainState,
    world: PyTree,
    count: int,
    key: Array,
    temperature: float,
) -> Episodes:
    """So many episodes of a seed: choices as actions `[T, E, D]`, what they earn `[T, E]`.

    state: of the high level.
    """
    reset_key, key = jax.random.split(key)
    size, discrete = low.own.skill_size, low.own.discrete

    def carry_out(seen: Array, skill: Array, key: Array) -> Array:
        return low.method.act(low.own, low.state, seen, skill, key, 0.0)

    def choose(seen: Array, key: Array) -> Array:
        if high.at_random:
            return skill_ops.sample(key, count, size, discrete)
        return high.method.act(high.own, state, seen, key, temperature)

    def step(state: skill_tasks.State, choice: Array) -> skill_tasks.State:
        skill = skill_ops.along(choice, discrete)
        return skill_tasks.step(task, world, carry_out, state, skill)

    return episodes.unroll(
        step,
        functools.partial(skill_tasks.observe, task),
        choose,
        skill_tasks.reset(task, world, count, reset_key),
        key,
        task.choices,
        lambda state: state.reward,
    )


def choices(walked: Episodes) -> Choices:
    """What is remembered of episodes, `[T, E, ...]`."""
    before, after = walked.observations[:-1], walked.observations[1:]
    last = jnp.zeros(walked.outcome.shape).at[-1].set(1.0)
    return Choices(before, walked.actions, after, walked.outcome, last)


def make_training(
    high: Chooser, low: Skills, lab: Lab, config: Experiment, seeds: Sequence[int]
) -> Callable[[TrainState, PyTree, Array], tuple[TrainState, dict[str, Array]]]:
    """`config.at_once` epochs of every seed as one program; metrics are `[S]`.

    Its batch is the state of the skills and the world. The high level's state is donated.
    """

    def epoch(
        skilled: TrainState, world: PyTree, key: Array, state: TrainState, i: Array
    ) -> tuple[TrainState, dict[str, Array]]:
        walk_key, key = jax.random.split(jax.random.fold_in(key, i))
        own = low._replace(state=skilled)
        walked = walk(high, own, lab.task, state, world, high.own.episodes, walk_key, 1.0)
        log = {}
        if not high.at_random:
            state, log = high.method.update(high.own, state, choices(walked), key)
        return state, {**log, "train/return": walked.outcome.sum(0).mean()}

    def many(
        state: TrainState, skilled: TrainState, world: PyTree, key: Array
    ) -> tuple[TrainState, dict[str, Array]]:
        run = functools.partial(epoch, skilled, world, key)
        state, log = jax.lax.scan(run, state, jnp.arange(config.at_once))
        return state, {name: values.mean() for name, values in log.items()}

    def dispatch(
        state: TrainState, batch: tuple[TrainState, PyTree], key: Array
    ) -> tuple[TrainState, dict[str, Array]]:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray(seeds))
        own, step = axes(high), state.step + 1
        both = jax.vmap(many, in_axes=(own, seed_axis.OF, None, 0), out_axes=(own, 0))
        state, log = both(state, *batch, keys)
        return state._replace(step=step), log

    return jax.jit(dispatch, donate_argnums=0)


def make_evaluation(
    high: Chooser, low: Skills, lab: Lab, config: Experiment, seeds: Sequence[int]
) -> Callable[[TrainState], Array]:
    """Mean return `[S]` of episodes without noise in the choices; the same draws at every call."""

    def evaluate(state: TrainState, skilled: TrainState, world: PyTree, key: Array) -> Array:
        own = low._replace(state=skilled)
        walked = walk(high, own, lab.task, state, world, config.shown, key, 0.0)
        return walked.outcome.sum(0).mean()

    compiled = jax.jit(jax.vmap(evaluate, in_axes=(axes(high), seed_axis.OF, None, 0)))
    keys = jax.vmap(lambda seed: jax.random.key(10_000 + seed))(np.asarray(seeds))
    keys = distributed.put(keys, meshes.replicated(lab.mesh))
    return lambda state: compiled(state, low.state, lab.world, keys)


# --- a run ----------------------------------------------------------------------------------------


def train_arm(
    lab: Lab,
    config: Experiment,
    arm: str,
    low: Skills,
    directories: Mapping[int, Path],
    *,
    resume: bool,
) -> None:
    """Trains one arm with all seeds, each of which leaves its numbers in its own folder.

    directories: of the arm, by seed. The checkpoints lie in the first one.
    """
    seeds, high = list(directories), chooser(config, arm, low.own)
    low = low._replace(state=seed_axis.spread(low.state, len(seeds), lab.mesh)[0])
    state = start_state(high, low.own, lab.task, seeds)
    state, _ = seed_axis.spread(state, len(seeds), lab.mesh)
    key = distributed.put(jax.random.key(config.seed), meshes.replicated(lab.mesh))
    evaluation = make_evaluation(high, low, lab, config, seeds)
    rows = high.own.episodes * lab.task.choices * lab.task.hold

    def measure(state: TrainState, step: int) -> dict[str, Any]:
        found, epochs = evaluation(state), step * config.at_once
        counted = {"epochs": epochs, "environment_steps": epochs * rows}
        return {"return": found, "mean_return": found.mean(), **counted}

    seed_axis.train(
        state,
        make_training(high, low, lab, config, seeds),
        (low.state, lab.world),
        key,
        config,
        arm,
        directories,
        Hook(config.evaluate_every // config.at_once, measure),
        steps=config.epochs // config.at_once,
        save_every=config.save_every // config.at_once,
        speed=(config.at_once * len(seeds) * rows, "environment steps"),
        shown="mean_return",
        resume=resume,
    )
    for seed, directory in directories.items():
        row = sinks.read_json_lines(directory / "metrics.jsonl")[-1]
        result = {name: value for name, value in row.items() if name != "step"}
        sinks.write_json(directory / "result.json", {"arm": arm, "seed": seed, **result})


def run_arms(
    config: Experiment, given: Path, directories: Mapping[int, Path], *, resume: bool
) -> None:
    """All arms, then each seed's `result.json` with "ARM/NUMBER" keys. given: the skills' run."""
    experiment, folders = find_skills(given, config)
    environment = skill_worlds.make(experiment.environment, experiment.physics)
    mesh = seed_axis.make_mesh(config.mesh, len(directories))
    world = distributed.put(environment.world, meshes.replicated(mesh))
    lab = Lab(skill_tasks.make(config.control, environment), world, mesh)
    for arm in config.arms:
        source = config.arms[0] if arm == RANDOM else arm
        low = load_skills(experiment, folders, source, len(directories))
        own = {seed: directory / arm for seed, directory in directories.items()}
        train_arm(lab, config, arm, low, own, resume=resume)
    seed_axis.gather(directories, config.arms)


def check(config: Experiment, seeds: int) -> None:
    """Raises UserError for what is wrong with a run of so many seeds; nothing is written yet."""
    seed_axis.make_mesh(config.mesh, seeds)
    skill_worlds.make(skill_tasks.find(config.control).environment, "exact")
    if config.skills:
        find_skills(Path(config.skills), config)
    else:
        skills.check(wanted_skills(config), seeds)
    rows = config.sac.episodes * skill_tasks.CHOICES
    if config.sac.buffer % rows:
        raise UserError(
            f"sac.buffer = {config.sac.buffer}: must be a multiple of the {rows} choices of an "
            f"epoch ({config.sac.episodes} episodes)"
        )


# --- the command line -----------------------------------------------------------------------------


def plane() -> Experiment:
    """Goals on the empty plane, on two CPU cores in minutes; without --skills it learns some."""
    return Experiment(
        control="plane-multi-goals",
        preset="plane",
        sac=SAC(hidden=(64, 64), learning_rate=1e-3, buffer=64_000),
        epochs=100,
        evaluate_every=10,
        save_every=50,
    )


def ant() -> Experiment:
    """Goals for MuJoCo's Ant, with CSF's settings. Compiled physics: meant for accelerators."""
    return Experiment(control="ant-multi-goals")


def half_cheetah_goal() -> Experiment:
    """A goal for MuJoCo's HalfCheetah, with CSF's settings. Meant for accelerators, as `ant`."""
    return Experiment(control="half-cheetah-goal", epochs=2000)


def half_cheetah_hurdle() -> Experiment:
    """Hurdles for MuJoCo's HalfCheetah; else as `half-cheetah-goal`. Meant for accelerators."""
    return Experiment(control="half-cheetah-hurdle", epochs=2000)


def tiny() -> Experiment:
    """Everything once, in under a minute on one CPU; without --skills it learns its own."""
    return Experiment(
        preset="tiny",
        arms=("metra", RANDOM),
        sac=SAC(hidden=(16, 16), episodes=4, updates=4, batch=32, buffer=96, warm_up=64),
        epochs=4,
        at_once=2,
        evaluate_every=2,
        shown=8,
        save_every=2,
    )


PRESETS = {
    "plane": plane,
    "ant": ant,
    "half-cheetah-goal": half_cheetah_goal,
    "half-cheetah-hurdle": half_cheetah_hurdle,
    "tiny": tiny,
}


def run_all(run: cli.Run) -> None:
    """All seeds of the command line at once, then the report."""
    check(run.config, len(run.seeds))
    directories = {each.config.seed: each.workdir for each in cli.open_seeds(run)}
    given = Path(run.config.skills) if run.config.skills else run.workdir / "skills"
    if not run.config.skills:
        learn_skills(run.config, run.seeds, given)
    run_arms(run.config, given, directories, resume=run.resume)
    print(report.table(run.workdir))
    print(f"report: {report.build(run.workdir)}")


if __name__ == "__main__":
    cli.main(run_all, "downstream", PRESETS, "plane")
