"""What skills do: where they lead, how much of the ground they cover, how near to goals they come.

Dimensions: E episodes, K skills shown, T steps of an episode, O observation, D skill, P coordinates
of a place.
"""

from __future__ import annotations

import functools
import sys
import types
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from experiments import skill_worlds
from jaxalign.core.state import TrainState
from jaxalign.core.types import Array, PyTree, UserError
from jaxalign.envs.environment import Environment
from jaxalign.ops import coverage
from jaxalign.ops import skills as skill_ops
from jaxalign.rollout import episodes
from jaxalign.rollout.episodes import Episodes

FILMED = 4  # skills of a film
FAST_FORWARD = 4  # a film shows every fourth step


class Sizes(Protocol):
    """The fields of an experiment that say what is shown."""

    @property
    def environment(self) -> str: ...
    @property
    def shown(self) -> int: ...
    @property
    def goals(self) -> int: ...


def walk(
    method: types.ModuleType,
    own: Any,
    environment: Environment,
    state: TrainState,
    world: PyTree,
    skills: Array,
    key: Array,
    temperature: float,
) -> Episodes:
    """An episode with each of the skills `[E, D]`. state: as the method knows it."""
    reset_key, key = jax.random.split(key)
    return episodes.unroll(
        functools.partial(environment.step, world),
        environment.observe,
        lambda seen, key: method.act(own, state, seen, skills, key, temperature),
        environment.reset(world, len(skills), reset_key),
        key,
        environment.steps,
    )


class Shown(NamedTuple):
    """What the policy does with K skills, without noise, and how near to goals it comes.

    skills: `[K, D]`. places: `[T+1, K, P]`. latents: `[T+1, K, D]`, None where the method has none.
    distance: `[T+1, goals]`, to the goal, with a skill that points there chosen at every step.
    seen: `[T+1, FILMED, O]`, observations under the first skills.
    """

    skills: Array
    places: Array
    latents: Array | None
    distance: Array
    seen: Array


def show(
    method: types.ModuleType,
    own: Any,
    environment: Environment,
    config: Sizes,
    state: TrainState,
    world: PyTree,
    key: Array,
) -> Shown:
    """Evaluates one seed. state: as the method knows it."""
    skill_key, walk_key, goal_key, key = jax.random.split(key, 4)
    skills = skill_ops.evenly(skill_key, config.shown, own.skill_size, own.discrete)
    walked = walk(method, own, environment, state, world, skills, walk_key, 0.0)
    latents = None
    if hasattr(method, "latent"):
        latents = method.latent(own, state, walked.observations)
    return Shown(
        skills,
        environment.place(walked.observations),
        latents,
        seek(method, own, environment, config, state, world, goal_key, key),
        walked.observations[:, :FILMED],
    )


def seek(
    method: types.ModuleType,
    own: Any,
    environment: Environment,
    config: Sizes,
    state: TrainState,
    world: PyTree,
    goal_key: Array,
    key: Array,
) -> Array:
    """Distance to goals `[T+1, goals]` of a policy that is told at every step the skill that leads
    from here to there, without having been trained for it.
    """
    start = environment.reset(world, config.goals, key)
    places = skill_worlds.goal_places(config.environment, world, config.goals, goal_key)
    goals = environment.goal_observation(environment.observe(start), places)

    def policy(seen: Array, key: Array) -> Array:
        skill = method.skill_towards(own, state, seen, goals)
        return method.act(own, state, seen, skill, key, 0.0)

    walked = episodes.unroll(
        functools.partial(environment.step, world),
        environment.observe,
        policy,
        start,
        key,
        environment.steps,
    )
    return jnp.linalg.norm(environment.place(walked.observations) - places[None], axis=-1)


def numbers(shown: Shown, visited: Array, radius: float) -> dict[str, Array]:
    """What is measured of one seed.

    coverage: cells that the K skills visit. total_coverage: those of all training so far.
    displacement: from the start to the end, mean over skills. reached, stayed: shares of goals
    within `radius` at some time, and at the end.
    """
    places = shown.places.reshape(-1, shown.places.shape[-1])
    moved = jnp.linalg.norm(shown.places[-1] - shown.places[0], axis=-1)
    return {
        "coverage": coverage.count(coverage.cells(places, skill_worlds.REACH)),
        "total_coverage": coverage.count(visited),
        "displacement": moved.mean(),
        "goal/reached": (shown.distance.min(0) < radius).mean(),
        "goal/stayed": (shown.distance[-1] < radius).mean(),
        "goal/distance": shown.distance[-1].mean(),
    }


def film(environment: str, seen: np.ndarray, path: Path) -> None:
    """Draws the walks `[T+1, FILMED, O]` one after the other, or says why it cannot."""
    from jaxalign.envs import mujoco_host  # it needs MuJoCo

    poses = seen[::FAST_FORWARD, :, : mujoco_host.walkers.load(environment).nq]
    try:
        mujoco_host.render(environment, np.concatenate(list(poses.swapaxes(0, 1))), path)
    except UserError as error:
        print(f"no {path.name}: {error}", file=sys.stderr)
