"""Sums of several rewards, each brought to one scale first.

    sum over rewards of  weight * (reward - mean) / std

Mean and standard deviation are given and fixed: measure them once, on the base model's pictures.
Those of a batch would move with the pictures beside and with training, so one picture would earn
another reward from stage to stage, and the scores of earlier stages, with which B2-DiffuRL's
baseline is pooled, would be on other scales.

Dimensions: B pictures, H W C a picture.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.core.types import Array, PyTree, UserError
from jaxalign.rewards.clip_score import Reward
from jaxalign.rewards.host import Score


class Scale(NamedTuple):
    """How one reward counts. weight: negative for one to be lowered. mean, std: of the reward."""

    weight: float = 1.0
    mean: float = 0.0
    std: float = 1.0

    def __call__(self, reward: Any) -> Any:
        """The reward's share in the sum."""
        return (reward - self.mean) * (self.weight / self.std)


def weighted(rewards: Mapping[str, Reward], scales: Mapping[str, Scale]) -> Reward:
    """The sum of rewards on the device.

    Its params are `{name: params}`, and its batch["target"] is `{name: target}` for the rewards
    that have one.

    Raises: UserError for names that are not the same in both, and numbers out of range.
    """
    _check(rewards, scales)

    def reward(pictures: Array, batch: Mapping[str, Any], params: Mapping[str, PyTree]) -> Array:
        total = jnp.zeros(len(pictures), jnp.float32)
        for name, scale in scales.items():
            own = {**batch, "target": batch["target"].get(name)}
            total += scale(rewards[name](pictures, own, params[name]))
        return total

    return reward


def weighted_scores(scores: Mapping[str, Score], scales: Mapping[str, Scale]) -> Score:
    """The same for rewards on the host, asked one after the other; `on_host` makes one of a device
    reward, for a sum of both kinds.
    """
    _check(scores, scales)

    def score(pictures: np.ndarray, batch: dict[str, Any]) -> np.ndarray:
        total = np.zeros(len(pictures))
        for name, scale in scales.items():
            own = {**batch, "target": batch["target"].get(name)}
            total += scale(np.asarray(scores[name](pictures.copy(), own), np.float64))
        return total

    return score


def on_host(reward: Reward, params: PyTree) -> Score:
    """A reward on the device as one on the host, which sees the pictures as bytes."""
    compiled = jax.jit(
        lambda pictures, batch, params: reward(
            pictures.astype(jnp.float32) / 127.5 - 1.0, batch, params
        )
    )

    def score(pictures: np.ndarray, batch: dict[str, Any]) -> np.ndarray:
        return np.asarray(compiled(*jax.device_put((pictures, batch)), params))

    return score


def _check(rewards: Mapping[str, Any], scales: Mapping[str, Scale]) -> None:
    odd = sorted(set(rewards) ^ set(scales))
    if odd or not scales:
        raise UserError(
            f"rewards {sorted(rewards)}, scales {sorted(scales)}: must be the same and not empty; "
            "name each in both"
        )
    for name, scale in scales.items():
        if not all(map(math.isfinite, scale)) or scale.std <= 0:
            raise UserError(
                f"reward {name}: {scale}: must be finite, std positive; measure mean and std on "
                "the base model's pictures"
            )
