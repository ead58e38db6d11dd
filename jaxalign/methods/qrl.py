"""QRL: quasimetric reinforcement learning; a value is minus a distance, as if along shortest paths.

Source: Wang et al. 2023, "Optimal Goal-Reaching Reinforcement Learning via Quasimetric Learning",
with the losses shaped as in its code; the quasimetric is IQE (Wang & Isola 2022); settings of
OGBench (Park et al. 2025). Distances of random pairs are pushed apart while a dual variable keeps
those of one step at most 1. As distances obey the triangle inequality, what results is the number
of steps of the shortest path. A model of the step in representation space tells the policy's loss
(DDPG+BC) what an action does.

Dimensions: B batch, O observation, A action, d representation.
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
from jaxalign.core.types import Array, Model, Params, UserError
from jaxalign.models import mlp
from jaxalign.ops import gaussian, quasimetric
from jaxalign.ops import policy_extraction as pe
from jaxalign.ops.goals import Batch, Goals

FAR, SOFT = 500.0, 100.0  # random pairs are pushed apart up to about FAR, gently by SOFT


@dataclasses.dataclass(frozen=True)
class Config:
    """OGBench's settings."""

    goals: Goals = Goals(value_current=0.0, value_trajectory=0.0, value_random=1.0)
    batch: int = 1024
    learning_rate: float = 3e-4
    slack: float = 0.05  # epsilon, mean squared excess of one-step distances that is let pass
    alpha: float = 0.003  # weight of cloning; OGBench: 0.0003 for pointmaze
    representation: int = 512  # d
    intervals: int = 8  # of a component of the quasimetric
    value_hidden: tuple[int, ...] = (512, 512, 512)
    actor_hidden: tuple[int, ...] = (512, 512, 512)

    def __post_init__(self) -> None:
        limits.positive(self, "learning_rate", "slack", "alpha")
        limits.counts(self, "batch", "representation", "intervals", "value_hidden", "actor_hidden")
        if self.representation % self.intervals:
            raise UserError(
                f"intervals = {self.intervals}: must divide representation = "
                f"{self.representation}; change one of the two"
            )


class Networks(NamedTuple):
    """phi: `(s,) -> [B, d]`. dynamics: `(phi, a) -> [B, d]`, the change of phi in a step.

    actor: `(s, g) -> Gaussian [B, A]`.
    """

    phi: Model
    dynamics: Model
    actor: Model


def networks(config: Config, observation_size: int, action_size: int) -> Networks:
    """The three networks for observations of size O and actions of size A."""
    d, hidden = config.representation, config.value_hidden
    return Networks(
        phi=mlp.mlp(observation_size, hidden, d, layer_norm=True),
        dynamics=mlp.mlp(d + action_size, hidden, d, layer_norm=True),
        actor=mlp.gaussian_actor(2 * observation_size, config.actor_hidden, action_size),
    )


def init(config: Config, observation_size: int, action_size: int, key: Array) -> TrainState:
    """The state before the first update. "mix" is a logit, the multiplier lambda starts at 1."""
    nets = networks(config, observation_size, action_size)
    params = mlp.init_each(nets, key)
    scalars = {"mix": jnp.zeros(()), "log_lambda": jnp.zeros(())}
    return states.create({**params, **scalars}, _optimizer(config))


def update(
    config: Config, state: TrainState, batch: Batch, key: Array
) -> tuple[TrainState, dict[str, Array]]:
    """One gradient step on the joint loss.

    key: of no use, as the loss draws nothing; other methods' may.
    """
    return steps.gradient_step(
        lambda params: loss(config, params, batch), _optimizer(config), state
    )


def loss(config: Config, params: Params, batch: Batch) -> tuple[Array, dict[str, Array]]:
    """The sum of the losses of distance, multiplier, dynamics and policy `[]`, and metrics."""
    nets = networks(config, batch.observation.shape[-1], batch.action.shape[-1])
    # Of the state, the next one and the random goal: one call, as gradients flow through all.
    rows = jnp.stack([batch.observation, batch.next_observation, batch.value_goal], axis=1)
    phi, ahead, goal = jnp.moveaxis(nets.phi.apply(params["phi"], rows), 1, 0)
    value_loss, value_metrics = _value_loss(config, params, phi, ahead, goal)
    predicted = phi + nets.dynamics.apply(params["dynamics"], phi, batch.action)
    there, back = (
        _distance(config, params, *pair) for pair in ((ahead, predicted), (predicted, ahead))
    )
    dynamics_loss = (there + back).mean() / 2
    known = jax.lax.stop_gradient(phi)
    actor_loss, actor_metrics = _actor_loss(config, nets, params, known, batch)
    total = value_loss + dynamics_loss + actor_loss
    return total, {
        "loss": total,
        "dynamics_loss": dynamics_loss,
        "actor_loss": actor_loss,
        **value_metrics,
        **actor_metrics,
    }


def _value_loss(
    config: Config, params: Params, phi: Array, ahead: Array, goal: Array
) -> tuple[Array, dict[str, Array]]:
    """Distances `[B]` grow, those of a step stay below 1, and lambda pays for what exceeds it."""
    far = _distance(config, params, phi, goal)
    near = _distance(config, params, phi, ahead)
    apart = SOFT * jax.nn.softplus((FAR - far) / SOFT).mean()
    excess = (jax.nn.relu(near - 1) ** 2).mean()
    multiplier = jnp.exp(params["log_lambda"])
    fixed_multiplier, fixed_excess = jax.lax.stop_gradient((multiplier, excess))
    # Lambda rises while the excess is larger than the slack.
    total = apart + fixed_multiplier * excess + multiplier * (config.slack - fixed_excess)
    return total, {
        "value_loss": total,
        "value_apart": apart,
        "value_excess": excess,
        "value_lambda": multiplier,
        "value_far": far.mean(),
        "value_near": near.mean(),
    }


def _actor_loss(
    config: Config, nets: Networks, params: Params, phi: Array, batch: Batch
) -> tuple[Array, dict[str, Array]]:
    """DDPG+BC `[]`, where Q is minus the distance from the predicted state to the goal."""
    frozen = jax.lax.stop_gradient(params)
    policy = nets.actor.apply(params["actor"], batch.observation, batch.actor_goal)
    action = policy.mean.clip(-1, 1)
    goal = nets.phi.apply(frozen["phi"], batch.actor_goal)
    predicted = phi + nets.dynamics.apply(frozen["dynamics"], phi, action)
    q = -_distance(config, frozen, predicted, goal)
    density = gaussian.log_density(policy, batch.action)
    return pe.ddpg_bc_loss(q, density, config.alpha).mean(), {
        "actor_value": q.mean(),
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
    """Minus the distance `[B]`, in steps, from observations to goals `[B, O]`."""
    nets = networks(config, observation.shape[-1], mlp.action_size(params["actor"]))
    phi, psi = nets.phi.apply(params["phi"], jnp.stack([observation, goal]))
    return -_distance(config, params, phi, psi)


def _distance(config: Config, params: Params, start: Array, stop: Array) -> Array:
    """`[B]` between representations `[B, d]`."""
    return quasimetric.iqe(start, stop, config.intervals, jax.nn.sigmoid(params["mix"]))


def _optimizer(config: Config) -> optax.GradientTransformation:
    return optax.adam(config.learning_rate)
