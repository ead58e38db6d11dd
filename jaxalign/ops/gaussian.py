"""Diagonal Gaussians: what a continuous policy says.

Dimensions: B rows, A actions.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.core.types import Array


class Gaussian(NamedTuple):
    """mean, log_std: `[B, A] f32`, the standard deviation as its natural logarithm."""

    mean: Array
    log_std: Array


def log_density(gaussian: Gaussian, value: Array) -> Array:
    """`[B]`, in nats, of values `[B, A]`."""
    standard = (value - gaussian.mean) * jnp.exp(-gaussian.log_std)
    return -(0.5 * standard**2 + gaussian.log_std + 0.5 * math.log(2 * math.pi)).sum(-1)


def draw(gaussian: Gaussian, key: Array, temperature: float | Array = 1.0) -> Array:
    """A sample `[B, A]`; the temperature multiplies the standard deviation, 0 gives the mean."""
    noise = jax.random.normal(key, gaussian.mean.shape)
    return gaussian.mean + temperature * jnp.exp(gaussian.log_std) * noise
