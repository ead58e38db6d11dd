"""Multi-layer perceptrons: values, ensembles of them, Gaussian actors, quasimetrics.

Layer by layer a product, the activation and, if asked for, a LayerNorm after it; the last layer is
the product alone. Kernels start with variance `scale` / mean of fan-in and fan-out (Glorot & Bengio
2010), biases with zero. All inputs of a network are joined along their last axis.

Dimensions: D inputs joined, F outputs, H networks of an ensemble; `...` any rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxalign.core.types import Array, Model, Params
from jaxalign.models.dense import Dense
from jaxalign.ops.gaussian import Gaussian

LOG_STD = (-5.0, 2.0)  # the range of a learned log standard deviation
MEAN_SCALE = 0.01  # variance of an actor's last layer: its first actions are near zero


class MLP(nn.Module):
    """`[..., D]` -> `[..., F]`."""

    hidden: Sequence[int]
    outputs: int
    activation: Callable[[Array], Array]
    layer_norm: bool
    final_scale: float
    distribution: Literal["uniform", "normal"]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for i, width in enumerate(self.hidden):
            x = Dense(width, kernel_init=self._kernel(1.0), name=f"hidden_{i}")(x)
            x = self.activation(x)
            if self.layer_norm:
                x = nn.LayerNorm(name=f"norm_{i}")(x)
        return Dense(self.outputs, kernel_init=self._kernel(self.final_scale), name="out")(x)

    def _kernel(self, scale: float) -> nn.initializers.Initializer:
        return nn.initializers.variance_scaling(scale, "fan_avg", self.distribution)


def mlp(
    inputs: int,
    hidden: Sequence[int],
    outputs: int,
    *,
    activation: Callable[[Array], Array] = nn.gelu,
    layer_norm: bool = False,
    final_scale: float = 1.0,
    distribution: Literal["uniform", "normal"] = "uniform",
) -> Model:
    """The network `(params, *inputs) -> [..., F]`, whose inputs differ in their last axis only.

    inputs: D. hidden: widths. outputs: F.
    final_scale: of the last kernel's variance; 0.01 makes its entries ten times smaller.
    distribution: of the kernels' entries.
    """
    module = MLP(tuple(hidden), outputs, activation, layer_norm, final_scale, distribution)

    def init(key: Array) -> Params:
        return module.init(key, jnp.zeros((1, inputs)))["params"]

    def apply(params: Params, *inputs: Array) -> Any:
        return module.apply({"params": params}, jnp.concatenate(inputs, axis=-1))

    return Model(init, apply)


def ensemble(model: Model, count: int) -> Model:
    """H = count networks of their own on the same inputs, `[...]` -> `[H, ...]`.

    Each leaf has the networks as its leading axis, so a layer of all of them is one product.
    """

    def init(key: Array) -> Params:
        return jax.vmap(model.init)(jax.random.split(key, count))

    def apply(params: Params, *inputs: Array) -> Array:
        return jax.vmap(lambda one: model.apply(one, *inputs))(params)

    return Model(init, apply)


def scalar(model: Model) -> Model:
    """A network of one output without the axis of it, `[..., 1]` -> `[...]`."""
    return Model(model.init, lambda params, *inputs: model.apply(params, *inputs)[..., 0])


def gaussian_actor(
    inputs: int,
    hidden: Sequence[int],
    outputs: int,
    *,
    activation: Callable[[Array], Array] = nn.gelu,
    learned_std: bool = False,
) -> Model:
    """A policy `(params, *inputs) -> Gaussian` over `[..., F]`.

    learned_std: one standard deviation a dimension is learned, the same for all inputs, within
        `LOG_STD`; without it it is 1.
    """
    mean = mlp(inputs, hidden, outputs, activation=activation, final_scale=MEAN_SCALE)

    def init(key: Array) -> Params:
        params = {"mean": mean.init(key)}
        return {**params, "log_std": jnp.zeros(outputs)} if learned_std else params

    def apply(params: Params, *inputs: Array) -> Gaussian:
        middle = mean.apply(params["mean"], *inputs)
        log_std = params["log_std"].clip(*LOG_STD) if learned_std else jnp.zeros(outputs)
        return Gaussian(middle, jnp.broadcast_to(log_std, middle.shape))

    return Model(init, apply)


def init_each(networks: Any, key: Array) -> Params:
    """Parameters of each network of a NamedTuple of them, by its name."""
    keys = jax.random.split(key, len(networks))
    named = zip(networks._asdict().items(), keys, strict=True)
    return {name: network.init(own) for (name, network), own in named}


def action_size(actor: Params) -> int:
    """F of the parameters of a Gaussian actor."""
    return actor["mean"]["out"]["bias"].shape[-1]
