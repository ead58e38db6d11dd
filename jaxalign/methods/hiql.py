"""HIQL: one value function, from which two policies are taken: one sets subgoals, one acts.

Source: Park et al. 2023, "HIQL: Offline Goal-Conditioned RL with Latent States as Actions": values
eq. 4, the two policies eqs. 6 and 7, subgoals as representations section 5.2. The defaults are the
settings of OGBench (Park et al. 2025); `original` has those of the paper's own repository.

V(s, phi([s; g])) has two heads on a representation phi of length sqrt(d). Learning takes one
gradient step a batch on the sum of three losses: expectile regression of V towards a slow copy of
its heads, and advantage-weighted regression of both policies with the advantages of the trained
heads. The slow heads read the trained phi. Only the value loss trains phi.

Departures from the original repository, `original` included: random goals are drawn from states
with a successor, as in OGBench, not from all states; a gradient that is not a number ends the run
instead of being zeroed. Pixels and discrete actions are left out.

Dimensions: B batch, O observation, A action, d representation.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

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
from jaxalign.ops.gaussian import Gaussian
from jaxalign.ops.goals import Batch, Goals


@dataclasses.dataclass(frozen=True)
class Config:
    """OGBench's settings for mazes."""

    goals: Goals = Goals()
    batch: int = 1024
    learning_rate: float = 3e-4
    expectile: float = 0.7  # tau
    low_alpha: float = 3.0  # beta, inverse temperature of the policy that acts
    high_alpha: float = 3.0  # beta, of the policy that sets subgoals
    target_rate: float = (
        0.005  # share of the trained heads that the slow ones take over each update
    )
    representation: int = 10  # d
    value_hidden: tuple[int, ...] = (512, 512, 512)  # of the heads and of phi
    actor_hidden: tuple[int, ...] = (512, 512, 512)
    actor_activation: Literal["gelu", "relu"] = "gelu"
    learned_std: bool = False  # of both policies; 1 otherwise

    def __post_init__(self) -> None:
        limits.fractions(self, "expectile", "target_rate")
        limits.positive(self, "learning_rate", "low_alpha", "high_alpha")
        limits.counts(self, "batch", "representation", "value_hidden", "actor_hidden")


def original() -> Config:
    """The settings of the paper's own repository for AntMaze."""
    return Config(
        goals=Goals(actor_random=0.3),
        low_alpha=1.0,
        high_alpha=1.0,
        actor_hidden=(256, 256),
        actor_activation="relu",
        learned_std=True,
    )


class Networks(NamedTuple):
    """representation: phi, `(s, g) -> [B, d]`. value: the heads, `(s, phi) -> [2, B]`.

    low: `(s, phi) -> Gaussian [B, A]`. high: `(s, g) -> Gaussian [B, d]`.
    """

    representation: Model
    value: Model
    low: Model
    high: Model


def networks(config: Config, observation_size: int, action_size: int) -> Networks:
    """The four networks for observations of size O and actions of size A."""
    o, d = observation_size, config.representation
    phi = mlp.mlp(2 * o, config.value_hidden, d, layer_norm=True)
    head = mlp.scalar(mlp.mlp(o + d, config.value_hidden, 1, layer_norm=True))

    def actor(inputs: int, outputs: int) -> Model:
        activation = getattr(jax.nn, config.actor_activation)
        return mlp.gaussian_actor(
            inputs,
            config.actor_hidden,
            outputs,
            activation=activation,
            learned_std=config.learned_std,
        )

    def represent(params: Params, observation: Array, goal: Array) -> Array:
        return _to_length(phi.apply(params, observation, goal))

    return Networks(
        representation=Model(phi.init, represent),
        value=mlp.ensemble(head, 2),
        low=actor(o + d, action_size),
        high=actor(2 * o, d),
    )


def init(config: Config, observation_size: int, action_size: int, key: Array) -> TrainState:
    """The state before the first update; the slow value heads lie in `slow["value"]`."""
    nets = networks(config, observation_size, action_size)
    params = mlp.init_each(nets, key)
    slow = {"value": jax.tree.map(jnp.copy, params["value"])}
    return states.create(params, make_optimizer(config), slow=slow)


def update(
    config: Config, state: TrainState, batch: Batch, key: Array
) -> tuple[TrainState, dict[str, Array]]:
    """One gradient step on the joint loss. The slow heads follow the parameters before it.

    key: of no use, as the loss draws nothing; other methods' may.
    """
    trained = {"value": state.params["value"]}
    slow = steps.follow(state.slow, trained, 1 - config.target_rate)
    state, metrics = steps.gradient_step(
        lambda params: loss(config, params, state.slow, batch), make_optimizer(config), state
    )
    return state._replace(slow=slow), metrics


class Fixed(NamedTuple):
    """What the losses take as given: no gradient flows through it.

    subgoal, target: `[B, d]`, phi of the state k steps ahead for the policy that acts, and of the
        state that the other should ask for.
    low_advantage, high_advantage: `[B]`, of the policies' targets.
    slow_value, slow_next: `[2, B]`, the slow heads at s and s'.
    """

    subgoal: Array
    target: Array
    low_advantage: Array
    high_advantage: Array
    slow_value: Array
    slow_next: Array


