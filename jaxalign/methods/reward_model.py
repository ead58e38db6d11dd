"""A reward model: from preferences between whole responses to a score, and to scores of prefixes.

Preferences follow Bradley and Terry (1952), as in Ouyang et al. 2022, eq. 1: the chosen response
wins with probability sigmoid(score of chosen - score of rejected), where a score is read at the
last token. That leaves the scores of prefixes free, of which token rewards are made.
`calibration_loss` teaches them what the model itself will say at the end, as RUDDER's auxiliary
loss does (Arjona-Medina et al. 2019): each prefix regresses the final score of a frozen copy. The
final score is held where it was, so rewards still sum to it.

A model here is a function `(params, ids [B, L], mask [B, L] bool) -> [B, L] f32`, scores at every
token; its parameters are any nested dict, for example `{"model": trunk, "head": head}`.

Departures: RUDDER trains its predictor and the auxiliary task together, here the second follows.

Dimensions: N pairs or responses in the data, B in a batch, P prompt slots, T response slots.
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
from jaxalign.core.types import Array, Max, Mean, Params, PyTree, UserError
from jaxalign.data.preferences import Pairs, Responses
from jaxalign.ops import redistribution as rd

Scores = Callable[[Params, Array, Array], Array]
Step = Callable[[TrainState, PyTree, Array], tuple[TrainState, dict[str, Array]]]


@dataclasses.dataclass(frozen=True)
class Config:
    """Training on preferences, or the calibration of prefixes."""

    updates: int = 1000
    batch: int = 64  # pairs, or responses when calibrating
    micro_batches: int = 1  # parts of a batch, one in memory at a time
    learning_rate: float = 1e-3
    anchor: float = 1.0  # calibration: weight of a response's final score against all its prefixes

    def __post_init__(self) -> None:
        for name in ("updates", "batch", "micro_batches"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)}: must be at least 1; raise it")
        for name in ("learning_rate", "anchor"):
            if not getattr(self, name) > 0:
                raise UserError(
                    f"{name} = {getattr(self, name)}: must be positive; try the default"
                )
        if self.batch % self.micro_batches:
            raise UserError(
                f"micro_batches = {self.micro_batches}: must divide batch = {self.batch}; "
                "change one of the two"
            )


def preference_loss(
    scores: Scores, params: Params, batch: Pairs, _: Array
) -> tuple[Mean, dict[str, Mean | Max]]:
    """-log sigmoid(chosen - rejected) a pair, and how many pairs the scores order as labelled.

    batch: responses `[B, P+T]`. Equal scores are half right.
    """
    ids, mask = (jnp.concatenate(two) for two in zip(batch.chosen, batch.rejected, strict=True))
    final = rd.final_score(scores(params, ids, mask), mask)
    chosen, rejected = jnp.split(final, 2)
    margin = chosen - rejected
    pairs = jnp.float32(margin.shape[0])
    right = (jnp.sign(margin) + 1) / 2
    metrics = {"accuracy": Mean(right.sum(), pairs), "margin": Mean(margin.sum(), pairs)}
    return Mean(jax.nn.softplus(-margin).sum(), pairs), metrics


def calibration_loss(
    scores: Scores,
    length: int,
    anchor: float,
    teacher: Params,
    params: Params,
    batch: Responses,
    _: Array,
) -> tuple[Mean, dict[str, Mean | Max]]:
    """Squared distance of each prefix's score to the teacher's final score, a response.

    The mean over the prefixes (the prompt alone to all but the last token) and, `anchor` times, the
    distance of the final score itself. Metrics: both parts.

    length: T. batch: ids, mask `[B, P+T]`; each response has a token.
    """
    ids, mask = map(jnp.asarray, batch)
    target = jax.lax.stop_gradient(rd.final_score(scores(teacher, ids, mask), mask))
    ours, response = scores(params, ids, mask), mask[:, -length:]
    # The score before each response token is that of a true prefix.
    error = jnp.where(response, (rd.prefix_scores(ours, response) - target[:, None]) ** 2, 0)
    prefix = error.sum(1) / jnp.maximum(response.sum(1), 1)
    drift = (rd.final_score(ours, mask) - target) ** 2
    rows = jnp.float32(len(drift))
    metrics = {"prefix_error": Mean(prefix.sum(), rows), "drift": Mean(drift.sum(), rows)}
    return Mean((prefix + anchor * drift).sum(), rows), metrics


def init(params: Params, config: Config) -> TrainState:
    """The state before training on preferences. params: copied; a trunk that was fine-tuned on
    demonstrations, with a new head.
    """
    return states.create(
        jax.tree.map(jnp.copy, params), steps.warmed_adam(config.learning_rate, config.updates)
    )


def init_calibration(params: Params, config: Config) -> TrainState:
    """The state before calibration; the frozen copy lies in `slow["teacher"]`."""
    copies = [jax.tree.map(jnp.copy, params) for _ in range(2)]
    return states.create(
        copies[0],
        steps.warmed_adam(config.learning_rate, config.updates),
        slow={"teacher": copies[1]},
    )


def make_step(scores: Scores, config: Config, rows: NamedSharding | None = None) -> Step:
    """The compiled update on preferences `(state, data, key) -> (state, metrics)`; donates state.

    data: `Pairs` of responses `[N, P+T]` on the device, from which each update draws its rows.
    rows: how a batch lies on a mesh.
    """

    def objective(params: Params, batch: Pairs, key: Array) -> tuple[Mean, dict[str, Mean | Max]]:
        return preference_loss(scores, params, batch, key)

    def step(state: TrainState, data: Pairs, key: Array) -> tuple[TrainState, dict]:
        return _update(objective, config, rows, state, data, data.chosen.ids.shape[0], key)

    return jax.jit(step, donate_argnums=0)


def make_calibration_step(
    scores: Scores, config: Config, length: int, rows: NamedSharding | None = None
) -> Step:
    """The compiled update of the calibration `(state, data, key) -> (state, metrics)`; donates
    state.

    data: `Responses` `[N, P+T]` on the device, sampled from the policy that training starts from;
    labels are not needed. length: T. rows: how a batch lies on a mesh.
    """

    def step(state: TrainState, data: Responses, key: Array) -> tuple[TrainState, dict]:
        teacher = state.slow["teacher"]

        def objective(params: Params, batch: Responses, key: Array) -> tuple[Mean, dict]:
            return calibration_loss(scores, length, config.anchor, teacher, params, batch, key)

        return _update(objective, config, rows, state, data, data.ids.shape[0], key)

    return jax.jit(step, donate_argnums=0)


def _update(
    objective: Callable,
    config: Config,
    rows: NamedSharding | None,
    state: TrainState,
    data: PyTree,
    count: int,
    key: Array,
) -> tuple[TrainState, dict[str, Array]]:
    """One update on a batch drawn with replacement from the `count` rows of data."""
    row = jax.random.randint(key, (config.batch,), 0, count)
    if rows is not None:
        row = jax.lax.with_sharding_constraint(row, rows)
    batch = jax.tree.map(lambda a: a[row], data)
    return steps.train_step(
        objective,
        steps.warmed_adam(config.learning_rate, config.updates),
        state,
        batch,
        key,
        micro_batches=config.micro_batches,
    )
