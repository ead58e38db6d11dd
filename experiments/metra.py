"""METRA and its relatives: skills learned without any reward.

    python -m experiments.metra [plane | pointmaze | ant | half-cheetah | quadruped | humanoid |
                                 claims | claims-ant | sweep | tiny]

A run trains each arm with all seeds (`--seeds N`) as one program, and leaves what the skills cover,
how near to goals they lead, and pictures of them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from experiments import cli, report, skill_tables, skills
from experiments.skill_tables import Claims
from experiments.skills import Experiment
from jaxalign.methods.csf import Config as CSF
from jaxalign.methods.diayn import Config as DIAYN
from jaxalign.methods.lsd import Config as LSD
from jaxalign.methods.metra import Config as METRA


def methods(**changes: Any) -> dict[str, Any]:
    """The config of each method that learns, with changes to fields where it has them."""
    return {
        name: _replaced(config, changes)
        for name, config in {
            "metra": METRA(),
            "lsd": LSD(),
            "diayn": DIAYN(),
            "csf": CSF(),
        }.items()
    }


def _replaced(config: Any, changes: dict[str, Any]) -> Any:
    known = {field.name for field in dataclasses.fields(config)}
    return dataclasses.replace(config, **{k: v for k, v in changes.items() if k in known})


def small(**changes: Any) -> dict[str, Any]:
    """Networks and rates for short runs on a CPU.

    All rates are ten times as large, as there are hundreds of times fewer updates. lambda at its
    published rate would not move in so few.
    """
    return methods(
        **{
            "hidden": (64, 64),
            "learning_rate": 1e-3,
            "dual_learning_rate": 1e-2,
            **changes,
        }
    )


def plane() -> Experiment:
    """The empty plane, on two CPU cores in minutes."""
    return Experiment(
        environment="plane",
        arms=("metra", "lsd", "diayn", "csf", "random"),
        **small(),
        epochs=200,
        buffer=320_000,
        evaluate_every=20,
    )


def pointmaze() -> Experiment:
    """OGBench's medium point maze, on two CPU cores in minutes."""
    return dataclasses.replace(
        plane(), environment="pointmaze-medium", **small(skill_size=4), updates=100
    )


def ant() -> Experiment:
    """MuJoCo's Ant with METRA's settings."""
    return Experiment(environment="ant", epochs=6250, save_every=500, evaluate_every=250)


def small_ant() -> Experiment:
    """MuJoCo's Ant with small networks, on two CPU cores."""
    return dataclasses.replace(
        ant(),
        **small(hidden=(256, 256), learning_rate=3e-4),
        epochs=1100,
        buffer=640_000,
        evaluate_every=100,
        save_every=100,
    )


def half_cheetah() -> Experiment:
    """MuJoCo's HalfCheetah with METRA's settings: 16 one-hot skills."""
    return dataclasses.replace(
        ant(), environment="half-cheetah", **methods(skill_size=16, discrete=True)
    )


def quadruped() -> Experiment:
    """DeepMind Control's Quadruped, seen by its state, not by pixels; else METRA's settings."""
    return dataclasses.replace(
        ant(), environment="quadruped", **methods(skill_size=4), updates=200, buffer=320_000
    )


def humanoid() -> Experiment:
    """DeepMind Control's Humanoid, seen by its state, not by pixels; else METRA's settings."""
    return dataclasses.replace(quadruped(), environment="humanoid", **methods(skill_size=2))


def tiny() -> Experiment:
    """Everything once, in under a minute on one CPU."""
    return Experiment(
        environment="plane",
        arms=("metra", "diayn", "random"),
        **small(hidden=(16, 16), batch=32),
        environments=2,
        epochs=4,
        updates=4,
        at_once=2,
        buffer=1200,
        warm_up=800,
        evaluate_every=4,
        shown=8,
        goals=4,
        save_every=2,
    )


def side_by_side(environments: int) -> Experiment:
    """METRA on the plane with more episodes an epoch, at as many gradient steps a transition.

    More of them fill an accelerator, but what is learned from is older.
    """
    base = plane()
    times = environments // base.environments
    return dataclasses.replace(
        base,
        arms=("metra",),
        environments=environments,
        epochs=base.epochs // times,
        updates=base.updates * times,
        at_once=1,
        evaluate_every=max(1, base.evaluate_every // times),
        save_every=max(1, base.save_every // times),
    )


def claims() -> Claims:
    """What skills cover, beside other methods and random actions, for RESULTS.md."""
    return Claims("claims", ("plane", "pointmaze"))


def claims_ant() -> Claims:
    """The same of MuJoCo's Ant, with fewer seeds: an hour on two CPU cores."""
    return Claims("claims-ant", ("small-ant",), repeats=2)


def sweep() -> Claims:
    """How many episodes side by side, for RESULTS.md."""
    return Claims("sweep", tuple(f"plane-{count}" for count in SIDE_BY_SIDE))


PRESETS = {
    "plane": plane,
    "pointmaze": pointmaze,
    "ant": ant,
    "half-cheetah": half_cheetah,
    "quadruped": quadruped,
    "humanoid": humanoid,
    "claims": claims,
    "claims-ant": claims_ant,
    "sweep": sweep,
    "tiny": tiny,
}
SIDE_BY_SIDE = (8, 40, 200)


def settings() -> dict[str, Experiment]:
    """What tables are made of, by name."""
    known = {"plane": plane(), "pointmaze": pointmaze(), "small-ant": small_ant()}
    return known | {f"plane-{count}": side_by_side(count) for count in SIDE_BY_SIDE}


def run_all(run: cli.Run) -> None:
    """All seeds of the command line at once, then the report."""
    if isinstance(run.config, Claims):
        print(f"tables: {skill_tables.run(cli.open_workdir(run), run.config, settings())}")
        return
    skills.check(run.config, len(run.seeds))
    directories = {each.config.seed: each.workdir for each in cli.open_seeds(run)}
    skills.run_arms(
        skills.make_lab(run.config, len(run.seeds)), run.config, directories, resume=run.resume
    )
    print(report.table(run.workdir))
    print(f"report: {report.build(run.workdir)}")


if __name__ == "__main__":
    cli.main(run_all, "metra", PRESETS, "plane")
