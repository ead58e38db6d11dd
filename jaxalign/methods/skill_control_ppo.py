"""A high level that picks one-hot skills by PPO; another policy carries them out.

Source: Schulman et al. 2017, "Proximal Policy Optimization Algorithms", eq. 7, for the downstream
control of METRA (Park et al. 2024, section 5.3), with the settings of CSF's code (Zheng et al.
2025): a gradient step of the policy, then one of the value, on rows drawn from the last epoch
alone. What a choice earns is the sum over the steps that it lasts; nothing follows an episode's
last choice.

Departures: the value learns the target of generalised advantage estimation, there the whole
return. lambda and the clipping range are not in the scripts there; these are the usual ones.

Dimensions: B batch, O observation (with what is told of the task), D skill, T choices of an
episode, E episodes.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxalign.core import descent, limits
from jaxalign.core.state import TrainState
from jaxalign.core.types import Array, Model, Params
from jaxalign.envs.skill_tasks import Choices
from jaxalign.models import mlp
from jaxalign.models import soft_actor_critic as sac
from jaxalign.ops import policy_gradient, returns

TINY = 1e-8


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of CSF's code for HalfCheetahGoal."""

    hidden: tuple[int, ...] = (1024, 1024)  # of both networks
    episodes: int = 64  # E, of an epoch
    updates: int = 10  # gradient steps of an epoch
    batch: int = 256  # B
    discount: float = 0.99  # gamma, of a choice
    decay: float = 0.95  # lambda
    clip: float = 0.2  # epsilon
    entropy_weight: float = 0.01  # of the entropy in the policy's objective
    learning_rate: float = 1e-4  # of policy and value

    def __post_init__(self) -> None:
        limits.counts(self, "hidden", "episodes", "updates", "batch")
        limits.fractions(self, "discount", "decay", "clip")
        limits.positive(self, "learning_rate", "entropy_weight")


class Networks(NamedTuple):
    """actor: `(params, o) -> [..., D]`, logits. value: `(params, o) -> [...]`."""

    actor: Model
    value: Model


def networks(config: Config, observation_size: int, skill_size: int) -> Networks:
    """The networks for observations of size O and skills of size D."""
    actor = mlp.mlp(
        observation_size,
        config.hidden,
        skill_size,
        activation=jnp.tanh,
        final_scale=mlp.MEAN_SCALE,
    )
    value = mlp.mlp(observation_size, config.hidden, 1, activation=jnp.tanh)
    return Networks(actor, mlp.scalar(value))


def init(
    config: Config,
    observation_size: int,
    skill_size: int,
    offset: np.ndarray,
    scale: np.ndarray,
    key: Array,
) -> TrainState:
    """The state before the first update.

    offset, scale: `[O]`, of observations, kept in `extra`; the networks read (o - offset) / scale.
    """
    params = mlp.init_each(networks(config, observation_size, skill_size), key)
    return descent.create(params, _optimizers(config), slow={}, extra=sac.normaliser(offset, scale))


def update(
    config: Config, state: TrainState, episodes: Choices, key: Array
) -> tuple[TrainState, dict[str, Array]]:
    """What is learned from an epoch `[T, E, ...]`; metrics are means over its gradient steps."""
    seen = sac.normalise(state.extra, episodes.observation)
    nets = networks(config, seen.shape[-1], episodes.action.shape[-1])
    value = nets.value.apply(state.params["value"], seen)
    reward = episodes.reward
    advantage, target = returns.gae(
        reward.T, value.T, jnp.ones(reward.T.shape, bool), config.discount, config.decay
    )
    old = _log_chance(nets, state.params["actor"], seen, episodes.action)
    rows = (seen, episodes.action, old, advantage.T, target.T)
    rows = jax.tree.map(lambda leaf: leaf.reshape(reward.size, *leaf.shape[2:]), rows)

    def one(state: TrainState, key: Array) -> tuple[TrainState, dict[str, Array]]:
        drawn = jax.random.randint(key, (config.batch,), 0, reward.size)
        return _gradient_step(config, nets, state, *(leaf[drawn] for leaf in rows))

    learned, log = jax.lax.scan(one, state, jax.random.split(key, config.updates))
    return learned._replace(step=state.step + 1), {n: values.mean() for n, values in log.items()}


def _gradient_step(
    config: Config,
    nets: Networks,
    state: TrainState,
    seen: Array,
    action: Array,
    old: Array,
    advantage: Array,
    target: Array,
) -> tuple[TrainState, dict[str, Array]]:
    """One step of the policy and one of the value, on rows `[B, ...]`."""
    standard = (advantage - advantage.mean()) / (advantage.std() + TINY)

    def actor_loss(actor: Params) -> tuple[Array, Array]:
        log_chances = jax.nn.log_softmax(nets.actor.apply(actor, seen))
        entropy = -(jnp.exp(log_chances) * log_chances).sum(-1).mean()
        log_ratio = (log_chances * action).sum(-1) - old
        surrogate = policy_gradient.clipped_surrogate(log_ratio, standard, config.clip)
        return surrogate.mean() - config.entropy_weight * entropy, entropy

    def value_loss(value: Params) -> tuple[Array, None]:
        return ((nets.value.apply(value, seen) - target) ** 2).mean(), None

    optimizers = _optimizers(config)
    state, actor_value, entropy = descent.descend(optimizers, state, "actor", actor_loss)
    state, critic_value, _ = descent.descend(optimizers, state, "value", value_loss)
    return state, {"actor_loss": actor_value, "value_loss": critic_value, "entropy": entropy}


def act(
    config: Config,
    state: TrainState,
    observation: Array,
    key: Array,
    temperature: float | Array = 1.0,
) -> Array:
    """Choices `[B, D]`, one-hot, for observations `[B, O]`.

    temperature: multiplies the noise on the logits; 1 draws from the policy, 0 takes the likeliest.
    """
    actor = state.params["actor"]
    size = actor["out"]["bias"].shape[-1]
    model = networks(config, observation.shape[-1], size).actor
    logits = model.apply(actor, sac.normalise(state.extra, observation))
    noisy = logits + temperature * jax.random.gumbel(key, logits.shape)
    return jax.nn.one_hot(noisy.argmax(-1), size)


def _log_chance(nets: Networks, actor: Params, seen: Array, action: Array) -> Array:
    """The logarithm of the probability of choices, `[...]`."""
    return (jax.nn.log_softmax(nets.actor.apply(actor, seen)) * action).sum(-1)


def _optimizers(config: Config) -> descent.Optimizers:
    """An Adam for each part of the parameters."""
    return dict.fromkeys(("actor", "value"), optax.adam(config.learning_rate))
