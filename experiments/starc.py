"""STARC: how far apart two rewards are, judged by what confusing them would cost.

    python -m experiments.starc [figure1 | gridworld | adversarial | continuous | monitor | tiny |
                                 claims]

Each part leaves a folder with its tables, numbers and pictures; `claims` makes the tables of
RESULTS.md from all of them.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from experiments import (
    cli,
    report,
    starc_continuous,
    starc_figure1,
    starc_monitor,
    starc_report,
    starc_small,
)
from experiments.b2_tables import RESULTS
from experiments.starc_report import Result
from jaxalign.core import limits, metrics
from jaxalign.core import mesh as meshes
from jaxalign.core.types import UserError


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What is computed; sizes are STARC's own where it has some."""

    parts: tuple[str, ...] = ("figure1",)
    worlds: int = 128  # figure1: random processes
    pairs: int = 8  # figure1: pairs of rewards in each
    steps: int = 16  # figure1: mixtures of a pair
    states: int = 32
    actions: int = 4
    discount: float = 0.95
    at_once: int = 8  # figure1: processes a batch, which is what a run goes on from
    samples: int = 4096  # continuous: states and actions at which rewards are compared
    updates: int = 2000  # monitor: of the reward model
    publish: bool = False  # leave the tables where RESULTS.md is made from
    seed: int = 0

    def __post_init__(self) -> None:
        limits.known("parts", self.parts, PARTS)
        least = {"states": 2, "actions": 2, "samples": 64}
        for name in ("worlds", "pairs", "steps", "states", "actions", "at_once", "samples"):
            if getattr(self, name) < least.get(name, 1):
                raise UserError(
                    f"{name} = {getattr(self, name)}: must be at least {least.get(name, 1)}"
                )
        if self.updates < 1:
            raise UserError(f"updates = {self.updates}: must be at least 1")
        if not 0 <= self.discount < 1:
            raise UserError(f"discount = {self.discount}: must be at least 0 and below 1")
        if self.worlds % self.at_once:
            raise UserError(
                f"at_once = {self.at_once}: must divide worlds = {self.worlds}; change one"
            )


def figure1(config: Experiment, folder: Path) -> Result:
    """Distance against regret on random processes."""
    points = starc_figure1.run(config, folder)
    notes = [
        f"Figure 1: {config.worlds} processes of {config.states} states and {config.actions} "
        f"actions, {config.pairs} pairs of rewards each, mixed in {config.steps} steps; discount "
        f"{config.discount:g}. The paper's generator, our random numbers, exact regret, float64. "
        "Intervals: processes drawn anew. Sampled regret: with the scatter of returns that are "
        "means of rollouts, as the paper's, from every state as many as there are actions.",
    ]
    return Result(starc_figure1.numbers(points), starc_figure1.tables(points), notes)


PARTS: Mapping[str, Callable[[Any, Path], Any]] = {
    "figure1": figure1,
    "gridworld": starc_small.gridworld,
    "adversarial": starc_small.adversarial,
    "continuous": starc_continuous.run,
    "monitor": starc_monitor.run,
}


# --- presets --------------------------------------------------------------------------------------


def figure1_preset() -> Experiment:
    """The paper's figure 1 at its size, 16,384 pairs of rewards: minutes on two cores."""
    return Experiment()


def gridworld() -> Experiment:
    """Six rewards of one gridworld, all against all."""
    return Experiment(parts=("gridworld",))


def adversarial() -> Experiment:
    """Rewards that EPIC and DARD misjudge in both directions."""
    return Experiment(parts=("adversarial",))


def continuous() -> Experiment:
    """Estimates from samples where the distances are known."""
    return Experiment(parts=("continuous",))


def monitor() -> Experiment:
    """A reward model in training, watched by its distance to the gold score."""
    return Experiment(parts=("monitor",))


def tiny() -> Experiment:
    """Everything but the monitor once, in under a minute on one CPU."""
    parts = ("figure1", "gridworld", "adversarial", "continuous")
    return Experiment(
        parts=parts, worlds=16, pairs=1, steps=2, states=6, actions=2, samples=64, updates=5
    )


def claims() -> Experiment:
    """All parts at full size, for RESULTS.md."""
    return Experiment(parts=tuple(PARTS), publish=True)


PRESETS = {
    "figure1": figure1_preset,
    "gridworld": gridworld,
    "adversarial": adversarial,
    "continuous": continuous,
    "monitor": monitor,
    "tiny": tiny,
    "claims": claims,
}


# --- running --------------------------------------------------------------------------------------


def check(config: Experiment) -> None:
    """Raises UserError for what only shows on the devices, before anything is written."""
    if "figure1" in config.parts:
        meshes.check_divisible("at_once", config.at_once, meshes.make_mesh())


def run_parts(run: cli.Run) -> None:
    """All parts of one seed that are not finished, then `result.json` with "PART/NUMBER" keys."""
    result: dict[str, float] = {}
    for part in run.config.parts:
        folder = run.workdir / part
        folder.mkdir(exist_ok=True)
        if not (folder / "result.json").exists():
            starc_report.save(folder, PARTS[part](run.config, folder))
        numbers = json.loads((folder / "result.json").read_text("utf-8"))
        result |= {f"{part}/{name}": value for name, value in numbers.items()}
    metrics.write_json(run.workdir / "result.json", result)


def publish(run: cli.Run) -> Path:
    """The tables and pictures of the first seed, for RESULTS.md."""
    parts = starc_report.read(report.comparison.read(run.workdir))
    env, figures = metrics.environment(), []
    for picture in ("bars", "regret", "worst", "continuous"):
        if (run.workdir / f"{picture}.png").exists():
            shutil.copyfile(run.workdir / f"{picture}.png", RESULTS / f"starc-{picture}.png")
            figures.append(f"starc-{picture}.png")
    result = {
        "title": "STARC: distances between rewards",
        "command": "python -m experiments.starc claims",
        "hardware": f"{env['devices']} x {env['device']}, {env['cpus']} processors",
        "date": datetime.date.today().isoformat(),
        "seeds": [run.config.seed],
        "notes": [note for each in parts.values() for note in each.notes],
        "tables": [table for each in parts.values() for table in each.tables],
        "figures": figures,
    }
    path = RESULTS / "starc.json"
    metrics.write_json(path, result)
    return path


def run_all(run: cli.Run) -> None:
    """All parts of every seed of the command line, then the report."""
    check(run.config)
    for each in cli.open_seeds(run):
        run_parts(each)
    print(report.table(run.workdir))
    print(f"report: {report.build(run.workdir)}")
    if run.config.publish:
        print(f"tables: {publish(run)}")


if __name__ == "__main__":
    cli.main(run_all, "starc", PRESETS, "figure1")
