"""What rewards of tokens say about each token: returns, advantages and baselines.

Sources: generalised advantage estimation, Schulman et al. 2016, eq. 16; leave-one-out baselines,
Kool et al. 2019; the clipped value loss, as in the code of Schulman et al. 2017.

Dimensions: B rows, T tokens of a response, K rows a group. Masks `[B, T] bool` are true on the
tokens of a response, which start in slot 0 and have no gaps.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxalign.core.types import Array

TINY = 1e-8


def gae(
    reward: Array, value: Array, mask: Array, discount: float | Array, decay: float | Array
) -> tuple[Array, Array]:
    """(advantage, target of the value), both `[B, T]` and 0 off the mask.

    reward: `[B, T]`, for the token. value: `[B, T]`, predicted before the token. After a response's
    last token the value is 0, for truncated ones too. discount: gamma. decay: lambda.
    """
    reward, value = jnp.where(mask, reward, 0), jnp.where(mask, value, 0)

    def back(carry: tuple[Array, Array], now: tuple[Array, ...]) -> tuple[tuple, Array]:
        advantage, value_next = carry
        reward, value, real = now
        error = reward + discount * value_next - value
        advantage = jnp.where(real, error + discount * decay * advantage, 0)
        return (advantage, value), advantage

    start = (jnp.zeros_like(reward[:, 0]), jnp.zeros_like(value[:, 0]))
    _, advantage = jax.lax.scan(back, start, (reward.T, value.T, mask.T), reverse=True)
    return advantage.T, advantage.T + value


def leave_one_out(score: Array, group: int) -> Array:
    """Each score `[B]` minus the mean of the others of its group of K = `group` consecutive rows.

    group: at least 2, and a divisor of B. Exactly 0 where a group's scores are equal.
    """
    apart = score.reshape(-1, group)
    apart = apart - apart[:, :1]
    return ((apart - apart.mean(1, keepdims=True)) * (group / (group - 1))).reshape(-1)


def masked_mean(x: Array, mask: Array, axis: int | None = None) -> Array:
    """Mean over the true places of mask, 0 where there are none; with `axis`, kept as size 1."""
    keep = axis is not None
    total = jnp.where(mask, x, 0).sum(axis, keepdims=keep)
    return total / jnp.maximum(mask.sum(axis, keepdims=keep), 1)


def whiten(x: Array, mask: Array) -> Array:
    """x `[B, T]` with mean 0 and standard deviation 1 over the whole mask; 0 off it."""
    centred = jnp.where(mask, x - masked_mean(x, mask), 0)
    return centred / (jnp.sqrt(masked_mean(centred**2, mask)) + TINY)


def centre(x: Array, mask: Array) -> Array:
    """x `[B, T]` minus its row's mean over the mask; 0 off it."""
    return jnp.where(mask, x - masked_mean(x, mask, axis=1), 0)


def clipped_value_loss(value: Array, old: Array, target: Array, clip: float | Array) -> Array:
    """Half the squared error per item; or, if larger, that of the value kept within clip of old."""
    held = old + jnp.clip(value - old, -clip, clip)
    return 0.5 * jnp.maximum((value - target) ** 2, (held - target) ** 2)


def explained_variance(value: Array, target: Array, mask: Array) -> Array:
    """1 - Var(target - value) / Var(target) over the mask; 1 is a perfect critic, 0 a constant."""

    def variance(x: Array) -> Array:
        return masked_mean((x - masked_mean(x, mask)) ** 2, mask)

    return 1 - variance(target - value) / (variance(target) + TINY)
