"""The report of a run of offline goal-conditioned RL: success rates, and the page.

Success is the share of attempts that reach their goal, the mean over five tasks. As in OGBench the
number of a run is the mean of its last three evaluations; none is chosen by its numbers.

Dimensions: S seeds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments import pages
from experiments.comparison import ArmRun, Comparison
from experiments.ogbench_settings import METHODS, PUBLISHED, TASKS
from experiments.pages import Column
from experiments.statistics import Estimate, mean_interval, paired_difference

LAST = 3  # evaluations that OGBench takes the mean of
COLUMNS = (
    Column("success (%)", "last three", "success", percent=True),
    *(
        Column("success (%)", f"task {i}", f"success/task{i}", percent=True)
        for i in range(1, TASKS + 1)
    ),
    Column("success (%)", "real", "real_success", percent=True),
    Column("training", "updates", "updates"),
    Column("training", "time (s)", "seconds"),
)


def last_three(runs: Sequence[ArmRun], name: str) -> np.ndarray:
    """`[S]`: the mean of the last three evaluations since training began; NaN without any."""
    return np.array([last_evaluations(run.rows, name) for run in runs])


def last_evaluations(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    """The mean of a number over the last three evaluations of a run's rows, NaN without any."""
    found = [row[name] for row in rows if name in row and row["step"]]
    return float(np.mean(found[-LAST:])) if found else math.nan


def of_runs(run: Comparison, arm: str, column: Column) -> np.ndarray:
    """A column's number of each of the arm's runs, `[S]`."""
    runs = run.of(arm)
    if column.metric == "real_success":
        values = real_success(run, arm)
    elif column.percent:
        values = last_three(runs, column.metric)
    else:
        values = np.array([each.rows[-1].get(column.metric, np.nan) for each in runs], float)
    return values * (100 if column.percent else 1)


def real_success(run: Comparison, arm: str) -> np.ndarray:
    """`[S]`: success in the real environment after training, NaN where it was not asked for."""
    folders = [run.directory / f"seed-{seed}" for seed in run.seeds if (arm, seed) in run.runs]
    folders = [f for f in folders if f.is_dir()] or [run.directory]
    paths = [folder / arm / "result.json" for folder in folders]
    results = [json.loads(path.read_text("utf-8")) if path.exists() else {} for path in paths]
    return np.array([result.get("real_success", np.nan) for result in results], float)


def final_numbers(run: Comparison, columns: Sequence[Column]) -> dict[str, list[Estimate]]:
    """By arm: the number of each column over seeds."""
    return {
        arm: [mean_interval(of_runs(run, arm, column)) for column in columns]
        for arm in run.arms
        if run.of(arm)
    }


def shown(run: Comparison) -> list[Column]:
    """The columns, without that of the real environment where nothing was attempted there."""
    tried = any(np.isfinite(real_success(run, arm)).any() for arm in run.arms if run.of(arm))
    return [column for column in COLUMNS if tried or column.metric != "real_success"]


def differences(run: Comparison) -> dict[str, list[Estimate]]:
    """By arm but the first: success minus the first's in percent, paired by seed."""
    first, *others = run.arms
    pairs = {arm: run.paired(arm, first) for arm in others}
    return {
        arm: [paired_difference(*(100 * last_three(runs, "success") for runs in pair))]
        for arm, pair in pairs.items()
        if len(pair[0]) > 1
    }


def published(run: Comparison) -> str:
    """What OGBench reports for the run's arms, in words; empty where it is not known here."""
    numbers = dict(zip(METHODS, PUBLISHED.get(run.config["task"], ()), strict=False))
    known = [f"{arm} {numbers[arm][0]}±{numbers[arm][1]}" for arm in run.arms if arm in numbers]
    if not known:
        return ""
    return f"OGBench, a million updates of full-size networks, 8 seeds: {', '.join(known)}."


def provenance(run: Comparison) -> str:
    """Where the data come from, from the first result there is."""
    paths = [run.directory / "result.json", *sorted(run.directory.glob("seed-*/result.json"))]
    results = [json.loads(path.read_text("utf-8")) for path in paths if path.exists()]
    known = results[0].items() if results else ()
    about = [f"{n.removeprefix('data/')} {v}" for n, v in known if n.startswith("data/")]
    return "data: " + ", ".join(about) if about else ""


def table(run: Comparison) -> str:
    """The final numbers as plain text; with several seeds the intervals below the means."""
    columns = shown(run)
    lines = pages.text_table([column[:2] for column in columns], final_numbers(run, columns))
    if len(run.seeds) > 1:
        lines.append(f"Means over {len(run.seeds)} seeds, below them 95 % intervals.")
    lines += [text for text in (published(run), provenance(run)) if text]
    lines += [f"Not finished: {what}." for what in run.unfinished("row")]
    return "\n".join(lines)


CAPTIONS = {
    "success": "Success against updates and time: thick the mean over seeds, shaded its 95 % "
    "interval. Time is that of the updates, with compilation, without evaluations.",
    "walks": "One attempt at each task by each arm's first seed: the walk from the start (dot) to "
    "where it ended (square), and the goal (star).",
    "values": "What a method thinks of the maze for each task: the value of every free cell, dark "
    "where the goal (star) is far, and arrows to the cell that resembles most the subgoal set "
    "there, where there is one.",
}


def page(run: Comparison, pictures: Mapping[str, bytes]) -> str:
    """The whole report as HTML. pictures: PNG content by name."""
    title = pages.title_of(run)
    about = "; ".join(text for text in (f"task {run.config['task']}", provenance(run)) if text)
    parts = [f"<h1>{pages.safe(title)}</h1>", pages.facts(run, about, run.unfinished("row"))]
    columns = shown(run)
    parts += ["<h2>Final numbers</h2>", pages.grouped_table(columns, final_numbers(run, columns))]
    parts.append(pages.note(f"{pages.seeds_note(run)} {published(run)}"))
    parts += pages.difference_table(run.arms[0], ["success (%)"], differences(run))
    parts += [pages.figure(name, png, CAPTIONS[name]) for name, png in pictures.items()]
    return pages.document(title, parts)
