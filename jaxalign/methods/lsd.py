"""LSD: skills that move far, where far is measured by a network that stretches nothing.

Source: Park et al. 2022, "Lipschitz-constrained Unsupervised Skill Discovery". As in METRA, a
policy that is told a skill z is rewarded for the latent step (phi(s') - phi(s))^T z, which phi
maximises (eq. 8). phi is 1-Lipschitz as a function of the observation: every kernel is divided by
its largest singular value (section 3.2), found by one power iteration an update.

Departures: it is trained in the order and with the settings of METRA's code, by which it was
compared there, so that only the constraint differs: skills on the unit sphere instead of Gaussian
ones, and the reward of a step by the phi just updated. The singular vectors start from
`FIRST_ITERATIONS` power iterations instead of one.

Dimensions: B batch, O observation, A action, D skill.
"""

from __future__ import annotations

import dataclasses
import functools
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

FIRST_ITERATIONS = 30


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
    """phi: `(normalised params, o) -> [..., D]`. agent: policy and critics."""

    phi: Model
    agent: Agent


def networks(config: Config, observation_size: int, action_size: int) -> Networks:
    """The networks for observations of size O and actions of size A."""
    phi = mlp.mlp(observation_size, config.hidden, config.skill_size, activation=jax.nn.relu)
    agent = sac.agent(observation_size, action_size, config.skill_size, config.hidden)
    return Networks(phi, agent)


def init(
    config: Config,
    observation_size: int,
    action_size: int,
    offset: np.ndarray,
    scale: np.ndarray,
    key: Array,
) -> TrainState:
    """The state before the first update; the slow critics lie in `slow["critic"]`, the singular
    vectors of phi in `extra["vectors"]`.

    offset, scale: `[O]`, of observations, kept in `extra`; the networks read (o - offset) / scale.
    """
    nets = networks(config, observation_size, action_size)
    phi_key, agent_key, vector_key = jax.random.split(key, 3)
    params = {
        "phi": nets.phi.init(phi_key),
        **mlp.init_each(nets.agent, agent_key),
        "log_temperature": jnp.log(jnp.float32(config.initial_temperature)),
    }
    slow = {"critic": jax.tree.map(jnp.copy, params["critic"])}
    vectors = mlp.singular_vectors(params["phi"], vector_key, FIRST_ITERATIONS)
    extra = {**sac.normaliser(offset, scale), "vectors": vectors}
    return descent.create(params, _optimizers(config), slow=slow, extra=extra)


def update(
    config: Config, state: TrainState, batch: Transitions, key: Array
) -> tuple[TrainState, dict[str, Array]]:
    """One gradient step of phi, the critics, the policy, alpha and the slow critics; metrics."""
    nets = networks(config, batch.observation.shape[-1], batch.action.shape[-1])
    rows = sac.normalised(state.extra, batch)
    descend = functools.partial(descent.descend, _optimizers(config))
    critic_key, policy_key = jax.random.split(key)

    vectors = mlp.power_iteration(state.params["phi"], state.extra["vectors"])
    state = state._replace(extra={**state.extra, "vectors": vectors})

    def phi_loss(phi: Params) -> tuple[Array, None]:
        move = _move(nets.phi, phi, vectors, rows)
        return -skills.reward(move, rows.skill, config.discrete).mean(), None

    state, loss, _ = descend(state, "phi", phi_loss)
    move = _move(nets.phi, state.params["phi"], vectors, rows)
    reward = skills.reward(move, rows.skill, config.discrete)
    state, critic_metrics = sac.improve_critic(
        nets.agent, descend, state, rows, reward, config.discount, critic_key
    )
    state, policy_metrics = sac.improve_policy(nets.agent, descend, state, rows, policy_key)
    trained = {"critic": state.params["critic"]}
    slow = steps.follow(state.slow, trained, 1 - config.target_rate)
    return state._replace(step=state.step + 1, slow=slow), {
        "phi_loss": loss,
        "reward": reward.mean(),
        "move": (move**2).sum(-1).mean(),
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
    """phi `[..., D]` of observations `[..., O]`."""
    phi = networks(config, observation.shape[-1], _action_size(state)).phi
    params = mlp.spectrally_normalised(state.params["phi"], state.extra["vectors"])
    return phi.apply(params, sac.normalise(state.extra, observation))


def skill_towards(config: Config, state: TrainState, observation: Array, goal: Array) -> Array:
    """The skills `[B, D]` that lead from observations to goals `[B, O]`: along phi(g) - phi(s)."""
    here, there = latent(config, state, observation), latent(config, state, goal)
    return skills.along(there - here, config.discrete)


def _move(phi: Model, params: Params, vectors: Params, rows: Transitions) -> Array:
    """phi(s') - phi(s), `[B, D]`."""
    params = mlp.spectrally_normalised(params, vectors)
    return phi.apply(params, rows.next_observation) - phi.apply(params, rows.observation)


def _action_size(state: TrainState) -> int:
    return mlp.action_size(state.params["actor"])


def _optimizers(config: Config) -> descent.Optimizers:
    """An Adam for each part of the parameters."""
    names = ("phi", "actor", "critic", "log_temperature")
    return dict.fromkeys(names, optax.adam(config.learning_rate))
