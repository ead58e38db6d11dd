"""The claims' runs as tables: what each arm reached, and paired differences to sparse rewards.

`summarise(root)` reads the folders that `r3hf_claims` left and writes
`experiments/results/r3hf_claims.json`, from which RESULTS.md is generated.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import comparison, statistics
from experiments.b2_tables import RESULTS, cell, paired
from experiments.comparison import ArmRun, Comparison
from jaxalign.core import metrics

REFERENCE = "sparse"

# What is read off a run: title -> number.
Number = Callable[[ArmRun], float]


def gold_of(run: ArmRun) -> np.ndarray:
    """Mean gold score of each iteration's responses."""
    return comparison.curve([run], "gold")[0, 0]


def area(run: ArmRun) -> float:
    """Mean gold over all iterations."""
    return float(gold_of(run).mean())


def last_tenth(run: ArmRun) -> float:
    """Mean gold over the last 10 % of iterations."""
    gold = gold_of(run)
    return float(gold[-max(len(gold) // 10, 1) :].mean())


def at_end(name: str) -> Number:
    """A number of the last row that has it."""
    return lambda run: float(comparison.final([run], name)[0])


NUMBERS: Mapping[str, Number] = {
    "gold, area": area,
    "gold, last tenth": last_tenth,
    "held-out gold": at_end("heldout/gold"),
    "held-out proxy": at_end("heldout/proxy"),
    "KL (nats)": at_end("heldout/kl"),
    "length": at_end("heldout/length"),
    "truncated": at_end("heldout/truncated"),
}
COMPARED = ("gold, area", "gold, last tenth", "held-out gold")


def finished(run: Comparison, arm: str) -> list[ArmRun]:
    """The arm's runs that came to their end."""
    return [r for r in run.of(arm) if r.finished]


def final_table(name: str, run: Comparison, rates: Mapping[str, Any]) -> dict[str, Any]:
    """What each arm reached in one setting."""
    rows: list[list[Any]] = []
    for arm in run.arms:
        if runs := finished(run, arm):
            values = [np.array([number(r) for r in runs]) for number in NUMBERS.values()]
            numbers = [cell(statistics.mean_interval(v)) for v in values]
            policy, critic = rates[arm]
            shown = f"{policy:g}" if arm.startswith("rloo") else f"{policy:g}, {critic:g}"
            rows.append([arm, shown, *numbers, len(runs)])
    return {"title": name, "columns": ["arm", "rates", *NUMBERS, "seeds"], "rows": rows}


def difference_table(title: str, run: Comparison) -> dict[str, Any]:
    """Every arm minus sparse rewards, paired by seed."""
    rows: list[list[Any]] = []
    for arm in run.arms:
        mine, theirs = paired(run, arm, REFERENCE)
        if arm == REFERENCE or len(mine) < 2:
            continue
        values = [[[NUMBERS[n](r) for r in runs] for runs in (mine, theirs)] for n in COMPARED]
        estimates = [statistics.paired_difference(*map(np.array, pair)) for pair in values]
        rows.append([f"{arm} - {REFERENCE}", *map(cell, estimates), len(mine)])
    return {"title": title, "columns": ["difference", *COMPARED, "seeds"], "rows": rows}


def summarise(
    root: Path, settings: Sequence[str], rates: Mapping[str, Any], notes: Sequence[str]
) -> Path:
    """Writes the result file. rates: arm -> (policy, critic)."""
    present = [name for name in settings if list((root / name).glob("seed-*/config.json"))]
    runs = {name: comparison.read(root / name) for name in present}
    tables = [final_table(name, run, rates) for name, run in runs.items()]
    tables += [difference_table(f"{name}, paired", run) for name, run in runs.items()]
    env = metrics.environment()
    result = {
        "title": "R3HF: rewards of tokens against rewards at the end (claims)",
        "command": "python -m experiments.r3hf claims --workdir runs/r3hf-claims",
        "hardware": f"{env['cpus']} {env['machine']} CPU cores, one core a run",
        "date": datetime.date.today().isoformat(),
        "seeds": sorted({seed for run in runs.values() for seed in run.seeds}),
        "notes": list(notes),
        "tables": tables,
        "figures": [],
    }
    path = RESULTS / "r3hf_claims.json"
    metrics.write_json(path, result)
    return path
