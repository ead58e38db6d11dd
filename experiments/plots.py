"""Pictures of a comparison: reward, diversity, prompts, stages, samples.

`draw_...` draw on axes that they are given; `figures` arranges them and is what a report calls.
Every arm has one colour and one marker everywhere (Okabe and Ito's palette, told apart by
colour-blind readers), the base is grey.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator

from experiments.comparison import (
    LISTS,
    REWARD,
    ArmRun,
    Comparison,
    Samples,
    base,
    base_samples,
    curve,
)
from experiments.statistics import mean_interval

Style = Mapping[str, Any]  # matplotlib's words for how an arm is drawn

BASE = "#777777"
SUCCESS = "#009E73"  # reserved for "the caption holds"
_COLOURS = {
    "ddpo": "#D55E00",
    "official": "#0072B2",
    "telescope": "#CC79A7",
    "loo": "#E69F00",
    "branch": "#56B4E9",
    "ddpo_bpt": "#999933",
    "extremes": "#222222",
}
_MARKERS = "osD^vP*X"
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#999999",
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "legend.frameon": False,
    "legend.columnspacing": 1.4,
    "legend.handlelength": 1.6,
    "text.parse_math": False,  # captions are the user's: a dollar is a dollar
}
COSTS = {
    "reward_evaluations": "reward evaluations",
    "cost": "network evaluations\n(a backward pass counts as 2)",
    "seconds": "training time (s, with compilation)",
}
MOST_CARDS = 24
MOST_PICTURES = 4


def arm_style(arms: Sequence[str], arm: str) -> Style:
    """Colour and marker of an arm; the known arms have theirs in every run."""
    spare = [c for name, c in _COLOURS.items() if name not in arms] or list(_COLOURS.values())
    unknown = [name for name in arms if name not in _COLOURS]
    colour = _COLOURS.get(arm) or spare[unknown.index(arm) % len(spare)]
    known = [*_COLOURS, *unknown]
    return {"color": colour, "marker": _MARKERS[known.index(arm) % len(_MARKERS)]}


def figures(comparison: Comparison) -> Iterator[tuple[str, Figure]]:
    """Name (also that of its file) and figure, for all that the run has data for."""
    with styled():
        yield "reward", reward_figure(comparison)
        for prompts in LISTS:
            if base_samples(comparison, prompts):
                yield f"samples-{prompts}", samples_figure(comparison, prompts)
        yield "diversity", diversity_figure(comparison)
        if all(base_samples(comparison, prompts) for prompts in LISTS):
            yield "prompts", prompts_figure(comparison)
        yield "stages", stages_figure(comparison)


def styled() -> AbstractContextManager[None]:
    """Within it figures are made and drawn in the style of the reports."""
    return rc_context(_STYLE)


def png(figure: Figure) -> bytes:
    """The figure as a PNG file's content."""
    content = io.BytesIO()
    with styled():
        figure.savefig(content, format="png", dpi=140)
    return content.getvalue()


def new_figure(
    width: float, height: float, layout: Literal["constrained"] | None = "constrained"
) -> Figure:
    """An empty figure of that many inches."""
    figure = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(figure)  # no display, whatever the user's backend
    return figure


