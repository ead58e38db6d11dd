"""A high level that picks continuous skills by soft actor-critic; another policy carries them out.

Source: the downstream control of METRA (Park et al. 2024, section 5.3), with the settings of CSF's
code (Zheng et al. 2025). The policy draws a vector from [-1, 1]^D, and its direction is the skill.
What a choice earns is the sum over the steps that it lasts; the last choice of an episode is
terminal, though only time ends it. Which skills these are, the high level is not told.

Departures: none known, but that gradient steps wait for `warm_up` choices, there for 10,000.

Dimensions: B batch, O observation (with what is told of the task), D skill, T choices of an
episode, E episodes, N rows of the buffer.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxalign.core import descent, limits
from jaxalign.core import step as steps
from jaxalign.core.state import TrainState
from jaxalign.core.types import Array, UserError
from jaxalign.envs.skill_tasks import Choices
from jaxalign.models import mlp
from jaxalign.models import soft_actor_critic as sac
from jaxalign.ops.skills import Transitions
from jaxalign.rollout import buffer as buffers


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of CSF's code for AntMultiGoals."""

    hidden: tuple[int, ...] = (1024, 1024)  # of all networks
    episodes: int = 8  # E, of an epoch
    updates: int = 50  # gradient steps of an epoch
    batch: int = 256  # B
    buffer: int = 1_000_000  # N
    warm_up: int = 1000  # choices before the first gradient step
    discount: float = 0.99  # gamma, of a choice
    learning_rate: float = 1e-4  # of the critics, the policy and alpha
    target_rate: float = 5e-3  # tau, share of the critics that the slow ones take over
    initial_temperature: float = 0.1  # temperature of the policy at the start

    def __post_init__(self) -> None:
        limits.counts(self, "hidden", "episodes", "updates", "batch", "buffer")
        limits.fractions(self, "discount", "target_rate")
        limits.positive(self, "learning_rate", "initial_temperature")
        if not 0 <= self.warm_up <= self.buffer:
            raise UserError(
                f"warm_up = {self.warm_up}: must lie between 0 and buffer = {self.buffer}"
            )


def init(
    config: Config,
    observation_size: int,
    skill_size: int,
    offset: np.ndarray,
    scale: np.ndarray,
    key: Array,
) -> TrainState:
    """The state before the first update; the slow critics lie in `slow`, the buffer in `extra`.

    offset, scale: `[O]`, of observations; the networks read (o - offset) / scale.
    """
    agent = sac.agent(observation_size, skill_size, 0, config.hidden)
    log_temperature = jnp.log(jnp.float32(config.initial_temperature))
    params = {**mlp.init_each(agent, key), "log_temperature": log_temperature}
    slow = {"critic": jax.tree.map(jnp.copy, params["critic"])}
    seen, nothing = jnp.zeros(observation_size), jnp.zeros(())
    example = Choices(seen, jnp.zeros(skill_size), seen, nothing, nothing)
    memory = buffers.create(example, config.buffer)  # ty: ignore[invalid-argument-type]
    extra = {**sac.normaliser(offset, scale), "buffer": memory}
    return descent.create(params, _optimizers(config), slow=slow, extra=extra)


def update(
    config: Config, state: TrainState, episodes: Choices, key: Array
) -> tuple[TrainState, dict[str, Array]]:
    """What is learned after an epoch; metrics are means over its gradient steps, 0 without any.

    episodes: leaves `[T, E, ...]`; T * E must divide N.
    """
    rows = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), episodes)
    memory = buffers.write(state.extra["buffer"], rows)
    state = state._replace(extra={**state.extra, "buffer": memory})
    # A traced number, so that one program serves the warm-up too.
    count = jnp.where(memory.size >= config.warm_up, config.updates, 0)

    def one(i: Array, learned: TrainState) -> tuple[TrainState, dict[str, Array]]:
        draw_key, own_key = jax.random.split(jax.random.fold_in(key, i))
        batch = buffers.sample(memory, draw_key, config.batch)
        return gradient_step(config, learned, batch, own_key)  # ty: ignore[invalid-argument-type]

    def body(i: Array, carry: tuple) -> tuple:
        learned, log = one(i, carry[0])
        return learned, jax.tree.map(jnp.add, carry[1], log)

    start = state._replace(extra={**state.extra, "buffer": None})
    log = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(one, 0, start)[1]
    )
    learned, log = jax.lax.fori_loop(0, count, body, (start, log))
    log = {name: total / jnp.maximum(count, 1) for name, total in log.items()}
    return learned._replace(step=state.step + 1, extra=state.extra), log


def gradient_step(
    config: Config, state: TrainState, batch: Choices, key: Array
) -> tuple[TrainState, dict[str, Array]]:
    """One step of the critics, the policy and alpha on rows `[B, ...]`, and metrics."""
    agent = sac.agent(batch.observation.shape[-1], batch.action.shape[-1], 0, config.hidden)
    told = jnp.zeros((len(batch.reward), 0))  # the high level is told no skill
    rows = Transitions(
        batch.observation, batch.action, batch.next_observation, told, batch.terminal
    )
    rows = sac.normalised(state.extra, rows)
    descend = functools.partial(descent.descend, _optimizers(config))
    critic_key, policy_key = jax.random.split(key)
    state, critic_metrics = sac.improve_critic(
        agent, descend, state, rows, batch.reward, config.discount, critic_key
    )
    state, policy_metrics = sac.improve_policy(agent, descend, state, rows, policy_key)
    trained = {"critic": state.params["critic"]}
    slow = steps.follow(state.slow, trained, 1 - config.target_rate)
    return state._replace(slow=slow), {**critic_metrics, **policy_metrics}


def act(
    config: Config,
    state: TrainState,
    observation: Array,
    key: Array,
    temperature: float | Array = 1.0,
) -> Array:
    """Choices `[B, D]` in [-1, 1], whose directions are the skills, for observations `[B, O]`.

    temperature: multiplies the policy's standard deviation; 0 takes tanh(mean).
    """
    size = mlp.action_size(state.params["actor"])
    actor = sac.agent(observation.shape[-1], size, 0, config.hidden).actor
    told = jnp.zeros((len(observation), 0))
    return sac.act(actor, state, observation, told, key, temperature)


def _optimizers(config: Config) -> descent.Optimizers:
    """An Adam for each part of the parameters."""
    names = ("actor", "critic", "log_temperature")
    return dict.fromkeys(names, optax.adam(config.learning_rate))
