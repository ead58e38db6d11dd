"""Actions drawn uniformly: what learned skills are compared with.

It has the functions of a method that learns skills (`methods.metra`), learns nothing, and ignores
what skill it is told.

Dimensions: B batch, O observation, A action.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.core.state import TrainState
from jaxalign.core.types import Array
from jaxalign.ops.skills import Transitions


@dataclasses.dataclass(frozen=True)
class Config:
    """Nothing can be set; a loop reads these of every method."""

    skill_size: ClassVar[int] = 1
    discrete: ClassVar[bool] = False
    batch: ClassVar[int] = 1
    terminal_at_limit: ClassVar[bool] = True


def init(
    config: Config,
    observation_size: int,
    action_size: int,
    offset: np.ndarray,
    scale: np.ndarray,
    key: Array,
) -> TrainState:
    """A state without parameters. `extra`: an action `[A]` of zeros, for its size."""
    del config, observation_size, offset, scale, key
    return TrainState(jnp.zeros((), jnp.int32), {}, {}, {}, jnp.zeros(action_size))


def update(
    config: Config, state: TrainState, batch: Transitions, key: Array
) -> tuple[TrainState, dict[str, Array]]:
    """Nothing is learned, and nothing measured."""
    del config, batch, key
    return state._replace(step=state.step + 1), {}


def act(
    config: Config,
    state: TrainState,
    observation: Array,
    skill: Array,
    key: Array,
    temperature: float | Array = 1.0,
) -> Array:
    """Actions `[B, A]`, uniform in [-1, 1] at any temperature."""
    del config, skill, temperature
    shape = (observation.shape[0], state.extra.shape[0])
    return jax.random.uniform(key, shape, minval=-1.0, maxval=1.0)


def skill_towards(config: Config, state: TrainState, observation: Array, goal: Array) -> Array:
    """Zeros `[B, D]`: no skill leads anywhere."""
    del state, goal
    return jnp.zeros((observation.shape[0], config.skill_size))
