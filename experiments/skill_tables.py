"""Tables of skills in several settings, for RESULTS.md.

    python -m experiments.metra claims | sweep [--settings ...] [--repeats N]

Each setting is a run of its own under the work directory, all seeds of an arm at once, resumable.
The numbers go to `experiments/results/NAME.json`, from which RESULTS.md is generated.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments import comparison, report, seed_axis, skill_report, skills, statistics
from experiments.b2_tables import RESULTS, cell
from experiments.comparison import Comparison
from experiments.skills import Experiment
from jaxalign.core import metrics
from jaxalign.core.types import UserError

FIGURES = ("coverage", "paths")


@dataclasses.dataclass(frozen=True)
class Claims:
    """What is run."""

    name: str  # of the preset
    settings: tuple[str, ...]
    repeats: int = 6  # seeds
    seed: int = 0

    def __post_init__(self) -> None:
        if self.repeats < 1 or not self.settings:
            raise UserError(
                f"repeats = {self.repeats}, settings = {self.settings}: give 1 or more of both"
            )


def run(root: Path, claims: Claims, known: Mapping[str, Experiment]) -> Path:
    """Trains what is not finished; returns the numbers for RESULTS.md.

    known: the experiments that settings name.
    """
    for name in claims.settings:
        if name not in known:
            raise UserError(f"settings: {name!r} is not one of {', '.join(known)}; give some")
        skills.check(known[name], claims.repeats)
    env = {"experiment": "metra", "command": command(claims), **metrics.environment()}
    seeds = range(claims.seed, claims.seed + claims.repeats)
    settings = {name: known[name] for name in claims.settings}
    seed_axis.run_settings(root, settings, seeds, env, _train)
    return summarise(root, claims)


def _train(experiment: Experiment, directories: Mapping[int, Path]) -> None:
    lab = skills.make_lab(experiment, len(directories))
    skills.run_arms(lab, experiment, directories, resume=True)


def command(claims: Claims) -> str:
    """The command that makes the tables."""
    return f"python -m experiments.metra {claims.name} --workdir runs/{claims.name}"


def summarise(root: Path, claims: Claims) -> Path:
    """Writes the result file."""
    runs = {name: comparison.read(root / name) for name in claims.settings}
    env = metrics.environment()
    result = {
        "title": f"Skills without rewards ({claims.name})",
        "command": command(claims),
        "hardware": f"{env['devices']} x {env['device']}, {env['cpus']} processors",
        "date": datetime.date.today().isoformat(),
        "seeds": list(range(claims.seed, claims.seed + claims.repeats)),
        "notes": [
            "Coverage: 1 x 1 cells visited by 48 skills without noise in the actions, and by all "
            "training episodes; `random` draws its actions uniformly. All at the last checkpoint, "
            "mean and 95 % interval over seeds. Time is that of all seeds together.",
        ],
        "tables": [
            *(_table(name, each) for name, each in runs.items()),
            *_differences(runs),
        ],
        "figures": [
            name
            for setting in claims.settings
            for name in report.publish(
                root / setting, FIGURES, f"metra_{claims.name}-{setting}", RESULTS
            )
        ],
    }
    path = RESULTS / f"metra_{claims.name}.json"
    metrics.write_json(path, result)
    return path


def _table(name: str, run: Comparison) -> dict[str, Any]:
    columns = skill_report.COLUMNS
    rows = [
        [arm, *map(cell, estimates)] for arm, estimates in skill_report.final_numbers(run).items()
    ]
    heads = ["arm", *(f"{column.head}: {column.sub}" for column in columns)]
    return {"title": f"{name}: {_described(run)}", "columns": heads, "rows": rows}


def _described(run: Comparison) -> str:
    """The size of a run, in words."""
    config = run.config
    return (
        f"{config['epochs']:,} epochs of {config['environments']} episodes and {config['updates']} "
        f"gradient steps, networks {config['metra']['hidden']}"
    )


def _differences(runs: Mapping[str, Comparison]) -> list[dict[str, Any]]:
    """METRA's coverage minus and over each other arm's, paired by seed."""
    rows: list[list[Any]] = []
    for name, run in runs.items():
        for arm in run.arms:
            pair = run.paired("metra", arm)
            if arm != "metra" and len(pair[0]) > 1:
                ours, theirs = (comparison.final(each, "coverage") for each in pair)
                difference = cell(statistics.paired_difference(ours, theirs))
                rows.append(
                    [
                        name,
                        f"metra, {arm}",
                        difference,
                        cell(statistics.mean_interval(ours / theirs)),
                    ]
                )
    columns = ["setting", "pair", "difference (cells)", "ratio"]
    return [{"title": "Coverage, paired by seed", "columns": columns, "rows": rows}] if rows else []
