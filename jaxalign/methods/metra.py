"""METRA: skills that cover the state space, as latent steps that are long but cost time.

Source: Park et al. 2024, "METRA: Scalable Unsupervised RL with Metric-Aware Abstraction", with the
order and the settings of its code. A policy is told a skill z for an episode and is rewarded for
the latent step (phi(s') - phi(s))^T z (eq. 6). phi maximises the same under the constraint that
adjacent states lie at most 1 apart (eqs. 8 and 9), weighed by a multiplier lambda that descends its
own loss. So distances of phi are times, and skills spread along what takes long to reach.

An update takes one batch through, in this order: phi; lambda; the critics, with rewards by the phi
just updated; the policy; the temperature alpha; the slow critics. Each has an Adam of its own. The
constraint never enters the reward.

`constraint` names the squared length that is kept below 1: of the code, the mean over the skill's
dimensions, so that a step may be sqrt(D) long; or of the paper, the sum. lambda of the one cannot
be compared with lambda of the other.

Departures: pixels are left out. The standard deviation that the code's phi also has is never used
there, and missing here.

Dimensions: B batch, O observation, A action, D skill.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxalign.core import descent, limits
from jaxalign.core import step as steps
from jaxalign.core.state import TrainState
from jaxalign.core.types import Array, Model, Params, UserError
from jaxalign.models import mlp
from jaxalign.models import soft_actor_critic as sac
from jaxalign.models.soft_actor_critic import Agent
from jaxalign.ops import skills
from jaxalign.ops.skills import Transitions


@dataclasses.dataclass(frozen=True)
class Config:
    """The code's settings for Ant; `skill_size = 16, discrete = True` are those of HalfCheetah."""

    skill_size: int = 2  # D
    discrete: bool = False  # one-hot skills, not points of the unit sphere
    hidden: tuple[int, ...] = (1024, 1024)  # of all networks
    batch: int = 256  # B
    discount: float = 0.99  # gamma
    learning_rate: float = 1e-4  # of phi, the critics, the policy and alpha
    dual_learning_rate: float = 1e-4  # of log lambda; a short run needs a larger one
    target_rate: float = 5e-3  # tau, share of the critics that the slow ones take over
    initial_temperature: float = 0.01  # temperature of the policy at the start
    initial_dual: float = 30.0  # lambda at the start
    slack: float = 1e-3  # epsilon, what a constraint that holds counts for at most
    constraint: Literal["mean", "sum"] = "mean"
    terminal_at_limit: bool = True  # an episode's last step is terminal, though time cut it off

    def __post_init__(self) -> None:
        skills.check_size(self.skill_size, self.discrete)
        limits.counts(self, "hidden", "batch")
        limits.fractions(self, "discount", "target_rate")
        limits.positive(self, "learning_rate", "dual_learning_rate")
        limits.positive(self, "initial_temperature", "initial_dual", "slack")
        if self.constraint not in ("mean", "sum"):
            raise UserError(f"constraint = {self.constraint!r}: must be 'mean' or 'sum'; use one")


class Networks(NamedTuple):
    """phi: `(params, o) -> [..., D]`. agent: policy and critics."""

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
    """The state before the first update; the slow critics lie in `slow["critic"]`.

    offset, scale: `[O]`, of observations, kept in `extra`; the networks read (o - offset) / scale.
    """
    nets = networks(config, observation_size, action_size)
    phi_key, agent_key = jax.random.split(key)
    params = {
        "phi": nets.phi.init(phi_key),
        **mlp.init_each(nets.agent, agent_key),
        "log_dual": jnp.log(jnp.float32(config.initial_dual)),
        "log_temperature": jnp.log(jnp.float32(config.initial_temperature)),
    }
    slow = {"critic": jax.tree.map(jnp.copy, params["critic"])}
    extra = sac.normaliser(offset, scale)
    return descent.create(params, _optimizers(config), slow=slow, extra=extra)


def update(
    config: Config, state: TrainState, batch: Transitions, key: Array
) -> tuple[TrainState, dict[str, Array]]:
    """One gradient step of everything on one batch, in the order above; and metrics."""
    nets = networks(config, batch.observation.shape[-1], batch.action.shape[-1])
    rows = sac.normalised(state.extra, batch)
    descend = functools.partial(descent.descend, _optimizers(config))
    critic_key, policy_key = jax.random.split(key)

    multiplier = jnp.exp(state.params["log_dual"])
    state, phi_loss, constraint = descend(
        state, "phi", lambda phi: _phi_loss(config, nets.phi, phi, multiplier, rows)
    )
    state, _, _ = descend(state, "log_dual", lambda log_dual: (log_dual * constraint, None))
    move = _move(nets.phi, state.params["phi"], rows)
    reward = skills.reward(move, rows.skill, config.discrete)
    state, critic_metrics = sac.improve_critic(
        nets.agent, descend, state, rows, reward, config.discount, critic_key
    )
    state, policy_metrics = sac.improve_policy(nets.agent, descend, state, rows, policy_key)
    trained = {"critic": state.params["critic"]}
    slow = steps.follow(state.slow, trained, 1 - config.target_rate)
    return state._replace(step=state.step + 1, slow=slow), {
        "phi_loss": phi_loss,
        "constraint": constraint,
        "dual": multiplier,
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
    return phi.apply(state.params["phi"], sac.normalise(state.extra, observation))


def skill_towards(config: Config, state: TrainState, observation: Array, goal: Array) -> Array:
    """The skills `[B, D]` that lead from observations to goals `[B, O]`: along phi(g) - phi(s)."""
    here, there = latent(config, state, observation), latent(config, state, goal)
    return skills.along(there - here, config.discrete)


def _move(phi: Model, params: Params, rows: Transitions) -> Array:
    """phi(s') - phi(s), `[B, D]`."""
    return phi.apply(params, rows.next_observation) - phi.apply(params, rows.observation)


def _phi_loss(
    config: Config, phi: Model, params: Params, multiplier: Array, rows: Transitions
) -> tuple[Array, Array]:
    """The loss `[]` of phi, and the constraint `[]`: what is left of it, negative where broken."""
    move = _move(phi, params, rows)
    square = (move**2).mean(-1) if config.constraint == "mean" else (move**2).sum(-1)
    left = jnp.minimum(config.slack, 1 - square)
    reward = skills.reward(move, rows.skill, config.discrete)
    return -(reward + multiplier * left).mean(), left.mean()


def _action_size(state: TrainState) -> int:
    return mlp.action_size(state.params["actor"])


def _optimizers(config: Config) -> descent.Optimizers:
    """An Adam for each part of the parameters."""
    names = ("phi", "actor", "critic", "log_temperature")
    optimizers = dict.fromkeys(names, optax.adam(config.learning_rate))
    return optimizers | {"log_dual": optax.adam(config.dual_learning_rate)}
