"""MuJoCo's walkers for the discovery of skills, compiled: MJX steps E of them side by side.

Source: environments of Park et al., "METRA: Scalable Unsupervised RL with Metric-Aware Abstraction"
(ICLR 2024), section 5 and the released code's settings. "ant" and "half-cheetah" are the models of
the package gymnasium, with the place in the observation, at 20 Hz. "quadruped" and "humanoid" are
those of dm_control at half the rate of its suite, as each action is repeated once: 25 and 20 Hz.
Episodes have 200 steps; nothing ends one, also not a fall. No model is copied: all are read from
the installed packages.

An observation is the generalised position, the velocity and, where actuators have one
(quadruped), their activation. A place is (x, y), for half-cheetah x. Actions are scaled from
[-1, 1] to the actuators' ranges.

Two kinds of physics. "exact": integrator and solver as the model's file has them (ant: Runge-Kutta
of fourth order, Newton up to convergence). "fast": semi-implicit Euler with damping explicit, one
Newton iteration and four steps of line search, as MJX's documentation advises: another simulator,
and hence part of the environment's name. On CPUs `mujoco_host` is faster than both.

Departures: METRA learns quadruped and humanoid from pixels. Here it is from states, and tables call
them "quadruped-state" and "humanoid-state". Starts of these two are drawn from `STARTS` that are
made once, by the rules of METRA's tasks. Root quaternions have unit length from the start on, as in
the MuJoCo of METRA's time. All is float32, with matrix products at full precision: a step is the
C library's to 1e-4, with one exception. Where a capsule within 30 degrees of upright touches the
floor, MJX gives the pyramid of its friction other axes. So it is in half of an ant's steps under
random actions; these differ by up to 0.03.

Dimensions: E environments, O observation, A action, P place, K starts, nq positions, nv velocities,
na activations.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import warnings
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.core.types import Array, PyTree, UserError
from jaxalign.envs.environment import Environment
from jaxalign.envs.mujoco_normaliser import NORMALISERS

STEPS = 200
STARTS = 512
WORST = 1e10  # MuJoCo's limit of a sane number
PHYSICS = ("exact", "fast")

Starter = Callable[[Any, np.random.Generator], np.ndarray]


class Recipe(NamedTuple):
    """What is particular to an environment.

    title: its name in tables.
    file: of its model, from the package that holds it on.
    substeps: steps of the physics in one of the environment.
    place: P, the first entries of an observation.
    noise: half the width of the uniform noise on starts, and deviation of the normal one of speeds.
    start: `(model, generator) -> [nq]`, a pose to start from.
    camera: which of the model's own follows it.
    """

    title: str
    file: str
    substeps: int
    place: int
    noise: float
    start: Starter
    camera: int = 0


class World(NamedTuple):
    """What the physics needs, to be passed to `reset` and `step`.

    model: `mjx.Model`. blank: `mjx.Data` of one environment, of which no number matters.
    starts: `[K, nq] f32`, poses to start from.
    """

    model: PyTree
    blank: PyTree
    starts: Array


class State(NamedTuple):
    """E environments, with all that the next step depends on.

    position: `[E, nq] f32`. velocity: `[E, nv] f32`. activation: `[E, na] f32`.
    acceleration: `[E, nv] f32`, of the last substep: from there the solver starts.
    """

    position: Array
    velocity: Array
    activation: Array
    acceleration: Array


def environment(name: str, physics: str = "exact") -> Environment:
    """The environment of that name, stepped by MJX. Its title tells of fast physics ("ant-fast").

    name: one of RECIPES. physics: "exact" or "fast".
    Raises: UserError for an unknown name or physics, or a missing package.
    """
    if physics not in PHYSICS:
        raise UserError(f"physics {physics!r} is unknown: use one of {', '.join(PHYSICS)}")
    recipe, model = find(name), load(name)
    offset, scale = normaliser(name)
    world = _world(name, model, physics)
    return Environment(
        name=recipe.title if physics == "exact" else f"{recipe.title}-{physics}",
        observation_size=model.nq + model.nv + model.na,
        action_size=model.nu,
        steps=STEPS,
        world=world,
        reset=functools.partial(reset, noise=recipe.noise),
        step=functools.partial(step, substeps=recipe.substeps),
        observe=observe,
        place=functools.partial(place, size=recipe.place),
        goal_observation=goal_observation,
        offset=offset,
        scale=scale,
    )


def reset(world: World, count: int, key: Array, *, noise: float) -> State:
    """Environments at their start, as many as `count`."""
    which, where, speed = jax.random.split(key, 3)
    model, starts = world.model, world.starts
    position = starts[jax.random.randint(which, (count,), 0, len(starts))]
    position += noise * jax.random.uniform(where, position.shape, minval=-1.0, maxval=1.0)
    if model.nq > model.nv:
        turn = position[:, 3:7]
        turn /= jnp.sqrt(jnp.sum(turn**2, axis=1, keepdims=True))
        position = position.at[:, 3:7].set(turn)
    velocity = noise * jax.random.normal(speed, (count, model.nv))
    still = jnp.zeros((count, model.nv))
    return State(position, velocity, jnp.zeros((count, model.na)), still)


def step(world: World, state: State, action: Array, *, substeps: int) -> State:
    """One step with actions `[E, A]`; what blew up is back at rest, as MuJoCo has it."""
    low, high = world.model.actuator_ctrlrange.T
    share = (jnp.clip(action, -1.0, 1.0) + 1) / 2
    control = low[None] + share * (high - low)[None]
    with _numerics():
        moved = jax.vmap(functools.partial(_advance, world, substeps))(state, control)
    return _restored(world, moved)


def observe(state: State) -> Array:
    """What the agent sees, `[E, O] f32`."""
    return jnp.concatenate([state.position, state.velocity, state.activation], axis=1)


def place(observation: Array, *, size: int) -> Array:
    """Where an environment is, `[..., P]`, from its observation `[..., O]`."""
    return observation[..., :size]


def goal_observation(observation: Array, place: Array) -> Array:
    """The observation `[..., O]`, moved to the place `[..., P]`."""
    return jnp.concatenate([place, observation[..., place.shape[-1] :]], axis=-1)


def normaliser(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Offset and scale of observations, `[O] f32` each; see `mujoco_normaliser`."""
    offset, scale = np.array(NORMALISERS[name], np.float32)
    return offset, scale


