"""The report of a run that aligned a language model: numbers for the terminal, and the page.

Gold is the true score, known in worlds of our own only; proxy is the reward model's score, which is
what the arms are paid. Held-out numbers are of the last checkpoint, on prompts never trained on.

Dimensions: S seeds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from experiments import comparison, heat_map, pages
from experiments.comparison import ArmRun, Comparison
from experiments.heat_map import START
from experiments.pages import Column
from experiments.statistics import Estimate, mean_interval, paired_difference

TENTH = 0.1


class Measure(NamedTuple):
    """A number of an arm: the last there is of a metric, or the mean over iterations."""

    column: Column
    over: Literal["end", "all", "tenth"] = "end"
    compared: bool = False

    def of(self, runs: Sequence[ArmRun]) -> np.ndarray:
        """The number of each run, `[S]`."""
        name = self.column.metric
        if self.over == "end":
            values = comparison.final(runs, name)
        else:
            values = comparison.average(runs, name, 1.0 if self.over == "all" else TENTH)
        return self._scaled(values)

    def of_start(self, run: Comparison) -> np.ndarray:
        """The number before the first iteration, `[S]`, NaN where there is none."""
        return self._scaled(comparison.base(run, self.column.metric))

    def _scaled(self, values: np.ndarray) -> np.ndarray:
        # The KL of a policy to itself is 0 but for the rounding of f32.
        return np.round(values, 6) * (100 if self.column.percent else 1)


QUALITY = (
    Measure(Column("gold", "held-out", "heldout/gold"), compared=True),
    Measure(Column("gold", "area", "gold"), "all", compared=True),
    Measure(Column("gold", "last tenth", "gold"), "tenth", compared=True),
    Measure(Column("proxy", "held-out", "heldout/proxy"), compared=True),
    Measure(Column("proxy", "area", "proxy"), "all"),
    Measure(Column("proxy", "last tenth", "proxy"), "tenth"),
    Measure(Column("KL (nats)", "held-out", "heldout/kl"), compared=True),
    Measure(Column("length", "held-out", "heldout/length"), compared=True),
    Measure(Column("truncated (%)", "held-out", "heldout/truncated", percent=True)),
)
COST = (
    Measure(Column("sampled", "responses", "episodes")),
    Measure(Column("sampled", "tokens", "tokens")),
    Measure(Column("time", "s", "seconds")),
)
# What the terminal leaves out, for want of room; where gold is unknown there is some.
_WIDE = (("proxy", "area"), ("proxy", "last tenth"), ("sampled", "tokens"))


def knows_gold(run: Comparison) -> bool:
    """Whether the true scores are known: where nobody knows them they are written as 0."""
    names = ("gold", "heldout/gold")
    return any(row.get(n) for each in run.runs.values() for row in each.rows for n in names)


def shown(run: Comparison, measures: Sequence[Measure]) -> list[Measure]:
    """The measures without those of an unknown gold."""
    known = knows_gold(run)
    return [each for each in measures if known or each.column.head != "gold"]


def final_numbers(run: Comparison, measures: Sequence[Measure]) -> dict[str, list[Estimate]]:
    """By `START` and arm: the number of each measure, over seeds."""
    table = {START: [mean_interval(each.of_start(run)) for each in measures]}
    for arm in run.arms:
        if runs := run.of(arm):
            table[arm] = [mean_interval(each.of(runs)) for each in measures]
    return table


def differences(run: Comparison, measures: Sequence[Measure]) -> dict[str, list[Estimate]]:
    """By arm but the first: each measure minus the first's, paired by seed, from two seeds on."""
    first, *others = run.arms
    pairs = {arm: run.paired(arm, first) for arm in others}
    return {
        arm: [paired_difference(*map(each.of, pair)) for each in measures]
        for arm, pair in pairs.items()
        if len(pair[0]) > 1
    }


# --- the terminal --------------------------------------------------------------------------------


def table(run: Comparison) -> str:
    """The final numbers as plain text; with several seeds the intervals below the means."""
    measures = shown(run, (*QUALITY, *COST))
    if knows_gold(run):
        measures = [each for each in measures if each.column[:2] not in _WIDE]
    heads = [each.column[:2] for each in measures]
    lines = pages.text_table(heads, final_numbers(run, measures))
    if len(run.seeds) > 1:
        lines.append(f"Means over {len(run.seeds)} seeds, below them 95 % intervals.")
    lines.append(EXPLAINED)
    lines += [f"Not finished: {what}." for what in run.unfinished("iteration")]
    return "\n".join(lines)


EXPLAINED = (
    "Area: mean over all iterations' responses; last tenth: over those of the last 10 %. KL of a "
    "whole response to the start."
)

