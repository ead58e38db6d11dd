"""Figures of a STARC run: correlations, regret against distance, bounds, and the small studies.

matplotlib is imported with `experiments.plots`, where a figure is made: tables are printed without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from experiments import starc_figure1
from experiments.comparison import Comparison
from experiments.starc_continuous import ESTIMATES
from experiments.starc_figure1 import L2, PAPER, Points, with_interval
from jaxalign.core.metrics import read_json_lines
from jaxalign.ops.starc import CANONICALISATIONS, NORMS

if TYPE_CHECKING:
    from experiments.plots import Axes, Figure

# Colours of Okabe and Ito, told apart by colour-blind readers; STARC's own are the dark ones.
COLOURS: Mapping[str, str] = {
    "val": "#0072B2",
    "minimal": "#D55E00",
    "minimal_l2": "#CC79A7",
    "val_potential": "#56B4E9",
    "minimal_potential": "#E69F00",
    "epic": "#009E73",
    "dard": "#999933",
    "none": "#777777",
}
SHOWN = ("val", "epic", "dard", "none")
NAMES = {
    "rollouts": ("rollouts, shared by all rewards", "#0072B2", "o"),
    "lstd": ("LSTD, shared", "#D55E00", "s"),
    "separate": ("rollouts of each reward's own", "#777777", "^"),
    "regression": ("regression (to minimal)", "#009E73", "D"),
}


def figures(run: Comparison) -> Iterator[tuple[str, Figure]]:
    """Name (also that of its file) and figure, for all parts that are finished."""
    from experiments import plots

    first = run.directory / f"seed-{run.seeds[0]}"
    folder = first if first.is_dir() else run.directory
    done = {part for part in run.config["parts"] if (folder / part / "tables.json").exists()}
    with plots.styled():
        if "figure1" in done:
            parts = sorted((folder / "figure1" / "batches").glob("*.npz"))
            points = starc_figure1.joined([starc_figure1.load(path) for path in parts])
            yield "bars", bars_figure(points)
            yield "regret", regret_figure(points)
            yield "worst", worst_figure(points)
        if "gridworld" in done:
            yield "gridworld", gridworld_figure(folder / "gridworld")
        if "continuous" in done:
            yield "continuous", continuous_figure(folder / "continuous")
        if "monitor" in done:
            yield "monitor", monitor_figure(folder / "monitor")


# --- figure 1 -------------------------------------------------------------------------------------


def bars_figure(points: Points) -> Figure:
    """One panel for (l2, l2), one for each canonicalisation's best cell."""
    from experiments import plots

    figure = plots.new_figure(10, 3.8)
    left, right = figure.subplots(1, 2, sharey=True)
    table = starc_figure1.correlations(points)[:, : len(NORMS)]
    best = [np.unravel_index(cells.argmax(), cells.shape) for cells in table]
    _bars(left, points, [(L2, L2)] * len(best), lambda theirs: theirs[1][1])
    _bars(right, points, [(int(n), int(m)) for n, m in best], lambda theirs: max(map(max, theirs)))
    left.set_title("norm l2, metric l2")
    right.set_title("best norm and metric of each")
    left.set_ylabel("correlation with regret")
    left.set_ylim(0, 1)
    return figure


def _bars(
    axes: Axes,
    points: Points,
    cells: list[tuple[int, int]],
    of_paper: Callable[[Sequence[Sequence[float]]], float],
) -> None:
    for i, (name, (n, m)) in enumerate(zip(CANONICALISATIONS, cells, strict=True)):
        found = with_interval(points.distance[:, i, n, m], points.regret)
        ends = [[found["mean"] - found["low"]], [found["high"] - found["mean"]]]
        axes.bar(i, found["mean"], color=COLOURS[name], alpha=0.85, width=0.7)
        axes.errorbar(i, found["mean"], ends, color="#222222", lw=1.2, capsize=3)
        if name in PAPER:
            axes.plot(i, of_paper(PAPER[name]), "D", ms=5, mfc="white", mec="#222222", zorder=4)
    words = [name.replace("_", "\n") for name in CANONICALISATIONS]
    axes.set_xticks(range(len(words)), words, fontsize=7.5)
    axes.grid(visible=False, axis="x")


def regret_figure(points: Points) -> Figure:
    """A panel for each of four distances."""
    from experiments import plots

    figure = plots.new_figure(11, 3.2)
    grid = figure.subplots(1, len(SHOWN), sharey=True, sharex=True)
    for axes, name in zip(grid, SHOWN, strict=True):
        distance = points.distance[:, CANONICALISATIONS.index(name), L2, L2]
        _cloud(axes, distance, points.regret, COLOURS[name])
        axes.set_title(f"{name}  (r = {starc_figure1.correlation(distance, points.regret):.3f})")
        axes.set_xlabel("distance")
    grid[0].set_ylabel("regret (of best - worst)")
    grid[0].set_xlim(0, 2)
    return figure


