"""Figures of skills: coverage against steps, where skills lead, and their latent paths.

matplotlib is imported with it, where a figure is made: tables are printed without.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps

from experiments import maze_plots, plots
from experiments.comparison import Comparison, curve
from experiments.plots import Axes, Figure, Style
from experiments.statistics import mean_interval
from jaxalign.envs import pointmaze

# Colours of Okabe and Ito, told apart by colour-blind readers.
_STYLES: Mapping[str, Style] = {
    "metra": {"color": "#0072B2", "marker": "o"},
    "lsd": {"color": "#E69F00", "marker": "^"},
    "diayn": {"color": "#D55E00", "marker": "D"},
    "csf": {"color": "#009E73", "marker": "v"},
    "random": {"color": "#777777", "marker": "s"},
}
CURVES = {
    "coverage": ("coverage of the skills (cells)", 1),
    "total_coverage": ("coverage of training (cells)", 1),
    "goal/reached": ("goals reached (%)", 100),
}


def read_skills(run: Comparison) -> dict[str, dict[str, np.ndarray]]:
    """What the skills of each arm's first seed show: skill, place and perhaps latent."""
    found = {}
    for arm in run.arms:
        paths = [run.directory / arm, *sorted(run.directory.glob(f"seed-*/{arm}"))]
        paths = [path / "skills.npz" for path in paths if (path / "skills.npz").exists()]
        if paths:
            with np.load(paths[0]) as arrays:
                found[arm] = dict(arrays)
    return found


def figures(run: Comparison) -> Iterator[tuple[str, Figure]]:
    """Name (also that of its file) and figure, for all that the run has data for."""
    with plots.styled():
        yield "coverage", coverage_figure(run)
        shown = read_skills(run)
        if shown:
            yield "paths", paths_figure(shown, run.config["environment"])
        latent = {arm: each for arm, each in shown.items() if "latent" in each}
        if latent:
            yield "latents", latents_figure(latent)


def coverage_figure(run: Comparison) -> Figure:
    """Coverage and goals against environment steps, with intervals over seeds."""
    figure = plots.new_figure(10, 3.2)
    for axes, (name, (label, scale)) in zip(
        figure.subplots(1, len(CURVES)), CURVES.items(), strict=True
    ):
        for arm in plots.present(run):
            draw_curve(axes, run, arm, name, scale)
        axes.set(xlabel="environment steps", ylabel=label)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_formatter(plots.EngFormatter(sep=""))
    plots.arm_legend(figure, {arm: _STYLES[arm] for arm in plots.present(run)})
    return figure


def draw_curve(axes: Axes, run: Comparison, arm: str, name: str, scale: float) -> None:
    """One arm's line, and its 95 % interval."""
    lines = curve(run.of(arm), "environment_steps", name)
    x, style = lines[:, 0].mean(0), _STYLES[arm]
    estimates = [mean_interval(scale * values) for values in lines[:, 1].T]
    axes.plot(x, [e.mean for e in estimates], ms=3, **style)
    low, high = ([getattr(e, end) for e in estimates] for end in ("low", "high"))
    axes.fill_between(x, low, high, color=style["color"], alpha=0.15, lw=0)


def skill_colours(skill: np.ndarray) -> np.ndarray:
    """A colour for each skill `[K, D]`: its angle round the wheel, or its number."""
    if skill.shape[1] == 2:
        turn = np.arctan2(skill[:, 1], skill[:, 0]) / (2 * np.pi)
        return colormaps["hsv"](turn % 1.0)
    return colormaps["hsv"](skill.argmax(1) / skill.shape[1])


def _row(arms: Sequence[str]) -> tuple[Figure, np.ndarray]:
    figure = plots.new_figure(2.4 * len(arms), 2.7)
    grid = figure.subplots(1, len(arms), squeeze=False)[0]
    for axes, arm in zip(grid, arms, strict=True):
        axes.set_title(arm, color=_STYLES[arm]["color"])
    return figure, grid


def paths_figure(shown: Mapping[str, Mapping[str, np.ndarray]], environment: str) -> Figure:
    """The places that the skills of each arm lead through, to the same scale."""
    figure, grid = _row(list(shown))
    reach = 1.05 * max(np.abs(each["place"]).max() for each in shown.values())
    for axes, (arm, each) in zip(grid, shown.items(), strict=True):
        colours = skill_colours(each["skill"]) if arm != "random" else None
        draw_paths(axes, each["place"], colours)
        axes.set_aspect("equal")
        if environment in pointmaze.MAPS:
            maze_plots.draw_maze(axes, np.asarray(pointmaze.make(environment).walls))
        elif each["place"].shape[-1] == 2:
            axes.set(xlim=(-reach, reach), ylim=(-reach, reach))
        else:
            axes.set(xlim=(-reach, reach), xlabel="x")
            axes.set_aspect("auto")
    return figure


def draw_paths(axes: Axes, paths: np.ndarray, colours: Any) -> None:
    """Paths `[T+1, K, P]`; over time where a place is one number."""
    for k in range(paths.shape[1]):
        path = paths[:, k]
        line = path.T if path.shape[-1] > 1 else (path[:, 0], np.arange(len(path)))
        colour = "#777777" if colours is None else colours[k]
        axes.plot(line[0], line[1], lw=0.8, color=colour)


def latents_figure(shown: Mapping[str, Mapping[str, np.ndarray]]) -> Figure:
    """The same in latent space."""
    figure, grid = _row(list(shown))
    for axes, each in zip(grid, shown.values(), strict=True):
        draw_paths(axes, each["latent"][..., :2], skill_colours(each["skill"]))
    return figure
