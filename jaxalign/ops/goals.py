"""Goal relabelling: transitions of stored episodes, with goals drawn in hindsight.

The goals of values are the state itself, a later state of the episode at a geometric distance, or
any state; those of policies a later state at a uniform distance, or any state (HIQL, Park et
al. 2023, in the form of OGBench, Park et al. 2025). A hierarchy also gets a subgoal k steps
ahead and, for the policy that sets subgoals, the state it should have asked for.

Everything is gathered on the device from the whole data set, so a batch costs no transfer.

Dimensions: N stored states, M of them with a successor, O observation, A action, B batch.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from jaxalign.core.types import Array, UserError


class Data(Protocol):
    """Episodes one after the other, all states of each, the last included.

    observations: `[N, O] f32`. actions: `[N, A] f32`; that of an episode's last state is no action.
    end: `[N] i32`, the last state of the state's episode. valid: `[M] i32`, states with successor.
    """

    @property
    def observations(self) -> Array: ...
    @property
    def actions(self) -> Array: ...
    @property
    def end(self) -> Array: ...
    @property
    def valid(self) -> Array: ...


@dataclasses.dataclass(frozen=True)
class Goals:
    """How goals are drawn."""

    value_current: float = 0.2  # share of values' goals that are the state itself
    value_trajectory: float = 0.5  # share from the rest of the episode
    value_random: float = 0.3  # share from all states
    actor_random: float = (
        0.0  # share of policies' goals from all states; the rest is of the episode
    )
    discount: float = 0.99  # gamma, of returns; 1 - gamma is how likely a goal is one step nearer
    subgoal_steps: int = 25  # k

    def __post_init__(self) -> None:
        shares = ("value_current", "value_trajectory", "value_random", "actor_random")
        for name in shares:
            share = getattr(self, name)
            if not 0 <= share <= 1:
                raise UserError(f"{name} = {share}: a share lies between 0 and 1; change it")
        total = sum(getattr(self, name) for name in shares[:3])
        if not math.isclose(total, 1, abs_tol=1e-6):
            raise UserError(
                f"value_current + value_trajectory + value_random = {total:g}: these shares must "
                "add up to 1; change one of them"
            )
        if not 0 < self.discount < 1:
            raise UserError(
                f"discount = {self.discount}: must lie between 0 and 1; try the default"
            )
        if self.subgoal_steps < 1:
            raise UserError(f"subgoal_steps = {self.subgoal_steps}: must be at least 1; raise it")


class Batch(NamedTuple):
    """Transitions with goals. A method reads the goals that it needs.

    observation, next_observation: `[B, O]`. action: `[B, A]`.
    value_goal: `[B, O]`, of values.
    reward: `[B]`, 0 where the goal is the state itself and -1 elsewhere.
    mask: `[B]`, 0 where the reward is 0, as nothing follows; else 1.
    actor_goal: `[B, O]`, of a flat policy. high_goal: `[B, O]`, the same, of one that sets
        subgoals.
    low_goal: `[B, O]`, the state k steps ahead or the episode's last.
    high_target: `[B, O]`, the subgoal on the way to `high_goal`: k steps ahead, but not beyond a
        goal of the same episode.
    """

    observation: Array
    action: Array
    next_observation: Array
    value_goal: Array
    reward: Array
    mask: Array
    actor_goal: Array
    low_goal: Array
    high_goal: Array
    high_target: Array


def sample(data: Data, goals: Goals, key: Array, size: int) -> Batch:
    """A batch of B = size transitions, drawn with replacement from those of all episodes."""
    state_key, value_key, actor_key = jax.random.split(key, 3)
    i = _any_state(data, state_key, size)
    end = data.end[i]
    value_goal = _value_goal(data, goals, value_key, i, end)
    actor_goal, same_episode = _actor_goal(data, goals, actor_key, i, end)
    ahead = jnp.minimum(i + goals.subgoal_steps, end)
    # A goal from elsewhere may have a smaller index, so it must not bound the target.
    target = jnp.where(same_episode, jnp.minimum(ahead, actor_goal), ahead)
    reached = (value_goal == i).astype(jnp.float32)
    policy_goal = data.observations[actor_goal]
    return Batch(
        observation=data.observations[i],
        action=data.actions[i],
        next_observation=data.observations[i + 1],
        value_goal=data.observations[value_goal],
        reward=reached - 1,
        mask=1 - reached,
        actor_goal=policy_goal,
        low_goal=data.observations[ahead],
        high_goal=policy_goal,
        high_target=data.observations[target],
    )


def geometric(uniform: Array, discount: float | Array) -> Array:
    """Steps `i32` >= 1 with success probability 1 - discount, from numbers uniform in [0, 1)."""
    return jnp.floor(jnp.log1p(-uniform) / jnp.log(discount)).astype(jnp.int32) + 1


def uniform_future(uniform: Array, i: Array, end: Array) -> Array:
    """A state after i of its episode, from numbers uniform in [0, 1); `end` if i is the last.

    Rounding gives the next state and the last half the chance of the others, as OGBench does.
    Steps are counted from the next state, where float32 is exact; large indices would not be.
    """
    first = jnp.minimum(i + 1, end)
    return first + jnp.round((1 - uniform) * (end - first)).astype(jnp.int32)


def _any_state(data: Data, key: Array, size: int) -> Array:
    """Indices `[size]` of states that have a successor."""
    return data.valid[jax.random.randint(key, (size,), 0, data.valid.shape[0])]


def _value_goal(data: Data, goals: Goals, key: Array, i: Array, end: Array) -> Array:
    """Indices `[B]`: the state itself, a later one of the episode, or any."""
    choice_key, step_key, random_key = jax.random.split(key, 3)
    choice = jax.random.uniform(choice_key, i.shape)
    steps = geometric(jax.random.uniform(step_key, i.shape), goals.discount)
    later = jnp.minimum(i + steps, end)
    anywhere = _any_state(data, random_key, i.shape[0])
    goal = jnp.where(choice < 1 - goals.value_random, later, anywhere)
    return jnp.where(choice < goals.value_current, i, goal)


def _actor_goal(data: Data, goals: Goals, key: Array, i: Array, end: Array) -> tuple[Array, Array]:
    """Indices `[B]`, a later state of the episode or any, and `[B] bool`, whether it is the former.

    "Any" may happen to be of the same episode, and still is of the second kind.
    """
    choice_key, step_key, random_key = jax.random.split(key, 3)
    later = uniform_future(jax.random.uniform(step_key, i.shape), i, end)
    same_episode = jax.random.uniform(choice_key, i.shape) >= goals.actor_random
    anywhere = _any_state(data, random_key, i.shape[0])
    return jnp.where(same_episode, later, anywhere), same_episode
