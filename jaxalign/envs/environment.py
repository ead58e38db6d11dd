"""What a learner of skills needs to know of an environment: one record of pure functions and sizes.

`rollout.episodes.unroll` records paths from `functools.partial(environment.step, world)` and
`environment.observe`, with the world passed into the jitted function.

Dimensions: E environments side by side, O observation, A action, P place, T steps of an episode.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jaxalign.core.types import Array, PyTree


class Environment(NamedTuple):
    """An environment without reward, for episodes of one length that nothing ends early.

    name: what it is called in files and tables.
    observation_size: O. action_size: A. steps: T.
    world: arrays that `reset` and `step` are given, as what is captured becomes a constant.
    reset: `(world, count, key) -> state`, whose leaves have the leading axis E = count.
    step: `(world, state, action [E, A]) -> state`; what lies outside [-1, 1] is clipped.
    observe: `state -> [E, O] f32`.
    place: `observation [..., O] -> [..., P]`, the coordinates whose unit cells are counted.
    goal_observation: `(observation [..., O], place [..., P]) -> [..., O]`, the observation moved to
        that place: a goal for zero-shot control.
    offset, scale: `[O] f32`, the fixed normaliser of what networks see: (observation - offset) /
        scale.
    """

    name: str
    observation_size: int
    action_size: int
    steps: int
    world: PyTree
    reset: Callable[[PyTree, int, Array], PyTree]
    step: Callable[[PyTree, PyTree, Array], PyTree]
    observe: Callable[[PyTree], Array]
    place: Callable[[Array], Array]
    goal_observation: Callable[[Array, Array], Array]
    offset: np.ndarray
    scale: np.ndarray
