"""Figures of a run that aligned a language model: reward, KL, length, health, words.

`figures` arranges what `experiments.plots` draws. matplotlib is imported with it, where a figure is
made: tables are printed without.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from experiments import heat_map
from experiments.comparison import Comparison, Response, base, curve
from experiments.heat_map import START
from experiments.language_report import has_critic, knows_gold, window
from experiments.pages import number

if TYPE_CHECKING:
    from experiments.plots import Axes, Figure, Style

# Colours of Okabe and Ito and of Tol, told apart by colour-blind readers. Arms that credit alike
# have the same one, dashed where they go without a critic.
_STYLES: Mapping[str, Style] = {
    "sparse": {"color": "#222222", "marker": "o"},
    "redistributed": {"color": "#0072B2", "marker": "s"},
    "calibrated": {"color": "#D55E00", "marker": "D"},
    "uniform": {"color": "#E69F00", "marker": "^"},
    "half": {"color": "#56B4E9", "marker": "v"},
    "without_first": {"color": "#332288", "marker": "P"},
    "shuffled": {"color": "#999933", "marker": "*"},
    "random": {"color": "#CC79A7", "marker": "X"},
    "sparse_reward_critic": {"color": "#009E73", "marker": "<"},
    "sparse_calibrated_critic": {"color": "#882255", "marker": ">"},
    "rloo": {"color": "#222222", "marker": "p", "ls": "--"},
    "rloo_redistributed": {"color": "#0072B2", "marker": "h", "ls": "--"},
    "rloo_calibrated": {"color": "#D55E00", "marker": "d", "ls": "--"},
}
COSTS = {"episodes": "responses sampled", "warm_seconds": "training time (s)"}
SCORES = {"gold": "gold (true score)", "proxy": "proxy (reward model)"}
LENGTHS = {"length": "tokens of a response", "truncated": "share of responses\nthat were cut off"}
SIGNS = {
    "entropy": "entropy (nats a token)",
    "positive_share": "share of tokens with\na positive advantage",
    "explained_variance": "explained variance\nof the critic",
}


def styles(run: Comparison) -> dict[str, Style]:
    """How each arm that has begun is drawn."""
    from experiments import plots

    arms = plots.present(run)
    unknown = [arm for arm in arms if arm not in _STYLES]
    return {arm: _STYLES.get(arm) or plots.arm_style(unknown, arm) for arm in arms}


def scores(run: Comparison) -> dict[str, str]:
    """The scores that are known, and their labels."""
    return {name: label for name, label in SCORES.items() if name == "proxy" or knows_gold(run)}


def figures(run: Comparison) -> Iterator[tuple[str, Figure]]:
    """Name (also that of its file) and figure, for all that the run has data for."""
    from experiments import plots

    with plots.styled():
        yield "reward", reward_figure(run)
        yield "kl", kl_figure(run)
        yield "length", length_figure(run)
        yield "health", health_figure(run)
        if blocks := heat_map.blocks(run):
            yield "tokens", tokens_figure(blocks, gold=knows_gold(run))


# --- curves --------------------------------------------------------------------------------------


def draw_training(axes: Axes, run: Comparison, x: str, y: str) -> None:
    """y against x over all iterations of all arms: running means, the mean over seeds, thin."""
    width = window(run)
    for arm, style in styles(run).items():
        lines = curve(run.of(arm), x, y).mean(0)
        if lines.shape[-1] >= width:
            smooth = [np.convolve(line, np.full(width, 1 / width), "valid") for line in lines]
            dashes = style.get("ls", "-")
            axes.plot(*smooth, lw=1.0, alpha=0.7, color=style["color"], ls=dashes)


def draw_both(axes: Axes, run: Comparison, x: str, name: str) -> None:
    """A number of all arms against x: on held-out prompts thick, in training thin."""
    from experiments import plots

    plots.draw_base(axes, base(run, f"heldout/{name}"))
    draw_training(axes, run, x, name)
    for arm, style in styles(run).items():
        plots.draw_curve(axes, run.of(arm), x, f"heldout/{name}", style)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(plots.MaxNLocator(6, integer=True))
    if x in COSTS:
        axes.xaxis.set_major_formatter(plots.EngFormatter(sep=""))


def _legend(run: Comparison, figure: Figure) -> None:
    from experiments import plots

    thin = plots.Line2D([], [], color="#444444", lw=1.0, label="in training")
    plots.arm_legend(figure, styles(run), plots.level(START), thin)


def reward_figure(run: Comparison) -> Figure:
    """Rows: gold, where it is known, and proxy. Columns: responses and time."""
    from experiments import plots

    known = scores(run)
    figure = plots.new_figure(10, 0.8 + 2.7 * len(known))
    grid = figure.subplots(len(known), len(COSTS), sharex="col", sharey="row", squeeze=False)
    for row, (name, label) in zip(grid, known.items(), strict=True):
        for axes, cost in zip(row, COSTS, strict=True):
            draw_both(axes, run, cost, name)
        row[0].set_ylabel(label)
    for axes, label in zip(grid[-1], COSTS.values(), strict=True):
        axes.set_xlabel(label)
    _legend(run, figure)
    return figure


def kl_figure(run: Comparison) -> Figure:
    """Gold, where it is known, and proxy against the KL to the start, on held-out prompts."""
    from experiments import plots

    known, arms = scores(run), styles(run)
    figure = plots.new_figure(5 * len(known), 3.6)
    row = figure.subplots(1, len(known), sharex=True, squeeze=False)[0]
    for axes, (name, label) in zip(row, known.items(), strict=True):
        for arm, style in arms.items():
            plots.draw_path(axes, run.of(arm), "heldout/kl", f"heldout/{name}", style)
        point = [base(run, f"heldout/{n}").mean(keepdims=True) for n in ("kl", name)]
        (dot,) = axes.plot(
            *point, ls="", marker="o", ms=8, color=plots.BASE, mec="white", zorder=4, label=START
        )
        axes.set(xlabel="KL to the start (nats a response)", ylabel=label)
    plots.arm_legend(figure, arms, dot)
    return figure


def length_figure(run: Comparison) -> Figure:
    """Length of the responses, and the share that was cut off, against iterations."""
    from experiments import plots

    figure = plots.new_figure(10, 3.3)
    for axes, (name, label) in zip(figure.subplots(1, 2), LENGTHS.items(), strict=True):
        draw_both(axes, run, "step", name)
        axes.set(xlabel="iteration", ylabel=label)
        axes.set_ylim(bottom=0)
    _legend(run, figure)
    return figure


def health_figure(run: Comparison) -> Figure:
    """Entropy, share of positive advantages, explained variance, against iterations."""
    from experiments import plots

    signs = [name for name in SIGNS if name != "explained_variance" or has_critic(run)]
    arms, figure = styles(run), plots.new_figure(11, 3.1)
    for axes, name in zip(figure.subplots(1, len(signs)), signs, strict=True):
        draw_training(axes, run, "step", name)
        axes.set(xlabel="iteration", ylabel=SIGNS[name])
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(plots.MaxNLocator(6, integer=True))
    lines = {arm: {**style, "marker": ""} for arm, style in arms.items()}
    plots.arm_legend(figure, lines)
    return figure


# --- words -------------------------------------------------------------------------------------

POINTS = 8
FONT: Style = {"family": "DejaVu Sans Mono", "size": POINTS}  # comes with matplotlib
LETTER = 0.645 * POINTS / 72  # inches, its width in that font, rounded up to pixels
# All in inches.
LINE = 0.2  # from one line of words to the next
GAP, BETWEEN = 0.05, 0.22  # after an answer, after a prompt's answers
MARGIN, TOP = 0.15, 0.55
NUMBER = 0.6  # the width of a column of numbers
WIDEST, NARROWEST = 11.0, 6.0


class Box(NamedTuple):
    """A word in its place. left, width: in letters. row: counted from the answer's first line."""

    word: str
    reward: float
    left: int
    width: int
    row: int


