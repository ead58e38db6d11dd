"""Soft actor-critic, an item at a time: actions of tanh-Gaussian policies, targets, losses.

Source: Haarnoja et al. 2018, "Soft Actor-Critic Algorithms and Applications": critics eq. 5,
policy eq. 9, temperature eq. 18, squashed actions appendix C. In the form of METRA's code: a critic
has half of the squared error, and the temperature is learned through its logarithm, by which the
gradient is not multiplied.

Dimensions: B rows, A action; the axis of 2 holds the twin critics.
"""

from __future__ import annotations

import jax.numpy as jnp

from jaxalign.core.types import Array
from jaxalign.ops import gaussian
from jaxalign.ops.gaussian import Gaussian

EPSILON = 1e-6  # keeps the density of an action at the bounds finite


def sample(policy: Gaussian, key: Array) -> tuple[Array, Array]:
    """Actions `[B, A]` in [-1, 1] and their log densities `[B]`.

    policy: `[B, A]`, before the tanh.
    """
    before = gaussian.draw(policy, key)
    return jnp.tanh(before), log_density(policy, before)


def log_density(policy: Gaussian, before: Array) -> Array:
    """`[B]`, in nats, of the actions tanh(before), before `[B, A]`."""
    squeeze = jnp.log(1 - jnp.tanh(before) ** 2 + EPSILON).sum(-1)
    return gaussian.log_density(policy, before) - squeeze


def act(policy: Gaussian, key: Array, temperature: float | Array) -> Array:
    """Actions `[B, A]`; the temperature multiplies the standard deviation, 0 gives tanh(mean)."""
    return jnp.tanh(gaussian.draw(policy, key, temperature))


def target(
    reward: Array,
    terminal: Array,
    discount: float,
    next_values: Array,
    next_log_density: Array,
    alpha: Array,
) -> Array:
    """What the critics learn, `[B]`: reward, and the discounted soft value of what follows.

    reward, terminal: `[B]`; terminal 1 where nothing follows. next_values: `[2, B]`, of an action
    of the policy by the slow critics. next_log_density: `[B]`, of that action. alpha: `[]`.
    """
    soft_value = next_values.min(0) - alpha * next_log_density
    return reward + discount * (1 - terminal) * soft_value


def critic_loss(values: Array, target: Array) -> Array:
    """`[B]`: half of the squared error to the target `[B]`, summed over the critics `[2, B]`."""
    return 0.5 * ((values - target[None]) ** 2).sum(0)


def actor_loss(values: Array, log_density: Array, alpha: Array) -> Array:
    """`[B]`: minus the smaller value `[2, B]` of the action, and alpha times its log density."""
    return alpha * log_density - values.min(0)


def temperature_loss(log_alpha: Array, log_density: Array, target_entropy: float) -> Array:
    """`[B]`: falls with a larger alpha where the entropy is below its target."""
    return -log_alpha * (log_density + target_entropy)


def target_entropy(action_size: int) -> float:
    """Minus half an action's size, in nats: METRA's choice; the paper has twice as much."""
    return -action_size / 2
