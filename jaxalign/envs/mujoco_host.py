"""MuJoCo's walkers stepped by its C library, in threads: on CPUs faster than the compiled ones.

The environments are those of `jaxalign.envs.mujoco`, with exact physics in double precision. All
advance in one call of `mujoco.rollout`, which deals them out to threads without Python's lock; the
policy, a compiled function, is asked once a step for all of them. An environment's path does not
depend on the number of threads.

Departures: the solver forgets, from one step of the environment to the next, where it ended. As it
runs until it has converged, paths are those of gymnasium's environments to 1e-12 over 30 steps.

Dimensions: E environments, O observation, A action, P place, T steps.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from jaxalign.core.types import Array, UserError
from jaxalign.envs import mujoco as walkers

# (observation [E, O], key) -> action [E, A], compiled.
Policy = Callable[[Array, Array], Array]

FRAME = 240, 320  # rows and columns of a picture


class HostEnvironments:
    """E environments of one kind. What it shares with `Environment` has the same name.

    observation: `[E, O] f32`, what was seen last.
    """

    def __init__(self, name: str, count: int, threads: int | None = None) -> None:
        """`threads`: as many as there are cores, where None.

        Raises: UserError for an unknown name, a missing package, or numbers below 1.
        """
        threads = _cores() if threads is None else threads
        if count < 1 or threads < 1:
            raise UserError(f"{count} environments, {threads} threads: each must be at least 1")
        recipe, self.model = walkers.find(name), walkers.load(name)
        self.name, self.steps, self.count = recipe.title, walkers.STEPS, count
        self.action_size = self.model.nu
        self.observation_size = self.model.nq + self.model.nv + self.model.na
        self.offset, self.scale = walkers.normaliser(name)
        self.place = functools.partial(walkers.place, size=recipe.place)
        self.goal_observation = walkers.goal_observation
        self._recipe, self._starts = recipe, walkers.make_starts(name, self.model)
        self._open(min(threads, count))
        self.reset(0)

    def _open(self, threads: int) -> None:
        mujoco = walkers.library()
        self._pool = _pool(threads)
        self._workers = [mujoco.MjData(self.model) for _ in range(threads)]
        size = mujoco.mj_stateSize(self.model, mujoco.mjtState.mjSTATE_FULLPHYSICS)
        self._state = np.zeros((self.count, size))

    def reset(self, seed: int) -> np.ndarray:
        """What is seen at new starts, `[E, O] f32`."""
        model, noise = self.model, self._recipe.noise
        generator = np.random.default_rng(seed)
        position = self._starts[generator.integers(len(self._starts), size=self.count)]
        position = position + noise * generator.uniform(-1, 1, position.shape)
        if model.nq > model.nv:
            position[:, 3:7] /= np.linalg.norm(position[:, 3:7], axis=1, keepdims=True)
        velocity = noise * generator.standard_normal((self.count, model.nv))
        self._state[:] = 0  # time, position, velocity, activation
        self._state[:, 1 : 1 + model.nq + model.nv] = np.hstack([position, velocity])
        return self.observation

    def step(self, action: np.ndarray) -> np.ndarray:
        """What is seen after one step with actions `[E, A]`, clipped to [-1, 1]: `[E, O] f32`."""
        low, high = self.model.actuator_ctrlrange.T
        control = low + (np.clip(action, -1, 1) + 1) / 2 * (high - low)
        control = np.repeat(control[:, None], self._recipe.substeps, axis=1)
        states, _ = self._pool.rollout(self.model, self._workers, self._state, control)
        self._state = states[:, -1].copy()
        return self.observation

    @property
    def observation(self) -> np.ndarray:
        return self._state[:, 1 : 1 + self.observation_size].astype(np.float32)

    def close(self) -> None:
        """Ends the threads."""
        self._pool.close()


def _pool(threads: int) -> Any:
    from mujoco import rollout

    return rollout.Rollout(nthread=threads)


def unroll(
    environments: HostEnvironments, policy: Policy, key: Array, length: int
) -> tuple[Array, Array]:
    """The next `length` steps: observations `[T+1, E, O] f32` and actions `[T, E, A]`.

    These are the first two fields of `rollout.episodes.Episodes`, and keys are dealt out as there:
    a policy draws the same numbers in both.
    policy: compiled, as it is asked once a step.
    Raises: UserError if the length is not positive.
    """
    if length < 1:
        raise UserError(f"episode length {length}: it must be at least 1")
    seen, actions = [environments.observation], []
    for each in jax.random.split(key, length):
        actions.append(np.asarray(policy(jnp.asarray(seen[-1]), each)))
        seen.append(environments.step(actions[-1]))
    return jnp.asarray(np.stack(seen)), jnp.asarray(np.stack(actions))


def measure_normaliser(
    name: str, rollouts: int = 10_000, length: int = 50, seed: int = 0, threads: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation `[O]` of what is seen under actions drawn evenly from [-1, 1].

    Over `length` states of each path, from the first on, as METRA's constants were measured.
    Raises: UserError as `HostEnvironments` does.
    """
    environments = HostEnvironments(name, rollouts, threads)
    generator = np.random.default_rng(seed)
    seen = [environments.reset(seed)]
    for _ in range(length - 1):
        action = generator.uniform(-1, 1, (rollouts, environments.action_size))
        seen.append(environments.step(action))
    environments.close()
    flat = np.concatenate(seen).astype(np.float64)
    return flat.mean(0), flat.std(0)


def render(name: str, positions: np.ndarray, path: str | Path) -> None:
    """Writes the poses `[T, nq]` of one environment as a moving picture (GIF), at its own pace.

    positions: the first nq entries of its observations.
    Raises: UserError where MuJoCo cannot draw, or as `HostEnvironments` does.
    """
    mujoco, model = walkers.library(), walkers.load(name)
    recipe, data = walkers.find(name), mujoco.MjData(model)
    missing = UserError(
        f"pictures of {name!r} need OpenGL without a display: set MUJOCO_GL=egl (or osmesa) "
        "before the start, and install its library"
    )
    if not _has_screen():
        raise missing
    try:
        renderer = mujoco.Renderer(model, *FRAME)
    except Exception:  # of many kinds: it depends on what is missing
        raise missing from None
    with renderer:
        pictures = [_picture(renderer, data, pose, recipe.camera) for pose in positions]
    milliseconds = round(1000 * recipe.substeps * model.opt.timestep)
    first, *others = map(Image.fromarray, pictures)
    first.save(path, save_all=True, append_images=others, duration=milliseconds, loop=0)


def _has_screen() -> bool:
    """Whether MuJoCo's choice of OpenGL may start: where it cannot, its half-made parts complain
    when they are collected.
    """
    chosen = os.environ.get("MUJOCO_GL", "").lower()
    displays = ("DISPLAY", "WAYLAND_DISPLAY")
    return (
        sys.platform != "linux"
        or chosen in ("egl", "osmesa")
        or any(os.environ.get(name) for name in displays)
    )


def _picture(renderer: Any, data: Any, pose: np.ndarray, camera: int) -> np.ndarray:
    """`[rows, columns, 3] u8`."""
    data.qpos[:] = pose
    walkers.library().mj_forward(renderer.model, data)
    renderer.update_scene(data, camera)
    return renderer.render()


def _cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
