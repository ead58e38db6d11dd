"""The report of a run of control with frozen skills: returns, their curves, and the page.

All numbers are those of the last checkpoint. An arm is the skills of a method; `random` picks those
of the first arm at random.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from experiments import pages
from experiments.comparison import Comparison
from experiments.pages import Column

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


def table(run: Comparison) -> str:
    """The final numbers as plain text; with several seeds the intervals below the means."""
    return pages.numbers_table(run, COLUMNS, pages.final_numbers(run, COLUMNS), "row")


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
    parts += [
        "<h2>Final numbers</h2>",
        pages.grouped_table(COLUMNS, pages.final_numbers(run, COLUMNS)),
    ]
    parts.append(pages.note(f"{pages.seeds_note(run)} All at the last checkpoint."))
    parts += pages.difference_table(run.arms[0], ["return"], pages.differences(run, "return"))
    parts += [pages.figure(name, content, CAPTION) for name, content in pictures.items()]
    return pages.document(title, parts)
