"""What redistribution gains: arms at equal responses, both rates tuned alike, on other seeds.

    python -m experiments.r3hf claims --workdir runs/r3hf-claims [--resume]

Three lengths of the synthetic world. At the shortest each arm runs with each pair of learning rates
on a seed of its own and takes the pair with the largest area under its gold curve, for all lengths;
then it runs on the seeds that count, each of `bases` data sets, policies and reward models serving
an equal share of them.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments import r3hf_tables
from experiments.jobs import is_done, run_jobs
from experiments.language import ARMS, Experiment, Lab, make_lab, train_arm
from experiments.problems import Source
from jaxalign.core import limits, metrics
from jaxalign.core.types import UserError

MAIN = ("sparse", "redistributed", "calibrated", "uniform")


class Setting(NamedTuple):
    """A length of responses, the arms compared there, and the size of their runs.

    effort: what policy and reward model are trained for, as a share of the default updates.
    """

    response: int
    arms: tuple[str, ...]
    iterations: int
    rollouts: int
    effort: float


SETTINGS = {
    "short": Setting(16, tuple(ARMS), 100, 64, 1.0),
    "medium": Setting(64, MAIN, 60, 32, 0.5),
    "long": Setting(256, MAIN[:3], 40, 16, 0.2),
}
TUNED_ON = "short"


@dataclasses.dataclass(frozen=True)
class Claims:
    """What is compared."""

    settings: tuple[str, ...] = tuple(SETTINGS)
    policy_rates: tuple[float, ...] = (5e-4, 1.5e-3)
    critic_rates: tuple[float, ...] = (5e-4, 2e-3)
    repeats: int = 10  # seeds that count
    bases: int = 2
    workers: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        limits.known("settings", self.settings, SETTINGS)
        if min(self.repeats, self.bases, self.workers) < 1:
            raise UserError("repeats, bases and workers must be at least 1")
        if not (self.policy_rates and self.critic_rates):
            raise UserError("policy_rates and critic_rates must not be empty")


class Rates(NamedTuple):
    """Learning rates of policy and critic."""

    policy: float
    critic: float


class Job(NamedTuple):
    """One run: an arm of a setting with its rates and a seed, and its folder."""

    setting: str
    arm: str
    rates: Rates
    seed: int
    base: int
    directory: Path

    def __str__(self) -> str:
        policy, critic = self.rates
        return f"{self.setting} {self.arm} {policy:g} {critic:g} seed {self.seed}"


def tuning_jobs(root: Path, claims: Claims) -> Iterator[Job]:
    """Each arm with each pair of rates, on a seed that does not count."""
    for arm in dict.fromkeys(arm for name in claims.settings for arm in SETTINGS[name].arms):
        for rates in itertools.starmap(
            Rates, itertools.product(claims.policy_rates, claims.critic_rates)
        ):
            folder = root / "tuning" / arm / f"{rates.policy:g}-{rates.critic:g}"
            if rates.critic == claims.critic_rates[0] or not arm.startswith("rloo"):
                yield Job(TUNED_ON, arm, rates, 1000, claims.bases, folder)


def gold_area(folder: Path) -> float:
    """Mean gold score of the responses over all iterations of a run."""
    rows = metrics.read_json_lines(folder / "metrics.jsonl")
    return float(np.mean([row["gold"] for row in rows if "gold" in row]))


def chosen_rates(root: Path, claims: Claims) -> dict[str, Rates]:
    """For each arm the rates with the largest area under the gold curve."""
    areas: dict[str, dict[Rates, float]] = {}
    for job in tuning_jobs(root, claims):
        areas.setdefault(job.arm, {})[job.rates] = gold_area(job.directory)
    return {arm: max(by, key=lambda rates: by[rates]) for arm, by in areas.items()}


def final_jobs(
    root: Path, claims: Claims, rates: Mapping[str, Rates], setting: str
) -> Iterator[Job]:
    """Seed by seed, so that a run that is cut short has complete comparisons of fewer seeds."""
    for seed in range(claims.seed, claims.seed + claims.repeats):
        for arm in SETTINGS[setting].arms:
            folder = root / setting / f"seed-{seed}" / arm
            yield Job(setting, arm, rates[arm], seed, seed % claims.bases, folder)


def experiment(job: Job) -> Experiment:
    """The configuration of a job, before its arm is applied."""
    setting = SETTINGS[job.setting]
    config = Experiment()
    rl = dataclasses.replace(
        config.rl,
        iterations=setting.iterations,
        rollouts=setting.rollouts,
        kl_weight=0.05,
        policy_rate=job.rates.policy,
        critic_rate=job.rates.critic,
    )

    def shortened(stage: Any) -> Any:
        return dataclasses.replace(stage, updates=round(setting.effort * stage.updates))

    return dataclasses.replace(
        config,
        source=Source(response=setting.response, seed=job.base),
        arms=setting.arms,
        fine_tuning=shortened(config.fine_tuning),
        reward=shortened(config.reward),
        calibration=shortened(config.calibration),
        rl=rl,
        evaluate_every=setting.iterations // 6,
        save_every=setting.iterations,
        stop_when_ill=False,  # a control may grow as long as it likes: that is a result
        seed=job.seed,
    )


_labs: dict[Source, Lab] = {}


def run_job(job: Job) -> Job:
    """Trains one arm from its first iteration; a job cut short starts again."""
    config = experiment(job)
    if config.source not in _labs:
        _labs[config.source] = make_lab(config)
    train_arm(_labs[config.source], config, job.arm, job.directory, resume=True)
    return job


class BaseJob(NamedTuple):
    """Training of what all arms start from."""

    job: Job
    directory: Path

    def __str__(self) -> str:
        return f"policy and reward model {self.job.setting} {self.job.base}"


def run_base(base: BaseJob) -> BaseJob:
    """Fills the cache."""
    lab = make_lab(experiment(base.job))
    base.directory.mkdir(parents=True, exist_ok=True)
    metrics.write_json(base.directory / "result.json", {"accuracy": lab.accuracy})
    return base


def base_jobs(root: Path, claims: Claims, setting: str) -> Iterator[BaseJob]:
    """One for each data set of a length, and where rates are tuned one more for that."""
    for base in range(claims.bases + (setting == TUNED_ON)):
        folder = root / "bases" / f"{setting}-{base}"
        yield BaseJob(Job(setting, "calibrated", Rates(1.0, 1.0), 0, base, folder), folder)


def describe(root: Path, claims: Claims, rates: Mapping[str, Rates]) -> None:
    """Leaves `config.json` and `env.json` where `comparison.read` looks for them."""
    env = {
        "experiment": "r3hf",
        "command": "python -m experiments.r3hf claims",
        **metrics.environment(),
    }
    for setting in claims.settings:
        for job in filter(is_done, final_jobs(root, claims, rates, setting)):
            folder = job.directory.parent
            metrics.write_json(folder / "config.json", dataclasses.asdict(experiment(job)))
            metrics.write_json(folder / "env.json", env)


def run(root: Path, claims: Claims) -> Path:
    """Trains bases, tunes, runs; everything under `root`. Returns the tables for RESULTS.md."""

    def prepare(setting: str) -> None:
        run_jobs(list(base_jobs(root, claims, setting)), run_base, claims.workers, "bases")

    prepare(TUNED_ON)
    run_jobs(list(tuning_jobs(root, claims)), run_job, claims.workers, "tuning")
    rates = chosen_rates(root, claims)
    for setting in claims.settings:
        prepare(setting)
        jobs = list(final_jobs(root, claims, rates, setting))
        run_jobs(jobs, run_job, claims.workers, setting)
    return write_tables(root, claims, rates)


def write_tables(root: Path, claims: Claims, rates: Mapping[str, Rates]) -> Path:
    """The result file, from the runs that are finished."""
    describe(root, claims, rates)
    pairs = ", ".join(f"{rate:g}" for rate in claims.policy_rates)
    critics = ", ".join(f"{rate:g}" for rate in claims.critic_rates)
    sizes = "; ".join(
        f"{name}: {s.response} tokens, {s.iterations} iterations of {s.rollouts} responses, policy "
        f"and reward model trained for {s.effort:g} of the default updates"
        for name, s in SETTINGS.items()
        if name in claims.settings
    )
    notes = [
        f"The synthetic world. {sizes}.",
        f"Rates of each arm: the best area under the gold curve among policy rates {pairs} and "
        f"critic rates {critics}, at {SETTINGS[TUNED_ON].response} tokens on another seed and data "
        "set, for all lengths.",
        f"{claims.bases} data sets, each with its own policy and reward model, serve the seeds in "
        "turn. Critics start from the policy's trunk with a head of zeros unless the arm says "
        "otherwise.",
        "Area: mean gold score of the training responses over all iterations. Last tenth: over the "
        "last 10 % of iterations. Held-out: after the last iteration, on prompts never trained on.",
        "Means and 95 % intervals over seeds; differences are paired by seed; no selection of "
        "seeds or checkpoints.",
    ]
    return r3hf_tables.summarise(root, claims.settings, rates, notes)
