"""DIAYN: skills that can be told apart by the states to which they lead.

Source: Eysenbach et al. 2019, "Diversity is All You Need: Learning Skills without a Reward
Function". A discriminator q(z | s') guesses the skill, and the policy is rewarded for what gives it
away, log q(z | s') - log p(z) (eq. 3). One-hot skills are guessed by a softmax. Skills on the unit
sphere are guessed by a Gaussian of unit variance, whose p(z) is the same Gaussian around 0, which
knows nothing; so the reward is mu^T z - |mu|^2 / 2 for the mean mu(s').

Departures: it is trained in the order and with the settings of METRA's code, which knows the
discriminator too, so that only the reward differs. There the Gaussian's deviation is learned and
log p(z), a constant, is not subtracted.

Dimensions: B batch, O observation, A action, D skill.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxalign.core import descent, limits
from jaxalign.core import step as steps
from jaxalign.core.state import TrainState
from jaxalign.core.types import Array, Model, Params
from jaxalign.models import mlp
from jaxalign.models import soft_actor_critic as sac
from jaxalign.models.soft_actor_critic import Agent
from jaxalign.ops import skills
from jaxalign.ops.skills import Transitions


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of METRA's code for Ant."""

    skill_size: int = 2  # D
    discrete: bool = False  # one-hot skills, not points of the unit sphere
    hidden: tuple[int, ...] = (1024, 1024)  # of all networks
    batch: int = 256  # B
    discount: float = 0.99  # gamma
    learning_rate: float = 1e-4  # of phi, the critics, the policy and alpha
    target_rate: float = 5e-3  # tau, share of the critics that the slow ones take over
    initial_temperature: float = 0.01  # temperature of the policy at the start
    terminal_at_limit: bool = True  # an episode's last step is terminal, though time cut it off

    def __post_init__(self) -> None:
        skills.check_size(self.skill_size, self.discrete)
        limits.counts(self, "hidden", "batch")
        limits.fractions(self, "discount", "target_rate")
        limits.positive(self, "learning_rate", "initial_temperature")


class Networks(NamedTuple):
    """discriminator: `(params, o) -> [..., D]`, logits or the mean. agent: policy and critics."""

    discriminator: Model
    agent: Agent


def networks(config: Config, observation_size: int, action_size: int) -> Networks:
    """The networks for observations of size O and actions of size A."""
    d, hidden = config.skill_size, config.hidden
    discriminator = mlp.mlp(observation_size, hidden, d, activation=jax.nn.relu)
    return Networks(discriminator, sac.agent(observation_size, action_size, d, hidden))


def init(
    config: Config,
    observation_size: int,
    action_size: int,
    offset: np.ndarray,
    scale: np.ndarray,
    key: Array,
) -> TrainState:
    """The state before the first update; the slow critics lie in `slow["critic"]`.

    offset, scale: `[O]`, of observations, kept in `extra`; the networks read (o - offset) / scale.
    """
    nets = networks(config, observation_size, action_size)
    own_key, agent_key = jax.random.split(key)
    params = {
        "discriminator": nets.discriminator.init(own_key),
        **mlp.init_each(nets.agent, agent_key),
        "log_temperature": jnp.log(jnp.float32(config.initial_temperature)),
    }
    slow = {"critic": jax.tree.map(jnp.copy, params["critic"])}
    extra = sac.normaliser(offset, scale)
    return descent.create(params, _optimizers(config), slow=slow, extra=extra)


def update(
    config: Config, state: TrainState, batch: Transitions, key: Array
) -> tuple[TrainState, dict[str, Array]]:
    """One gradient step of the discriminator, the critics, the policy and alpha; metrics."""
    nets = networks(config, batch.observation.shape[-1], batch.action.shape[-1])
    rows = sac.normalised(state.extra, batch)
    descend = functools.partial(descent.descend, _optimizers(config))
    critic_key, policy_key = jax.random.split(key)

    def loss(discriminator: Params) -> tuple[Array, None]:
        guess = nets.discriminator.apply(discriminator, rows.next_observation)
        return -information(guess, rows.skill, config.discrete).mean(), None

    state, discriminator_loss, _ = descend(state, "discriminator", loss)
    guess = nets.discriminator.apply(state.params["discriminator"], rows.next_observation)
    reward = information(guess, rows.skill, config.discrete)
    state, critic_metrics = sac.improve_critic(
        nets.agent, descend, state, rows, reward, config.discount, critic_key
    )
    state, policy_metrics = sac.improve_policy(nets.agent, descend, state, rows, policy_key)
    trained = {"critic": state.params["critic"]}
    slow = steps.follow(state.slow, trained, 1 - config.target_rate)
    return state._replace(step=state.step + 1, slow=slow), {
        "discriminator_loss": discriminator_loss,
        "reward": reward.mean(),
        **critic_metrics,
        **policy_metrics,
    }


def act(
    config: Config,
    state: TrainState,
    observation: Array,
    skill: Array,
    key: Array,
    temperature: float | Array = 1.0,
) -> Array:
    """Actions `[B, A]` in [-1, 1] for observations `[B, O]` and skills `[B, D]`.

    temperature: multiplies the policy's standard deviation; 0 takes tanh(mean).
    """
    actor = networks(config, observation.shape[-1], _action_size(state)).agent.actor
    return sac.act(actor, state, observation, skill, key, temperature)


def latent(config: Config, state: TrainState, observation: Array) -> Array:
    """What the discriminator says of observations `[..., O]`, `[..., D]`: logits or the mean."""
    discriminator = networks(config, observation.shape[-1], _action_size(state)).discriminator
    seen = sac.normalise(state.extra, observation)
    return discriminator.apply(state.params["discriminator"], seen)


def skill_towards(config: Config, state: TrainState, observation: Array, goal: Array) -> Array:
    """The skills `[B, D]` that the discriminator guesses at goals `[B, O]`, from wherever."""
    return skills.along(latent(config, state, goal), config.discrete)


def information(guess: Array, skill: Array, discrete: bool) -> Array:
    """log q(z | s') - log p(z), `[B]` in nats, of guesses and skills `[B, D]`."""
    if discrete:
        own = (jax.nn.log_softmax(guess) * skill).sum(-1)
        return own + math.log(skill.shape[-1])
    return (guess * skill).sum(-1) - 0.5 * (guess**2).sum(-1)


def _action_size(state: TrainState) -> int:
    return mlp.action_size(state.params["actor"])


def _optimizers(config: Config) -> descent.Optimizers:
    """An Adam for each part of the parameters."""
    names = ("discriminator", "actor", "critic", "log_temperature")
    return dict.fromkeys(names, optax.adam(config.learning_rate))