# ---------------------------------------------------------------- physics


@contextlib.contextmanager
def _numerics() -> Generator[None]:
    # MJX adds arrays of different ranks.
    with jax.default_matmul_precision("highest"), jax.numpy_rank_promotion("allow"):
        yield


def _advance(world: World, substeps: int, state: State, control: Array) -> State:
    """`substeps` steps of one environment. Only its state is carried from one to the next."""
    mjx = compiler()

    def body(_: int, state: State) -> State:
        data = world.blank.replace(
            qpos=state.position,
            qvel=state.velocity,
            act=state.activation,
            qacc_warmstart=state.acceleration,
            ctrl=control,
        )
        data = mjx.step(world.model, data)
        return State(data.qpos, data.qvel, data.act, data.qacc_warmstart)

    return jax.lax.fori_loop(0, substeps, body, state)


def _restored(world: World, state: State) -> State:
    """The state, with environments at rest where a number is beyond sense."""
    seen = jnp.concatenate(state, axis=1)
    sane = jnp.all(jnp.abs(seen) < WORST, axis=1, keepdims=True)  # not so where it is no number
    rest = State(world.model.qpos0, *(jnp.zeros_like(leaf[0]) for leaf in state[1:]))
    return jax.tree.map(lambda leaf, calm: jnp.where(sane, leaf, calm[None]), state, rest)


def _world(name: str, model: Any, physics: str) -> World:
    mujoco, mjx = library(), compiler()
    starts = make_starts(name, model)
    if physics == "fast":
        model.opt.integrator = mujoco.mjtIntegrator.mjINT_EULER
        model.opt.iterations, model.opt.ls_iterations = 1, 4
        model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_EULERDAMP
    blank = mjx.make_data(model, impl="jax")
    return World(mjx.put_model(model, impl="jax"), blank, jnp.asarray(starts, jnp.float32))


# ---------------------------------------------------------------- models


def find(name: str) -> Recipe:
    """The recipe of an environment. Raises: UserError if there is none of that name."""
    if name not in RECIPES:
        raise UserError(f"environment {name!r} is unknown: use one of {', '.join(RECIPES)}")
    return RECIPES[name]