def arm_legend(figure: Figure, styles: Mapping[str, Style], *more: Line2D) -> None:
    """The arms by their styles, and what else there is, above the figure's axes."""
    handles = [Line2D([], [], label=arm, lw=1.8, ms=4, **style) for arm, style in styles.items()]
    handles += more
    letters = sum(len(str(handle.get_label())) + 6 for handle in handles)
    rows = max(-(-letters // int(14 * figure.get_figwidth())), -(-len(handles) // 9))
    figure.legend(handles=handles, loc="outside upper center", ncols=-(-len(handles) // rows))


def level(label: str) -> Line2D:
    """The legend's entry for `draw_base`."""
    return Line2D([], [], label=label, color=BASE, lw=1.4, ls="--")


def present(comparison: Comparison) -> list[str]:
    """The arms that have begun."""
    return [arm for arm in comparison.arms if comparison.of(arm)]


# --- reward ------------------------------------------------------------------------------------


def draw_curve(axes: Axes, runs: Sequence[ArmRun], x: str, y: str, style: Style) -> None:
    """y against x over the evaluations of one arm; with several seeds mean and 95 % band."""
    values = curve(runs, x, y)
    along, estimate = values[:, 0].mean(0), mean_interval(values[:, 1])
    axes.plot(along, estimate.mean, lw=1.8, ms=4, clip_on=False, zorder=3, **style)
    if estimate.seeds > 1:
        axes.fill_between(
            along, estimate.low, estimate.high, color=style["color"], alpha=0.18, lw=0
        )


def draw_stages(axes: Axes, runs: Sequence[ArmRun], x: str, y: str, style: Style) -> None:
    """y against x over all stages of one arm as a thin line, the mean over seeds."""
    along, height = curve(runs, x, y).mean(0)
    axes.plot(along, height, lw=0.9, alpha=0.55, color=style["color"])


def draw_base(axes: Axes, values: np.ndarray) -> None:
    """The base's number, `[S]`, as a level line."""
    if np.isfinite(values).all():
        axes.axhline(values.mean(), color=BASE, lw=1.4, ls="--", zorder=1)


def reward_figure(comparison: Comparison) -> Figure:
    """Rows: the two prompt lists. Columns: three costs. Thin: pictures sampled in training."""
    figure, arms = new_figure(11, 6.2), present(comparison)
    grid = figure.subplots(2, 3, sharex="col", sharey="row", squeeze=False)
    for row, (prompts, title) in zip(grid, LISTS.items(), strict=True):
        for axes, (cost, label) in zip(row, COSTS.items(), strict=True):
            draw_base(axes, base(comparison, f"{prompts}/reward"))
            for arm in arms:
                style = arm_style(arms, arm)
                if prompts == "train":
                    draw_stages(axes, comparison.of(arm), cost, "reward", style)
                draw_curve(axes, comparison.of(arm), cost, f"{prompts}/reward", style)
            axes.set_xlim(left=0)
            axes.xaxis.set_major_locator(MaxNLocator(5))
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            if prompts == "heldout":
                axes.set_xlabel(label)
        row[0].set_ylabel(f"{title}\n{REWARD}")
    thin = Line2D([], [], color="#444444", lw=0.9, label="pictures sampled in training")
    arm_legend(figure, {arm: arm_style(arms, arm) for arm in arms}, level("base"), thin)
    return figure


# --- diversity -----------------------------------------------------------------------------------

SPREADS = {
    "entropy": "factor entropy (nats)",
    "distance": "pairwise distance\n(RMS of pixels in [-1, 1])",
    "divergence": "KL to base, whole path (nats)",
}


def draw_path(axes: Axes, runs: Sequence[ArmRun], x: str, y: str, style: Style) -> None:
    """The way of one arm through (x, y) over its evaluations, a marker at its end.

    With several seeds the way of the means, and 95 % intervals both ways at its end.
    """
    values = curve(runs, x, y)
    if values.shape[-1] == 0:
        return
    estimate = mean_interval(values)
    (along, height), colour = estimate.mean, style["color"]
    axes.plot(along, height, lw=1.4, ls=style.get("ls", "-"), color=colour, marker=".", ms=3)
    end = along[-1:], height[-1:]
    axes.plot(
        *end, ls="", color=colour, marker=style["marker"], ms=7, mec="white", mew=0.8, zorder=3
    )
    if estimate.seeds > 1:
        for across in (True, False):
            which = 0 if across else 1
            ends = np.abs(np.array([estimate.low, estimate.high]) - estimate.mean)[:, which, -1:]
            bars = {"xerr": ends} if across else {"yerr": ends}
            axes.errorbar(*end, fmt="none", ecolor=colour, elinewidth=1.2, **bars)


def diversity_figure(comparison: Comparison) -> Figure:
    """Rows: the two prompt lists. Columns: entropy, distance, KL; all against reward."""
    figure, arms = new_figure(11, 6.2), present(comparison)
    grid = figure.subplots(2, 3, sharex="row", squeeze=False)
    for row, (prompts, title) in zip(grid, LISTS.items(), strict=True):
        for axes, (name, label) in zip(row, SPREADS.items(), strict=True):
            x, y = f"{prompts}/reward", f"{prompts}/{name}"
            for arm in arms:
                draw_path(axes, comparison.of(arm), x, y, arm_style(arms, arm))
            start = base(comparison, x), base(comparison, y)
            axes.plot(
                *(values.mean(keepdims=True) for values in start),
                ls="", marker="o", ms=8, color=BASE, mec="white", zorder=4,
            )  # fmt: skip
            axes.set(xlabel=f"{REWARD}, {title}", ylabel=label)
            axes.xaxis.set_major_locator(MaxNLocator(5))
    dot = Line2D([], [], ls="", marker="o", ms=8, color=BASE, mec="white", label="base")
    handles = [Line2D([], [], label=arm, lw=1.4, ms=7, **arm_style(arms, arm)) for arm in arms]
    figure.legend(handles=[*handles, dot], loc="outside upper center", ncols=min(len(arms) + 1, 9))
    return figure


# --- prompts -------------------------------------------------------------------------------------


def per_prompt(samples: Sequence[Samples], numbers: str = "reward") -> np.ndarray:
    """`[P]`: the mean over pictures and seeds of "reward" or "success"."""
    return np.mean([getattr(each, numbers).mean(1) for each in samples], axis=0)


def draw_prompt_bars(
    axes: Axes,
    prompts: Sequence[str],
    before: np.ndarray,
    after: Mapping[str, np.ndarray],
    styles: Mapping[str, Style],
) -> None:
    """Bars from the base's reward of each prompt, `[P]`, to each arm's; a grey tick is the base.

    The prompts stand in the order of the base's reward, the worst on top.
    """
    order, height = np.argsort(before, kind="stable"), 0.8 / max(len(after), 1)
    rows = np.arange(len(order))
    for index, (arm, reward) in enumerate(after.items()):
        middle = rows - 0.4 + (index + 0.5) * height
        axes.barh(
            middle, (reward - before)[order], left=before[order], height=0.9 * height,
            color=styles[arm]["color"],
        )  # fmt: skip
    axes.vlines(before[order], rows - 0.45, rows + 0.45, color=BASE, lw=1.8, zorder=3)
    axes.set_yticks(rows, [prompts[i] for i in order], fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.use_sticky_edges = False
    axes.margins(x=0.04)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.tick_params("y", length=0)
    axes.grid(False, axis="y")


def prompts_figure(comparison: Comparison) -> Figure:
    """Left the training prompts, right the held-out ones, at the same size and scale."""
    arms = [arm for arm in present(comparison) if any(run.after for run in comparison.of(arm))]
    before = {name: base_samples(comparison, name) for name in LISTS}
    counts = {name: len(samples[0].prompts) for name, samples in before.items()}
    longest = max(len(text) for samples in before.values() for text in samples[0].prompts)
    # In inches, by hand: automatic layouts cannot give rows of the two sides the same height.
    width, text, row = 11.0, 0.15 + 0.063 * longest, 0.2 + 0.045 * len(arms)
    above, below = 0.75, 0.55
    height = above + row * max(counts.values()) + below
    figure = new_figure(width, height, layout=None)
    first: Axes | None = None
    for column, (name, title) in enumerate(LISTS.items()):
        tall = row * counts[name]
        box = (column * width / 2 + text, height - above - tall, width / 2 - text - 0.2, tall)
        scaled = (box[0] / width, box[1] / height, box[2] / width, box[3] / height)
        axes = figure.add_axes(scaled, sharex=first)
        first = first or axes
        after = {
            arm: per_prompt([run.after[name] for run in comparison.of(arm) if name in run.after])
            for arm in arms
        }
        styles = {arm: arm_style(arms, arm) for arm in arms}
        draw_prompt_bars(axes, before[name][0].prompts, per_prompt(before[name]), after, styles)
        axes.set(title=title, xlabel=REWARD)
    handles = [Line2D([], [], label=arm, lw=6, color=arm_style(arms, arm)["color"]) for arm in arms]
    tick = Line2D([], [], label="base", ls="", marker="|", ms=11, mew=2, color=BASE)
    figure.legend(
        handles=[*handles, tick], loc="upper center", ncols=min(len(arms) + 1, 9),
        bbox_to_anchor=(0.5, 1 - 0.08 / height), borderaxespad=0,
    )  # fmt: skip
    return figure


# --- stages --------------------------------------------------------------------------------------


def stages_figure(comparison: Comparison) -> Figure:
    """How long the trained suffix is, and the share of reward variance within branches."""
    figure, arms = new_figure(8, 2.8), present(comparison)
    labels = {
        "suffix": "trained suffix (steps)",
        "within_share": "share of reward variance\nwithin branches",
    }
    for axes, (name, label) in zip(figure.subplots(1, 2), labels.items(), strict=True):
        for index, arm in enumerate(arms):
            along, height = curve(comparison.of(arm), "step", name).mean(0)
            if name == "within_share" and (height == 1).all():
                continue  # an arm without branches
            # Later lines are thinner: where arms agree, all of them are seen.
            width, colour = 1.4 + 0.9 * (len(arms) - 1 - index), arm_style(arms, arm)["color"]
            axes.plot(along, height, lw=width, color=colour, label=arm)
        axes.set(xlabel="stage", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_ylim(0, 1.06 * axes.get_ylim()[1])
    figure.axes[0].yaxis.set_major_locator(MaxNLocator(6, integer=True))
    figure.axes[1].set_ylim(0, 1.06)
    handles = [Line2D([], [], label=arm, lw=3, color=arm_style(arms, arm)["color"]) for arm in arms]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(len(arms), 9))
    return figure


# --- samples -------------------------------------------------------------------------------------


def framed(images: np.ndarray, success: np.ndarray, scale: int, frame: int) -> np.ndarray:
    """A row of pictures `[n, H, W, C] u8`, enlarged, as `[h, w, 3] u8`; framed by success `[n]`."""
    from matplotlib.colors import to_rgb

    tiles = []
    for image, holds in zip(images, success, strict=True):
        large = np.repeat(
            np.repeat(np.broadcast_to(image, (*image.shape[:2], 3)), scale, 0), scale, 1
        )
        colour = np.uint8(np.array(to_rgb(SUCCESS if holds > 0.5 else "#e4e4e4")) * 255)
        height, width = (side + 4 * frame for side in large.shape[:2])
        tile = np.full((height, width, 3), 255, np.uint8)
        tile[frame:-frame, frame:-frame] = colour
        tile[2 * frame : -2 * frame, 2 * frame : -2 * frame] = large
        tiles.append(tile)
    return np.concatenate(tiles, axis=1)


def draw_card(
    axes: Axes, rows: Mapping[str, Samples], prompt: int, colours: Mapping[str, str], named: bool
) -> None:
    """The pictures of one prompt, one row for the base and each arm, the caption under them.

    rows: the samples by what made them. named: whether those names stand at the left.
    """
    side = next(iter(rows.values())).images.shape[2]
    scale = max(1, round(64 / side))
    strips = []
    for each in rows.values():
        images = each.images[prompt][:MOST_PICTURES]
        strips.append(framed(images, each.success[prompt][: len(images)], scale, frame=4))
    axes.imshow(np.concatenate(strips), interpolation="nearest")
    tall = strips[0].shape[0]
    ticks = [tall * (index + 0.5) for index in range(len(rows))]
    axes.set_yticks(ticks, list(rows) if named else [""] * len(rows), fontsize=8)
    for label, name in zip(axes.get_yticklabels(), rows, strict=True):
        label.set_color(colours[name])
    axes.set_xticks([])
    axes.tick_params(length=0, pad=1)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.set_xlabel(next(iter(rows.values())).prompts[prompt], fontsize=8, labelpad=3)


def samples_figure(comparison: Comparison, prompts: str) -> Figure:
    """A card for each prompt (at most 24, evenly chosen), of the first seed, equal noise."""
    arms = present(comparison)
    seed = next(seed for seed in comparison.seeds if (arms[0], seed) in comparison.runs)
    runs = {arm: comparison.runs[arm, seed] for arm in arms if (arm, seed) in comparison.runs}
    rows = {"base": base_samples(comparison, prompts)[0]}
    rows |= {arm: run.after[prompts] for arm, run in runs.items() if prompts in run.after}
    colours = {"base": BASE} | {arm: arm_style(arms, arm)["color"] for arm in arms}
    shown = chosen_prompts(len(rows["base"].prompts))
    wide = 4 if len(shown) > 2 else len(shown)
    tall = -(-len(shown) // wide)
    pictures = min(MOST_PICTURES, rows["base"].images.shape[1])
    cell = 0.55 + 1.95 * len(rows) / pictures
    figure = new_figure(11, 0.5 + cell * tall)
    grid = figure.subplots(tall, wide, squeeze=False)
    for index, (axes, prompt) in enumerate(zip(grid.flat, shown, strict=False)):
        draw_card(axes, rows, prompt, colours, named=index % wide == 0)
    for axes in figure.axes[len(shown) :]:
        axes.remove()
    if "world" in comparison.config:  # which knows when a caption holds
        holds = Line2D(
            [], [], ls="", marker="s", ms=9, mfc="none", mec=SUCCESS, mew=2.5,
            label="the picture shows what its caption says",
        )  # fmt: skip
        figure.legend(handles=[holds], loc="outside upper center")
    return figure


def chosen_prompts(count: int) -> list[int]:
    """Which of `count` prompts are shown: all, or 24 evenly spread over the list."""
    if count <= MOST_CARDS:
        return list(range(count))
    return [int(i) for i in np.linspace(0, count - 1, MOST_CARDS).round()]
