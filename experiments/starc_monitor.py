"""A reward model in training, watched by its STARC distance to the gold score.

`hook` is for any training of a reward model on pairs of responses: both responses of each held-back
pair are scored by the model and by the gold score, and the one-step distance of the two is logged.
It is 0 once the model orders all policies as the gold score does, up to what a prompt alone adds,
and unlike the share of pairs in order it says by how much it is wrong.

Dimensions: X pairs, L slots of prompt and response.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from experiments import problems
from experiments.problems import Network, Problem, Source
from experiments.starc_report import Result
from jaxalign.core import metrics
from jaxalign.core.loop import Hook, fit
from jaxalign.core.types import Array, Params
from jaxalign.data.preferences import Pairs
from jaxalign.methods import reward_model
from jaxalign.models.scalar_head import with_scalar_head
from jaxalign.ops import redistribution as rd
from jaxalign.ops import starc_sampled

MOST_PAIRS = 512
SOURCE = Source(
    response=8,
    network=Network(width=32, depth=2, heads=2),
    prompts=64,
    demonstrations=64,
    pairs=16384,
)
RATE = 3e-3  # learning rate of so small a network


class Sizes(Protocol):
    """The fields of an experiment that this depends on."""

    @property
    def updates(self) -> int: ...
    @property
    def seed(self) -> int: ...


def distance(scores: reward_model.Scores, params: Params, pairs: Pairs, gold: Array) -> Array:
    """`[]`: one-step STARC distance of a model and the gold score.

    scores: the model's, of every prefix. pairs: of ids and mask `[X, L]`. gold: `[2 X]`, of the
    chosen responses, then of the rejected ones.
    """
    ids, mask = (jnp.concatenate(two) for two in zip(pairs.chosen, pairs.rejected, strict=True))
    ours = rd.final_score(scores(params, ids, mask), mask)
    both = jnp.stack([ours, gold]).reshape(2, 2, -1).swapaxes(1, 2)
    return starc_sampled.distances(starc_sampled.one_step(both))[0, 1]


def hook(problem: Problem, scores: reward_model.Scores, every: int) -> Hook:
    """Logs `starc`, the distance to the gold score on held-back pairs, after each `every` steps."""
    pairs = jax.tree.map(lambda a: jnp.asarray(a)[:MOST_PAIRS], problem.test_pairs)
    responses = (jnp.concatenate(two) for two in zip(pairs.chosen, pairs.rejected, strict=True))
    gold = jax.jit(problem.gold)(problem.gold_params, *responses)
    measure = jax.jit(functools.partial(distance, scores))

    def run(state: Any, step: int) -> dict[str, Array]:
        del step
        return {"starc": measure(state.params, pairs, gold)}

    return Hook(every, run)


def run(config: Sizes, folder: Path) -> Result:
    """Trains a reward model on the synthetic world and watches it."""
    problem = problems.make(SOURCE)
    scalar = with_scalar_head(problem.model)
    settings = reward_model.Config(updates=config.updates, learning_rate=RATE)
    state = reward_model.init(scalar.init(jax.random.key(config.seed)), settings)
    (folder / "metrics.jsonl").unlink(missing_ok=True)
    sink = metrics.JsonLines(folder / "metrics.jsonl")
    every = max(config.updates // 20, 1)
    fit(
        state,
        reward_model.make_step(scalar.scores, settings),
        lambda i: problem.pairs,
        jax.random.key(config.seed),
        steps=config.updates,
        sinks=[sink],
        hooks=[hook(problem, scalar.scores, every)],
        title="monitor",
        shown=("loss", "accuracy", "starc"),
        put=_as_is,
    )
    sink.close()
    rows = [r for r in metrics.read_json_lines(folder / "metrics.jsonl") if "starc" in r]
    numbers = {"starc before": rows[0]["starc"], "starc after": rows[-1]["starc"]}
    shown = [rows[round(i * (len(rows) - 1) / 5)] for i in range(6)]
    table = {
        "title": "A reward model in training: distance to the gold score",
        "columns": ["updates", "STARC distance", "accuracy (batch)"],
        "rows": [[r["step"], {"value": r["starc"]}, _accuracy(r)] for r in shown],
    }
    note = (
        f"Monitor: a Bradley-Terry reward model on the synthetic world of `r3hf`, whose gold score "
        f"is known; one-step distance on {MOST_PAIRS} held-back pairs, both responses of each. "
        "sqrt(2) is that of unrelated rewards."
    )
    return Result(numbers, [table], [note])


def _as_is(batch: Any) -> Any:
    return batch


def _accuracy(row: dict[str, Any]) -> dict[str, float] | str:
    return {"value": row["accuracy"]} if "accuracy" in row else ""