@functools.cache
def library() -> Any:
    """The module mujoco. Raises: UserError where it is not installed."""
    try:
        import mujoco
    except ImportError:
        raise _missing("mujoco") from None
    return mujoco


@functools.cache
def compiler() -> Any:
    """The module mujoco.mjx. Raises: UserError where it is not installed."""
    library()
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # there it tells that Warp is missing
            from mujoco import mjx
    except ImportError:
        raise _missing("mujoco-mjx") from None
    return mjx


def _missing(package: str) -> UserError:
    return UserError(
        f"MuJoCo's environments need {package}, which is not installed: "
        "pip install 'jaxalign[mujoco]'"
    )


def load(name: str) -> Any:
    """The `MjModel` of an environment, new at each call.

    Raises: UserError for an unknown name or a missing package.
    """
    mujoco = library()
    package, _, file = find(name).file.partition("/")
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise _missing(package.replace("_", "-"))
    spec = mujoco.MjSpec.from_file(str(Path(found.submodule_search_locations[0], file)))
    _clear_stage(spec)
    with warnings.catch_warnings():  # half-cheetah's file has an attribute of former days
        warnings.filterwarnings("ignore", "compiler attribute 'settotalmass'")
        return spec.compile()


def _clear_stage(spec: Any) -> None:
    """Leaves only animal and floor of dm_control's quadruped, as its tasks of walking have it."""
    stage = [geom for geom in spec.geoms if geom.name.startswith(("wall_", "terrain"))]
    stage += [body for body in spec.bodies if body.name == "ball"]
    stage += [site for site in spec.sites if site.name == "target"]
    far = library().mjtSensor.mjSENS_RANGEFINDER
    for part in stage + [sensor for sensor in spec.sensors if sensor.type == far]:
        spec.delete(part)


def make_starts(name: str, model: Any) -> np.ndarray:
    """Poses to start from, `[K, nq]`; always the same ones."""
    start = find(name).start
    generator = np.random.default_rng(0)
    count = 1 if start is _at_rest else STARTS
    return np.stack([start(model, generator) for _ in range(count)])


def _at_rest(model: Any, generator: np.random.Generator) -> np.ndarray:
    return model.qpos0


def _on_its_feet(model: Any, generator: np.random.Generator) -> np.ndarray:
    """Nearly upright, at the least height, in centimetres, at which nothing touches the floor."""
    turn = np.array([1.0, 0, 0, 0]) + 0.02 * generator.standard_normal(4)
    pose = model.qpos0.copy()
    pose[:7] = 0, 0, 0, *turn / np.linalg.norm(turn)
    depth = -min(gap for gap in _gaps(model, pose))
    pose[2] = np.ceil(depth * 100) / 100
    return pose


def _in_the_air(model: Any, generator: np.random.Generator) -> np.ndarray:
    """Joints anywhere in their ranges, turned at random, dropped where nothing touches."""
    while True:
        pose = model.qpos0.copy()
        turn = generator.random(4)  # not all turns, and so it is in dm_control
        pose[3:7] = turn / np.linalg.norm(turn)
        pose[7:] = generator.uniform(*model.jnt_range[1:].T)
        if not _gaps(model, pose):
            return pose


def _gaps(model: Any, pose: np.ndarray) -> list[float]:
    """The gaps of all contacts, negative where bodies are within each other."""
    mujoco = library()
    data = mujoco.MjData(model)
    data.qpos[:] = pose
    mujoco.mj_fwdPosition(model, data)
    return list(data.contact.dist)


GYMNASIUM, SUITE = "gymnasium/envs/mujoco/assets", "dm_control/suite"
RECIPES = {
    "ant": Recipe("ant", f"{GYMNASIUM}/ant.xml", 5, 2, 0.1, _at_rest),
    "half-cheetah": Recipe("half-cheetah", f"{GYMNASIUM}/half_cheetah.xml", 5, 1, 0.1, _at_rest),
    "quadruped": Recipe("quadruped-state", f"{SUITE}/quadruped.xml", 8, 2, 0, _on_its_feet, 2),
    "humanoid": Recipe("humanoid-state", f"{SUITE}/humanoid.xml", 10, 2, 0, _in_the_air),
}
