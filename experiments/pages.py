"""What reports are made of: numbers as text, tables, and a page of HTML that needs nothing else.

Rows of numbers come as `Estimate`s, one a column, by the name of their row.
"""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from experiments import comparison
from experiments.comparison import Comparison
from experiments.statistics import Estimate, mean_interval, paired_difference

# --- numbers -------------------------------------------------------------------------------------


def number(value: float, decimals: int | None = None) -> str:
    """The number with three figures, whole ones and large ones in full; "-" for none.

    decimals: how many, where not by size.
    """
    if value is None or not math.isfinite(value):
        return "-"
    if decimals is None and 0 < abs(value) < 1e-4:
        return f"{value:.2e}"
    if decimals is None:
        whole = value == round(value) or abs(value) >= 100
        decimals = 0 if whole else min(6, max(0, 2 - math.floor(math.log10(abs(value)))))
    text = f"{value:,.{decimals}f}"
    return text.removeprefix("-") if float(text.replace(",", "")) == 0 else text


def interval(mean: float, low: float, high: float) -> str:
    """Mean and "[low, high]" to two figures of the half-width; the mean alone without width."""
    if low is None or high is None or not high - low > 1e-9 * abs(mean):
        return number(mean)
    decimals = min(5, max(0, 1 - math.floor(math.log10((high - low) / 2))))
    mean_text, low_text, high_text = (number(x, decimals) for x in (mean, low, high))
    return f"{mean_text} [{low_text}, {high_text}]"


def _mean_and_range(estimate: Estimate) -> tuple[str, str]:
    text = interval(float(estimate.mean), float(estimate.low), float(estimate.high))
    mean, _, ends = text.partition(" ")
    return mean, ends


def final_numbers(run: Comparison, columns: Sequence[Column]) -> dict[str, list[Estimate]]:
    """By arm: the last number of each column over seeds."""
    scales = [100 if column.percent else 1 for column in columns]
    return {
        arm: [
            mean_interval(scale * comparison.final(run.of(arm), column.metric))
            for column, scale in zip(columns, scales, strict=True)
        ]
        for arm in run.arms
        if run.of(arm)
    }


def differences(run: Comparison, *metrics: str) -> dict[str, list[Estimate]]:
    """By arm but the first: its last numbers minus the first's, paired by seed."""
    first, *others = run.arms
    pairs = {arm: run.paired(arm, first) for arm in others}
    return {
        arm: [
            paired_difference(*(comparison.final(runs, metric) for runs in pair))
            for metric in metrics
        ]
        for arm, pair in pairs.items()
        if len(pair[0]) > 1
    }


# --- the terminal --------------------------------------------------------------------------------


def text_table(
    heads: Sequence[tuple[str, str]], rows: Mapping[str, Sequence[Estimate]]
) -> list[str]:
    """The lines of a table as plain text, intervals below the means. heads: two lines a column."""
    lines = [["", *words] for words in zip(*heads, strict=True)]
    for name, estimates in rows.items():
        parts = [_mean_and_range(estimate) for estimate in estimates]
        lines.append([name, *(mean for mean, _ in parts)])
        if any(ends for _, ends in parts):
            lines.append(["", *(ends for _, ends in parts)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in lines
    ]
    return [line.rstrip() for line in text]


def numbers_table(
    run: Comparison,
    columns: Sequence[Column],
    numbers: Mapping[str, Sequence[Estimate]],
    step: str,
) -> str:
    """A run's numbers as plain text, with what is missing. step: what a row of it is."""
    lines = text_table([column[:2] for column in columns], numbers)
    if len(run.seeds) > 1:
        lines.append(f"Means over {len(run.seeds)} seeds, below them 95 % intervals.")
    return "\n".join([*lines, *(f"Not finished: {what}." for what in run.unfinished(step))])


# --- HTML ----------------------------------------------------------------------------------------

CSS = """
body { max-width: 1100px; margin: 2em auto; padding: 0 1em; background: #fff; color: #222;
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6em; margin-bottom: .2em; }
h2 { font-size: 1.2em; margin-top: 2em; }
code { background: #f3f3f3; padding: .15em .4em; border-radius: 3px; font-size: .92em; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .86em; }
th, td { padding: .3em .55em; text-align: right; border-bottom: 1px solid #e3e3e3; }
th { font-weight: 600; }
thead th { border-bottom: 1px solid #999; }
.group th { border: 0; text-align: center; }
th:first-child, td:first-child { text-align: left; }
.range { display: block; color: #777; font-size: .85em; white-space: nowrap; }
figure { margin: 1.5em 0 2.5em; }
figure img { max-width: 100%; height: auto; }
figcaption, .note { color: #555; font-size: .92em; max-width: 52em; }
details { margin: 1em 0; }
summary { cursor: pointer; }
.warning { color: #a33; }
"""


class Column(NamedTuple):
    """A column of a table of numbers: `head` over `sub`, and the metric."""

    head: str
    sub: str
    metric: str
    percent: bool = False


def safe(text: Any) -> str:
    """The text with HTML's own characters escaped."""
    return html.escape(str(text))


def document(title: str, body: Sequence[str], css: str = "") -> str:
    """The whole page. body: HTML. css: rules beside those of every page."""
    content = "\n".join(body)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{safe(title)}</title>\n<style>{CSS}{css}</style>\n</head>\n"
        f"<body>\n{content}\n</body>\n</html>\n"
    )


