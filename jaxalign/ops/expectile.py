"""Expectile regression of values, as implicit Q-learning uses it.

A step that went better than expected counts `expectile`, another 1 - expectile, so that above a
half the value leans to the best actions in the data (Kostrikov et al. 2022, eq. 5). Without
actions, and with two heads, it is HIQL's value loss (Park et al. 2023, eq. 4).

Dimensions: B items; the axis of 2 holds the heads.
"""

from __future__ import annotations

import jax.numpy as jnp

from jaxalign.core.types import Array


def expectile_loss(advantage: Array, error: Array, expectile: float) -> Array:
    """`error ** 2`, weighted by `expectile` where the advantage is not negative; broadcasts."""
    return jnp.where(advantage >= 0, expectile, 1 - expectile) * error**2


def bellman_target(reward: Array, mask: Array, discount: float, next_value: Array) -> Array:
    """reward + discount * mask * next_value, `[..., B]`; mask 0 where the goal is reached."""
    shape = next_value.shape
    reward, mask = jnp.broadcast_to(reward, shape), jnp.broadcast_to(mask, shape)
    return reward + discount * mask * next_value


def twin_value_loss(
    value: Array,
    slow_value: Array,
    slow_next: Array,
    reward: Array,
    mask: Array,
    discount: float,
    expectile: float,
) -> Array:
    """The loss `[B]` of two value heads that learn from a slow copy, summed over the heads.

    value: `[2, B]` of s by the trained heads. slow_value, slow_next: `[2, B]` of s and s' by the
    slow ones. reward, mask: `[B]`.
    The advantage, which decides the weight, takes the smaller of the slow heads at s' and their
    mean at s. The error of a head is taken to the target of its own slow head.
    """
    best = bellman_target(reward, mask, discount, slow_next.min(0))
    advantage = jnp.broadcast_to(best - slow_value.mean(0), value.shape)
    target = bellman_target(reward, mask, discount, slow_next)
    return expectile_loss(advantage, target - value, expectile).sum(0)
