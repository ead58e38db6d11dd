"""Skills where MuJoCo's C library steps the environments, in threads: faster on CPUs than compiled.

An epoch is walked on the host, with one call of the policies of all seeds a step; writing it into
the buffers and all gradient steps are one compiled program. Evaluations are walked in the same way.

Departures from `experiments.skills`: starts are drawn for all seeds together, so what a seed learns
depends on how many there are.

Dimensions: as there.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import seed_axis, skill_evaluation, skill_worlds, skills
from experiments.skill_evaluation import Shown
from experiments.skills import AXES, Evaluation, Experiment, Lab
from jaxalign.core import mesh as meshes
from jaxalign.core.state import TrainState
from jaxalign.core.types import Array, PyTree
from jaxalign.envs.mujoco_host import HostEnvironments, unroll
from jaxalign.ops import skills as skill_ops
from jaxalign.rollout.episodes import Episodes

# (state of all seeds, what they are told [S, E, ...], observation [S, E, O], keys) -> [S, E, A]
Policy = Callable[[TrainState, Array, Array, Array], Array]


def make_training(
    method: types.ModuleType, own: Any, lab: Lab, config: Experiment, seeds: Sequence[int]
) -> Callable[[TrainState, PyTree, Array], tuple[TrainState, dict[str, Array]]]:
    """`config.at_once` epochs of every seed; metrics are `[S]`. The state is donated."""
    walkers = HostEnvironments(config.environment, len(seeds) * config.environments)

    def act(state: TrainState, told: Array, seen: Array, key: Array) -> Array:
        return method.act(own, skills.learner(state), seen, told, key, 1.0)

    policy = jax.jit(jax.vmap(act, in_axes=(AXES, 0, 0, 0)))
    draw = jax.jit(functools.partial(_draw, own, config.environments, seeds))
    learn = make_learning(method, own, lab, config, seeds)

    def step(state: TrainState, world: PyTree, key: Array) -> tuple[TrainState, dict[str, Array]]:
        log: dict[str, Array] = {}
        with jax.transfer_guard("allow"):
            for i in range(config.at_once):
                told, walk_key, learn_keys = draw(jax.random.fold_in(key, i))
                walked = walk(walkers, functools.partial(policy, state, told), len(seeds), walk_key)
                state, log = learn(state, walked, told, learn_keys, jnp.int32(i))
        return state, log

    return step


def _draw(
    own: Any, environments: int, seeds: Sequence[int], key: Array
) -> tuple[Array, Array, Array]:
    """An epoch's skills `[S, E, D]`, the key of its walk, and each seed's key `[S]` to learn by."""
    skill_key, walk_key, learn_key = jax.random.split(key, 3)
    each = jax.vmap(jax.random.fold_in, (None, 0))
    sample = functools.partial(
        skill_ops.sample, count=environments, size=own.skill_size, discrete=own.discrete
    )
    told = jax.vmap(sample)(each(skill_key, jnp.asarray(seeds)))
    return told, walk_key, each(learn_key, jnp.asarray(seeds))


def make_learning(
    method: types.ModuleType, own: Any, lab: Lab, config: Experiment, seeds: Sequence[int]
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """`(state, episodes, skills, keys, i) -> (state, metrics)`, compiled.

    i: the epoch of the dispatch; after the last one the dispatch counts as a step.
    """
    environment = lab.environment

    def one(
        state: TrainState, walked: Episodes, told: Array, key: Array, count: Array
    ) -> tuple[TrainState, dict[str, Array]]:
        state = skills.remember(environment, state, walked, told, own)
        return skills.learn(method, own, state, count, key)

    def dispatch(
        state: TrainState, walked: Episodes, told: Array, keys: Array, i: Array
    ) -> tuple[TrainState, dict[str, Array]]:
        count = skills.updates_of(config, environment, state.step * config.at_once + i)
        both = jax.vmap(one, in_axes=(AXES, 0, 0, 0, None), out_axes=(AXES, 0))
        step = state.step + (i == config.at_once - 1)
        state, log = both(state, walked, told, keys, count)
        return state._replace(step=step), log

    return jax.jit(dispatch, donate_argnums=0)


def walk(
    walkers: HostEnvironments,
    policy: Callable[[Array, Array], Array],
    seeds: int,
    key: Array,
) -> Episodes:
    """An episode of every environment: leaves `[S, T, E, ...]`.

    policy: `(observation [S, E, O], keys [S]) -> action [S, E, A]`, compiled.
    """
    walkers.reset(int(jax.random.bits(key)))

    def act(seen: Array, key: Array) -> Array:
        rows = seen.reshape(seeds, -1, seen.shape[-1])
        return policy(rows, jax.random.split(key, seeds)).reshape(walkers.count, -1)

    seen, actions = unroll(walkers, act, key, walkers.steps)

    def by_seed(leaf: Array) -> Array:
        return jnp.moveaxis(leaf.reshape(len(leaf), seeds, -1, leaf.shape[-1]), 1, 0)

    return Episodes(by_seed(seen), by_seed(actions), None)


# --- evaluation -----------------------------------------------------------------------------------


def make_evaluation(
    method: types.ModuleType, own: Any, lab: Lab, config: Experiment, seeds: Sequence[int]
) -> Evaluation:
    """As `skills.make_evaluation`; the same draws at every call."""
    environment, count = lab.environment, len(seeds)
    showing = HostEnvironments(config.environment, count * config.shown)
    seeking = HostEnvironments(config.environment, count * config.goals)
    keys = jax.vmap(lambda seed: jax.random.split(jax.random.key(10_000 + seed)))(np.asarray(seeds))
    sample = functools.partial(
        skill_ops.evenly, count=config.shown, size=own.skill_size, discrete=own.discrete
    )
    told = jax.vmap(sample)(keys[:, 0])
    places = jax.vmap(
        lambda key: skill_worlds.goal_places(config.environment, lab.world, config.goals, key)
    )(keys[:, 1])

    def act(state: TrainState, told: Array, seen: Array, key: Array) -> Array:
        return method.act(own, state, seen, told, key, 0.0)

    def seek(state: TrainState, goal: Array, seen: Array, key: Array) -> Array:
        return act(state, method.skill_towards(own, state, seen, goal), seen, key)

    axes = (seed_axis.OF, 0, 0, 0)
    show_policy, seek_policy = (jax.jit(jax.vmap(f, in_axes=axes)) for f in (act, seek))

    def judge(
        state: TrainState, visited: Array, told: Array, seen: Array, sought: Array, place: Array
    ) -> tuple[Shown, dict[str, Array]]:
        latents = method.latent(own, state, seen) if hasattr(method, "latent") else None
        distance = jnp.linalg.norm(environment.place(sought) - place[None], axis=-1)
        filmed = seen[:, : skill_evaluation.FILMED]
        shown = Shown(told, environment.place(seen), latents, distance, filmed)
        return shown, skill_evaluation.numbers(shown, visited, config.goal_radius)

    judge_all = jax.jit(jax.vmap(judge, in_axes=(seed_axis.OF, 0, 0, 0, 0, 0)))
    key = jax.device_put(jax.random.key(20_000 + config.seed), meshes.replicated(lab.mesh))

    def evaluate(state: TrainState) -> tuple[Shown, dict[str, Array]]:
        known = skills.learner(state)
        seen = walk(showing, functools.partial(show_policy, known, told), count, key).observations
        seeking.reset(0)
        start = jnp.asarray(seeking.observation).reshape(count, config.goals, -1)
        goals = environment.goal_observation(start, places)
        policy = functools.partial(seek_policy, known, goals)
        sought = walk(seeking, policy, count, key).observations
        return judge_all(known, state.extra.visited, told, seen, sought, places)

    return evaluate
