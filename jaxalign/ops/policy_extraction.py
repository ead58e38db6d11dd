"""From values to a policy without leaving the data: weighted regression, DDPG with cloning.

Sources: AWR, Peng et al. 2019, with the clipped weight of IQL (Kostrikov et al. 2022);
DDPG+BC, Fujimoto & Gu 2021 (TD3+BC), in the form of OGBench (Park et al. 2025).

Dimensions: B items.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxalign.core.types import Array

LARGEST_WEIGHT = 100.0


def awr_weight(advantage: Array, alpha: float) -> Array:
    """min(exp(alpha * advantage), 100) `[B]`; alpha is the inverse temperature."""
    return jnp.minimum(jnp.exp(alpha * advantage), LARGEST_WEIGHT)


def ddpg_bc_loss(q: Array, log_density: Array, alpha: float) -> Array:
    """`[B]`: the negative of q over the batch's mean |q|, and alpha times that of the log-density.

    q: `[B]` of the policy's actions, through which the gradient flows. log_density: `[B]` of the
    data's actions. The division makes alpha mean the same whatever the scale of values is; no
    gradient flows through the divisor.
    """
    scale = jax.lax.stop_gradient(jnp.abs(q).mean() + 1e-6)
    return -q / jnp.broadcast_to(scale, q.shape) - alpha * log_density
