"""The programs that an experiment runs on its devices, as shapes alone: nothing is allocated.

For each experiment a function `(config, seeds, mesh) -> list[Program]` builds what a run would
compile, from the experiment's own functions, with every argument a `jax.ShapeDtypeStruct` that
knows how it is spread over the mesh. The mesh may be of devices that are not there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxalign.core import mesh as meshes
from jaxalign.core.types import PyTree


class Program(NamedTuple):
    """One compiled function of a run.

    name: what it does in a training step, for example "update".
    function, arguments: of `jax.ShapeDtypeStruct`s with shardings; NumPy integers among them are
        values that the compiled program is planned for, such as a stage's number.
    donated: which arguments it may overwrite.
    held: arguments by what they are, for example "parameters"; the rest count as "other".
    within: arrays of which it is known that the program keeps them while it runs.
    beside: what else lies in the devices' memory meanwhile.
    turns: of a loop that data end, how many to plan for.
    times: how often it runs in a training step.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[PyTree, ...]
    donated: tuple[int, ...] = ()
    held: Mapping[str, PyTree] = {}
    within: Mapping[str, PyTree] = {}
    beside: Mapping[str, PyTree] = {}
    turns: int = 1
    times: int = 1


def spread(tree: PyTree, sharding: NamedSharding | PyTree) -> PyTree:
    """The shapes of `tree`, each with its sharding. sharding: one for all leaves, or a tree."""
    if isinstance(sharding, NamedSharding):
        sharding = jax.tree.map(lambda _: sharding, tree)
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        tree,
        sharding,
    )


def bytes_a_device(tree: PyTree) -> int:
    """Bytes of the part of `tree` that each device holds."""

    def size(leaf: Any) -> int:
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return 0  # a value planned for
        shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape
        item = 8 if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize
        return math.prod(shape) * item

    return sum(map(size, jax.tree.leaves(tree)))


def _key(mesh: Mesh) -> jax.ShapeDtypeStruct:
    return spread(jax.eval_shape(lambda: jax.random.key(0)), meshes.replicated(mesh))


# --- seeds side by side ---------------------------------------------------------------------------


def _deal(state: PyTree, seeds: int, mesh: Mesh) -> tuple[PyTree, NamedSharding | None]:
    """As `experiments.seed_axis.spread`: seeds are dealt out where they divide, else rows are."""
    everywhere, rows = meshes.replicated(mesh), meshes.batch_sharding(mesh)
    dealt = seeds % math.prod(mesh.shape[axis] for axis in meshes.data_axes(mesh)) == 0
    where = jax.tree.map(lambda leaf: rows if dealt and leaf.ndim else everywhere, state)
    return spread(state, where), None if dealt else rows


def metra(config: Any, seeds: Sequence[int], mesh: Mesh) -> list[Program]:
    """Skills: `at_once` epochs of the first arm, or where the host walks, one epoch's learning."""
    from experiments import skill_worlds, skills, skills_host

    arm = config.arms[0]
    method, own = skills.METHODS[arm], getattr(config, arm)
    environment = skill_worlds.make(config.environment, config.physics)
    lab = skills.Lab(environment, None, mesh)
    state = jax.eval_shape(
        lambda: skills.start_state(method, own, environment, config.buffer, seeds)
    )
    state, _ = _deal(state, len(seeds), mesh)
    state = state._replace(step=np.int32(config.epochs // config.at_once))
    held = {
        "parameters": (state.params, state.slow),
        "optimizer": state.opt_state,
        "buffer": state.extra,
    }
    common: dict[str, Any] = {"donated": (0,), "held": held, "turns": config.updates}
    if config.physics == "host" and skill_worlds.is_mujoco(config.environment):
        function = skills_host.make_learning(method, own, lab, config, seeds)
        walked = (state, *_walked(own, environment, config, seeds, mesh), np.int32(0))
        return [Program("learning", function, walked, times=config.at_once, **common)]
    function = skills.make_training(method, own, lab, config, seeds)
    world = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, environment.world))
    given = (state, spread(world, meshes.replicated(mesh)), _key(mesh))
    return [Program("training", function, given, **common)]


def _walked(
    own: Any, environment: Any, config: Any, seeds: Sequence[int], mesh: Mesh
) -> tuple[PyTree, PyTree, PyTree]:
    """An epoch's episodes, skills and keys, as the host hands them over."""
    from jaxalign.rollout.episodes import Episodes

    count, steps, side = len(seeds), environment.steps, config.environments

    def array(*shape: int) -> Any:
        return jax.ShapeDtypeStruct((count, *shape), jnp.float32)

    walked = Episodes(
        array(steps + 1, side, environment.observation_size),
        array(steps, side, environment.action_size),
        None,
    )
    keys = jax.eval_shape(lambda: jax.vmap(jax.random.key)(np.asarray(seeds)))
    given, _ = _deal((walked, array(side, own.skill_size), keys), count, mesh)
    return given


def hiql(config: Any, seeds: Sequence[int], mesh: Mesh) -> list[Program]:
    """Offline goal-conditioned learning: `at_once` updates of the first arm."""
    from experiments import offline

    arm = config.arms[0]
    method, own = offline.METHODS[arm], getattr(config, arm)
    data = spread(_trajectories(config), meshes.replicated(mesh))
    state = jax.eval_shape(lambda data: offline.start_state(method, own, data, seeds), data)
    state, rows = _deal(state, len(seeds), mesh)
    function = offline.make_training(method, own, seeds, config.at_once, rows)
    held = {
        "parameters": (state.params, state.slow),
        "optimizer": state.opt_state,
        "data": data,
    }
    return [Program("training", function, (state, data, _key(mesh)), (0,), held)]


def _trajectories(config: Any) -> PyTree:
    """A data set of OGBench's size for the task: a million states and more, by its recipe."""
    from experiments import offline_data
    from jaxalign.core.types import UserError
    from jaxalign.data import pointmaze_data
    from jaxalign.data.trajectories import Trajectories

    if not offline_data.in_maze(config.task):
        raise UserError(f"task {config.task!r}: plans are for point mazes; give one of those")
    recipe = pointmaze_data.recipe(config.task)
    episodes = config.data_episodes or recipe.episodes
    states = episodes * recipe.length
    shapes = [(states, 2), (states, 2), (states,), (states - episodes,)]
    kinds = [jnp.float32, jnp.float32, jnp.int32, jnp.int32]
    return Trajectories(*map(jax.ShapeDtypeStruct, shapes, kinds))  # ty: ignore


Build = Callable[[Any, Sequence[int], Mesh], list[Program]]
PROGRAMS: Mapping[str, Build] = {"metra": metra, "hiql": hiql}
