"""Two small studies of reward distances: rewards of one gridworld, and adversarial ones.

Each writes one row of metrics and returns its tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from experiments import starc_worlds
from experiments.starc_report import Result
from jaxalign.core import metrics
from jaxalign.core.types import Array
from jaxalign.ops import starc, tabular
from jaxalign.ops.starc import CANONICALISATIONS
from jaxalign.ops.tabular import MDP

TIMES = (1.0, 10.0, 100.0, 1000.0)


class Sizes(Protocol):
    """The fields of an experiment that these depend on."""

    @property
    def states(self) -> int: ...
    @property
    def actions(self) -> int: ...
    @property
    def discount(self) -> float: ...
    @property
    def seed(self) -> int: ...


def write_row(folder: Path, numbers: Mapping[str, float]) -> None:
    """The one row of metrics of a part that is done in one go."""
    (folder / "metrics.jsonl").unlink(missing_ok=True)
    sink = metrics.JsonLines(folder / "metrics.jsonl")
    sink.write(0, numbers)
    sink.close()


@jax.jit
def compare(mdp: MDP, rewards: Array) -> tuple[dict[str, Array], Array]:
    """All distances `[N, N]` by canonicalisation (norm and metric l2), and worst regrets `[N, N]`.

    The latter under the row's reward, over all that the column's reward allows.
    """
    found: dict[str, Array] = {
        c: starc.distances(mdp, rewards, canonicalisation=c) for c in CANONICALISATIONS
    }
    a = starc.canonical(mdp, rewards)[..., 0]
    first, second = jnp.repeat(a, len(a), axis=0), jnp.tile(a, (len(a), 1, 1))
    worst = tabular.worst_regret(mdp, first, second).value.reshape(len(a), len(a))
    return found, worst


def gridworld(config: Sizes, folder: Path) -> Result:
    """Six rewards that one might write for reaching a corner, all against all."""
    mdp, named = starc_worlds.gridworld()
    names, rewards = list(named), jnp.stack(list(named.values()))
    found, worst = jax.device_get(compare(mdp, rewards))
    rows, numbers = [], {}
    for i, one in enumerate(names):
        for j, two in list(enumerate(names))[i + 1 :]:
            apart = [float(found[c][i, j]) for c in CANONICALISATIONS]
            regret = float(max(worst[i, j], worst[j, i]))
            rows.append([f"{one} - {two}", *(f"{d:.3f}" for d in apart), f"{regret:.3f}"])
            numbers[f"{one}-{two}/val"] = apart[0]
            numbers[f"{one}-{two}/worst regret"] = regret
    write_row(folder, numbers)
    np.savez(folder / "distances.npz", names=np.array(names), worst=worst, **found)
    table = {
        "title": "Gridworld: distances (norm and metric l2)",
        "columns": ["rewards", *CANONICALISATIONS, "worst-case regret"],
        "rows": rows,
    }
    note = (
        "Gridworld: nine cells, five deterministic moves, discount 0.99, and rewards of our own: "
        "goal; shaped, which is goal with shaping; path; cliff; effort; opposite. Worst-case "
        "regret: the larger of both directions."
    )
    return Result(numbers, [table], [note])


def adversarial(config: Sizes, folder: Path) -> Result:
    """Rewards that differ by k times one that nobody sees: equivalent, and opposite."""
    k_process, k_rewards = jax.random.split(jax.random.key(config.seed))
    sizes = (config.states, config.actions, config.discount)
    mdp = starc_worlds.random_process(k_process, *sizes)
    rows: list[list[Any]] = []
    numbers: dict[str, float] = {}
    for k in TIMES:
        made = starc_worlds.adversarial(k_rewards, mdp, k)
        for kind, pair in (("same order", made.same), ("opposite order", made.opposite)):
            pairs, worst = jax.device_get(compare(mdp, jnp.stack(pair)))
            found = {c: float(pairs[c][0, 1]) for c in CANONICALISATIONS}
            worst = float(worst[0, 1])
            rows.append([f"{k:g}", kind, *(f"{d:.4f}" for d in found.values()), f"{worst:.4f}"])
            numbers |= {f"{kind} {k:g}/{c}": d for c, d in found.items()}
            numbers[f"{kind} {k:g}/worst regret"] = worst
    write_row(folder, numbers)
    table = {
        "title": "Adversarial pairs: distances (norm and metric l2)",
        "columns": ["k", "policies", *CANONICALISATIONS, "worst-case regret"],
        "rows": rows,
    }
    note = (
        "Adversarial: r against r + k u (same order), and k u + r against k u - r (opposite "
        "order), where the mean of u over next states is 0 everywhere. A distance should be 0 in "
        "the first case and large in the second, where it should follow the worst-case regret."
    )
    return Result(numbers, [table], [note])
