"""Supervised fine-tuning: a language model learns to give the responses it is shown.

Next-token cross-entropy (Ouyang et al. 2022, section 3.1) on the tokens of the responses, stop
token included; those of the prompts are read and not predicted. Every token counts alike, whatever
the length of its response. Logits exist for a few tokens at a time only (`rollout.decode.score`).

Dimensions: N responses in the data, B in a batch, P prompt slots, T response slots.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from jaxalign.core import state as states
from jaxalign.core import step as steps
from jaxalign.core.state import TrainState
from jaxalign.core.types import Array, LanguageModel, Max, Mean, Params, UserError
from jaxalign.data.preferences import Responses
from jaxalign.ops.sampling import Sampling
from jaxalign.rollout import decode


@dataclasses.dataclass(frozen=True)
class Config:
    """Training of the model that alignment starts from."""

    updates: int = 1000
    batch: int = 64
    micro_batches: int = 1  # parts of a batch, one in memory at a time
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("updates", "batch", "micro_batches"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)}: must be at least 1; raise it")
        if not self.learning_rate > 0:
            raise UserError(
                f"learning_rate = {self.learning_rate}: must be positive; try the default"
            )
        if self.batch % self.micro_batches:
            raise UserError(
                f"micro_batches = {self.micro_batches}: must divide batch = {self.batch}; "
                "change one of the two"
            )


def loss(
    model: LanguageModel, length: int, params: Params, batch: Responses, _: Array
) -> tuple[Mean, dict[str, Mean | Max]]:
    """Cross-entropy of the response tokens, in nats, and the entropy of the model's predictions.

    length: T. batch: ids, mask `[B, P+T]`.
    """
    ids, mask = map(jnp.asarray, batch)
    density, entropy = decode.score(model, params, ids, mask, length, Sampling())
    tokens = mask[:, -length:].sum(dtype=jnp.float32)
    return Mean(-density.sum(), tokens), {"entropy": Mean(entropy.sum(), tokens)}


def init(params: Params, config: Config) -> TrainState:
    """The state before the first update. params: of the model; they are copied."""
    return states.create(
        jax.tree.map(jnp.copy, params), steps.warmed_adam(config.learning_rate, config.updates)
    )


def make_step(
    model: LanguageModel, config: Config, length: int, rows: NamedSharding | None = None
) -> Callable[[TrainState, Responses, Array], tuple[TrainState, dict[str, Array]]]:
    """The compiled update `(state, data, key) -> (state, metrics)`; the state is donated.

    data: the whole corpus on the device, `[N, P+T]`, from which each update draws its rows.
    length: T. rows: how a batch lies on a mesh.
    """
    optimizer = steps.warmed_adam(config.learning_rate, config.updates)

    def objective(
        params: Params, batch: Responses, key: Array
    ) -> tuple[Mean, dict[str, Mean | Max]]:
        return loss(model, length, params, batch, key)

    def step(state: TrainState, data: Responses, key: Array) -> tuple[TrainState, dict]:
        row = jax.random.randint(key, (config.batch,), 0, data.ids.shape[0])
        if rows is not None:
            row = jax.lax.with_sharding_constraint(row, rows)
        batch = jax.tree.map(lambda a: a[row], data)
        return steps.train_step(
            objective, optimizer, state, batch, key, micro_batches=config.micro_batches
        )

    return jax.jit(step, donate_argnums=0)