# --- report.html ---------------------------------------------------------------------------------

CAPTIONS = {
    "reward": "Reward against what it cost. Thick lines: held-out prompts, the same ones with the "
    "same noise each time. Thin lines: the responses sampled in training{running}. {scores} Time "
    "begins after the first iteration, most of which is compilation, and leaves the evaluations "
    "out.",
    "kl": "What the reward was paid with. Each line leads from the start over the evaluations to "
    "the last checkpoint, always on held-out prompts; the KL is of whole responses, sampled. {kl}",
    "length": "How long the responses are, and how many were cut off for want of a stop token. "
    "Thick: held-out prompts. Thin: training{running}.",
    "health": "Signs of health, of the training responses{running}: how random the policy "
    "still is, how many of the tokens had a positive advantage (half of them is normal, nearly "
    "none or nearly all is not){critic}.",
    "tokens": "The same words as above, as a picture.",
}
_GOLD = {
    "scores": "Gold is the true score, proxy what the reward model says and what is trained on.",
    "kl": "Where the proxy rises and gold falls, the reward model is being exploited.",
}
_PROXY = {
    "scores": "Proxy is what the reward model says and what is trained on; the true score is not "
    "known here.",
    "kl": "The true score is not known here, so exploitation of the reward model cannot be seen.",
}
_CRITIC = (
    ", and the share of the returns' variance that the critic explains (arms with a critic only)"
)


def captions(run: Comparison) -> dict[str, str]:
    """What each picture shows, in words, by its name."""
    critic = _CRITIC if has_critic(run) else ""
    width = window(run)
    running = f", running means over {width} iterations" if width > 1 else ""
    words = {**(_GOLD if knows_gold(run) else _PROXY), "critic": critic, "running": running}
    return {name: text.format(**words).strip() for name, text in CAPTIONS.items()}


def window(run: Comparison) -> int:
    """Over how many iterations the curves of training are smoothed: a fifteenth of them."""
    return max(max(each.rows[-1]["step"] for each in run.runs.values()) // 15, 1)


def has_critic(run: Comparison) -> bool:
    """Whether some arm has a critic."""
    return any("explained_variance" in row for each in run.runs.values() for row in each.rows)


def page(run: Comparison, pictures: Mapping[str, bytes]) -> str:
    """The whole report as HTML. pictures: PNG content by name."""
    title = pages.title_of(run)
    parts = [f"<h1>{pages.safe(title)}</h1>"]
    parts.append(pages.facts(run, _world(run), run.unfinished("iteration")))
    parts += ["<h2>Final numbers</h2>", _final_tables(run)]
    compared = shown(run, [each for each in QUALITY if each.compared])
    heads = [f"{each.column.head}, {each.column.sub}" for each in compared]
    parts += pages.difference_table(run.arms[0], heads, differences(run, compared))
    words = captions(run)
    figures = {name: pages.figure(name, png, words[name]) for name, png in pictures.items()}
    tokens = figures.pop("tokens", None)
    parts += ["<h2>Curves</h2>", *figures.values()]
    parts += heat_map.section(run, gold=knows_gold(run))
    if tokens:
        parts.append(f"<details><summary>As a picture</summary>{tokens}</details>")
    return pages.document(title, parts, heat_map.CSS)


def _world(run: Comparison) -> str:
    """What was trained on, and how well the reward model tells the better response."""
    source = run.config.get("source", {}).get("name", "")
    found = _accuracies(run)
    judged = f"the reward model orders {100 * np.mean(found):.1f} % of held-back pairs as labelled"
    return "; ".join([*([f"source {source}"] if source else []), *([judged] if found else [])])


def _accuracies(run: Comparison) -> list[float]:
    """Of the reward model, from the result of each seed that is finished."""
    name = "reward model/accuracy on held-back pairs"
    paths = [run.directory / "result.json", *run.directory.glob("seed-*/result.json")]
    results = [json.loads(path.read_text("utf-8")) for path in paths if path.exists()]
    return [result[name] for result in results if name in result]


def _final_tables(run: Comparison) -> str:
    """What came out, and below it what it cost."""
    tables = []
    for measures in (shown(run, QUALITY), COST):
        columns = [each.column for each in measures]
        tables.append(pages.grouped_table(columns, final_numbers(run, measures)))
    quality = (
        f"{pages.seeds_note(run)} Held-out: at the last checkpoint, which is not chosen by its "
        f"numbers. {EXPLAINED}"
    )
    cost = "Time: of the iterations, compilation included, evaluations not."
    return tables[0] + pages.note(quality) + tables[1] + pages.note(cost)
