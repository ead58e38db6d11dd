"""The paper's comparisons, for real: every arm on every setting, rates tuned on other seeds.

    python -m experiments.b2_diffurl claims --workdir runs/claims [--resume]

First each arm runs with each learning rate of one grid on seeds of their own, and takes the rate
with the best final training reward; then it runs with that rate on the seeds that count. All arms
get the same reward evaluations, optimizer steps and step weighting. Jobs are single runs, shared
out to worker processes of one core each, which on small networks do more together than one process
on all cores.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from experiments import b2_tables
from experiments.jobs import is_done, run_jobs
from experiments.pictures import ARMS, Experiment, Lab, make_lab, small, train_arm
from jaxalign.core import metrics
from jaxalign.core.types import UserError

SETTINGS = {
    "sprites-early": Experiment(world="sprites", grammar="place", reward="early"),
    "sprites-late": Experiment(world="sprites", grammar="place", reward="late"),
    "sprites-mixed": Experiment(world="sprites", grammar="place", reward="mixed"),
    "digits": Experiment(world="digits", reward="digits"),
}
TUNING = {"sprites-early": "sprites-mixed", "sprites-late": "sprites-mixed"}


@dataclasses.dataclass(frozen=True)
class Claims:
    """What is compared."""

    settings: tuple[str, ...] = tuple(SETTINGS)
    arms: tuple[str, ...] = tuple(ARMS)
    rates: tuple[float, ...] = (2e-4, 4e-4, 8e-4)
    tuning_seeds: int = 1
    repeats: int = 8  # seeds that count
    stages: int = 24
    workers: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (("settings", SETTINGS), ("arms", ARMS)):
            for value in getattr(self, name):
                if value not in known:
                    raise UserError(
                        f"{name}: {value!r} is not one of {', '.join(known)}; give some of these"
                    )
        if min(self.tuning_seeds, self.repeats, self.stages, self.workers) < 1 or not self.rates:
            raise UserError(
                "tuning_seeds, repeats, stages and workers must be at least 1, and rates not empty"
            )


class Job(NamedTuple):
    """One run: an arm of a setting with a learning rate and a seed, and its folder."""

    setting: str
    arm: str
    rate: float
    seed: int
    stages: int
    directory: Path

    def __str__(self) -> str:
        return f"{self.setting} {self.arm} {self.rate:g} seed {self.seed}"


def tuned_on(setting: str, settings: tuple[str, ...]) -> str:
    """The setting whose rates this one takes: in a world, one grid search serves all rewards."""
    other = TUNING.get(setting, setting)
    return other if other in settings else setting


def tuning_jobs(root: Path, claims: Claims) -> Iterator[Job]:
    """Each arm with each rate, on seeds that do not count."""
    for setting in dict.fromkeys(tuned_on(s, claims.settings) for s in claims.settings):
        for arm in claims.arms:
            for rate in claims.rates:
                for seed in range(1000, 1000 + claims.tuning_seeds):
                    folder = root / "tuning" / setting / arm / f"{rate:g}" / f"seed-{seed}"
                    yield Job(setting, arm, rate, seed, claims.stages, folder)


def chosen_rates(root: Path, claims: Claims) -> dict[tuple[str, str], float]:
    """For each (tuning setting, arm) the rate with the highest mean final training reward."""
    rewards: dict[tuple[str, str], dict[float, list[float]]] = {}
    for job in tuning_jobs(root, claims):
        final = json.loads((job.directory / "result.json").read_text())["train/reward"]
        rewards.setdefault((job.setting, job.arm), {}).setdefault(job.rate, []).append(final)
    return {key: max(by, key=lambda rate: sum(by[rate])) for key, by in rewards.items()}


def final_jobs(root: Path, claims: Claims, rates: dict[tuple[str, str], float]) -> Iterator[Job]:
    """Seed by seed, so that a run that is cut short has complete comparisons of fewer seeds."""
    for seed in range(claims.seed, claims.seed + claims.repeats):
        for setting in claims.settings:
            for arm in claims.arms:
                rate = rates[tuned_on(setting, claims.settings), arm]
                folder = root / setting / f"seed-{seed}" / arm
                yield Job(setting, arm, rate, seed, claims.stages, folder)


# --- single runs --------------------------------------------------------------------------

_labs: dict[tuple[str, str], Lab] = {}


def experiment(job: Job) -> Experiment:
    """The configuration of a job, before its arm is applied."""
    return dataclasses.replace(
        SETTINGS[job.setting],
        b2=small(stages=job.stages, learning_rate=job.rate),
        evaluate_every=max(job.stages // 3, 1),
        save_every=job.stages,
        seed=job.seed,
    )


def run_job(job: Job) -> Job:
    """Trains one arm from its first stage; a job cut short leaves no result and starts again."""
    config = experiment(job)
    where = config.world, config.grammar
    if where not in _labs:
        _labs[where] = make_lab(config)
    train_arm(_labs[where], config, job.arm, job.directory, resume=True)
    return job


def describe(root: Path, claims: Claims, rates: dict[tuple[str, str], float]) -> None:
    """Leaves `config.json` and `env.json` where `comparison.read` looks for them."""
    env = {"command": "python -m experiments.b2_diffurl claims", **metrics.environment()}
    for job in filter(is_done, final_jobs(root, claims, rates)):
        folder = job.directory.parent
        config = {**dataclasses.asdict(experiment(job)), "arms": claims.arms}
        metrics.write_json(folder / "config.json", config)
        metrics.write_json(folder / "env.json", env)


def run(root: Path, claims: Claims) -> Path:
    """Tunes, runs, and leaves everything under `root`; the path of the tables for RESULTS.md."""
    for setting in claims.settings:  # the base models, once, before the workers ask for them
        make_lab(SETTINGS[setting])
    run_jobs(list(tuning_jobs(root, claims)), run_job, claims.workers, "tuning")
    rates = chosen_rates(root, claims)
    run_jobs(list(final_jobs(root, claims, rates)), run_job, claims.workers, "runs")
    return write_tables(root, claims, rates)


def write_tables(root: Path, claims: Claims, rates: dict[tuple[str, str], float]) -> Path:
    """The result file, from the runs that are finished."""
    describe(root, claims, rates)
    by_setting = {
        setting: {arm: rates[tuned_on(setting, claims.settings), arm] for arm in claims.arms}
        for setting in claims.settings
    }
    grid = ", ".join(f"{rate:g}" for rate in claims.rates)
    notes = [
        f"Learning rate of each arm: the best of {grid} on {claims.tuning_seeds} other seed(s); "
        "for the sprites on the mixed reward, for all three rewards.",
        f"{claims.stages} stages of 160 pictures, 4 optimizer steps a stage, 10 DDIM steps, for "
        "every arm; the last two steps are not trained and a KL penalty of 0.02 a dimension holds "
        "every arm.",
        "Mean and 95 % interval over seeds, last stage, no selection of seeds or checkpoints.",
        "Network evaluations count sampling and updates; a backward pass counts as two.",
    ]
    return b2_tables.summarise(root, claims.settings, by_setting, notes)
