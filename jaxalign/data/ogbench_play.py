"""OGBench's play data of cube, scene and puzzle, made again from its own scripts and simulator.

Nothing is learned and nothing downloaded: a scripted arm of the package `ogbench` follows one plan
after another, each to a target drawn at random (pick a cube and place it, press a button, push a
drawer or a window), and its plans carry smooth noise. The published sets (Park et al., 2025,
appendix on data; the repository's data_gen_scripts/generate_manipspace.py) were made so. Their
seed is not known, so these have the same distribution and other numbers: "regenerated".

Episodes are made in processes of their own, one environment each. An episode depends on the seed
and its number only, and neither on the number of processes nor on the episodes before it.

An episode of `scene` is made again when the cube left the places where it can be seen: where a goal
is shown as a picture, what cannot be seen cannot be asked for.

Departures: only play data, not the noisy kind of the Markovian scripts. One seed for each episode,
where the published sets have one unrecorded stream for all.

Dimensions: N stored states of all episodes, O observation, A = 5 (hand x, y, z, yaw; gripper).
"""

from __future__ import annotations

import difflib
import functools
import importlib.metadata
import importlib.util
import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any, NamedTuple

import numpy as np

from jaxalign.core.types import UserError

Arrays = dict[str, np.ndarray]

LENGTH = 1001  # states of an episode
NOISE, SMOOTHING = 0.1, 0.5  # of the plans, as in the published sets
PACKAGES = ("ogbench", "mujoco", "gymnasium", "numpy")


class Recipe(NamedTuple):
    """What is particular to an environment.

    episodes: in the published training set; its validation set has a tenth as many besides.
    stacking: bounds of the chance that a cube is put on another, drawn for each episode.
    """

    episodes: int
    stacking: tuple[float, float] = (0.5, 0.5)


RECIPES = {
    "cube-single": Recipe(1000, (0.0, 0.0)),
    "cube-double": Recipe(1000, (0.0, 0.25)),
    "cube-triple": Recipe(3000, (0.05, 0.35)),
    "cube-quadruple": Recipe(5000, (0.1, 0.5)),
    "cube-octuple": Recipe(100_000, (0.0, 0.35)),  # published as a set of 100M states only
    "scene": Recipe(1000),
    "puzzle-3x3": Recipe(1000),
    "puzzle-4x4": Recipe(1000),
    "puzzle-4x5": Recipe(3000),
    "puzzle-4x6": Recipe(5000),
}
# Columns of qpos that hold the place of the first cube, after the arm and the gripper.
CUBE = slice(14, 17)


def generate(
    name: str,
    numbers: range,
    seed: int,
    *,
    workers: int | None = None,
    length: int = LENGTH,
    progress: Callable[[int], object] | None = None,
) -> tuple[Arrays, dict[str, Any]]:
    """Play data as arrays and their provenance, for `trajectories.write` or `stored`.

    The arrays: observations `[N, O] f32`, actions `[N, 5] f32`, terminals `[N] bool`, qpos and qvel
    `[N, ...] f32`, and button_states `[N, ...] i64` where there are buttons.

    name: one of RECIPES, such as "scene".
    numbers: of the episodes: `range(1000)` is the size of the published training set, and
        `range(1000, 1100)` a validation set for it.
    seed: of the whole set.
    workers: processes; as many as there are cores where None.
    length: states of an episode.
    progress: called with the count of episodes that are done.
    Raises: UserError for an unknown name, a number out of range, a missing package, or a process
        that died.
    """
    _check(name, numbers, seed, length)
    made = []
    for episode in _episodes(name, numbers, seed, length, workers or cores()):
        made.append(episode)
        if progress is not None:
            progress(len(made))
    arrays = {field: np.concatenate([episode[field] for episode in made]) for field in made[0]}
    return arrays, {
        "source": "regenerated",
        "generator": "jaxalign.data.ogbench_play",
        "environment": name,
        "seed": seed,
        "first_episode": numbers[0],
        "episodes": len(numbers),
        "length": length,
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
    }


def _check(name: str, numbers: range, seed: int, length: int) -> None:
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        known = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(RECIPES)}"
        raise UserError(f"no play data of {name!r}: {known}")
    if not numbers or min(numbers) < 0 or seed < 0 or length < 2:
        raise UserError(
            f"episodes {numbers}, seed {seed}, length {length}: give one episode or more, numbers "
            "and seed from 0, and a length of 2 or more"
        )
    require_packages(f"play data of {name!r}")


