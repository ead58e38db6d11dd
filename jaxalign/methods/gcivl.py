"""GCIVL: goal-conditioned implicit V-learning, HIQL without the hierarchy.

Source: OGBench (Park et al. 2025), whose authors take it from HIQL's value loss (Park et al. 2023,
eq. 4). V(s, g) has two heads, trained by expectile regression towards a slow copy of them; the
policy learns by regression weighted with exp(alpha * (V(s', g) - V(s, g))).

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
    alpha: float = 10.0  # inverse temperature of the policy's weights
    target_rate: float = (
        0.005  # share of the trained heads that the slow ones take over each update
    )
    value_hidden: tuple[int, ...] = (512, 512, 512)
    actor_hidden: tuple[int, ...] = (512, 512, 512)

    def __post_init__(self) -> None:
        limits.fractions(self, "expectile", "target_rate")
        limits.positive(self, "learning_rate", "alpha")
        limits.counts(self, "batch", "value_hidden", "actor_hidden")


class Networks(NamedTuple):
    """value: the heads, `(s, g) -> [2, B]`. actor: `(s, g) -> Gaussian [B, A]`."""

    value: Model
    actor: Model


def networks(config: Config, observation_size: int, action_size: int) -> Networks:
    """Both networks for observations of size O and actions of size A."""
    inputs = 2 * observation_size
    head = mlp.scalar(mlp.mlp(inputs, config.value_hidden, 1, layer_norm=True))
    return Networks(
        mlp.ensemble(head, 2), mlp.gaussian_actor(inputs, config.actor_hidden, action_size)
    )


def init(config: Config, observation_size: int, action_size: int, key: Array) -> TrainState:
    """The state before the first update; the slow value heads lie in `slow["value"]`."""
    nets = networks(config, observation_size, action_size)
    params = mlp.init_each(nets, key)
    slow = {"value": jax.tree.map(jnp.copy, params["value"])}
    return states.create(params, _optimizer(config), slow=slow)


def update(
    config: Config, state: TrainState, batch: Batch, key: Array
) -> tuple[TrainState, dict[str, Array]]:
    """One gradient step on the joint loss. The slow heads follow the parameters before it.

    key: of no use, as the loss draws nothing; other methods' may.
    """
    trained = {"value": state.params["value"]}
    slow = steps.follow(state.slow, trained, 1 - config.target_rate)
    state, metrics = steps.gradient_step(
        lambda params: loss(config, params, state.slow, batch), _optimizer(config), state
    )
    return state._replace(slow=slow), metrics


def loss(
    config: Config, params: Params, slow: Params, batch: Batch
) -> tuple[Array, dict[str, Array]]:
    """The sum of the value's and the policy's loss `[]`, and metrics.

    What no gradient flows through is one call of the trained heads and one of the slow ones, with
    s and s' of a transition side by side.
    """
    nets = networks(config, batch.observation.shape[-1], batch.action.shape[-1])
    pair = jnp.stack([batch.observation, batch.next_observation], axis=1)
    slow_values = nets.value.apply(slow["value"], pair, jnp.stack([batch.value_goal] * 2, axis=1))
    heads = nets.value.apply(params["value"], batch.observation, batch.value_goal)
    value_loss = expectile.twin_value_loss(
        heads,
        slow_values[..., 0],
        slow_values[..., 1],
        batch.reward,
        batch.mask,
        config.goals.discount,
        config.expectile,
    ).mean()
    frozen = jax.lax.stop_gradient(params["value"])
    values = nets.value.apply(frozen, pair, jnp.stack([batch.actor_goal] * 2, axis=1)).mean(0)
    advantage = values[:, 1] - values[:, 0]
    policy = nets.actor.apply(params["actor"], batch.observation, batch.actor_goal)
    weight = pe.awr_weight(advantage, config.alpha)
    actor_loss = -(weight * gaussian.log_density(policy, batch.action)).mean()
    total = value_loss + actor_loss
    return total, {
        "loss": total,
        "value_loss": value_loss,
        "value_mean": heads.mean(),
        "actor_loss": actor_loss,
        "actor_advantage": advantage.mean(),
        "actor_error": ((policy.mean - batch.action) ** 2).mean(),
        "actor_clipped": (weight >= pe.LARGEST_WEIGHT).mean(),
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
    """V `[B]` of observations and goals `[B, O]`: the mean of the heads, minus discounted steps."""
    nets = networks(config, observation.shape[-1], mlp.action_size(params["actor"]))
    return nets.value.apply(params["value"], observation, goal).mean(0)


def _optimizer(config: Config) -> optax.GradientTransformation:
    return optax.adam(config.learning_rate)
