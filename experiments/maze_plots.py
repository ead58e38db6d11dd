"""Figures of offline goal-conditioned RL: success, walks through the maze, values and subgoals.

matplotlib is imported with it, where a figure is made: tables are printed without.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_hex

from experiments import plots
from experiments.comparison import Comparison, curve
from experiments.plots import Axes, Figure, Style
from experiments.statistics import mean_interval

# Colours of Okabe and Ito, told apart by colour-blind readers.
_STYLES: Mapping[str, Style] = {
    "hiql": {"color": "#0072B2", "marker": "o"},
    "gcbc": {"color": "#222222", "marker": "s"},
    "gcivl": {"color": "#D55E00", "marker": "D"},
    "gciql": {"color": "#E69F00", "marker": "^"},
    "qrl": {"color": "#009E73", "marker": "v"},
    "crl": {"color": "#CC79A7", "marker": "P"},
}


def arm_style(arms: Sequence[str], arm: str) -> Style:
    """Colour and marker of an arm; variants of a method from dark to light in their order."""
    if arm in _STYLES:
        return _STYLES[arm]
    method = arm.split()[0]
    variants = [name for name in arms if name.split()[0] == method]
    shade = variants.index(arm) / max(len(variants) - 1, 1)
    return {"color": to_hex(colormaps["viridis"](0.9 * shade)), "marker": _STYLES[method]["marker"]}


COSTS = {"updates": "updates", "seconds": "training time of all seeds (s)"}
CELL = 4.0


class Walks(NamedTuple):
    """What `offline.save_walks` left of an arm; value and subgoal are None without."""

    walls: np.ndarray
    position: np.ndarray
    goal: np.ndarray
    reached: np.ndarray
    place: np.ndarray
    value: np.ndarray | None
    subgoal: np.ndarray | None


def read_walks(run: Comparison) -> dict[str, Walks]:
    """The walks of the first seed, by arm."""
    found = {}
    for arm in run.arms:
        paths = [run.directory / arm, *sorted(run.directory.glob(f"seed-*/{arm}"))]
        paths = [path / "walks.npz" for path in paths if (path / "walks.npz").exists()]
        if paths:
            with np.load(paths[0]) as arrays:
                known: dict[str, Any] = {"value": None, "subgoal": None, **arrays}
                found[arm] = Walks(**known)
    return found


def figures(run: Comparison) -> Iterator[tuple[str, Figure]]:
    """Name (also that of its file) and figure, for all that the run has data for."""
    with plots.styled():
        yield "success", success_figure(run)
        walks = read_walks(run)
        if walks:
            yield "walks", walks_figure(walks)
        valued = {arm: each for arm, each in walks.items() if each.value is not None}
        if valued:
            yield "values", values_figure(valued)


def success_figure(run: Comparison) -> Figure:
    """Success in % against updates and time, with intervals over seeds."""
    figure = plots.new_figure(9, 3.4)
    for axes, (cost, label) in zip(figure.subplots(1, 2, sharey=True), COSTS.items(), strict=True):
        for arm in plots.present(run):
            draw_success(axes, run, arm, cost)
        axes.set(xlabel=label, ylim=(-2, 102))
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(plots.EngFormatter(sep=""))
    figure.axes[0].set_ylabel("success (%)")
    arms = plots.present(run)
    plots.arm_legend(figure, {arm: arm_style(arms, arm) for arm in arms})
    return figure


def draw_success(axes: Axes, run: Comparison, arm: str, cost: str) -> None:
    """One arm's line, and its 95 % interval."""
    lines = curve(run.of(arm), cost, "success")
    x, style = lines[:, 0].mean(0), arm_style(plots.present(run), arm)
    estimates = [mean_interval(100 * values) for values in lines[:, 1].T]
    axes.plot(x, [e.mean for e in estimates], ms=4, **style)
    low, high = ([getattr(e, end) for e in estimates] for end in ("low", "high"))
    axes.fill_between(x, low, high, color=style["color"], alpha=0.15, lw=0)


# --- mazes ----------------------------------------------------------------------------------------


def extent(walls: np.ndarray) -> tuple[float, float, float, float]:
    """Left, right, bottom and top of the maze."""
    rows, columns = walls.shape
    return -1.5 * CELL, (columns - 1.5) * CELL, -1.5 * CELL, (rows - 1.5) * CELL


def draw_maze(axes: Axes, walls: np.ndarray) -> None:
    """The maze with x to the right and y upwards, as walked."""
    ends = extent(walls)
    axes.imshow(~walls, cmap="gray", vmin=-3, vmax=1, origin="lower", extent=ends)
    axes.set(xticks=[], yticks=[], xlim=ends[:2], ylim=ends[2:])
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _grid(walks: Mapping[str, Walks]) -> tuple[Figure, np.ndarray]:
    """A row of mazes for each arm, a column for each task."""
    first = next(iter(walks.values()))
    tasks, (rows, columns) = len(first.goal), first.walls.shape
    figure = plots.new_figure(2.2 * tasks, 0.5 + 2.2 * rows / columns * len(walks))
    grid = figure.subplots(len(walks), tasks, squeeze=False)
    for task, axes in enumerate(grid[0]):
        axes.set_title(f"task {task + 1}")
    for line, (arm, each) in zip(grid, walks.items(), strict=True):
        line[0].set_ylabel(arm, color=arm_style(list(walks), arm)["color"])
        for task, axes in enumerate(line):
            draw_maze(axes, each.walls)
            axes.plot(*each.goal[task], "*", ms=11, color="#E69F00", mec="black", mew=0.5, zorder=4)
    return figure, grid


def walks_figure(walks: Mapping[str, Walks]) -> Figure:
    """Every arm's attempt at every task."""
    figure, grid = _grid(walks)
    for line, (arm, each) in zip(grid, walks.items(), strict=True):
        colour = arm_style(list(walks), arm)["color"]
        for task, axes in enumerate(line):
            walk = each.position[: each.reached[task] + 2, task]
            axes.plot(*walk.T, lw=1, color=colour)
            axes.plot(*walk[0], "o", ms=4, color="black", zorder=5)
            axes.plot(*walk[-1], "s", ms=4, color=colour, zorder=5)
    return figure


def values_figure(walks: Mapping[str, Walks]) -> Figure:
    """Values of all free cells, and where subgoals point."""
    figure, grid = _grid(walks)
    for line, each in zip(grid, walks.values(), strict=True):
        for task, axes in enumerate(line):
            draw_values(axes, each, task)
    return figure


def draw_values(axes: Axes, walks: Walks, task: int) -> None:
    """Each free cell in the colour of its value, with an arrow to its subgoal."""
    assert walks.value is not None
    cells = np.full(walks.walls.shape, np.nan)
    cells[~walks.walls] = walks.value[task]
    axes.imshow(cells, cmap="viridis", origin="lower", extent=extent(walks.walls))
    if walks.subgoal is None:
        return
    way = walks.subgoal[task] - walks.place
    length = np.linalg.norm(way, axis=-1, keepdims=True)
    arrow = 0.7 * CELL * way / np.maximum(length, CELL)
    # "mid" keeps the arrow within its own cell. No arrow where the subgoal is the cell itself.
    far = length[:, 0] > 0
    axes.quiver(
        *walks.place[far].T,
        *arrow[far].T,
        angles="xy",
        scale_units="xy",
        scale=1,
        pivot="mid",
        width=0.014,
        headlength=4,
        headaxislength=4,
        color="white",
    )
