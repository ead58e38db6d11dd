"""HIQL and its neighbours on OGBench: offline goal-conditioned RL.

    python -m experiments.hiql [pointmaze-medium | pointmaze-large | pointmaze-giant | cube-single |
                                scene | small | table | tiny]

A run makes or reads a data set, trains each arm with all seeds (`--seeds N`) as one program, and
leaves the success rates of five tasks, and pictures of the walks through the maze.
"""

from __future__ import annotations

from typing import Any

from experiments import cli, hiql_table, report
from experiments.hiql_table import Table
from experiments.offline import Experiment, check, make_lab, run_arms
from experiments.ogbench_settings import settings


def small() -> Experiment:
    """The medium point maze with small networks, for two CPU cores."""
    return hiql_table.small("pointmaze-medium-navigate")


def pointmaze_medium() -> Experiment:
    """OGBench's recipe in the medium point maze, for an accelerator."""
    return hiql_table.full("pointmaze-medium-navigate")


def pointmaze_large() -> Experiment:
    """OGBench's recipe in the large point maze, for an accelerator."""
    return hiql_table.full("pointmaze-large-navigate")


def pointmaze_giant() -> Experiment:
    """OGBench's recipe in the giant point maze, for an accelerator."""
    return hiql_table.full("pointmaze-giant-navigate")


def cube_single() -> Experiment:
    """OGBench's recipe for one cube; attempts in the real environment (extra `ogbench`)."""
    return hiql_table.full("cube-single-play")


def scene() -> Experiment:
    """OGBench's recipe for the scene; attempts in the real environment (extra `ogbench`)."""
    return hiql_table.full("scene-play")


def tiny() -> Experiment:
    """Everything once, in under a minute on one CPU."""
    task = "pointmaze-medium-navigate"
    return Experiment(
        task=task,
        data_episodes=8,
        **settings(task, hidden=(16, 16), batch=32),
        updates=40,
        at_once=10,
        evaluate_every=40,
        attempts=2,
        save_every=20,
    )


def table() -> Table:
    """All six methods on the point mazes beside OGBench's numbers: for an accelerator."""
    return Table()


PRESETS = {
    "small": small,
    "pointmaze-medium": pointmaze_medium,
    "pointmaze-large": pointmaze_large,
    "pointmaze-giant": pointmaze_giant,
    "cube-single": cube_single,
    "scene": scene,
    "tiny": tiny,
    "table": table,
}


def run_all(run: cli.Run) -> None:
    """All seeds of the command line at once, then the report."""
    if isinstance(run.config, Table):
        print(f"tables: {hiql_table.run(cli.open_workdir(run), run.config)}")
        return
    check(run.config, len(run.seeds))
    directories = {each.config.seed: each.workdir for each in cli.open_seeds(run)}
    lab = make_lab(run.config, len(run.seeds))
    print(f"data of {run.config.task}: {describe(lab.provenance)}")
    run_arms(lab, run.config, directories, resume=run.resume)
    print(report.table(run.workdir))
    print(f"report: {report.build(run.workdir)}")


def describe(provenance: Any) -> str:
    """Where data come from, in a line."""
    return ", ".join(f"{name} {value}" for name, value in provenance.items())


if __name__ == "__main__":
    cli.main(run_all, "hiql", PRESETS, "small")
