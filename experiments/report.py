"""Reports: `python -m experiments.report [WORKDIR ...]`.

With work directories: `report.html` and its pictures in each, from the files that the run left.
Without: RESULTS.md, from the committed result files in `experiments/results/`. Such a file is

    {"title": str, "command": str, "hardware": str, "date": str, "seeds": [int], "notes": [str],
     "tables": [{"title": str, "columns": [str], "rows": [[cell]]}], "figures": ["relative.png"]}

where a cell is text, {"value": x} or {"mean": x, "low": a, "high": b}; the last two are formatted
here, so that numbers look alike everywhere. Figures are named relative to the result file.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import (
    cli,
    comparison,
    downstream_report,
    language_report,
    offline_report,
    pages,
    skill_report,
    stable_diffusion_report,
    starc_report,
)
from experiments.comparison import LISTS, REWARD, Comparison, Samples
from experiments.pages import Column, interval, number, text_table
from experiments.statistics import Estimate, mean_interval, paired_difference
from jaxalign.core.metrics import replacing
from jaxalign.core.types import UserError

COMMAND = "python -m experiments.report"
HERE = Path(__file__).parent

# --- numbers of a picture run ------------------------------------------------------------------

COLUMNS = (
    Column(REWARD, "train", "train/reward"),
    Column(REWARD, "held-out", "heldout/reward"),
    Column("success (%)", "train", "train/success", percent=True),
    Column("success (%)", "held-out", "heldout/success", percent=True),
    Column("entropy (nats)", "train", "train/entropy"),
    Column("entropy (nats)", "held-out", "heldout/entropy"),
    Column("distance", "train", "train/distance"),
    Column("distance", "held-out", "heldout/distance"),
    Column("KL to base (nats)", "train", "train/divergence"),
    Column("KL to base (nats)", "held-out", "heldout/divergence"),
    Column("reward", "evaluations", "reward_evaluations"),
    Column("network", "evaluations", "network_evaluations"),
    Column("network", "trained pairs", "trained_pairs"),
    Column("network", "sum", "cost"),
    Column("time", "s", "seconds"),
)


def final_numbers(run: Comparison) -> dict[str, list[Estimate]]:
    """By "base" and arm: the number of each of COLUMNS at the last checkpoint, over seeds."""

    def estimates(values: Mapping[str, np.ndarray]) -> list[Estimate]:
        scales = {column.metric: 100 if column.percent else 1 for column in COLUMNS}
        return [mean_interval(values[name] * scale) for name, scale in scales.items()]

    names = [column.metric for column in COLUMNS]
    table = {"base": estimates({name: comparison.base(run, name) for name in names})}
    for arm in run.arms:
        if runs := run.of(arm):
            table[arm] = estimates({name: comparison.final(runs, name) for name in names})
    return table


def differences(run: Comparison) -> dict[str, list[Estimate]]:
    """By arm but the first: reward minus that of the first, on each prompt list, paired by seed."""
    first, *others = run.arms
    table = {}
    for arm in others:
        pair = run.paired(arm, first)
        if len(pair[0]) > 1:
            ends = [[comparison.final(runs, f"{x}/reward") for runs in pair] for x in LISTS]
            table[arm] = [paired_difference(*end) for end in ends]
    return table


# --- the terminal --------------------------------------------------------------------------------

# Metric, and the two lines over its column.
_NARROW = {
    "train/reward": ("reward", "train"),
    "heldout/reward": ("reward", "held-out"),
    "train/success": ("success", "train %"),
    "heldout/success": ("success", "held-out %"),
    "heldout/entropy": ("entropy", "held-out"),
    "heldout/distance": ("distance", "held-out"),
    "heldout/divergence": ("KL to base", "held-out"),
    "reward_evaluations": ("reward", "evaluations"),
    "cost": ("network", "evaluations*"),
    "seconds": ("time", "s"),
}


def table(workdir: str | Path) -> str:
    """The final numbers of a run as plain text; with several seeds the intervals below the means.

    Raises: UserError when `workdir` is no run.
    """
    run = comparison.read(workdir)
    if other := _of_another_kind(run):
        return other.table(run)
    shown = [column.metric for column in COLUMNS]
    picked = [shown.index(metric) for metric in _NARROW]
    rows = {name: [row[i] for i in picked] for name, row in final_numbers(run).items()}
    text = text_table(list(_NARROW.values()), rows)
    if len(run.seeds) > 1:
        text.append(f"Means over {len(run.seeds)} seeds, below them 95 % intervals.")
    text.append("Entropy and KL in nats. * Sampling and updates; a backward pass counts as 2.")
    text += [f"Not finished: {what}." for what in run.unfinished()]
    return "\n".join(text)


# --- report.html ---------------------------------------------------------------------------------

CAPTIONS = {
    "reward": "Reward against what it cost. Above training prompts, below prompts never trained "
    "on. The evaluations use the same noise each time; the thin lines are the pictures sampled in "
    "training. Time is that of the stages, with the compilation of the first, without evaluations.",
    "samples-train": "Training prompts: pictures of the base, and of each arm at its end, from the "
    "same noise.",
    "samples-heldout": "Held-out prompts: pictures of the base, and of each arm at its end, from "
    "the same noise.",
    "diversity": "What the reward was paid with: entropy of the factors read off the pictures of a "
    "prompt, their pairwise distance, and the KL of the whole denoising path to the base. Each "
    "line leads from the base over the evaluations to the last checkpoint.",
    "prompts": "Reward of each prompt, from the base (tick) to each arm's last checkpoint (end of "
    "the bar).",
    "stages": "The steps that are trained, counted from the picture's end, and the share of the "
    "reward's variance that lies within branches (arms with branches only).",
}


def build(workdir: str | Path) -> Path:
    """Writes `report.html` and the PNG files into a run's directory; returns the page's path.

    Raises: UserError when `workdir` is no run, matplotlib is missing, or the disk is full.
    """
    run = comparison.read(workdir)
    try:
        from experiments import language_plots, maze_plots, plots, skill_plots, starc_plots
    except ImportError as error:
        raise UserError(
            "the report needs matplotlib; pip install 'jaxalign[report]', then "
            f"{COMMAND} {run.directory}"
        ) from error
    other = _of_another_kind(run)
    drawing = {
        language_report: language_plots,
        offline_report: maze_plots,
        skill_report: skill_plots,
        starc_report: starc_plots,
        downstream_report: downstream_report,
        stable_diffusion_report: stable_diffusion_report,
    }.get(other, plots)
    pictures = {}
    for name, figure in drawing.figures(run):
        pictures[name] = plots.png(figure)
        with replacing(run.directory / f"{name}.png") as temporary:
            temporary.write_bytes(pictures[name])
    text = (other.page if other else page)(run, pictures)
    target = run.directory / "report.html"
    with replacing(target) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return target


def publish(workdir: Path, kinds: Sequence[str], prefix: str, results: Path) -> list[str]:
    """Copies pictures of a run beside a result file, as PREFIX-KIND.png; returns their names."""
    build(workdir)
    results.mkdir(exist_ok=True)
    for kind in kinds:
        shutil.copyfile(workdir / f"{kind}.png", results / f"{prefix}-{kind}.png")
    return [f"{prefix}-{kind}.png" for kind in kinds]


def _of_another_kind(run: Comparison) -> types.ModuleType | None:
    """The report of a run that is none of pictures.

    Runs of language say from which `source` their prompts come, those that reach goals their
    `task`, those that learn skills their `environment`, those that use them what they `control`,
    those that compare rewards their `parts`, those on Stable Diffusion their `model`; those of
    pictures which `world` is drawn.
    """
    kinds = {
        "source": language_report,
        "task": offline_report,
        "environment": skill_report,
        "control": downstream_report,
        "parts": starc_report,
        "model": stable_diffusion_report,
    }
    return next((module for field, module in kinds.items() if field in run.config), None)


def page(run: Comparison, pictures: Mapping[str, bytes]) -> str:
    """The whole report of a picture run as HTML. pictures: PNG content by name."""
    world = ", ".join(f"{n} {run.config[n]}" for n in ("world", "reward") if n in run.config)
    title = pages.title_of(run)
    parts = [f"<h1>{pages.safe(title)}</h1>", pages.facts(run, world, run.unfinished())]
    parts += ["<h2>Final numbers</h2>", _final_table(run)]
    heads = [f"{REWARD}, {prompts}" for prompts in LISTS.values()]
    parts += pages.difference_table(run.arms[0], heads, differences(run))
    for name, content in pictures.items():
        parts.append(pages.figure(name, content, CAPTIONS[name]))
        if name == "prompts":
            parts.append(_prompt_tables(run))
    return pages.document(title, parts)


def _final_table(run: Comparison) -> str:
    """What came out, and below it what it cost."""
    quality = [i for i, column in enumerate(COLUMNS) if "/" in column.metric]
    cost = [i for i in range(len(COLUMNS)) if i not in quality]
    numbers = final_numbers(run)
    tables = [
        pages.grouped_table(
            [COLUMNS[i] for i in shown],
            {name: [row[i] for i in shown] for name, row in numbers.items()},
        )
        for shown in (quality, cost)
    ]
    quality_note = (
        f"{pages.seeds_note(run)} All at the last checkpoint, which is not chosen by its numbers."
    )
    cost_note = (
        "Sum: network evaluations plus three for each trained pair (one picture at one step, "
        "forward and backward). Time: of the stages, compilation included, evaluations not."
    )
    return tables[0] + pages.note(quality_note) + tables[1] + pages.note(cost_note)


def _prompt_tables(run: Comparison) -> str:
    """The bars as numbers, folded away."""
    parts = []
    for name, title in LISTS.items():
        before = comparison.base_samples(run, name)
        columns = {"base": before}
        for arm in run.arms:
            after = [each.after[name] for each in run.of(arm) if name in each.after]
            columns |= {arm: after} if after else {}
        rows = _prompt_rows(columns)
        heads = ["", *(f"{arm}{what}" for arm in columns for what in ("", ", success"))]
        parts.append(f"<details><summary>{pages.safe(title.capitalize())}, one by one</summary>")
        parts.append(pages.html_table(heads, rows) + "</details>")
    return "\n".join(parts)


def _prompt_rows(columns: Mapping[str, Sequence[Samples]]) -> list[list[str]]:
    """Caption, then reward and success of each column, averaged over pictures and seeds."""
    captions = next(iter(columns.values()))[0].prompts
    rows: list[list[str]] = [[caption] for caption in captions]
    for samples in columns.values():
        for row, reward, success in zip(
            rows,
            np.mean([each.reward.mean(1) for each in samples], axis=0),
            np.mean([each.success.mean(1) for each in samples], axis=0),
            strict=True,
        ):
            row += [number(float(reward), 2), f"{100 * success:.0f} %"]
    return rows


# --- RESULTS.md ----------------------------------------------------------------------------------


def build_results(results: Path = HERE / "results", target: Path = HERE / "RESULTS.md") -> Path:
    """Writes RESULTS.md from all result files, by name; returns its path.

    Raises: UserError for a result file that is not as the module's docstring says.
    """
    text = results_text(results, target.parent)
    with replacing(target) as temporary:
        temporary.write_text(text, "utf-8")
    return target


def results_text(results: Path, base: Path) -> str:
    """RESULTS.md as text. results: the result files' directory. base: where RESULTS.md stands."""
    sections = [result_section(path, base) for path in sorted(results.glob("*.json"))]
    head = (
        "# Results\n\n"
        f"Generated by `{COMMAND}` from the files in `{results.name}/`: edit those, not this. "
        "Numbers in brackets are 95 % intervals over seeds.\n"
    )
    return "\n".join([head, *(sections or ["No results yet.\n"])])


