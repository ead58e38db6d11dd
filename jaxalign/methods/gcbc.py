"""Goal-conditioned behavioural cloning: the policy repeats what led to the goal.

Sources: Lynch et al. 2019; Ghosh et al. 2021 (GCSL), offline; settings of OGBench (Park et al.
2025). A later state of the episode is taken for the goal of the action before it, and the
log-density of that action is raised. There is no value.

Dimensions: B batch, O observation, A action.
"""

from __future__ import annotations

import dataclasses

import optax

from jaxalign.core import limits
from jaxalign.core import state as states
from jaxalign.core import step as steps
from jaxalign.core.state import TrainState
from jaxalign.core.types import Array, Model, Params
from jaxalign.models import mlp
from jaxalign.ops import gaussian
from jaxalign.ops.goals import Batch, Goals


@dataclasses.dataclass(frozen=True)
class Config:
    """OGBench's settings."""

    goals: Goals = Goals()
    batch: int = 1024
    learning_rate: float = 3e-4
    actor_hidden: tuple[int, ...] = (512, 512, 512)

    def __post_init__(self) -> None:
        limits.positive(self, "learning_rate")
        limits.counts(self, "batch", "actor_hidden")


def network(config: Config, observation_size: int, action_size: int) -> Model:
    """The policy `(s, g) -> Gaussian [B, A]` of standard deviation 1."""
    return mlp.gaussian_actor(2 * observation_size, config.actor_hidden, action_size)


def init(config: Config, observation_size: int, action_size: int, key: Array) -> TrainState:
    """The state before the first update."""
    params = {"actor": network(config, observation_size, action_size).init(key)}
    return states.create(params, _optimizer(config))


def update(
    config: Config, state: TrainState, batch: Batch, key: Array
) -> tuple[TrainState, dict[str, Array]]:
    """One gradient step. key: of no use, as the loss draws nothing; other methods' may."""
    return steps.gradient_step(
        lambda params: loss(config, params, batch), _optimizer(config), state
    )


def loss(config: Config, params: Params, batch: Batch) -> tuple[Array, dict[str, Array]]:
    """The negative log-density `[]` of the data's actions, and metrics."""
    actor = network(config, batch.observation.shape[-1], batch.action.shape[-1])
    policy = actor.apply(params["actor"], batch.observation, batch.actor_goal)
    cloning = -gaussian.log_density(policy, batch.action).mean()
    return cloning, {
        "loss": cloning,
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
    actor = network(config, observation.shape[-1], mlp.action_size(params["actor"]))
    policy = actor.apply(params["actor"], observation, goal)
    return gaussian.draw(policy, key, temperature).clip(-1, 1)


def _optimizer(config: Config) -> optax.GradientTransformation:
    return optax.adam(config.learning_rate)