def require_packages(what: str) -> None:
    """Raises: UserError, that `what` needs OGBench and MuJoCo, where they are not installed."""
    if any(importlib.util.find_spec(package) is None for package in ("ogbench", "mujoco")):
        raise UserError(
            f"{what} needs ogbench and mujoco, which are not installed: "
            "pip install 'jaxalign[ogbench]'"
        )


# ---------------------------------------------------------------- processes


def cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _episodes(name: str, numbers: range, seed: int, length: int, workers: int) -> Iterator[Arrays]:
    """The episodes in the order of their numbers, each as soon as it and those before are made."""
    pool = futures.ProcessPoolExecutor(
        min(workers, len(numbers)), multiprocessing.get_context("spawn"), _start_worker
    )
    try:
        yield from pool.map(functools.partial(episode, name, seed, length=length), numbers)
    except futures.process.BrokenProcessPool:
        raise UserError(
            f"a process that makes play data of {name!r} died, as for lack of memory; use fewer "
            f"than {workers} workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    # Nothing is drawn, and the search for a display fails loudly where there is none.
    os.environ.setdefault("MUJOCO_GL", "disabled")


# ---------------------------------------------------------------- one episode


def episode(name: str, seed: int, number: int, length: int = LENGTH) -> Arrays:
    """The arrays of one episode. Leaves NumPy's global generator in a state that depends on it."""
    for attempt in itertools.count():
        words = np.random.SeedSequence((seed, number, attempt)).generate_state(1)
        arrays = _attempt(name, int(words[0]), length)
        if name != "scene" or is_healthy(arrays["qpos"]):
            return arrays
    raise AssertionError("attempts do not end")


def is_healthy(qpos: np.ndarray) -> bool:
    """Whether the cube of `scene` stayed where it can be seen, or in the drawer.

    qpos: `[T, ...]`, the joint positions of an episode.
    """
    _, sideways, height = qpos[:, CUBE].T
    too_far_right = sideways >= 0.29
    in_drawer = (height >= 0.06) & (height <= 0.08)
    too_far_left = (sideways <= -0.3) & ~in_drawer
    return not np.any(too_far_right | too_far_left)


def _attempt(name: str, seed: int, length: int) -> Arrays:
    environment, oracles = _stage(name, length)
    # The scripts draw from NumPy's global generator, the environment from its own.
    np.random.seed(seed)
    observation, info = environment.reset(seed=seed)
    stacking = np.random.uniform(*RECIPES[name].stacking)
    oracle = _aimed(oracles, observation, info)
    rows, done = [], False
    while not done:
        action = np.clip(oracle.select_action(observation, info), -1.0, 1.0)
        following, _, terminated, truncated, info = environment.step(action)
        done = terminated or truncated
        rows.append(_row(observation, action, done, info))
        if oracle.done:
            oracle = _aimed(oracles, *environment.unwrapped.set_new_target(p_stack=stacking))
        observation = following
    return {field: np.array([row[field] for row in rows], _dtype(field)) for field in rows[0]}


def _aimed(oracles: dict[str, Any], observation: np.ndarray, info: dict[str, Any]) -> Any:
    """The script for the target that the environment has drawn, with a plan to it."""
    oracle = oracles[info["privileged/target_task"]]
    oracle.reset(observation, info)
    return oracle


def _row(
    observation: np.ndarray, action: np.ndarray, done: bool, info: dict[str, Any]
) -> dict[str, Any]:
    """What is stored of a state. info: of the step from it."""
    row = {"observations": observation, "actions": action, "terminals": done}
    states = ("qpos", "qvel", "button_states")
    return row | {state: info[f"prev_{state}"] for state in states if f"prev_{state}" in info}


def _dtype(field: str) -> type:
    return {"terminals": bool, "button_states": np.int64}.get(field, np.float32)


@functools.cache
def _stage(name: str, length: int) -> tuple[Any, dict[str, Any]]:
    """The environment, and a script for each kind of target; made once in a process."""
    import gymnasium

    # Registers the environments as well.
    from ogbench.manipspace.oracles.plan import button_plan, cube_plan, drawer_plan, window_plan

    environment = gymnasium.make(
        f"{name}-v0",
        mode="data_collection",
        terminate_at_goal=False,
        max_episode_steps=length,
        disable_env_checker=True,
    )
    kinds = {
        "cube": cube_plan.CubePlanOracle,
        "button": functools.partial(
            button_plan.ButtonPlanOracle, gripper_always_closed=name.startswith("puzzle")
        ),
        "drawer": drawer_plan.DrawerPlanOracle,
        "window": window_plan.WindowPlanOracle,
    }
    return environment, {
        kind: make(env=environment, noise=NOISE, noise_smoothing=SMOOTHING)
        for kind, make in kinds.items()
    }