_FIELDS: Mapping[str, type] = {
    "title": str, "command": str, "hardware": str, "date": str,
    "seeds": list, "notes": list, "tables": list, "figures": list,
}  # fmt: skip


def result_section(path: Path, base: Path) -> str:
    """One result file as Markdown. base: the directory that figures are linked from."""
    result = _read_result(path)
    seeds = ", ".join(map(str, result["seeds"])) or "none"
    lines = [f"## {result['title']}", "", f"`{result['command']}`", ""]
    lines += [f"{result['hardware']}; {result['date']}; seeds {seeds}.", ""]
    for each in result["tables"]:
        lines += [f"### {each['title']}", "", *_markdown_table(each), ""]
    for figure in result["figures"]:
        link = Path(os.path.relpath(path.parent / figure, base))
        lines += [f"![{result['title']}]({link.as_posix()})", ""]
    lines += [f"- {note}" for note in result["notes"]]
    return "\n".join(lines).rstrip() + "\n"


def _read_result(path: Path) -> dict[str, Any]:
    try:
        result = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); mend it") from error
    if not isinstance(result, dict):
        raise UserError(f"{path}: must hold one JSON object; mend it")
    for name, kind in _FIELDS.items():
        if not isinstance(result.get(name), kind):
            raise UserError(f"{path}: {name} must be there and be a {kind.__name__}; mend it")
    for each in result["tables"]:
        if not isinstance(each, dict) or not {"title", "columns", "rows"} <= set(each):
            raise UserError(f"{path}: a table needs title, columns and rows; mend it")
        if uneven := [row for row in each["rows"] if len(row) != len(each["columns"])]:
            raise UserError(
                f"{path}: table {each['title']!r} has {len(each['columns'])} columns, but the row "
                f"{uneven[0]!r} has {len(uneven[0])}; mend it"
            )
        cells = [cell for row in each["rows"] for cell in row if isinstance(cell, dict)]
        if odd := [cell for cell in cells if not {"mean", "value"} & set(cell)]:
            raise UserError(f"{path}: the cell {odd[0]!r} has neither mean nor value; mend it")
    for figure in result["figures"]:
        if not (path.parent / figure).is_file():
            raise UserError(
                f"{path}: the figure {figure} is not beside it; add it, or drop its name"
            )
    return result