def boxes(answer: Response, columns: int) -> list[Box]:
    """The first words of an answer in lines of at most `columns` letters."""
    found: list[Box] = []
    left = row = 0
    for word, reward in zip(answer.response, answer.reward, strict=True):
        if len(found) == heat_map.MOST_WORDS:
            return [*found, Box("…", 0.0, left, 2, row)]
        text = heat_map.visible(word)[: columns - 1]
        if left + len(text) + 1 > columns:
            left, row = 0, row + 1
        found.append(Box(text, reward, left, len(text) + 1, row))
        left += len(text) + 1
    return found


def drawable(text: str) -> str:
    """The text with a square for each letter that the font lacks."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    known = get_font(findfont(FontProperties(family=FONT["family"]))).get_charmap()
    return "".join(letter if ord(letter) in known else "□" for letter in text)


def draw_words(axes: Axes, placed: Sequence[Box], left: float, top: float, end: float) -> None:
    """Words in boxes of their colours. left, top: inches. end: the scale's, `heat_map.limit`."""
    middle = [top + LINE * (box.row + 0.5) for box in placed]
    lefts = [left + LETTER * box.left for box in placed]
    widths = [LETTER * box.width for box in placed]
    colours = [heat_map.colour(box.reward, end) for box in placed]
    axes.barh(
        middle, widths, left=lefts, height=0.85 * LINE, color=colours, edgecolor="#cccccc", lw=0.5
    )
    for box, x, y, width in zip(placed, lefts, middle, widths, strict=True):
        ink, text = heat_map.ink(box.reward, end), drawable(box.word)
        axes.text(x + width / 2, y, text, color=ink, ha="center", va="center_baseline", **FONT)


