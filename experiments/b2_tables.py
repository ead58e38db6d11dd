"""The claims' runs as tables: what each arm reached, and paired differences at equal budgets.

`summarise(root)` reads the folders that `b2_claims` left and writes
`experiments/results/b2_claims.json`, from which RESULTS.md is generated.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import comparison, report, statistics
from experiments.comparison import ArmRun, Comparison
from jaxalign.core import metrics

RESULTS = Path(__file__).parent / "results"
REFERENCE = "ddpo"
CLAIMED = ("official", "loo", "telescope")


def cell(estimate: statistics.Estimate) -> dict[str, float]:
    """An estimate of one number as a table's cell."""
    return {name: float(getattr(estimate, name)) for name in ("mean", "low", "high")}


def paired(run: Comparison, arm: str, other: str) -> tuple[list[ArmRun], list[ArmRun]]:
    """Finished runs of two arms, seed by seed, of the seeds that have both."""
    runs = [(run.runs.get((arm, s)), run.runs.get((other, s))) for s in run.seeds]
    both = [(a, b) for a, b in runs if a and b and a.finished and b.finished]
    return [a for a, _ in both], [b for _, b in both]


# --- numbers of one pair of runs: (arm, other) -> two floats ------------------------------

Pair = Callable[[ArmRun, ArmRun], tuple[float, float]]


def evaluations(run: ArmRun, *names: str) -> np.ndarray:
    """`[len(names), E]`, the numbers at the run's evaluations."""
    return comparison.curve([run], *names)[0]


def at_end(name: str) -> Pair:
    """The number after the last stage: equal reward evaluations."""
    return lambda a, b: (evaluations(a, name)[0, -1], evaluations(b, name)[0, -1])


def at_equal_cost(a: ArmRun, b: ArmRun) -> tuple[float, float]:
    """Training reward where both have spent what the cheaper one spent in all.

    Between evaluations by lines.
    """
    paths = [evaluations(run, "cost", "train/reward") for run in (a, b)]
    budget = min(path[0, -1] for path in paths)
    first, second = (float(np.interp(budget, *path)) for path in paths)
    return first, second


def entropy_at_equal_reward(a: ArmRun, b: ArmRun) -> tuple[float, float]:
    """Factor entropy where both first reach the highest reward that both reach."""
    paths = [evaluations(run, "train/reward", "train/entropy") for run in (a, b)]
    reward = min(path[0].max() for path in paths)
    first, second = (_first_at(reward, *path) for path in paths)
    return first, second


def _first_at(level: float, x: np.ndarray, y: np.ndarray) -> float:
    """y where x, followed by lines from its first entry, first reaches `level`."""
    after = int(np.argmax(x >= level))
    if after == 0:
        return float(y[0])
    share = (level - x[after - 1]) / (x[after] - x[after - 1])
    return float(y[after - 1] + share * (y[after] - y[after - 1]))


def difference(run: Comparison, arm: str, other: str, pair: Pair) -> statistics.Estimate | None:
    """Paired difference arm - other over the seeds that have both; None for fewer than two."""
    numbers = np.array([pair(a, b) for a, b in zip(*paired(run, arm, other), strict=True)])
    return statistics.paired_difference(numbers[:, 0], numbers[:, 1]) if len(numbers) > 1 else None


# --- tables -------------------------------------------------------------------------------


def final_table(name: str, run: Comparison, rates: Mapping[str, float]) -> dict[str, Any]:
    """What the base and each arm reached in one setting."""
    splits = ("train/reward", "heldout/reward")
    measured = (*splits, "train/success", "train/entropy", "train/divergence")
    base = [cell(statistics.mean_interval(comparison.base(run, name))) for name in measured]
    rows: list[list[Any]] = [["base", "", *base, {"value": 0}, len(run.seeds)]]
    for arm in run.arms:
        runs = [r for r in run.of(arm) if r.finished]
        if not runs:
            continue
        numbers = [cell(statistics.mean_interval(comparison.final(runs, n))) for n in measured]
        cost = float(np.mean(comparison.final(runs, "cost"))) / 1000
        rows.append([arm, f"{rates[arm]:g}", *numbers, {"value": round(cost, 1)}, len(runs)])
    columns = ["arm", "rate", "training reward", "held-out reward", "success", "entropy (nats)"]
    return {
        "title": f"{name}: after the last stage",
        "columns": [*columns, "KL to base (nats)", "thousand network evaluations", "seeds"],
        "rows": rows,
    }


def difference_table(title: str, runs: Mapping[str, Comparison], pair: Pair) -> dict[str, Any]:
    """Each claimed arm minus DDPO, a column a setting."""
    rows = []
    for arm in CLAIMED:
        estimates = [difference(run, arm, REFERENCE, pair) for run in runs.values()]
        rows.append([f"{arm} - {REFERENCE}", *(cell(e) if e else "" for e in estimates)])
    return {"title": title, "columns": ["difference", *runs], "rows": rows}


def best_other(run: Comparison) -> str:
    """The arm beside `telescope` that has the highest mean final training reward."""
    others = [arm for arm in run.arms if arm != "telescope" and run.of(arm)]
    return max(others, key=lambda arm: np.mean(comparison.final(run.of(arm), "train/reward")))


def telescope_table(runs: Mapping[str, Comparison]) -> dict[str, Any]:
    """Telescoping credit against the best other arm of each setting, and what both cost."""
    rows = []
    for name, run in runs.items():
        other = best_other(run)
        ends = [
            difference(run, "telescope", other, at_end(f"{prompts}/reward"))
            for prompts in ("train", "heldout")
        ]
        costs = [np.mean(comparison.final(run.of(arm), "cost")) for arm in ("telescope", other)]
        ratio = {"value": float(costs[0] / costs[1])}
        rows.append([name, other, *(cell(e) if e else "" for e in ends), ratio])
    columns = ["setting", "best other arm", "telescope - other, training", "held-out"]
    return {
        "title": "Telescoping credit against the best other arm",
        "columns": [*columns, "its network evaluations / other's"],
        "rows": rows,
    }


def summarise(
    root: Path,
    settings: Sequence[str],
    rates: Mapping[str, Mapping[str, float]],
    notes: Sequence[str],
) -> Path:
    """Writes the result file. rates: setting -> arm -> learning rate."""
    runs = {name: comparison.read(root / name) for name in settings}
    tables = [final_table(name, run, rates[name]) for name, run in runs.items()]
    pairs: dict[str, Pair] = {
        "Training reward at equal reward evaluations": at_end("train/reward"),
        "Training reward at equal network evaluations": at_equal_cost,
        "Held-out reward at equal reward evaluations": at_end("heldout/reward"),
        "Factor entropy (nats) at equal training reward": entropy_at_equal_reward,
    }
    tables += [difference_table(title, runs, pair) for title, pair in pairs.items()]
    tables.append(telescope_table(runs))
    seeds = sorted({seed for run in runs.values() for seed in run.seeds})
    env = metrics.environment()
    result = {
        "title": "B2-DiffuRL against its neighbours (claims)",
        "command": "python -m experiments.b2_diffurl claims --workdir runs/claims",
        "hardware": f"{env['cpus']} {env['machine']} CPU cores, one core a run",
        "date": datetime.date.today().isoformat(),
        "seeds": seeds,
        "notes": list(notes),
        "tables": tables,
        "figures": [
            name
            for setting in settings
            for name in report.publish(
                root / setting, ("reward", "diversity"), f"b2_claims-{setting}", RESULTS
            )
        ],
    }
    path = RESULTS / "b2_claims.json"
    metrics.write_json(path, result)
    return path