def _markdown_table(content: Mapping[str, Any]) -> list[str]:
    rows = [[_markdown_cell(cell) for cell in row] for row in content["rows"]]
    heads = [_markdown_cell(head) for head in content["columns"]]
    numeric = [
        all(not isinstance(row[i], str) for row in content["rows"]) for i in range(len(heads))
    ]
    rule = ["---:" if content["rows"] and right else "---" for right in numeric]
    return ["| " + " | ".join(row) + " |" for row in (heads, rule, *rows)]


def _markdown_cell(cell: Any) -> str:
    if isinstance(cell, Mapping) and "mean" in cell:
        return interval(cell["mean"], cell.get("low"), cell.get("high"))
    if isinstance(cell, Mapping):
        return number(cell["value"])
    if isinstance(cell, float | int) and not isinstance(cell, bool):
        return number(cell)
    return str(cell).replace("|", "\\|").replace("\n", " ")


# --- the command ---------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    """Rebuilds what is asked for and prints where it is; ends the process unless that went well."""
    words = list(sys.argv[1:] if argv is None else argv)
    if any(word in ("-h", "--help") for word in words):
        print(f"{COMMAND} [WORKDIR ...]\n\n{__doc__}")
        return
    with cli.exit_codes():
        if flags := [word for word in words if word.startswith("-")]:
            raise UserError(f"no option {flags[0]}; it is {COMMAND} [WORKDIR ...]")
        for word in words:
            print(build(word))
        if not words:
            print(build_results())


if __name__ == "__main__":
    main()
