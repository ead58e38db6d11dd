"""A soft actor-critic that is told a skill: its networks, and how they learn from a reward.

The policy and the critics read the observation and the skill side by side. Networks and initial
weights are those of METRA's code: a policy of tanh layers with two heads, and critics of ReLU
layers with normal Xavier weights. The arithmetic is that of `ops.soft_actor_critic`.

Observations are normalised, `(o - offset) / scale`, by numbers that never change. They lie beside
the parameters, as do the logarithm of the temperature alpha and what else a method keeps.

Dimensions: B batch, O observation, A action, D skill; the axis of 2 holds the twin critics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from jaxalign.core.state import TrainState
from jaxalign.core.types import Array, Model, Params, PyTree
from jaxalign.models import mlp
from jaxalign.ops import soft_actor_critic as sac
from jaxalign.ops.gaussian import Gaussian
from jaxalign.ops.skills import Transitions

# One optimizer step of a named part of the state down a loss, as `core.descent.descend` makes it.
Loss = Callable[[PyTree], tuple[Array, PyTree]]
Descend = Callable[[TrainState, str, Loss], tuple[TrainState, Array, PyTree]]


class Agent(NamedTuple):
    """actor: `(params, o, z) -> Gaussian [B, A]`, before the tanh.

    critic: `(params, o, z, a) -> [2, B]`.
    """

    actor: Model
    critic: Model


def agent(observation_size: int, action_size: int, skill_size: int, hidden: Sequence[int]) -> Agent:
    """The networks for observations of size O, actions of size A and skills of size D."""
    twins = critic(observation_size, action_size, skill_size, hidden, 1)
    return Agent(
        actor=mlp.two_headed_actor(observation_size + skill_size, hidden, action_size),
        critic=mlp.scalar(twins),
    )


def critic(
    observation_size: int, action_size: int, skill_size: int, hidden: Sequence[int], outputs: int
) -> Model:
    """Twin networks `(params, o, z, a) -> [2, B, outputs]`."""
    inputs = observation_size + skill_size + action_size
    one = mlp.mlp(inputs, hidden, outputs, activation=nn.relu, distribution="normal")
    return mlp.ensemble(one, 2)


def normaliser(offset: np.ndarray, scale: np.ndarray) -> dict[str, Array]:
    """What `normalise` needs, from vectors `[O]`."""
    return {"offset": jnp.array(offset, jnp.float32), "scale": jnp.array(scale, jnp.float32)}


def normalise(extra: PyTree, observation: Array) -> Array:
    """What the networks read, `[..., O]`."""
    shape = (1,) * (observation.ndim - 1) + (-1,)
    return (observation - extra["offset"].reshape(shape)) / extra["scale"].reshape(shape)


def normalised(extra: PyTree, batch: Transitions) -> Transitions:
    """The batch as the networks read it."""
    return batch._replace(
        observation=normalise(extra, batch.observation),
        next_observation=normalise(extra, batch.next_observation),
    )


def act(
    actor: Model,
    state: TrainState,
    observation: Array,
    skill: Array,
    key: Array,
    temperature: float | Array,
) -> Array:
    """Actions `[B, A]` in [-1, 1] for observations `[B, O]` and skills `[B, D]`.

    temperature: multiplies the policy's standard deviation; 0 takes tanh(mean).
    """
    policy = actor.apply(state.params["actor"], normalise(state.extra, observation), skill)
    return sac.act(policy, key, temperature)


def improve_critic(
    agent: Agent,
    descend: Descend,
    state: TrainState,
    rows: Transitions,
    reward: Array,
    discount: float,
    key: Array,
) -> tuple[TrainState, dict[str, Array]]:
    """One step of the critics towards the soft target of the rewards `[B]`, and metrics."""
    alpha = jnp.exp(state.params["log_temperature"])
    following, skill = rows.next_observation, rows.skill
    policy = agent.actor.apply(state.params["actor"], following, skill)
    action, log_density = sac.sample(policy, key)
    slow = agent.critic.apply(state.slow["critic"], following, skill, action)
    target = sac.target(reward, rows.terminal, discount, slow, log_density, alpha)

    def loss(critic: Params) -> tuple[Array, Array]:
        values = agent.critic.apply(critic, rows.observation, skill, rows.action)
        return sac.critic_loss(values, target).mean(), values.mean()

    state, value, mean = descend(state, "critic", loss)
    return state, {"critic_loss": value, "value": mean}


def improve_policy(
    agent: Agent, descend: Descend, state: TrainState, rows: Transitions, key: Array
) -> tuple[TrainState, dict[str, Array]]:
    """One step of the policy against the critics, then one of the temperature, and metrics."""
    alpha = jnp.exp(state.params["log_temperature"])
    critic = state.params["critic"]
    entropy = sac.target_entropy(rows.action.shape[-1])

    def loss(actor: Params) -> tuple[Array, Array]:
        policy: Gaussian = agent.actor.apply(actor, rows.observation, rows.skill)
        action, log_density = sac.sample(policy, key)
        values = agent.critic.apply(critic, rows.observation, rows.skill, action)
        return sac.actor_loss(values, log_density, alpha).mean(), log_density

    state, value, log_density = descend(state, "actor", loss)

    def temperature_loss(log_alpha: Array) -> tuple[Array, None]:
        return sac.temperature_loss(log_alpha, log_density, entropy).mean(), None

    state, _, _ = descend(state, "log_temperature", temperature_loss)
    return state, {"actor_loss": value, "entropy": -log_density.mean(), "temperature": alpha}
