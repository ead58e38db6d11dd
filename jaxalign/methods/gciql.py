"""GCIQL: goal-conditioned implicit Q-learning, with a policy that climbs Q near the data.

Sources: IQL (Kostrikov et al. 2022), eqs. 5 and 6, conditioned on goals; the policy's loss is
DDPG+BC; settings of OGBench (Park et al. 2025). V(s, g) is an expectile of the smaller of two slow
Q(s, a, g), both Q regress r + gamma * V(s', g).

Dimensions: B batch, O observation, A action.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxalign.core import limits
from jaxalign.core import state as states
from jaxalign.core import step as steps
from jaxalign.core.state import TrainState
from jaxalign.core.types import Array, Model, Params
from jaxalign.models import mlp
from jaxalign.ops import expectile, gaussian
from jaxalign.ops import policy_extraction as pe
from jaxalign.ops.goals import Batch, Goals


@dataclasses.dataclass(frozen=True)
class Config:
    """OGBench's settings."""

    goals: Goals = Goals()
    batch: int = 1024
    learning_rate: float = 3e-4
    expectile: float = 0.9
    alpha: float = 0.3  # weight of cloning; OGBench: 0.003 for pointmaze
    target_rate: float = 0.005  # share of the trained Q that the slow ones take over each update
    value_hidden: tuple[int, ...] = (512, 512, 512)
    actor_hidden: tuple[int, ...] = (512, 512, 512)

    def __post_init__(self) -> None:
        limits.fractions(self, "expectile", "target_rate")
        limits.positive(self, "learning_rate", "alpha")
        limits.counts(self, "batch", "value_hidden", "actor_hidden")


class Networks(NamedTuple):
    """value: `(s, g) -> [B]`. critic: `(s, g, a) -> [2, B]`. actor: `(s, g) -> Gaussian [B, A]`."""

    value: Model
    critic: Model
    actor: Model


def networks(config: Config, observation_size: int, action_size: int) -> Networks:
    """The three networks for observations of size O and actions of size A."""
    inputs, hidden = 2 * observation_size, config.value_hidden
    q = mlp.scalar(mlp.mlp(inputs + action_size, hidden, 1, layer_norm=True))
    return Networks(
        value=mlp.scalar(mlp.mlp(inputs, hidden, 1, layer_norm=True)),
        critic=mlp.ensemble(q, 2),
        actor=mlp.gaussian_actor(inputs, config.actor_hidden, action_size),
    )


def init(config: Config, observation_size: int, action_size: int, key: Array) -> TrainState:
    """The state before the first update; the slow Q lie in `slow["critic"]`."""
    nets = networks(config, observation_size, action_size)
    params = mlp.init_each(nets, key)
    slow = {"critic": jax.tree.map(jnp.copy, params["critic"])}
    return states.create(params, _optimizer(config), slow=slow)


def update(
    config: Config, state: TrainState, batch: Batch, key: Array
) -> tuple[TrainState, dict[str, Array]]:
    """One gradient step on the joint loss. The slow Q follow the parameters before it.

    key: of no use, as the loss draws nothing; other methods' may.
    """
    trained = {"critic": state.params["critic"]}
    slow = steps.follow(state.slow, trained, 1 - config.target_rate)
    state, metrics = steps.gradient_step(
        lambda params: loss(config, params, state.slow, batch), _optimizer(config), state
    )
    return state._replace(slow=slow), metrics


def loss(
    config: Config, params: Params, slow: Params, batch: Batch
) -> tuple[Array, dict[str, Array]]:
    """The sum of the losses of V, Q and the policy `[]`, and metrics."""
    nets = networks(config, batch.observation.shape[-1], batch.action.shape[-1])
    frozen = jax.lax.stop_gradient(params)
    s, goal = batch.observation, batch.value_goal

    slow_q = nets.critic.apply(slow["critic"], s, goal, batch.action).min(0)
    v = nets.value.apply(params["value"], s, goal)
    value_loss = expectile.expectile_loss(slow_q - v, slow_q - v, config.expectile).mean()

    next_v = nets.value.apply(frozen["value"], batch.next_observation, goal)
    target = expectile.bellman_target(batch.reward, batch.mask, config.goals.discount, next_v)
    q = nets.critic.apply(params["critic"], s, goal, batch.action)
    critic_loss = ((q - target[None]) ** 2).sum(0).mean()

    policy = nets.actor.apply(params["actor"], s, batch.actor_goal)
    action = policy.mean.clip(-1, 1)
    policy_q = nets.critic.apply(frozen["critic"], s, batch.actor_goal, action).min(0)
    density = gaussian.log_density(policy, batch.action)
    actor_loss = pe.ddpg_bc_loss(policy_q, density, config.alpha).mean()

    total = value_loss + critic_loss + actor_loss
    return total, {
        "loss": total,
        "value_loss": value_loss,
        "value_mean": v.mean(),
        "critic_loss": critic_loss,
        "critic_mean": q.mean(),
        "actor_loss": actor_loss,
        "actor_value": policy_q.mean(),
        "actor_error": ((policy.mean - batch.action) ** 2).mean(),
    }


def act(
    config: Config,
    params: Params,
    observation: Array,
    goal: Array,
    key: Array,
    temperature: float | Array = 0.0,
) -> Array:
    """Actions `[B, A]` in [-1, 1] for observations and goals `[B, O]`.

    temperature: multiplies the policy's standard deviation; 0 takes its mean.
    """
    nets = networks(config, observation.shape[-1], mlp.action_size(params["actor"]))
    policy = nets.actor.apply(params["actor"], observation, goal)
    return gaussian.draw(policy, key, temperature).clip(-1, 1)


def value(config: Config, params: Params, observation: Array, goal: Array) -> Array:
    """V `[B]` of observations and goals `[B, O]`: minus discounted steps."""
    nets = networks(config, observation.shape[-1], mlp.action_size(params["actor"]))
    return nets.value.apply(params["value"], observation, goal)


def _optimizer(config: Config) -> optax.GradientTransformation:
    return optax.adam(config.learning_rate)
