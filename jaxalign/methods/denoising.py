"""Supervised training of a text-to-image denoiser: the base model that rewards then align.

v-prediction (Salimans & Ho 2022, appendix D) with caption dropout (Ho & Salimans 2022) and an
average of the weights. Parameters are `{"text": encoder, "net": denoiser}`; the encoder's tables
are trained along.

Dimensions: B pictures, L words of a caption, D width.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from jaxalign.core import state as states
from jaxalign.core import step as steps
from jaxalign.core.state import TrainState
from jaxalign.core.types import Array, Max, Mean, Model, Params, UserError
from jaxalign.ops import diffusion


@dataclasses.dataclass(frozen=True)
class Config:
    """Training of the base model."""

    updates: int = 2500
    batch: int = 64
    learning_rate: float = 2e-3
    ema: float = 0.995
    caption_dropout: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.updates, self.batch) < 1:
            raise UserError(
                f"updates = {self.updates}, batch = {self.batch}: both must be at least 1"
            )
        if not (0 <= self.caption_dropout < 1 and 0 <= self.ema < 1 and self.learning_rate > 0):
            raise UserError(
                f"caption_dropout = {self.caption_dropout}, ema = {self.ema}, learning_rate = "
                f"{self.learning_rate}: shares lie in [0, 1), a learning rate is positive"
            )


def loss(
    text: Model,
    net: Model,
    config: Config,
    alphas: Array,
    params: Params,
    batch: Mapping[str, Array],
    key: Array,
) -> tuple[Mean, dict[str, Mean | Max]]:
    """Squared error of the predicted v.

    alphas: `[count]`. batch: images `[B, ...]`, tokens `[B, L]`.
    """
    noise_key, time_key, drop_key = jax.random.split(key, 3)
    images = batch["images"]
    rows = images.shape[0]
    timestep = jax.random.randint(time_key, (rows,), 0, alphas.shape[0])
    x, target = diffusion.diffuse(alphas, noise_key, images, timestep)
    dropped = jax.random.bernoulli(drop_key, config.caption_dropout, (rows, 1))
    context = text.apply(params["text"], jnp.where(dropped, 0, batch["tokens"]))
    error = (net.apply(params["net"], x, timestep.astype(jnp.float32), context) - target) ** 2
    return Mean(error.mean(axis=tuple(range(1, error.ndim))).sum(), jnp.float32(rows)), {}


def init(text: Model, net: Model, config: Config) -> TrainState:
    """Fresh parameters with their optimizer state and average."""
    text_key, net_key = jax.random.split(jax.random.key(config.seed))
    params = {"text": text.init(text_key), "net": net.init(net_key)}
    return states.create(
        params,
        steps.warmed_adam(config.learning_rate, config.updates, b2=0.99),
        slow=jax.tree.map(jnp.copy, params),
    )


def make_step(
    text: Model, net: Model, config: Config, rows: NamedSharding | None = None
) -> Callable[[TrainState, Mapping[str, Array], Array], tuple[TrainState, dict[str, Array]]]:
    """The compiled update `(state, data, key) -> (state, metrics)`; the state is donated.

    data is the whole corpus on the device, from which each update draws its rows: images `[N, ...]`
    in [-1, 1], tokens `[N, L] i32`, and alphas `[count]`, the cumulative signal shares.
    rows: how a batch lies on a mesh.
    """
    optimizer = steps.warmed_adam(config.learning_rate, config.updates, b2=0.99)

    def step(state: TrainState, data: Mapping[str, Array], key: Array) -> tuple[TrainState, dict]:
        row_key, loss_key = jax.random.split(key)
        row = jax.random.randint(row_key, (config.batch,), 0, data["images"].shape[0])
        if rows is not None:
            row = jax.lax.with_sharding_constraint(row, rows)
        batch = {"images": data["images"][row], "tokens": data["tokens"][row]}
        objective = functools.partial(loss, text, net, config, data["alphas"])
        return steps.train_step(objective, optimizer, state, batch, loss_key, ema=config.ema)

    return jax.jit(step, donate_argnums=0)
