"""Where the data of an offline task come from: OGBench's files, or made on this machine.

Walks through point mazes come from a compiled generator, play with cubes, scene and puzzle from a
scripted hand in OGBench's own environments. What was made is kept in the cache, with a note of how.
"""

from __future__ import annotations

import functools
import importlib.metadata
from pathlib import Path

from experiments import ogbench_settings
from jaxalign.core.metrics import Progress
from jaxalign.core.types import UserError
from jaxalign.data import ogbench_play, pointmaze_data, trajectories
from jaxalign.data.trajectories import Arrays, Provenance
from jaxalign.envs import pointmaze


def in_maze(task: str) -> bool:
    """Whether tasks can be attempted in an environment of our own."""
    return environment(task) in pointmaze.MAPS


def environment(task: str) -> str:
    """The environment's name: "pointmaze-medium" of "pointmaze-medium-navigate"."""
    return task.rpartition("-")[0]


def read(task: str, folder: str, count: int, seed: int) -> tuple[Arrays, Provenance]:
    """A task's data set and where it comes from.

    folder: of OGBench's files, TASK-v0.npz; empty for data made here. count: of episodes made here;
    0: as many as OGBench's set has. seed: of what is made here.
    """
    if folder:
        return trajectories.read(Path(folder) / f"{task}-v0.npz")
    size = f"-{count}" if count else ""
    make = functools.partial(maze_data if in_maze(task) else play_data, task, count)
    return trajectories.stored(f"{task}{size}", make, seed)


def maze_data(task: str, count: int, seed: int) -> tuple[Arrays, Provenance]:
    """Walks through a point maze, from the compiled generator."""
    recipe = pointmaze_data.recipe(task)
    recipe = recipe._replace(episodes=count or recipe.episodes)
    chunks, done = [], 0
    with Progress(recipe.episodes, f"data of {task}", 0, (1, "episodes")) as bar:
        for chunk in pointmaze_data.generate(recipe, seed):
            chunks.append(chunk)
            done += int(chunk["terminals"].sum())
            bar.update(done)
    return pointmaze_data.join(chunks), {
        "source": "regenerated",
        "generator": "jaxalign.data.pointmaze_data",
        **recipe._asdict(),
        "seed": seed,
        "versions": {package: importlib.metadata.version(package) for package in ("jax", "numpy")},
    }


def play_data(task: str, count: int, seed: int) -> tuple[Arrays, Provenance]:
    """Play of a scripted hand in the package's environment."""
    name, kind = environment(task), ogbench_settings.split(task)[1]
    if kind != "play" or name not in ogbench_play.RECIPES:
        raise UserError(
            f"task {task!r}: its data cannot be made here; download {task}-v0.npz from OGBench and "
            "name its folder with --data"
        )
    total = count or ogbench_play.RECIPES[name].episodes
    with Progress(total, f"data of {task}", 0, (1, "episodes")) as bar:
        return ogbench_play.generate(name, range(total), seed, progress=bar.update)
