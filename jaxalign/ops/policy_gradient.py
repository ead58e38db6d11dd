"""Advantages of sampled trees, the clipped surrogate, and the per-prompt history they lean on.

An estimator turns rewards `[G, K]` (K branches of each of G groups) into `Credit`: an advantage for
every row of the tree and whether that row is trained on at all. All of them share one rollout.

Sources: B2-DiffuRL's released selection (`official`); leave-one-out baselines, Kool et al. 2019;
GRPO, Shao et al. 2024; the clipped surrogate, Schulman et al. 2017, eq. 7.

Dimensions: G groups, K branches a group, W rows of the tree a group, P prompts, S stages
remembered.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.core.types import Array

TINY = 1e-8


class Credit(NamedTuple):
    """advantage: `[G, W] f32`. keep: `[G, W] bool`, whether the row enters the loss.

    weight: `[G, W] f32`, how much the row counts in the mean; or one number for all.
    """

    advantage: Array
    keep: Array
    weight: Array | float = 1.0


class Moments(NamedTuple):
    """Count, mean and summed squared deviation of scores; sets merge exactly (Chan et al. 1983)."""

    count: Array
    mean: Array
    deviation: Array

    def std(self) -> Array:
        """Sample standard deviation (ddof 1); zero for fewer than two scores."""
        return jnp.sqrt(self.deviation / jnp.maximum(self.count - 1, 1))


def moments_by(index: Array, values: Array, size: int) -> Moments:
    """Moments `[size]` of values `[N]` grouped by index `[N] i32`."""
    count = jnp.zeros(size).at[index].add(1.0)
    # Means are taken around a member: that of equal values is then exact, and their deviation zero.
    top = jnp.full(size, -jnp.inf).at[index].max(values)
    around = jnp.where(count > 0, top, 0.0)
    mean = around + jnp.zeros(size).at[index].add(values - around[index]) / jnp.maximum(count, 1)
    deviation = jnp.zeros(size).at[index].add((values - mean[index]) ** 2)
    return Moments(count, mean, deviation)


def pool(moments: Moments) -> Moments:
    """Merges sets along the leading axis: fields `[S, P]` -> `[P]`."""
    count = moments.count.sum(0)
    top = jnp.where(moments.count > 0, moments.mean, -jnp.inf).max(0)
    around = jnp.where(count > 0, top, 0.0)
    mean = around + (moments.count * (moments.mean - around[None])).sum(0) / jnp.maximum(count, 1)
    between = moments.count * (moments.mean - mean[None]) ** 2
    return Moments(count, mean, (moments.deviation + between).sum(0))


def empty_history(stages: int, prompts: int) -> Moments:
    """Scores of the last `stages` stages for each prompt, none yet: fields `[S, P]`."""
    return Moments(*(jnp.zeros((stages, prompts)) for _ in Moments._fields))


def push(history: Moments, now: Moments) -> Moments:
    """Forgets the oldest stage and remembers `now` (fields `[P]`)."""
    return jax.tree.map(lambda old, new: jnp.concatenate([old[1:], new[None]]), history, now)


def prompt_z(rewards: Array, mean: Array, std: Array) -> Credit:
    """Each reward's z-score among its prompt's; with one branch a group this is DDPO's.

    rewards: `[G, K]`. mean, std: `[G]`, of the group's prompt.
    """
    z = (rewards - mean[:, None]) / (std[:, None] + TINY)
    return Credit(z, jnp.ones_like(z, bool))


def official(rewards: Array, mean: Array, std: Array, threshold: float = 0.5) -> Credit:
    """B2-DiffuRL as released: of each group the best branch and the worst, where they stand out.

    The best counts if z >= threshold, the worst if z < -threshold. The advantage is the z-score
    itself; the group's mean is not subtracted.
    """
    z = prompt_z(rewards, mean, std).advantage
    return Credit(z, _best_and_worst(z, threshold))


def extremes(
    rewards: Array, mean: Array, std: Array, threshold: float = 0.5, size: int = 5
) -> Credit:
    """Control for `official`: the same selection among independent rows, not sibling branches.

    rewards: `[G, 1]`, in sets of `size`; G divisible by `size`.
    """
    z = prompt_z(rewards, mean, std).advantage
    return Credit(z, _best_and_worst(z.reshape(-1, size), threshold).reshape(z.shape))


def _best_and_worst(z: Array, threshold: float) -> Array:
    """Mask `[G, K]` of each group's highest z if >= threshold and lowest if < -threshold."""
    column = jnp.arange(z.shape[1])[None]
    best = (column == z.argmax(1, keepdims=True)) & (z >= threshold)
    worst = (column == z.argmin(1, keepdims=True)) & (z < -threshold)
    return best | worst


def _centred(rewards: Array) -> Array:
    """Rewards `[G, K]` minus their group's mean.

    Exactly zero where a group's rewards are equal: the last bit of a mean over a tiny spread would
    be a large advantage.
    """
    apart = rewards - rewards[:, :1]
    return apart - apart.mean(1, keepdims=True)


def branch_loo(rewards: Array, scale: Array) -> Credit:
    """Reward minus the mean of its sibling branches: unbiased, free of the prefix.

    Divided by scale, `[]` or `[G]`.
    """
    branches = rewards.shape[1]
    advantage = _centred(rewards) * (branches / (branches - 1))
    advantage = advantage / (jnp.broadcast_to(scale, rewards.shape[:1])[:, None] + TINY)
    return Credit(advantage, jnp.ones_like(advantage, bool))


