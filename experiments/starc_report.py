"""The report of a STARC run: its tables, for the terminal and as a page.

Each part of a run leaves `tables.json` in its folder, in the form of a result file's tables.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from experiments import pages
from experiments.comparison import Comparison
from jaxalign.core import metrics


class Result(NamedTuple):
    """What a part comes to. numbers: flat. tables, notes: as result files have them."""

    numbers: Mapping[str, float]
    tables: list[dict[str, Any]]
    notes: list[str]


CAPTIONS = {
    "bars": "Correlation of each distance with regret, over all pairs of rewards: norm and metric "
    "l2, and the best of all norms and metrics. Lines: 95 % intervals over processes. Diamonds: "
    "the paper's values.",
    "regret": "Regret against distance (norm and metric l2), a dot a pair of rewards: what is lost "
    "by acting on the wrong reward. The line is the mean over a twentieth of the pairs.",
    "worst": "What is lost at worst by any choice that the other reward allows, against VAL's "
    "distance, and the ratio of the certificate U d to it.",
    "gridworld": "Distances between six rewards of one task, by canonicalisation.",
    "adversarial": "A reward that no policy ever gains by, k times as large as the rest: left "
    "equivalent rewards, right opposite ones.",
    "continuous": "Error of the estimated distances against samples: linear dynamics, quadratic "
    "rewards, exact distances known.",
    "monitor": "A reward model in training: its distance to the gold score on the same responses, "
    "and how many pairs it orders rightly.",
}


def save(folder: Path, result: Result) -> None:
    """Leaves a part's tables, and its numbers as `result.json`."""
    metrics.write_json(folder / "tables.json", {"tables": result.tables, "notes": result.notes})
    metrics.write_json(folder / "result.json", result.numbers)


def read(run: Comparison) -> dict[str, Result]:
    """The finished parts of the first seed, by name."""
    first = run.directory / f"seed-{run.seeds[0]}"
    folder = first if first.is_dir() else run.directory
    parts = {}
    for part in run.config["parts"]:
        if (folder / part / "tables.json").exists():
            tables = json.loads((folder / part / "tables.json").read_text("utf-8"))
            numbers = json.loads((folder / part / "result.json").read_text("utf-8"))
            parts[part] = Result(numbers, tables["tables"], tables["notes"])
    return parts


def cell(value: Any) -> str:
    """A table's cell as text."""
    if isinstance(value, Mapping) and "mean" in value:
        return pages.interval(value["mean"], value.get("low"), value.get("high"))
    if isinstance(value, Mapping):
        return pages.number(value["value"])
    return value if isinstance(value, str) else pages.number(value)


def table(run: Comparison) -> str:
    """The tables as plain text, but those too long for a screen."""
    lines: list[str] = []
    for result in read(run).values():
        for each in result.tables:
            if len(each["rows"]) <= 20:
                lines += ["", each["title"], *_text(each)]
    lines += [f"Only seed {run.seeds[0]} is shown."] if len(run.seeds) > 1 else []
    lines += [f"Not finished: {what}." for what in run.unfinished("batch")]
    return "\n".join(lines).strip("\n")


def _text(each: Mapping[str, Any]) -> list[str]:
    rows = [[*each["columns"]], *([cell(c) for c in row] for row in each["rows"])]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def page(run: Comparison, pictures: Mapping[str, bytes]) -> str:
    """The whole report as HTML. pictures: PNG content by name."""
    title = pages.title_of(run)
    parts = [f"<h1>{pages.safe(title)}</h1>"]
    parts.append(pages.facts(run, ", ".join(run.config["parts"]), run.unfinished("batch")))
    for result in read(run).values():
        for each in result.tables:
            parts.append(f"<h2>{pages.safe(each['title'])}</h2>")
            rows = [[cell(row[0]), *(pages.safe(cell(c)) for c in row[1:])] for row in each["rows"]]
            parts.append(pages.html_table(each["columns"], rows))
        parts += [pages.note(text) for text in result.notes]
    for name, content in pictures.items():
        parts.append(pages.figure(name, content, CAPTIONS[name]))
    return pages.document(title, parts)