def title_of(run: Comparison) -> str:
    """Experiment and preset."""
    return f"{run.env.get('experiment', 'run')} {run.env.get('preset', '')}".strip()


def facts(run: Comparison, world: str, unfinished: Sequence[str]) -> str:
    """How the run was made. world: what it trained on, in words."""
    env = run.env
    packages = ("python", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    versions = ", ".join(f"{name} {env[name]}" for name in packages if env.get(name))
    device = (
        f"{env.get('devices', '?')} x {env.get('device', '?')}, {env.get('cpus', '?')} processors"
    )
    seeds = f"seed{'s' if len(run.seeds) > 1 else ''} {', '.join(map(str, run.seeds))}"
    lines = [f"<p>Made by <code>{safe(env.get('command', 'an unknown command'))}</code></p>"]
    lines.append(note("; ".join(fact for fact in (world, seeds, device, versions) if fact)))
    if commit := env.get("commit"):
        changed = ", with changes" if env.get("dirty") else ""
        lines.append(note(f"Sources at {commit[:12]}{changed}"))
    lines += [f'<p class="warning">Not finished: {safe(what)}</p>' for what in unfinished]
    return "\n".join(lines)


def seeds_note(run: Comparison) -> str:
    """Whether the numbers of a table are means."""
    several = f"Means over {len(run.seeds)} seeds with 95 % bootstrap intervals."
    return several if len(run.seeds) > 1 else "One seed, so no intervals."


def cell(estimate: Estimate) -> str:
    """The mean, and its interval in small."""
    mean, ends = _mean_and_range(estimate)
    return mean + (f'<span class="range">{ends}</span>' if ends else "")


def html_table(heads: Sequence[str], rows: Sequence[Sequence[str]], group: str = "") -> str:
    """heads and first cells are text, the other cells HTML. group: a line above the heads."""
    head = "".join(f"<th>{safe(text)}</th>" for text in heads)
    lines = [
        f"<tr><td>{safe(row[0])}</td>" + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>"
        for row in rows
    ]
    return (
        f'<div class="wide"><table>\n<thead>{group}<tr>{head}</tr></thead>\n<tbody>\n'
        + "\n".join(lines)
        + "\n</tbody></table></div>\n"
    )


def grouped_table(columns: Sequence[Column], rows: Mapping[str, Sequence[Estimate]]) -> str:
    """A row for each name; columns with the same head stand below it together."""
    heads = [column.head for column in columns]
    spans = {head: heads.count(head) for head in heads}
    top = "".join(f'<th colspan="{n}">{safe(head)}</th>' for head, n in spans.items())
    cells = [[name, *map(cell, estimates)] for name, estimates in rows.items()]
    group = f'<tr class="group"><th></th>{top}</tr>'
    return html_table(["", *(column.sub for column in columns)], cells, group)


def difference_table(
    first: str, heads: Sequence[str], rows: Mapping[str, Sequence[Estimate]]
) -> list[str]:
    """Each row minus the arm `first`, with a title; nothing where there are no rows."""
    if not rows:
        return []
    cells = [[f"{arm} - {first}", *map(cell, estimates)] for arm, estimates in rows.items()]
    text = "Paired by seed, with 95 % bootstrap intervals; one that spans 0 shows no difference."
    return [f"<h2>Difference to {safe(first)}</h2>", html_table(["", *heads], cells), note(text)]


def note(text: str) -> str:
    """A paragraph in grey."""
    return f'<p class="note">{safe(text)}</p>'


def figure(name: str, content: bytes, caption: str) -> str:
    """A picture within the page. content: of the PNG file."""
    inline = base64.b64encode(content).decode("ascii")
    return (
        f'<figure id="{safe(name)}"><img alt="{safe(caption)}" '
        f'src="data:image/png;base64,{inline}">\n<figcaption>{safe(caption)}</figcaption></figure>'
    )
