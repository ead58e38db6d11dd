"""The table of six methods on the point mazes, beside OGBench's numbers.

    python -m experiments.hiql table [--scale small] [--tasks ...] [--arms ...] [--repeats N]

Each task is a run of its own under the work directory, all seeds of an arm at once, resumable. The
numbers go to `experiments/results/hiql_SCALE.json`, from which RESULTS.md is generated; what was
not run says so, with the command.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from experiments import comparison, offline, offline_report, report, seed_axis, statistics
from experiments.b2_tables import RESULTS, cell
from experiments.comparison import Comparison
from experiments.offline import Experiment
from experiments.ogbench_settings import METHODS, PUBLISHED, settings
from jaxalign.core import metrics
from jaxalign.core.types import UserError

FIGURES = ("success", "walks", "values")
MAZES = tuple(task for task in PUBLISHED if task.startswith("pointmaze"))


@dataclasses.dataclass(frozen=True)
class Table:
    """What is run."""

    tasks: tuple[str, ...] = MAZES
    arms: tuple[str, ...] = tuple(METHODS)
    scale: Literal["full", "small"] = "full"  # OGBench's recipe, or one for CPUs
    real: bool = False  # attempts in the real environment too
    repeats: int = 8  # seeds
    seed: int = 0

    def __post_init__(self) -> None:
        for task in self.tasks:
            if task not in PUBLISHED:
                raise UserError(
                    f"tasks: {task!r} is not one of {', '.join(PUBLISHED)}; give some of these"
                )
        if self.repeats < 1 or not self.arms:
            raise UserError(f"repeats = {self.repeats}, arms = {self.arms}: give 1 or more of both")


def experiment(config: Table, task: str) -> Experiment:
    """The run of one task."""
    make = small if config.scale == "small" else full
    return dataclasses.replace(make(task), arms=config.arms, real=config.real, seed=config.seed)


def full(task: str) -> Experiment:
    """OGBench's recipe: a million updates, three evaluations in the last 200,000."""
    return Experiment(task=task, **settings(task))


def small(task: str) -> Experiment:
    """Networks an eighth as wide, a quarter of the rows, 40,000 updates; all else is OGBench's."""
    return Experiment(
        task=task,
        **settings(task, hidden=(64, 64, 64), batch=256),
        updates=40_000,
        at_once=500,
        evaluate_every=4000,
        attempts=20,
        save_every=4000,
    )


def run(root: Path, config: Table) -> Path:
    """Trains what is not finished; returns the numbers for RESULTS.md."""
    experiments = {task: experiment(config, task) for task in config.tasks}
    for each in experiments.values():
        offline.check(each, config.repeats)
    env = {"experiment": "hiql", "command": command(config), **metrics.environment()}
    seeds = range(config.seed, config.seed + config.repeats)
    seed_axis.run_settings(root, experiments, seeds, env, _train)
    return summarise(root, config)


def _train(experiment: Experiment, directories: Mapping[int, Path]) -> None:
    lab = offline.make_lab(experiment, len(directories))
    offline.run_arms(lab, experiment, directories, resume=True)


def command(config: Table) -> str:
    """The command that makes the table."""
    words = ["python", "-m", "experiments.hiql", "table"]
    for name in ("scale", "tasks", "arms", "repeats"):
        value = getattr(config, name)
        if value != getattr(Table(), name):
            words += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
    return " ".join([*words, *(["--real"] if config.real else [])])


def summarise(root: Path, config: Table) -> Path:
    """Writes the result file."""
    rows: list[list[Any]] = []
    done = {task: comparison.read(root / task) for task in config.tasks}
    for task in PUBLISHED:
        for arm, theirs in zip(METHODS, PUBLISHED[task], strict=True):
            ours = _ours(done.get(task), arm)
            rows.append([task, arm, *ours, f"{theirs[0]} ± {theirs[1]}"])
    env = metrics.environment()
    example = experiment(config, config.tasks[0])
    result = {
        "title": f"Offline goal-conditioned RL on OGBench, {config.scale} recipe",
        "command": command(config),
        "hardware": f"{env['devices']} x {env['device']}, {env['cpus']} processors",
        "date": datetime.date.today().isoformat(),
        "seeds": list(range(config.seed, config.seed + config.repeats)),
        "notes": [
            "Success in % over five tasks, the mean of a run's last three evaluations; mean and "
            "95 % interval over seeds. OGBench: mean and standard deviation over eight seeds, "
            "a million updates of networks 512 wide.",
            f"{example.updates:,} updates, networks {example.hiql.value_hidden}, batch "
            f"{example.hiql.batch}, {example.attempts} attempts a task and evaluation. Data "
            "regenerated by `jaxalign.data.pointmaze_data` with seed 0.",
            "Not run: `python -m experiments.hiql table --tasks TASK --arms ARM`; from 36 GFLOP an "
            "update, one to two hours of an H200 for HIQL's eight seeds of a task (an estimate).",
        ],
        "tables": [
            {
                "title": "Success (%)",
                "columns": ["task", "method", "ours", "real environment", "time (s)", "OGBench"],
                "rows": rows,
            },
            *_differences(done),
        ],
        "figures": [
            name
            for task in done
            for name in report.publish(root / task, FIGURES, f"hiql_{config.scale}-{task}", RESULTS)
        ],
    }
    path = RESULTS / f"hiql_{config.scale}.json"
    metrics.write_json(path, result)
    return path


def _ours(run: Comparison | None, arm: str) -> list[Any]:
    """Success, success in the real environment, and the time of all seeds."""
    if run is None or not run.of(arm):
        return ["not run", "not run", ""]
    success = cell(
        statistics.mean_interval(100 * offline_report.last_three(run.of(arm), "success"))
    )
    real = 100 * offline_report.real_success(run, arm)
    tried = np.isfinite(real).all()
    seconds = float(comparison.final(run.of(arm), "seconds")[0])
    return [
        success,
        cell(statistics.mean_interval(real)) if tried else "not run",
        {"value": seconds},
    ]


def _differences(done: dict[str, Comparison]) -> list[dict[str, Any]]:
    """HIQL minus each other method, paired by seed."""
    rows: list[list[Any]] = []
    for task, run in done.items():
        for arm in run.arms:
            pair = run.paired("hiql", arm)
            if arm != "hiql" and len(pair[0]) > 1:
                ends = [100 * offline_report.last_three(runs, "success") for runs in pair]
                rows.append([task, f"hiql - {arm}", cell(statistics.paired_difference(*ends))])
    columns = ["task", "difference", "success (%)"]
    return [{"title": "Paired by seed", "columns": columns, "rows": rows}] if rows else []
