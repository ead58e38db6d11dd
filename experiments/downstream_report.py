"""The report of a run of control with frozen skills: returns, their curves, and the page.

All numbers are those of the last checkpoint. An arm is the skills of a method; `random` picks those
of the first arm at random.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from experiments import comparison, pages
from experiments.comparison import Comparison
from experiments.pages import Column
from experiments.statistics import Estimate, mean_interval, paired_difference

if TYPE_CHECKING:
    from experiments.plots import Figure

COLUMNS = (
    Column("return", "without noise", "return"),
    Column("return", "in training", "train/return"),
    Column("training", "steps", "environment_steps"),
    Column("training", "time (s)", "seconds"),
)
CAPTION = (
    "Return of an episode without noise in the choices, against the steps of the environment in "
    "training the high level (those of learning the skills are not counted): thick the mean over "
    "seeds, shaded its 95 % interval."
)


def final_numbers(run: Comparison) -> dict[str, list[Estimate]]:
    """By arm: the number of each of COLUMNS over seeds."""
    return {
        arm: [mean_interval(comparison.final(run.of(arm), column.metric)) for column in COLUMNS]
        for arm in run.arms
        if run.of(arm)
    }


def differences(run: Comparison) -> dict[str, list[Estimate]]:
    """By arm but the first: return minus the first's, paired by seed."""
    first, *others = run.arms
    pairs = {arm: run.paired(arm, first) for arm in others}
    return {
        arm: [paired_difference(*(comparison.final(runs, "return") for runs in pair))]
        for arm, pair in pairs.items()
        if len(pair[0]) > 1
    }


def table(run: Comparison) -> str:
    """The final numbers as plain text; with several seeds the intervals below the means."""
    lines = pages.text_table([column[:2] for column in COLUMNS], final_numbers(run))
    if len(run.seeds) > 1:
        lines.append(f"Means over {len(run.seeds)} seeds, below them 95 % intervals.")
    lines += [f"Not finished: {what}." for what in run.unfinished("row")]
    return "\n".join(lines)


def figures(run: Comparison) -> Iterator[tuple[str, Figure]]:
    """Name (also that of its file) and figure."""
    from experiments import plots, skill_plots

    with plots.styled():
        figure = plots.new_figure(5.5, 3.4)
        axes = figure.subplots()
        for arm in plots.present(run):
            skill_plots.draw_curve(axes, run, arm, "return", 1)
        axes.set(xlabel="environment steps", ylabel=f"return ({run.config['control']})")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_formatter(plots.EngFormatter(sep=""))
        drawn = zip(plots.present(run), axes.get_lines(), strict=True)
        plots.arm_legend(
            figure,
            {arm: {"color": x.get_color(), "marker": x.get_marker()} for arm, x in drawn},
        )
        yield "return", figure


def page(run: Comparison, pictures: Mapping[str, bytes]) -> str:
    """The whole report as HTML. pictures: PNG content by name."""
    title = pages.title_of(run)
    parts = [f"<h1>{pages.safe(title)}</h1>"]
    parts += [pages.facts(run, f"task {run.config['control']}", run.unfinished("row"))]
    parts += ["<h2>Final numbers</h2>", pages.grouped_table(COLUMNS, final_numbers(run))]
    parts.append(pages.note(f"{pages.seeds_note(run)} All at the last checkpoint."))
    parts += pages.difference_table(run.arms[0], ["return"], differences(run))
    parts += [pages.figure(name, content, CAPTION) for name, content in pictures.items()]
    return pages.document(title, parts)
