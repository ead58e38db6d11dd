"""Decision processes and rewards on which reward distances are tried.

- `random_process` and `random_reward`: those of STARC's experiments, Skalse et al. 2024, section 5.
  Reward pairs there are mixed in equal steps, so that distances of all sizes occur.
- `gridworld`: nine cells and four rewards that a person would write for one task. Ours: the
  published ones are not described closely enough to be built again.
- `adversarial`: rewards that EPIC and DARD misjudge both ways, by k times a reward that nobody ever
  sees.

Dimensions: S states, A actions.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.core.types import Array
from jaxalign.ops.tabular import MDP

# --- random processes and rewards -----------------------------------------------------------------


def random_process(key: Array, states: int, actions: int, discount: float) -> MDP:
    """Softmax of normal numbers, of which the low ones (most) become -20: as good as impossible."""
    logits = jax.random.normal(key, (states, actions, states))
    least = 1.0 if states < 50 else 1.5 if states < 100 else 1.8
    transition = jax.nn.softmax(jnp.where(logits <= least, -20.0, logits))
    return MDP(transition, jnp.full((states,), 1 / states), discount)


def random_reward(key: Array, mdp: MDP) -> Array:
    """`[S, A, S]`: normal; of five one sparse, of ten seven scaled, three shifted, five shaped."""
    keys = jax.random.split(key, 9)
    states = mdp.transition.shape[0]
    reward = jax.random.normal(keys[0], mdp.transition.shape)
    least = 3.0 if states < 50 else 3.5 if states < 100 else 3.8
    sparse = jnp.where(reward > least, reward, 0.0)
    reward = jnp.where(_happens(keys[1], 0.2), sparse, reward)
    scale, shift = (10 * jax.random.uniform(k) for k in keys[2:4])
    reward = jnp.where(_happens(keys[4], 0.7), scale * reward, reward)
    reward = jnp.where(_happens(keys[5], 0.3), reward + shift, reward)
    scale, shift = 10 * jax.random.uniform(keys[6]), jax.random.uniform(keys[7])
    k_potential, k_shaped = jax.random.split(keys[8])
    potential = scale * jax.random.normal(k_potential, (states,)) + shift
    return jnp.where(_happens(k_shaped, 0.5), shaped(mdp, reward, potential), reward)


def _happens(key: Array, chance: float) -> Array:
    return jax.random.uniform(key) < chance


def shaped(mdp: MDP, reward: Array, potential: Array) -> Array:
    """reward `[S, A, S]` plus discount P(s') - P(s), of a potential `[S]`."""
    return reward + mdp.discount * potential[None, None, :] - potential[:, None, None]


def unseen_reward(key: Array, mdp: MDP) -> Array:
    """`[S, A, S]`: normal, less its mean over next states, so that no policy ever gains by it."""
    noise = jax.random.normal(key, mdp.transition.shape)
    return noise - (mdp.transition * noise).sum(-1, keepdims=True)


# --- a gridworld ----------------------------------------------------------------------------------

SIDE = 3
MOVES = np.array([[0, 0], [-1, 0], [1, 0], [0, -1], [0, 1]])  # stay, up, down, left, right


class Gridworld(NamedTuple):
    """mdp: nine cells, row by row, and five moves. rewards: `[S, A, S]` each, by name."""

    mdp: MDP
    rewards: dict[str, Array]


def gridworld(discount: float = 0.99) -> Gridworld:
    """Deterministic moves, walls around; the goal is the last cell, the start any.

    goal: 1 for entering or staying at the goal. shaped: the same with the (negative) distance to
    the goal as potential. path: goal, and a tenth for each step along the left and lower edge.
    cliff: goal, and -1 for entering the centre. opposite: -goal. effort: goal, and -0.05 for every
    move but staying.
    """
    cells = np.stack(np.divmod(np.arange(SIDE**2), SIDE), axis=1)
    arrived = np.clip(cells[:, None] + MOVES[None], 0, SIDE - 1)
    following = arrived[..., 0] * SIDE + arrived[..., 1]
    transition = np.eye(SIDE**2)[following]
    at_goal = np.broadcast_to(np.arange(SIDE**2) == SIDE**2 - 1, transition.shape).astype(float)
    potential = -np.abs(cells - (SIDE - 1)).sum(1) / SIDE
    progress = discount * potential[None, None, :] - potential[:, None, None]
    edge = (cells[:, 1] == 0) | (cells[:, 0] == SIDE - 1)
    on_path = (edge[:, None] & edge[None, :])[:, None, :]
    moved = np.arange(SIDE**2)[:, None] != np.arange(SIDE**2)[None, :]
    centre = np.broadcast_to(np.arange(SIDE**2) == SIDE**2 // 2, transition.shape)
    rewards = {
        "goal": at_goal,
        "shaped": at_goal + progress,
        "path": at_goal + 0.1 * (on_path & moved[:, None, :]),
        "cliff": at_goal - 1.0 * centre,
        "effort": at_goal - 0.05 * (np.arange(len(MOVES)) > 0)[None, :, None],
        "opposite": -at_goal,
    }
    start = np.full(SIDE**2, 1 / SIDE**2)
    mdp = MDP(jnp.asarray(transition), jnp.asarray(start), discount)
    return Gridworld(mdp, {name: jnp.asarray(reward) for name, reward in rewards.items()})


# --- what nobody sees -----------------------------------------------------------------------------


class Adversarial(NamedTuple):
    """Two pairs of rewards `[S, A, S]`.

    same: order all policies alike, though the second has k times an unseen reward. opposite: order
    all policies in opposite ways, behind the same unseen reward.
    """

    same: tuple[Array, Array]
    opposite: tuple[Array, Array]


def adversarial(key: Array, mdp: MDP, k: float) -> Adversarial:
    """Both pairs, from one normal reward and one that no policy gains by."""
    k_seen, k_unseen = jax.random.split(key)
    seen = jax.random.normal(k_seen, mdp.transition.shape)
    unseen = k * unseen_reward(k_unseen, mdp)
    return Adversarial((seen, seen + unseen), (unseen + seen, unseen - seen))
