"""The environments in which skills are learned, and the goals that are set there.

Dimensions: P coordinates of a place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.core.types import Array, PyTree, UserError
from jaxalign.envs import mujoco, plane, pointmaze
from jaxalign.envs.environment import Environment

Physics = Literal["host", "exact", "fast"]

REACH = 128  # cells counted to either side of the origin, along each axis
# Goals are drawn from -range to +range along each axis. Those of MuJoCo's are CSF's (Zheng et al.
# 2025); on the plane the farthest corner is 40 away.
GOAL_RANGE: Mapping[str, float] = {
    "plane": 20.0,
    "ant": 50.0,
    "half-cheetah": 100.0,
    "quadruped": 15.0,
    "humanoid": 10.0,
}
NAMES = (*GOAL_RANGE, *pointmaze.MAPS)


def is_mujoco(name: str) -> bool:
    """Whether MuJoCo computes it."""
    return name in GOAL_RANGE and name != "plane"


def make(name: str, physics: Physics) -> Environment:
    """The environment of that name. physics: of MuJoCo's; on the host it is as exact as "exact".

    Raises: UserError for an unknown name, or without the packages that it needs.
    """
    if name not in NAMES:
        raise UserError(f"environment = {name!r}: is none of {', '.join(NAMES)}; give one of these")
    if name == "plane":
        return plane.environment()
    if name in pointmaze.MAPS:
        return pointmaze.environment(name)
    return mujoco.environment(name, "exact" if physics == "host" else physics)


def goal_places(name: str, world: PyTree, count: int, key: Array) -> Array:
    """Goals `[count, P]`: uniform in the range, or in the free cells of a maze."""
    if name in GOAL_RANGE:
        axes = 1 if name == "half-cheetah" else 2
        reach = GOAL_RANGE[name]
        return jax.random.uniform(key, (count, axes), minval=-reach, maxval=reach)
    free = np.argwhere(np.array([[cell == "." for cell in row] for row in pointmaze.MAPS[name]]))
    cells = jnp.asarray(pointmaze.centre(free), jnp.float32)
    return cells[jax.random.randint(key, (count,), 0, len(free))]
