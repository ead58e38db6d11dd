"""CRL: contrastive reinforcement learning; Q is a classifier of goals that were reached.

Source: Eysenbach et al. 2022, "Contrastive Learning as Goal-Conditioned Reinforcement Learning",
with binary noise-contrastive estimation; the policy's loss is DDPG+BC; settings of OGBench (Park
et al. 2025). Q(s, a, g) = phi(s, a)^T psi(g) / sqrt(d), in two versions. Within a batch the goal of
the same row is a state that followed, at a geometric distance; those of the other rows are
negatives. The optimal Q is log p(g | s, a) - log p(g), so there is no target network.

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
from jaxalign.core.types import Array, Model, Params
from jaxalign.models import mlp
from jaxalign.ops import gaussian
from jaxalign.ops import policy_extraction as pe
from jaxalign.ops.goals import Batch, Goals


@dataclasses.dataclass(frozen=True)
class Config:
    """OGBench's settings."""

    goals: Goals = Goals(value_current=0.0, value_trajectory=1.0, value_random=0.0)
    batch: int = 1024
    learning_rate: float = 3e-4
    alpha: float = 0.1  # weight of cloning; OGBench: 0.03 for pointmaze
    representation: int = 512  # d
    value_hidden: tuple[int, ...] = (512, 512, 512)
    actor_hidden: tuple[int, ...] = (512, 512, 512)

    def __post_init__(self) -> None:
        limits.positive(self, "learning_rate", "alpha")
        limits.counts(self, "batch", "representation", "value_hidden", "actor_hidden")


class Networks(NamedTuple):
    """phi: `(s, a) -> [2, B, d]`. psi: `(g,) -> [2, B, d]`. actor: `(s, g) -> Gaussian [B, A]`."""

    phi: Model
    psi: Model
    actor: Model


def networks(config: Config, observation_size: int, action_size: int) -> Networks:
    """The three networks for observations of size O and actions of size A."""

    def twin(inputs: int) -> Model:
        network = mlp.mlp(inputs, config.value_hidden, config.representation, layer_norm=True)
        return mlp.ensemble(network, 2)

    return Networks(
        phi=twin(observation_size + action_size),
        psi=twin(observation_size),
        actor=mlp.gaussian_actor(2 * observation_size, config.actor_hidden, action_size),
    )


def init(config: Config, observation_size: int, action_size: int, key: Array) -> TrainState:
    """The state before the first update."""
    nets = networks(config, observation_size, action_size)
    params = mlp.init_each(nets, key)
    return states.create(params, _optimizer(config))


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
    """The sum of the classifier's and the policy's loss `[]`, and metrics."""
    nets = networks(config, batch.observation.shape[-1], batch.action.shape[-1])
    frozen = jax.lax.stop_gradient(params)
    scale = config.representation**-0.5
    phi = nets.phi.apply(params["phi"], batch.observation, batch.action)
    psi = nets.psi.apply(params["psi"], batch.value_goal)
    # Row i, column j: whether the goal of transition j followed transition i.
    logits = scale * jnp.einsum("hid,hjd->hij", phi, psi)
    followed = jnp.eye(len(batch.action))
    labels = jnp.broadcast_to(followed, logits.shape)
    critic_loss = optax.sigmoid_binary_cross_entropy(logits, labels).mean()

    policy = nets.actor.apply(params["actor"], batch.observation, batch.actor_goal)
    action = policy.mean.clip(-1, 1)
    phi = nets.phi.apply(frozen["phi"], batch.observation, action)
    psi = nets.psi.apply(frozen["psi"], batch.actor_goal)
    policy_q = scale * (phi * psi).sum(-1).min(0)
    density = gaussian.log_density(policy, batch.action)
    actor_loss = pe.ddpg_bc_loss(policy_q, density, config.alpha).mean()

    total = critic_loss + actor_loss
    mean = logits.mean(0)
    return total, {
        "loss": total,
        "critic_loss": critic_loss,
        "critic_accuracy": ((mean > 0) == (followed > 0)).mean(),
        "critic_top_accuracy": (mean.argmax(1) == jnp.arange(len(mean))).mean(),
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
    """Q `[B]` of observations, goals `[B, O]` and the policy's mean action: the smaller one."""
    nets = networks(config, observation.shape[-1], mlp.action_size(params["actor"]))
    action = nets.actor.apply(params["actor"], observation, goal).mean.clip(-1, 1)
    phi = nets.phi.apply(params["phi"], observation, action)
    psi = nets.psi.apply(params["psi"], goal)
    return config.representation**-0.5 * (phi * psi).sum(-1).min(0)


def _optimizer(config: Config) -> optax.GradientTransformation:
    return optax.adam(config.learning_rate)
