"""Skills: vectors that a policy is told to act by, and what transitions under them earn.

A skill is a point of the unit sphere or a one-hot vector, drawn once for an episode. A reward that
is linear in it, (phi(s') - phi(s))^T z, is that of METRA (Park et al. 2024, "METRA: Scalable
Unsupervised RL with Metric-Aware Abstraction", eq. 6), LSD and CSF. With one-hot skills z is
replaced by its deviation from the mean of its entries, times D / (D - 1): 1 for the own dimension
and -1 / (D - 1) for each other one.

Dimensions: D skill, B rows; `...` any rows.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.core.types import Array, UserError

SMALLEST_LENGTH = 1e-8  # what a vector is at least divided by: 0 has no direction


class Transitions(NamedTuple):
    """What a skill learner remembers of steps.

    observation, next_observation: `[..., O] f32`. action: `[..., A] f32` in [-1, 1].
    skill: `[..., D] f32`, the same for both observations.
    terminal: `[...] f32`, 1 where no value follows, else 0.
    """

    observation: Array
    action: Array
    next_observation: Array
    skill: Array
    terminal: Array


def check_size(size: int, discrete: bool) -> None:
    """Raises UserError unless skills can have this size D."""
    least = 2 if discrete else 1
    if size < least:
        kind = "one-hot skills need" if discrete else "skills need"
        raise UserError(f"skill_size = {size}: {kind} at least {least}; raise it")


def sample(key: Array, count: int, size: int, discrete: bool) -> Array:
    """Skills `[count, D]`, D = size: uniform on the unit sphere, or one-hot vectors if discrete."""
    if discrete:
        return jax.nn.one_hot(jax.random.randint(key, (count,), 0, size), size)
    return _unit(jax.random.normal(key, (count, size)))


def evenly(key: Array, count: int, size: int, discrete: bool) -> Array:
    """Skills `[count, D]` to judge by: one-hot vectors in turn if discrete, otherwise random."""
    if discrete:
        return jax.nn.one_hot(jnp.arange(count) % size, size)
    return sample(key, count, size, discrete)


def heading(skill: Array, discrete: bool) -> Array:
    """The direction `[..., D]` in latent space that skills `[..., D]` ask for."""
    return centred(skill) if discrete else skill


def centred(one_hot: Array) -> Array:
    """`[..., D]`: 1 where the vector has its one, -1 / (D - 1) elsewhere; D is at least 2."""
    size = one_hot.shape[-1]
    return (one_hot - one_hot.mean(-1, keepdims=True)) * size / (size - 1)


def reward(move: Array, skill: Array, discrete: bool) -> Array:
    """`[...]`: how far a latent step `[..., D]` goes in the direction of the skill `[..., D]`."""
    return (move * heading(skill, discrete)).sum(-1)


def along(vector: Array, discrete: bool) -> Array:
    """The skill `[..., D]` that goes best along a latent vector `[..., D]`."""
    if discrete:
        return jax.nn.one_hot(vector.argmax(-1), vector.shape[-1])
    return _unit(vector)


def _unit(vector: Array) -> Array:
    length = jnp.linalg.norm(vector, axis=-1, keepdims=True)
    return vector / jnp.maximum(length, SMALLEST_LENGTH)