def branch_z(rewards: Array) -> Credit:
    """z-score among the sibling branches: each group counts alike, however little they differ."""
    centred = _centred(rewards)
    z = centred / (centred.std(1, keepdims=True, ddof=1) + TINY)
    return Credit(z, jnp.ones_like(z, bool))


def grpo(rewards: Array, prompt: Array, prompts: int) -> Credit:
    """z-score among all rows of the prompt in this stage, without history. prompt: `[G] i32`."""
    now = moments_by(jnp.repeat(prompt, rewards.shape[1]), rewards.reshape(-1), prompts)
    return prompt_z(rewards, now.mean[prompt], now.std()[prompt])


def telescope(rewards: Array, mean: Array, scale: Array, factors: Sequence[int]) -> Credit:
    """Credit for every stretch of the tree from nested branch means.

    V of a row is the mean reward of the leaves below it, and V of nothing the prompt's mean. A
    stretch is credited with V(its end) - V(its start), where a row's own leaves are left out of its
    parent's V: (V - sibling mean) * K / (K - 1). Without that factor the credits along a path sum
    exactly to reward - mean. A shared stretch counts once for each of its leaves, so that early and
    late steps weigh as they do on independent paths. rewards: `[G, prod(factors)]`; mean, scale:
    `[G]`; result `[G, W]`, trunk first.
    """
    advantages = []
    for level, value in enumerate(nested_means(rewards - mean[:, None], factors)):
        if level == 0:
            advantages.append(value)
            continue
        siblings = value.reshape(value.shape[0], -1, factors[level - 1])
        centred = siblings - siblings.mean(-1, keepdims=True)
        factor = factors[level - 1] / max(factors[level - 1] - 1, 1)
        advantages.append((centred * factor).reshape(value.shape))
    return _tree_credit(advantages, scale)


def telescope_shrunk(
    rewards: Array, mean: Array, scale: Array, factors: Sequence[int], share: float = 1.0
) -> Credit:
    """`telescope`, each baseline shrunk from the siblings' mean towards the parent's baseline.

    With few branches the mean of the siblings is itself noisy. Of row k with parent baseline b,

        baseline_k = b + c * (mean of the other siblings - b),

    where c is the least-squares slope over the whole batch, in [0, 1]: c = 0 is the prompt's mean
    (DDPO's baseline), c = 1 the leave-one-out mean. A row's own reward enters its baseline only
    through c, one number for the batch. Of each level the `share` of rows with the largest
    advantages is kept: half of the rows carry nine tenths of the signal of normal advantages.
    Otherwise as `telescope`.
    """
    values = nested_means(rewards - mean[:, None], factors)
    baseline = jnp.zeros_like(values[0])  # the prompt's mean
    advantages = [values[0]]
    for value, factor in zip(values[1:], factors, strict=True):
        siblings = value.reshape(value.shape[0], -1, factor)
        others = (siblings.sum(-1, keepdims=True) - siblings) / (factor - 1)
        own, rest = siblings - baseline[:, :, None], others - baseline[:, :, None]
        slope = jnp.clip((own * rest).sum() / ((rest**2).sum() + TINY), 0.0, 1.0)
        advantages.append((own - slope * rest).reshape(value.shape))
        baseline = (baseline[:, :, None] + slope * rest).reshape(value.shape)
    return _tree_credit(advantages, scale, share)


def nested_means(rewards: Array, factors: Sequence[int]) -> list[Array]:
    """Mean reward of the leaves below each row, level by level: `[G, 1]`, `[G, K1]`, ..."""
    groups = rewards.shape[0]
    rows = [math.prod(factors[:level]) for level in range(len(factors) + 1)]
    return [rewards.reshape(groups, count, -1).mean(-1) for count in rows]


def _tree_credit(advantages: list[Array], scale: Array, share: float = 1.0) -> Credit:
    """Levels side by side; each row weighs as many as the leaves below it."""
    leaves = advantages[-1].shape[1]
    scaled = [advantage / (scale[:, None] + TINY) for advantage in advantages]
    keep = [jnp.abs(a) >= jnp.quantile(jnp.abs(a), 1 - share) for a in scaled]
    weight = [jnp.full_like(a, leaves / a.shape[1]) for a in scaled]
    return Credit(*(jnp.concatenate(levels, 1) for levels in (scaled, keep, weight)))


def within_share(rewards: Array, prompt: Array, prompts: int) -> Array:
    """Share `[]` of a prompt's reward variance that arises after the branch point.

    Mean within-group variance over mean within-prompt variance of this stage, clipped to [0, 1].
    prompt: `[G] i32`.
    """
    total = moments_by(jnp.repeat(prompt, rewards.shape[1]), rewards.reshape(-1), prompts)
    variance = total.deviation.sum() / jnp.maximum((total.count - 1).clip(0).sum(), 1)
    return jnp.clip(rewards.var(1, ddof=1).mean() / (variance + TINY), 0.0, 1.0)


def clipped_surrogate(log_ratio: Array, advantage: Array, clip: float) -> Array:
    """PPO's loss per item `[B]`: max(-A rho, -A clip(rho, 1 - clip, 1 + clip)), to be minimised."""
    ratio = jnp.exp(log_ratio)
    return jnp.maximum(-advantage * ratio, -advantage * jnp.clip(ratio, 1 - clip, 1 + clip))
