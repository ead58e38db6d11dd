"""Interval quasimetric embeddings: distances that need not be symmetric, from vectors.

Source: Wang & Isola 2022, "Improved Representation of Asymmetrical Distances with Interval
Quasimetric Embeddings". Each coordinate of two vectors spans the interval from x up to y, empty
unless x < y. A component is the length of the union of its intervals, and the distance mixes the
mean and the maximum of the components (IQE-maxmean).

Dimensions: B pairs, d coordinates, C components of K intervals, C * K = d.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxalign.core.types import Array


def iqe(start: Array, stop: Array, intervals: int, mix: Array) -> Array:
    """The distance `[B]` from start to stop `[B, d]`.

    intervals: K, a divisor of d. mix: `[]` in [0, 1], weight of the mean against the maximum.
    """
    shape = (*start.shape[:-1], -1, intervals)
    components = union_length(start.reshape(shape), stop.reshape(shape))
    return mix * components.mean(-1) + (1 - mix) * components.max(-1)


def union_length(lower: Array, upper: Array) -> Array:
    """The length `[...]` of the union of K intervals from lower to upper `[..., K]`.

    Each interval adds what sticks out of those that begin before it. Comparing all pairs of so few
    is faster than sorting them.
    """
    upper = jnp.where(lower < upper, upper, lower)
    mine, other = lower[..., :, None], lower[..., None, :]
    rank = jnp.arange(lower.shape[-1])
    # Of two that begin together the one of the smaller index counts as the earlier.
    tie = (rank[None, :] < rank[:, None]).reshape((1,) * (lower.ndim - 1) + (rank.size, rank.size))
    mine, other, tie = jnp.broadcast_arrays(mine, other, tie)
    before = (other < mine) | ((other == mine) & tie)
    covered = jnp.where(before, jnp.broadcast_to(upper[..., None, :], mine.shape), mine).max(-1)
    return jax.nn.relu(upper - covered).sum(-1)
