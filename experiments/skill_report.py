"""The report of a run that learned skills: coverage, goals, and the page.

All numbers are those of the last checkpoint. Coverage counts the 1 x 1 cells that the skills of an
evaluation visit; `random` acts without skill, and is what the others are compared with.
"""

from __future__ import annotations

from collections.abc import Mapping

from experiments import pages
from experiments.comparison import Comparison
from experiments.pages import Column
from experiments.statistics import Estimate

COLUMNS = (
    Column("coverage (cells)", "skills", "coverage"),
    Column("coverage (cells)", "training", "total_coverage"),
    Column("skills", "displacement", "displacement"),
    Column("goals (%)", "reached", "goal/reached", percent=True),
    Column("goals (%)", "stayed at", "goal/stayed", percent=True),
    Column("goals", "distance", "goal/distance"),
    Column("latent step", "mean square", "move"),
    Column("training", "steps", "environment_steps"),
    Column("training", "time (s)", "seconds"),
)


def final_numbers(run: Comparison) -> dict[str, list[Estimate]]:
    """By arm: the number of each of COLUMNS over seeds."""
    return pages.final_numbers(run, COLUMNS)


def table(run: Comparison) -> str:
    """The final numbers as plain text; with several seeds the intervals below the means."""
    return pages.numbers_table(run, COLUMNS, final_numbers(run), "row")


CAPTIONS = {
    "coverage": "Cells that the skills of an evaluation visit, cells that all training episodes so "
    "far have visited, and goals reached with skills chosen on the way: thick the mean over seeds, "
    "shaded its 95 % interval.",
    "paths": "Where the first seed's skills lead, without noise in the actions; a colour is a "
    "direction of the skill, or its largest entry where it has more than two.",
    "latents": "The same paths in the method's latent space, its first two dimensions.",
}


def page(run: Comparison, pictures: Mapping[str, bytes]) -> str:
    """The whole report as HTML. pictures: PNG content by name."""
    about = f"environment {run.config['environment']}"
    parts: list[str] = [f"<h1>{pages.safe(pages.title_of(run))}</h1>"]
    parts += [pages.facts(run, about, run.unfinished("row"))]
    parts += ["<h2>Final numbers</h2>", pages.grouped_table(COLUMNS, final_numbers(run))]
    parts.append(pages.note(f"{pages.seeds_note(run)} All at the last checkpoint."))
    parts += pages.difference_table(
        run.arms[0], ["coverage (cells)"], pages.differences(run, "coverage")
    )
    parts += [pages.figure(name, png, CAPTIONS[name]) for name, png in pictures.items()]
    return pages.document(pages.title_of(run), parts)