def draw_scale(axes: Axes, end: float, right: float, top: float) -> None:
    """The colours from end to end with their numbers. right, top: inches, of its middle."""
    steps = np.linspace(-end, end, 41)
    length = 2.4
    width, left = length / len(steps), right - length
    colours = [heat_map.colour(float(x), end) for x in steps]
    places = left + width * np.arange(len(steps))
    axes.barh([top] * len(steps), width, left=places, height=0.13, align="edge", color=colours)
    for part, text in ((0, number(-end)), (0.5, "0"), (1, f"+{number(end)}")):
        axes.text(left + part * length, top + 0.24, text, ha="center", va="center", size=POINTS)
    axes.text(left - 0.3, top + 0.07, "reward of a token", ha="right", va="center", size=POINTS)


class Sheet(NamedTuple):
    """Where everything of the words' figure stands, in inches.

    left, right: of the words. height: of the figure. columns: letters of a line.
    """

    left: float
    right: float
    height: float
    columns: int

    def rows(self, answer: Response) -> int:
        """Lines of an answer, one for an empty one."""
        return max((box.row + 1 for box in boxes(answer, self.columns)), default=1)


def sheet(blocks: Sequence[heat_map.Block], numbers: int) -> Sheet:
    """A sheet as large as the answers need. numbers: how many stand beside an answer."""
    answers = [answer for block in blocks for _, answer in block.answers]
    left = MARGIN + 0.1 + LETTER * max(len(who) for who, _ in blocks[0].answers)
    beside = MARGIN + NUMBER * numbers
    most = int((WIDEST - left - beside) / LETTER)
    longest = max((box.left + box.width for a in answers for box in boxes(a, most)), default=0)
    right = max(left + LETTER * longest, NARROWEST - beside)
    empty = Sheet(left, right, 0.0, most)
    below = sum(LINE * empty.rows(answer) + GAP for answer in answers)
    return empty._replace(height=TOP + (LINE + BETWEEN) * len(blocks) + below)


def tokens_figure(blocks: Sequence[heat_map.Block], *, gold: bool) -> Figure:
    """Every answer as words in boxes, coloured by their rewards; by prompt, `START` first."""
    from experiments import plots

    heads = ("score", "gold") if gold else ("score",)
    page, end = sheet(blocks, len(heads)), heat_map.limit(blocks)
    width = page.right + NUMBER * len(heads) + MARGIN
    figure = plots.new_figure(width, page.height, layout=None)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(page.height, 0))
    axes.axis("off")
    draw_scale(axes, end, width - 2 * MARGIN, 0.12)
    top = TOP
    for block in blocks:
        top = draw_block(axes, block, page, heads, end, top)
    return figure


def draw_block(
    axes: Axes, block: heat_map.Block, page: Sheet, heads: Sequence[str], end: float, top: float
) -> float:
    """A prompt and its answers from `top` down; returns where the next one begins."""
    places = [page.right + NUMBER * (i + 1) for i in range(len(heads))]
    prompt, most = heat_map.text_of(block.prompt), int((page.right - MARGIN) / LETTER) - 8
    shown = prompt if len(prompt) <= most else f"… {prompt[2 - most :]}"
    middle = top + LINE / 2
    axes.text(MARGIN, middle, drawable(f"prompt: {shown}"), va="center", weight="bold", **FONT)
    for x, head in zip(places, heads, strict=True):
        axes.text(x, middle, head, ha="right", va="center", color="#777777", size=POINTS)
    top += LINE
    for who, answer in block.answers:
        middle = top + LINE / 2
        axes.text(MARGIN, middle, drawable(who), va="center", color="#555555", **FONT)
        draw_words(axes, boxes(answer, page.columns), page.left, top, end)
        for x, value in zip(places, (answer.score, answer.gold), strict=False):
            axes.text(x, middle, number(value, 2), ha="right", va="center", size=POINTS)
        top += LINE * page.rows(answer) + GAP
    return top + BETWEEN
