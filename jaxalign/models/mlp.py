"""Multi-layer perceptrons: values, ensembles of them, Gaussian actors, spectral normalisation.

Layer by layer a product, the activation and, if asked for, a LayerNorm after it; the last layer is
the product alone. Kernels start with variance `scale` / mean of fan-in and fan-out (Glorot & Bengio
2010), biases with zero. All inputs of a network are joined along their last axis.

Dimensions: D inputs joined, F outputs, H networks of an ensemble; `...` any rows.
"""

from __future__ import annotations

import math
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
WIDE_LOG_STD = (math.log(1e-6), 2.0)  # the same range of an actor with two heads


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


class TwoHeaded(nn.Module):
    """`[..., D]` -> two of `[..., F]`, from one trunk of tanh layers."""

    hidden: Sequence[int]
    outputs: int

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array]:
        for i, width in enumerate(self.hidden):
            kernel = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
            x = nn.tanh(Dense(width, kernel_init=kernel, name=f"hidden_{i}")(x))
        final = nn.initializers.variance_scaling(MEAN_SCALE, "fan_avg", "normal")
        mean = Dense(self.outputs, kernel_init=final, name="mean")(x)
        return mean, Dense(self.outputs, kernel_init=final, name="log_std")(x)


def two_headed_actor(inputs: int, hidden: Sequence[int], outputs: int) -> Model:
    """A policy `(params, *inputs) -> Gaussian` over `[..., F]`, whose mean and standard deviation
    depend on the inputs; at the start they are near 0 and 1."""
    module = TwoHeaded(tuple(hidden), outputs)

    def init(key: Array) -> Params:
        return module.init(key, jnp.zeros((1, inputs)))["params"]

    def apply(params: Params, *inputs: Array) -> Gaussian:
        both: Any = module.apply({"params": params}, jnp.concatenate(inputs, axis=-1))
        mean, log_std = both
        return Gaussian(mean, log_std.clip(*WIDE_LOG_STD))

    return Model(init, apply)


def init_each(networks: Any, key: Array) -> Params:
    """Parameters of each network of a NamedTuple of them, by its name."""
    keys = jax.random.split(key, len(networks))
    named = zip(networks._asdict().items(), keys, strict=True)
    return {name: network.init(own) for (name, network), own in named}


def action_size(actor: Params) -> int:
    """F of the parameters of a Gaussian actor, of either kind."""
    mean = actor["mean"]
    return mean.get("out", mean)["bias"].shape[-1]


# --- spectral normalisation ----------------------------------------------------------------------
# Miyato et al. 2018, "Spectral Normalization for Generative Adversarial Networks": kernels divided
# by their largest singular value, so that each layer stretches no difference. The vectors, one a
# layer `[F of the layer]` by its name, are estimates of right singular vectors, kept between steps.


def singular_vectors(params: Params, key: Array, iterations: int) -> Params:
    """Vectors of unit length from random ones, after so many power iterations."""
    named = zip(params.items(), jax.random.split(key, len(params)), strict=True)
    start = {name: jax.random.normal(own, layer["bias"].shape) for (name, layer), own in named}
    return jax.lax.fori_loop(0, iterations, lambda _, v: power_iteration(params, v), start)


def power_iteration(params: Params, vectors: Params) -> Params:
    """The vectors after one step towards the singular vectors of the kernels."""

    def step(name: str, vector: Array) -> Array:
        kernel = params[name]["kernel"]
        vector = kernel.T @ (kernel @ vector)
        return vector / jnp.linalg.norm(vector)

    return {name: step(name, vector) for name, vector in vectors.items()}


def spectrally_normalised(params: Params, vectors: Params) -> Params:
    """The parameters with kernels divided by the lengths to which they stretch the vectors.

    No gradient flows into the vectors, as in the paper.
    """

    def divide(layer: Params, vector: Array) -> Params:
        stretch = jnp.linalg.norm(layer["kernel"] @ jax.lax.stop_gradient(vector))
        return {**layer, "kernel": layer["kernel"] / stretch}

    return {name: divide(layer, vectors[name]) for name, layer in params.items()}
