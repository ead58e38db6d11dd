"""What a comparison run left on disk, read back for tables and plots.

A run is a folder with `env.json`, `config.json` and a folder for each arm, in which `metrics.jsonl`
has the row of step 0 with the evaluation of the base, and later rows with one row a stage (of
pictures) or an iteration (of language). With
several seeds the folder has a run in each `seed-K`. Unfinished runs are read as far as they went.

Dimensions: P prompts, N pictures of each, S seeds, E rows in which all seeds have the number.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxalign.core.metrics import read_json_lines
from jaxalign.core.types import UserError

LISTS = {"train": "training prompts", "heldout": "held-out prompts"}
COUNTED = ("reward_evaluations", "network_evaluations", "trained_pairs", "episodes", "tokens")
REWARD = "reward"  # a probability in both worlds; kB for the JPEG rewards


class Samples(NamedTuple):
    """Pictures of one prompt list from one evaluation.

    prompts: P captions. images: `[P, n, H, W, C] u8`, the first n of N. reward, success: `[P, N]`;
    nothing succeeds where nobody can tell.
    """

    prompts: tuple[str, ...]
    images: np.ndarray
    reward: np.ndarray
    success: np.ndarray


class Response(NamedTuple):
    """A language model's answer to a held-out prompt.

    prompt, response: their tokens as words. reward: of each response token, one number a word.
    score: the reward model's of the whole. gold: the true one, 0 where nobody knows it.
    """

    prompt: tuple[str, ...]
    response: tuple[str, ...]
    reward: tuple[float, ...]
    score: float
    gold: float


class ArmRun(NamedTuple):
    """One arm of one seed.

    rows: of `metrics.jsonl`, with two numbers added: "cost", all network evaluations, updates
        included (`forwards_a_pair`), and "warm_seconds", the time since the first step's end.
    before, after: `Samples` by list name, empty where there are none.
    finished: whether the arm came to its end.
    responses_before, responses_after: of language models, to the same prompts.
    """

    rows: list[dict[str, Any]]
    before: Mapping[str, Samples]
    after: Mapping[str, Samples]
    finished: bool
    responses_before: tuple[Response, ...] = ()
    responses_after: tuple[Response, ...] = ()


class Comparison(NamedTuple):
    """A run, with all its seeds.

    config, env: those of the first seed. arms: in the order in which they ran. seeds: as numbered.
    runs: by `(arm, seed)`; those that have not begun are absent.
    """

    directory: Path
    config: Mapping[str, Any]
    env: Mapping[str, Any]
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    runs: Mapping[tuple[str, int], ArmRun]

    def of(self, arm: str) -> list[ArmRun]:
        """The runs of an arm, by seed."""
        return [self.runs[arm, seed] for seed in self.seeds if (arm, seed) in self.runs]

    def paired(self, arm: str, other: str) -> tuple[list[ArmRun], list[ArmRun]]:
        """The runs of two arms, seed by seed, of the seeds that have both."""
        seeds = [s for s in self.seeds if (arm, s) in self.runs and (other, s) in self.runs]
        return [self.runs[arm, s] for s in seeds], [self.runs[other, s] for s in seeds]

    def unfinished(self, step: str = "stage") -> list[str]:
        """What is missing, in words: "official, seed 3, at stage 12". step: what a row is."""
        missing = []
        for seed in self.seeds:
            for arm in self.arms:
                run = self.runs.get((arm, seed))
                if run is None or not run.finished:
                    where = f"at {step} {run.rows[-1]['step']}" if run else "not begun"
                    missing.append(f"{arm}, seed {seed}, {where}")
        return missing


def forwards_a_pair(config: Mapping[str, Any]) -> int:
    """What training on one (row, step) pair costs in network evaluations.

    A backward pass counts as two, the base's answer for a KL penalty as one more, and guidance
    doubles all of them.
    """
    b2 = config.get("b2", {})
    return (3 + bool(b2.get("kl_weight"))) * (1 if b2.get("guidance", 1) == 1 else 2)


# --- reading -------------------------------------------------------------------------------------


def read(workdir: str | Path) -> Comparison:
    """The comparison in `workdir`.

    Raises: UserError when it is no run, or has no row of metrics yet.
    """
    workdir = Path(workdir)
    if not workdir.is_dir():
        raise UserError(f"{workdir}: no such directory; give one that --workdir named in a run")
    folders = sorted(workdir.glob("seed-*"), key=_seed_of) or [workdir]
    folders = [folder for folder in folders if (folder / "config.json").exists()]
    if not folders:
        where = "; its parent is one" if (workdir.parent / "config.json").exists() else ""
        raise UserError(
            f"{workdir} is no run (no config.json in it){where}; give a directory that --workdir "
            "named in a run"
        )
    config = _read_json(folders[0] / "config.json")
    seeds = tuple(int(_read_json(folder / "config.json").get("seed", 0)) for folder in folders)
    runs: dict[tuple[str, int], ArmRun] = {}
    for seed, folder in zip(seeds, folders, strict=True):
        for path in sorted(folder.glob("*/metrics.jsonl")):
            if run := _read_arm(path.parent, forwards_a_pair(config)):
                runs[path.parent.name, seed] = run
    if not runs:
        raise UserError(f"{workdir}: no arm has metrics yet; wait for the run's first row")
    # A sweep's arms are named by their numbers, as they are found.
    known = () if config.get("sweep") else config.get("arms", ())
    listed = [*known, *sorted({arm for arm, _ in runs})]
    env = _read_json(folders[0] / "env.json") if (folders[0] / "env.json").exists() else {}
    return Comparison(workdir, config, env, tuple(dict.fromkeys(listed)), seeds, runs)


def _seed_of(folder: Path) -> int:
    number = folder.name.removeprefix("seed-")
    return int(number) if number.isdigit() else -1


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); run again") from error


def _read_arm(folder: Path, forwards: int) -> ArmRun | None:
    try:
        rows = read_json_lines(folder / "metrics.jsonl")
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'metrics.jsonl'}: not JSON lines ({error})") from error
    if not rows:
        return None
    if rows[0]["step"] == 0:
        rows[0] = {**dict.fromkeys(COUNTED, 0), **rows[0]}
    for row in rows:
        pairs, networks = row.get("trained_pairs"), row.get("network_evaluations")
        row["cost"] = None if networks is None else networks + forwards * (pairs or 0)
        if "seconds" in row:
            row["warm_seconds"] = max(row["seconds"] - rows[min(1, len(rows) - 1)]["seconds"], 0.0)
    return ArmRun(
        rows,
        _read_samples(folder, "before"),
        _read_samples(folder, "after"),
        (folder / "result.json").exists(),
        _read_responses(folder, "before"),
        _read_responses(folder, "after"),
    )


def _read_responses(folder: Path, when: str) -> tuple[Response, ...]:
    path = folder / f"samples-{when}.json"
    if not path.exists():
        return ()
    return tuple(
        Response(
            tuple(each["prompt"]),
            tuple(each["response"]),
            tuple(each["reward"]),
            each["score"],
            each["gold"],
        )
        for each in _read_json(path)["samples"]
    )


def _read_samples(folder: Path, when: str) -> dict[str, Samples]:
    path = folder / f"samples-{when}.npz"
    if not path.exists():
        return {}
    with np.load(path) as arrays:
        return {
            name: Samples(
                tuple(map(str, arrays[f"{name}/prompts"])),
                arrays[f"{name}/images"],
                arrays[f"{name}/reward"],
                arrays.get(f"{name}/success", np.zeros_like(arrays[f"{name}/reward"])),
            )
            for name in LISTS
            if f"{name}/prompts" in arrays
        }


# --- numbers by arm ------------------------------------------------------------------------------


def curve(runs: Sequence[ArmRun], *names: str) -> np.ndarray:
    """`[S, len(names), E]`: the numbers of the rows in which every run has them all.

    runs: of one arm. A row counts by its step. What is not finite was written as null: NaN here.
    """
    tables = [
        {row["step"]: row for row in run.rows if all(n in row for n in names)} for run in runs
    ]
    steps = sorted(set.intersection(*map(set, tables))) if tables else []
    values = [[[_number(table[s][name]) for s in steps] for name in names] for table in tables]
    return np.array(values, np.float64).reshape(len(runs), len(names), len(steps))


def final(runs: Sequence[ArmRun], name: str) -> np.ndarray:
    """`[S]`: the number in the last row that has it, NaN where none has."""
    return np.array([_last(run.rows, name) for run in runs], np.float64)


def average(runs: Sequence[ArmRun], name: str, last: float = 1.0) -> np.ndarray:
    """`[S]`: the mean over all rows that have the number, or the last part of them; NaN for none.

    Over all rows of equal length it is the area under the curve. last: the part, 0.1 for a tenth.
    """
    columns = [[_number(row[name]) for row in run.rows if name in row] for run in runs]
    parts = [column[-max(int(last * len(column)), 1) :] for column in columns]
    return np.array([np.mean(part) if part else math.nan for part in parts], np.float64)


def base(comparison: Comparison, name: str) -> np.ndarray:
    """`[S]`: the number of the base, from the row of step 0 of each seed's first arm."""
    found = []
    for runs in _by_seed(comparison):
        rows = [run.rows[0] for run in runs if run.rows[0]["step"] == 0 and name in run.rows[0]]
        found.append(_number(rows[0][name]) if rows else math.nan)
    return np.array(found, np.float64)


def base_samples(comparison: Comparison, prompts: str) -> list[Samples]:
    """The base's pictures for a list of prompts, one entry a seed that has them."""
    found = []
    for seed in comparison.seeds:
        runs = [
            comparison.runs[arm, seed] for arm in comparison.arms if (arm, seed) in comparison.runs
        ]
        found += [run.before[prompts] for run in runs if prompts in run.before][:1]
    return found


def _by_seed(comparison: Comparison) -> list[list[ArmRun]]:
    """For each seed the runs of its arms, in the order of the arms."""
    runs, arms = comparison.runs, comparison.arms
    return [[runs[arm, seed] for arm in arms if (arm, seed) in runs] for seed in comparison.seeds]


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _last(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    values = [row[name] for row in rows if name in row]
    return _number(values[-1]) if values else math.nan