def loss(
    config: Config, params: Params, slow: Params, batch: Batch
) -> tuple[Array, dict[str, Array]]:
    """The sum of the three losses `[]`, and metrics: each of them and what they are made of."""
    nets = networks(config, batch.observation.shape[-1], batch.action.shape[-1])
    s = batch.observation
    phi = nets.representation.apply(params["representation"], s, batch.value_goal)
    heads = nets.value.apply(params["value"], s, phi)
    frozen, known = jax.lax.stop_gradient((params, phi))
    fixed = _fixed(nets, frozen, slow, batch, known)
    value_loss = expectile.twin_value_loss(
        heads,
        fixed.slow_value,
        fixed.slow_next,
        batch.reward,
        batch.mask,
        config.goals.discount,
        config.expectile,
    ).mean()
    low = nets.low.apply(params["low"], s, fixed.subgoal)
    low_loss, low_metrics = _regression(low, batch.action, fixed.low_advantage, config.low_alpha)
    high = nets.high.apply(params["high"], s, batch.high_goal)
    high_loss, high_metrics = _regression(
        high, fixed.target, fixed.high_advantage, config.high_alpha
    )
    total = value_loss + low_loss + high_loss
    mean = heads.mean(0)
    return total, {
        "loss": total,
        "value_loss": value_loss,
        "value_mean": mean.mean(),
        "value_max": mean.max(),
        "value_min": mean.min(),
        **{f"low_{name}": number for name, number in low_metrics.items()},
        **{f"high_{name}": number for name, number in high_metrics.items()},
    }


def _fixed(nets: Networks, params: Params, slow: Params, batch: Batch, phi: Array) -> Fixed:
    """phi: `[B, d]` of s and the values' goal, which is known already.

    Each term calls the networks on its own B rows. Fewer calls on stacked rows were 1.1 to 1.3
    times as slow on CPUs, where their arrays leave the cache.
    """
    s, ahead, target = batch.observation, batch.next_observation, batch.high_target

    def represent(state: Array, goal: Array) -> Array:
        return nets.representation.apply(params["representation"], state, goal)

    def mean_value(state: Array, goal: Array) -> Array:
        return nets.value.apply(params["value"], state, represent(state, goal)).mean(0)

    return Fixed(
        subgoal=represent(s, batch.low_goal),
        target=represent(s, target),
        low_advantage=mean_value(ahead, batch.low_goal) - mean_value(s, batch.low_goal),
        high_advantage=mean_value(target, batch.high_goal) - mean_value(s, batch.high_goal),
        slow_value=nets.value.apply(slow["value"], s, phi),
        slow_next=nets.value.apply(slow["value"], ahead, represent(ahead, batch.value_goal)),
    )


def act(
    config: Config,
    params: Params,
    observation: Array,
    goal: Array,
    key: Array,
    temperature: float | Array = 0.0,
) -> Array:
    """Actions `[B, A]` in [-1, 1] for observations and goals `[B, O]`, through a subgoal a step.

    temperature: multiplies the standard deviations of both policies; 0 takes their means.
    """
    nets = networks(config, observation.shape[-1], mlp.action_size(params["low"]))
    high_key, low_key = jax.random.split(key)
    high = nets.high.apply(params["high"], observation, goal)
    subgoal = _to_length(gaussian.draw(high, high_key, temperature))
    low = nets.low.apply(params["low"], observation, subgoal)
    return gaussian.draw(low, low_key, temperature).clip(-1, 1)


def value(config: Config, params: Params, observation: Array, goal: Array) -> Array:
    """V `[B]` of observations and goals `[B, O]`: the mean of the heads, minus discounted steps."""
    nets = networks(config, observation.shape[-1], mlp.action_size(params["low"]))
    phi = nets.representation.apply(params["representation"], observation, goal)
    return nets.value.apply(params["value"], observation, phi).mean(0)


def subgoal(
    config: Config, params: Params, observation: Array, goal: Array, candidates: Array
) -> Array:
    """Indices `[B]` of the candidates `[C, O]` that resemble most the subgoals set on the way from
    observations to goals `[B, O]`: those with the largest product of representations."""
    nets = networks(config, observation.shape[-1], mlp.action_size(params["low"]))
    wanted = _to_length(nets.high.apply(params["high"], observation, goal).mean)
    shape = (observation.shape[0], *candidates.shape)
    here = jnp.broadcast_to(observation[:, None], shape)
    there = jnp.broadcast_to(candidates[None], shape)
    phis = nets.representation.apply(params["representation"], here, there)
    return jnp.einsum("bcd,bd->bc", phis, wanted).argmax(1)


def _to_length(vector: Array) -> Array:
    """`[B, d]`, scaled to length sqrt(d)."""
    length = jnp.linalg.norm(vector, axis=-1, keepdims=True)
    return vector / length * vector.shape[-1] ** 0.5


def _regression(
    policy: Gaussian, target: Array, advantage: Array, alpha: float
) -> tuple[Array, dict[str, Array]]:
    """Advantage-weighted regression `[]` of a policy to what was done, `[B, ...]`."""
    weight, density = pe.awr_weight(advantage, alpha), gaussian.log_density(policy, target)
    regression = -(weight * density).mean()
    return regression, {
        "loss": regression,
        "advantage": advantage.mean(),
        "log_density": density.mean(),
        "error": ((policy.mean - target) ** 2).mean(),
        "clipped": (weight >= pe.LARGEST_WEIGHT).mean(),
    }


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """One Adam for all networks."""
    return optax.adam(config.learning_rate)
