"""CSF: contrastive successor features, METRA's skills without a constraint to weigh.

Source: Zheng et al. 2025, "Can a MISL Fly? Analysis and Ingredients for Mutual Information Skill
Learning", with the order and the settings of its code. As in METRA, a policy that is told a skill z
is rewarded for the latent step (phi(s') - phi(s))^T z. phi learns it by contrast: its loss is minus
that, plus xi log sum exp of the same with skills drawn afresh. The critics predict no value but the
discounted sum of latent steps, psi in R^D, whose product with z is the value.

An update takes one batch through, in this order: phi; psi, with steps by the phi just updated; the
slow psi; the policy; the temperature alpha. Each has an Adam of its own. Of the slow twins the one
with the smaller value gives the target, in which entropy has no part.

Departures: pixels are left out. With one-hot skills the vector that stands for z in the reward (see
`ops.skills`) does so everywhere; the code has it in the reward only.

Dimensions: B batch, O observation, A action, D skill; the axis of 2 holds the twins.
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
from jaxalign.ops import soft_actor_critic as squashed
from jaxalign.ops.skills import Transitions


@dataclasses.dataclass(frozen=True)
class Config:
    """The code's settings for Ant."""

    skill_size: int = 2  # D
    discrete: bool = False  # one-hot skills, not points of the unit sphere
    hidden: tuple[int, ...] = (1024, 1024)  # of all networks
    batch: int = 256  # B
    discount: float = 0.99  # gamma
    learning_rate: float = 1e-4  # of phi, the critics, the policy and alpha
    target_rate: float = 5e-3  # tau, share of the critics that the slow ones take over
    initial_temperature: float = 0.01  # temperature of the policy at the start
    contrast: float = 5.0  # xi, weight of the skills that were not acted by
    negatives: int = 256  # J, how many of them
    terminal_at_limit: bool = False  # an episode's last step is terminal, though time cut it off

    def __post_init__(self) -> None:
        skills.check_size(self.skill_size, self.discrete)
        limits.counts(self, "hidden", "batch", "negatives")
        limits.fractions(self, "discount", "target_rate")
        limits.positive(self, "learning_rate", "initial_temperature", "contrast")


class Networks(NamedTuple):
    """phi: `(params, o) -> [..., D]`. psi: `(params, o, z, a) -> [2, B, D]`.

    agent: the policy, and psi^T z as its critics, with the parameters of psi.
    """

    phi: Model
    psi: Model
    agent: Agent


def networks(config: Config, observation_size: int, action_size: int) -> Networks:
    """The networks for observations of size O and actions of size A."""
    d, hidden = config.skill_size, config.hidden
    phi = mlp.mlp(observation_size, hidden, d, activation=jax.nn.relu)
    psi = sac.critic(observation_size, action_size, d, hidden, d)

    def value(params: Params, observation: Array, skill: Array, action: Array) -> Array:
        features = psi.apply(params, observation, skill, action)
        return skills.reward(features, skill[None], config.discrete)

    actor = sac.agent(observation_size, action_size, d, hidden).actor
    return Networks(phi, psi, Agent(actor, Model(psi.init, value)))


def init(
    config: Config,
    observation_size: int,
    action_size: int,
    offset: np.ndarray,
    scale: np.ndarray,
    key: Array,
) -> TrainState:
    """The state before the first update; the slow psi lies in `slow["critic"]`.

    offset, scale: `[O]`, of observations, kept in `extra`; the networks read (o - offset) / scale.
    """
    nets = networks(config, observation_size, action_size)
    phi_key, agent_key = jax.random.split(key)
    params = {
        "phi": nets.phi.init(phi_key),
        **mlp.init_each(nets.agent, agent_key),
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
    contrast_key, critic_key, policy_key = jax.random.split(key, 3)

    others = skills.sample(contrast_key, config.negatives, config.skill_size, config.discrete)
    state, phi_loss, _ = descend(
        state, "phi", lambda phi: _phi_loss(config, nets.phi, phi, others, rows)
    )
    move = _move(nets.phi, state.params["phi"], rows)
    target = _target(config, nets, state, move, rows, critic_key)
    state, critic_loss, _ = descend(
        state, "critic", lambda psi: _psi_loss(nets.psi, psi, target, rows)
    )
    trained = {"critic": state.params["critic"]}
    slow = steps.follow(state.slow, trained, 1 - config.target_rate)
    state, policy_metrics = sac.improve_policy(nets.agent, descend, state, rows, policy_key)
    return state._replace(step=state.step + 1, slow=slow), {
        "phi_loss": phi_loss,
        "reward": skills.reward(move, rows.skill, config.discrete).mean(),
        "move": (move**2).sum(-1).mean(),
        "critic_loss": critic_loss,
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
    config: Config, phi: Model, params: Params, others: Array, rows: Transitions
) -> tuple[Array, None]:
    """The loss `[]` of phi. others: `[J, D]`, skills that were not acted by."""
    move = _move(phi, params, rows)
    reward = skills.reward(move, rows.skill, config.discrete)
    contrast = jax.nn.logsumexp(move @ skills.heading(others, config.discrete).T, axis=-1)
    return -(reward - config.contrast * contrast).mean(), None


def _target(
    config: Config, nets: Networks, state: TrainState, move: Array, rows: Transitions, key: Array
) -> Array:
    """What psi learns, `[B, D]`: the latent step, and the discounted slow psi of what follows."""
    following, skill = rows.next_observation, rows.skill
    policy = nets.agent.actor.apply(state.params["actor"], following, skill)
    action, _ = squashed.sample(policy, key)
    twins = nets.psi.apply(state.slow["critic"], following, skill, action)
    values = skills.reward(twins, skill[None], config.discrete)
    slow = jnp.where((values[0] <= values[1])[:, None], twins[0], twins[1])
    return move + config.discount * (1 - rows.terminal)[:, None] * slow


def _psi_loss(psi: Model, params: Params, target: Array, rows: Transitions) -> tuple[Array, None]:
    """The squared error `[]` of psi, mean over batch and dimensions, summed over the twins."""
    features = psi.apply(params, rows.observation, rows.skill, rows.action)
    return ((features - target[None]) ** 2).mean((1, 2)).sum(), None


def _action_size(state: TrainState) -> int:
    return mlp.action_size(state.params["actor"])


def _optimizers(config: Config) -> descent.Optimizers:
    """An Adam for each part of the parameters."""
    names = ("phi", "actor", "critic", "log_temperature")
    return dict.fromkeys(names, optax.adam(config.learning_rate))
