"""The empty plane: a point that moves where it is told, without physics or walls.

Source: the test bed of METRA's code (Park et al. 2024). The point starts at the origin and moves
0.2 of the action a step, so within an episode of 200 steps the farthest places are the corners of a
square, 40 away along each axis.

Dimensions: E environments side by side.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from jaxalign.core.types import Array
from jaxalign.envs.environment import Environment

REACH = 0.2  # how far an action of 1 moves the point
STEPS = 200


def reset(world: tuple[()], count: int, key: Array) -> Array:
    """Positions `[E, 2]` of E = count points at the origin; nothing is drawn."""
    return jnp.zeros((count, 2))


def step(world: tuple[()], position: Array, action: Array) -> Array:
    """Positions `[E, 2]` after actions `[E, 2]`."""
    return position + REACH * jnp.clip(action, -1.0, 1.0)


def observe(position: Array) -> Array:
    """What the agent sees: the position, `[E, 2] f32`."""
    return position


def place(observation: Array) -> Array:
    """(x, y) `[..., 2]` of observations `[..., 2]`, which are that."""
    return observation


def goal_observation(observation: Array, place: Array) -> Array:
    """What is seen at places `[..., 2]`."""
    return place


def environment() -> Environment:
    """The plane as learners of skills see it, without normalisation, as in METRA's code."""
    return Environment(
        name="plane",
        observation_size=2,
        action_size=2,
        steps=STEPS,
        world=(),
        reset=reset,
        step=step,
        observe=observe,
        place=place,
        goal_observation=goal_observation,
        offset=np.zeros(2, np.float32),
        scale=np.ones(2, np.float32),
    )
