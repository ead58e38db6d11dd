"""Compiled episodes of environments side by side: `unroll` records paths, `evaluate` counts goals.

An environment is two functions of a state whose leaves have the environments as leading axis:
`step(state, action [E, A]) -> state` and `observe(state)`, which gives the policy its inputs (an
array, or a tuple when the policy also needs the goal). A policy is a function `(inputs, key) ->
action [E, A]`; key is another one at every step. Functions that need arrays (a maze, parameters)
are made from them by `functools.partial` within the jitted function that takes these arrays.

No environment is reset on the way, so the last observation is the true one.

Dimensions: T steps, E environments, A action.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from jaxalign.core.types import Array, PyTree, UserError

State = TypeVar("State")
Policy = Callable[[PyTree, Array], Array]


class Episodes(NamedTuple):
    """E episodes of T steps.

    observations: what `observe` returns, each leaf `[T+1, E, ...]`; entry t is seen before action t
        and the last one after all actions.
    actions: `[T, E, A]`.
    outcome: what `outcome` returns after each step, each leaf `[T, E, ...]`; None without it.
    """

    observations: PyTree
    actions: Array
    outcome: PyTree


class Evaluation(NamedTuple):
    """How many goals are reached.

    success: `[tasks, episodes] bool`.
    steps: `[tasks, episodes] i32`, until the goal was reached; the horizon where it was not.
    """

    success: Array
    steps: Array


def unroll(
    step: Callable[[State, Array], State],
    observe: Callable[[State], PyTree],
    policy: Policy,
    state: State,
    key: Array,
    length: int,
    outcome: Callable[[State], PyTree] | None = None,
) -> Episodes:
    """The next `length` steps from `state`.

    outcome: what else to record of the state after each step, for instance success or reward.
    Raises: UserError if the length is not positive.
    """
    _check_positive("episode length", length)

    def body(state: State, key: Array) -> tuple[State, tuple[PyTree, Array, PyTree]]:
        seen = observe(state)
        action = policy(seen, key)
        state = step(state, action)
        return state, (seen, action, outcome(state) if outcome else None)

    last, (seen, actions, outcomes) = jax.lax.scan(body, state, jax.random.split(key, length))
    observations = jax.tree.map(
        lambda path, end: jnp.concatenate([path, end[None]]), seen, observe(last)
    )
    return Episodes(observations, actions, outcomes)


def evaluate(
    reset: Callable[[Array, Array], State],
    step: Callable[[State, Array], State],
    success: Callable[[State], Array],
    observe: Callable[[State], PyTree],
    policy: Policy,
    tasks: int,
    episodes: int,
    horizon: int,
    key: Array,
) -> Evaluation:
    """All episodes of all tasks side by side, until each has succeeded or the horizon is reached.

    An episode succeeds at the first step after which `success(state) [E] bool` holds, as in
    OGBench; what its environment does afterwards does not count.
    reset: `(task [E] i32, key) -> state`, tasks counted from 0.
    horizon: steps that an episode may take.
    Raises: UserError if a number is not positive.
    """
    _check_positive("tasks", tasks)
    _check_positive("episodes", episodes)
    _check_positive("horizon", horizon)
    reset_key, key = jax.random.split(key)
    state = reset(jnp.repeat(jnp.arange(tasks), episodes), reset_key)

    def body(carry: tuple[Array, State, Evaluation]) -> tuple[Array, State, Evaluation]:
        time, state, found = carry
        state = step(state, policy(observe(state), jax.random.fold_in(key, time)))
        steps = jnp.where(found.success, found.steps, time + 1)
        return time + 1, state, Evaluation(found.success | success(state), steps)

    def unfinished(carry: tuple[Array, State, Evaluation]) -> Array:
        time, _, found = carry
        return (time < horizon) & ~jnp.all(found.success)

    nothing = Evaluation(jnp.zeros(tasks * episodes, bool), jnp.zeros(tasks * episodes, jnp.int32))
    _, _, found = jax.lax.while_loop(unfinished, body, (jnp.int32(0), state, nothing))
    return Evaluation(*(leaf.reshape(tasks, episodes) for leaf in found))


def _check_positive(name: str, number: int) -> None:
    if number < 1:
        raise UserError(f"{name} {number}: it must be at least 1")
