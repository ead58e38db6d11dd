"""Tasks for a high level that picks skills, each carried out for K steps by a policy it is given.

Source: the downstream tasks of METRA (Park et al. 2024, section 5.3), in the form that they have in
the code of CSF (Zheng et al. 2025, "Can a MISL Fly?"). An episode is 8 choices of 25 steps.

- multi-goals: a goal, drawn evenly from a square around where the walker is then; after two choices
  another one. Each step that ends within 3 of the goal earns 1.
- goal: the same with one goal an episode.
- hurdle: seven hurdles, at 3, 7, ..., 27 along x. Each earns 1, once.

Departures: CSF's code draws a goal around the one before, here it is around the walker, as METRA's
paper has it. The goal is told as seen from the walker and divided by its range, there as it is.
Hurdles are no bodies here, so that the physics is that of the skills: one is taken if the trunk
passes it forwards at least `CLEARANCE` above its height at the start. That, the number of choices
on the way, and what is told (the distance to the next hurdle) are ours.

Dimensions: E environments, O observation, A action, P place, D skill, G what is told of the task.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.core.types import Array, PyTree, UserError
from jaxalign.envs.environment import Environment

HOLD, CHOICES = 25, 8  # K, and how many choices an episode has
RADIUS = 3.0  # around a goal
HURDLES = (3.0, 7.0, 11.0, 15.0, 19.0, 23.0, 27.0)
HURDLE_SCALE = 4.0  # what the distance to a hurdle is divided by
CLEARANCE = 0.1  # metres; the trunk's height above that at the start is the second number seen

# (observation [E, O], skill [E, D], key) -> action [E, A]
Act = Callable[[Array, Array, Array], Array]


class Choices(NamedTuple):
    """What is remembered of choices of skills.

    observation, next_observation: `[..., O + G] f32`. action: `[..., D] f32`, the choice.
    reward: `[...] f32`, summed over the steps that it lasted. terminal: `[...] f32`, 1 at the end.
    """

    observation: Array
    action: Array
    next_observation: Array
    reward: Array
    terminal: Array


class Rules(NamedTuple):
    """What is asked of a walker. An aim is what has to be remembered of it, leaves `[E, ...]`.

    size: G. begin: `(observation, key) -> aim`.
    earn: `(aim, observation before, and after a step) -> (aim, reward [E])`.
    renew: `(aim, observation, choices so far [], key) -> aim`, after each choice.
    tell: `(aim, observation) -> [E, G]`, of the size of 1.
    """

    size: int
    begin: Callable[[Array, Array], PyTree]
    earn: Callable[[PyTree, Array, Array], tuple[PyTree, Array]]
    renew: Callable[[PyTree, Array, Array, Array], PyTree]
    tell: Callable[[PyTree, Array], Array]


class Task(NamedTuple):
    """A task over an environment.

    hold: K, steps for which a choice lasts. choices: of an episode.
    """

    environment: Environment
    rules: Rules
    hold: int = HOLD
    choices: int = CHOICES


class State(NamedTuple):
    """walker: of the environment. aim: of the rules. count: `[] i32`, choices so far.

    reward: `[E]`, of the last choice. key: of those to come.
    """

    walker: PyTree
    aim: PyTree
    count: Array
    reward: Array
    key: Array


def make(name: str, environment: Environment) -> Task:
    """The task of that name, one of TASKS, over its environment. Raises: UserError if unknown."""
    return Task(environment, find(name).rules(environment))


def find(name: str) -> Kind:
    """What a task is made of. Raises: UserError if there is none of that name."""
    if name not in TASKS:
        raise UserError(f"control = {name!r}: is none of {', '.join(TASKS)}; give one of these")
    return TASKS[name]


def reset(task: Task, world: PyTree, count: int, key: Array) -> State:
    """The start of E = count episodes."""
    walker_key, aim_key, key = jax.random.split(key, 3)
    walker = task.environment.reset(world, count, walker_key)
    aim = task.rules.begin(task.environment.observe(walker), aim_key)
    return State(walker, aim, jnp.int32(0), jnp.zeros(count), key)


def step(task: Task, world: PyTree, act: Act, state: State, skill: Array) -> State:
    """K steps of the policy `act` with the skills `[E, D]`."""
    environment, rules = task.environment, task.rules
    walk_key, aim_key, key = jax.random.split(state.key, 3)

    def body(carry: tuple[PyTree, PyTree], key: Array) -> tuple[tuple[PyTree, PyTree], Array]:
        walker, aim = carry
        before = environment.observe(walker)
        walker = environment.step(world, walker, act(before, skill, key))
        aim, reward = rules.earn(aim, before, environment.observe(walker))
        return (walker, aim), reward

    keys = jax.random.split(walk_key, task.hold)
    (walker, aim), rewards = jax.lax.scan(body, (state.walker, state.aim), keys)
    count = state.count + 1
    aim = rules.renew(aim, environment.observe(walker), count, aim_key)
    return State(walker, aim, count, rewards.sum(0), key)


def observe(task: Task, state: State) -> Array:
    """What the high level sees, `[E, O + G] f32`: the observation, and what is told of the task."""
    seen = task.environment.observe(state.walker)
    return jnp.concatenate([seen, task.rules.tell(state.aim, seen)], axis=-1)


def normaliser(task: Task) -> tuple[np.ndarray, np.ndarray]:
    """Offset and scale `[O + G] f32` of what the high level sees."""
    told = np.ones(task.rules.size, np.float32)
    environment = task.environment
    return np.append(environment.offset, 0 * told), np.append(environment.scale, told)


# --- rules ----------------------------------------------------------------------------------------


def goals(environment: Environment, *, reach: float, every: int) -> Rules:
    """A goal within `reach` of the walker along each axis; another one every so many choices.

    The aim is its place `[E, P]`.
    """

    def begin(seen: Array, key: Array) -> Array:
        here = environment.place(seen)
        return here + jax.random.uniform(key, here.shape, minval=-reach, maxval=reach)

    def earn(goal: Array, before: Array, after: Array) -> tuple[Array, Array]:
        distance = jnp.linalg.norm(environment.place(after) - goal, axis=-1)
        return goal, (distance <= RADIUS).astype(jnp.float32)

    def renew(goal: Array, seen: Array, count: Array, key: Array) -> Array:
        return jnp.where(count % every == 0, begin(seen, key), goal)

    def tell(goal: Array, seen: Array) -> Array:
        return (goal - environment.place(seen)) / reach

    seen = jax.ShapeDtypeStruct((environment.observation_size,), jnp.float32)
    size = jax.eval_shape(environment.place, seen).shape[-1]
    return Rules(size, begin, earn, renew, tell)


def hurdles(environment: Environment) -> Rules:
    """Hurdles on the way forwards. The aim is which of them are left, `[E, H] bool`."""
    places = np.array(HURDLES, np.float32)[None]

    def begin(seen: Array, key: Array) -> Array:
        return jnp.ones((len(seen), len(HURDLES)), bool)

    def earn(left: Array, before: Array, after: Array) -> tuple[Array, Array]:
        passed = (environment.place(before) < places) & (environment.place(after) >= places)
        taken = left & passed & (after[:, 1:2] >= CLEARANCE)
        return left & ~taken, taken.sum(-1).astype(jnp.float32)

    def renew(left: Array, seen: Array, count: Array, key: Array) -> Array:
        return left

    def tell(left: Array, seen: Array) -> Array:
        ahead = places - environment.place(seen)
        nearest = jnp.where(ahead > 0, ahead, jnp.inf).min(-1, keepdims=True)
        return jnp.where(jnp.isfinite(nearest), nearest, ahead[:, -1:]) / HURDLE_SCALE

    return Rules(1, begin, earn, renew, tell)


class Kind(NamedTuple):
    """environment: in which the skills were learned. rules: of the task there."""

    environment: str
    rules: Callable[[Environment], Rules]


MULTI_GOALS = functools.partial(goals, reach=7.5, every=2)
ONE_GOAL: Any = functools.partial(goals, reach=100.0, every=CHOICES)
TASKS: Mapping[str, Kind] = {
    "plane-multi-goals": Kind("plane", MULTI_GOALS),
    "ant-multi-goals": Kind("ant", MULTI_GOALS),
    "half-cheetah-goal": Kind("half-cheetah", ONE_GOAL),
    "half-cheetah-hurdle": Kind("half-cheetah", hurdles),
}