def _cloud(axes: Axes, x: ArrayLike, y: ArrayLike, colour: str) -> None:
    """All points, faint, and the mean over each twentieth of them."""
    x, y = np.ravel(x), np.ravel(y)
    chosen = np.random.default_rng(0).permutation(len(x))[:4000]
    axes.plot(x[chosen], y[chosen], ".", ms=2, color=colour, alpha=0.25, rasterized=True)
    order = np.array_split(np.argsort(x), min(20, len(x)))
    means = np.array([(x[part].mean(), y[part].mean()) for part in order])
    axes.plot(*means.T, "-o", ms=3, lw=1.5, color="#222222")


def worst_figure(points: Points) -> Figure:
    """Left worst-case regret against distance, right how much larger the certificate is."""
    from experiments import plots

    figure = plots.new_figure(8, 3.2)
    left, right = figure.subplots(1, 2)
    val = points.distance[:, CANONICALISATIONS.index("val"), L2, L2]
    _cloud(left, val, points.worst, COLOURS["val"])
    left.set_xlabel("distance (val)")
    left.set_ylabel("worst-case regret")
    real = np.isfinite(points.bound) & (points.worst > starc_figure1.ROUNDING)
    ratio = points.bound[real] / points.worst[real]
    right.hist(np.log10(ratio), bins=60, color=COLOURS["val"])
    ticks = np.arange(0, np.ceil(np.log10(ratio).max()) + 1)
    right.set_xticks(ticks, [f"{10**t:g}" for t in ticks])
    right.set_xlabel("certificate U d / worst-case regret")
    right.set_ylabel("pairs of rewards")
    return figure


# --- the others -----------------------------------------------------------------------------------


def gridworld_figure(folder: Path) -> Figure:
    """A map of all distances for four canonicalisations, and one of worst-case regret."""
    from experiments import plots

    with np.load(folder / "distances.npz") as arrays:
        names = [str(name) for name in arrays["names"]]
        maps = {name: arrays[name] for name in ("val", "minimal", "epic", "dard")}
        maps["worst-case regret"] = arrays["worst"]
    figure = plots.new_figure(13, 3.4)
    grid = figure.subplots(1, len(maps), sharey=True)
    for axes, (name, values) in zip(grid, maps.items(), strict=True):
        most = 1 if name == "worst-case regret" else 2
        axes.imshow(values, cmap="Blues", vmin=0, vmax=1.3 * most)
        for (i, j), value in np.ndenumerate(values.astype(float)):
            value = float(value)
            colour = "white" if value > 0.8 * most else "#222222"
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7.5, color=colour)
        axes.set_xticks(range(len(names)), names, rotation=40, ha="right")
        axes.set_yticks(range(len(names)), names)
        axes.grid(visible=False)
        axes.set_title(name)
    return figure


def continuous_figure(folder: Path) -> Figure:
    """Left the mean error of the distances, right that of an equivalent reward, against samples."""
    from experiments import plots

    rows = read_json_lines(folder / "metrics.jsonl")
    size = [row["samples"] for row in rows]
    figure = plots.new_figure(9.5, 3.6)
    axes = figure.subplots(1, 2)
    for panel, what in zip(axes, ("error", "shaped"), strict=True):
        for name in ESTIMATES:
            label, colour, marker = NAMES[name]
            height = [max(row[f"{name}/{what}"], 1e-7) for row in rows]
            panel.plot(size, height, marker=marker, color=colour, lw=1.5, ms=4, label=label)
        panel.set_xscale("log")
        panel.set_xticks(size, [f"{n:,}" for n in size], minor=False)
        panel.set_xticks([], minor=True)
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter(lambda value, position: f"{value:g}")
        panel.yaxis.set_minor_formatter(lambda value, position: "")
        panel.set_xlabel("sampled states and actions")
    axes[0].set_yticks([0.005, 0.01, 0.02, 0.05, 0.1])
    axes[0].set_yticks([], minor=True)
    axes[0].set_ylabel("mean error of six distances")
    axes[1].set_ylabel("distance to the same reward, shaped\n(exact: 0)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4)
    return figure


def monitor_figure(folder: Path) -> Figure:
    """Distance to the gold score, and pairs in order, over the updates."""
    from experiments import plots

    rows = read_json_lines(folder / "metrics.jsonl")
    seen = [(row["step"], row["starc"]) for row in rows if "starc" in row]
    figure = plots.new_figure(8, 3)
    left, right = figure.subplots(1, 2)
    left.plot(*np.array(seen).T, "-o", ms=4, color=COLOURS["val"])
    left.axhline(np.sqrt(2), color=COLOURS["none"], ls="--", lw=1.2, label="unrelated rewards")
    left.set_ylim(0, 1.6)
    left.legend()
    left.set_ylabel("STARC distance to gold")
    accuracy = np.array([(row["step"], row["accuracy"]) for row in rows if "accuracy" in row])
    parts = np.array_split(accuracy, min(len(accuracy), 20))
    right.plot(*np.array([part.mean(0) for part in parts]).T, "-o", ms=4, color=COLOURS["epic"])
    right.set_ylabel("pairs in order (training)")
    for axes in (left, right):
        axes.set_xlabel("updates")
    return figure
