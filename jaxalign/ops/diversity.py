"""How different the pictures of one prompt are: factor entropy, pairwise distance.

Dimensions: P prompts, N pictures a prompt.
"""

from __future__ import annotations

import jax.numpy as jnp

from jaxalign.core.types import Array


def code_entropy(codes: Array) -> Array:
    """Entropy `[P]` in nats of the values seen in codes `[P, N] i32`, by counting.

    At most log N: compare only at equal N.
    """
    same = codes[:, :, None] == codes[:, None, :]
    # of each picture's own value; averaging -log of it sums over values exactly
    share = same.mean(-1)
    return -jnp.log(share).mean(-1)


def pairwise_distance(pictures: Array) -> Array:
    """Mean root-mean-square pixel distance `[P]` between different pictures of a prompt `[P, N,
    ...]`.
    """
    flat = pictures.reshape(*pictures.shape[:2], -1)
    square = jnp.square(flat).mean(-1)
    product = jnp.einsum("pnd,pmd->pnm", flat, flat) / flat.shape[-1]
    distance = jnp.sqrt(jnp.maximum(square[:, :, None] + square[:, None, :] - 2 * product, 0.0))
    count = pictures.shape[1]
    off_diagonal = 1 - jnp.eye(count)[None]
    return (distance * off_diagonal).sum((1, 2)) / max(count * (count - 1), 1)
