"""Offline trajectories for goal-conditioned learning, in OGBench's files and layout.

OGBench (Park et al., "OGBench: Benchmarking Offline Goal-Conditioned RL", 2025) keeps a data set as
`NAME.npz`, and the tenth as much again for validation as `NAME-val.npz`. What is read of a file:

- observations `[N, O]`: the states, episode after episode, the last state of each included.
- actions `[N, A]` in [-1, 1]: what was done in the state. That of a last state means nothing.
- terminals `[N]`: 1 on the last state of each episode, 0 elsewhere.
- provenance: how the file came about, as JSON text; only files made here have it.

The state after row i is row i+1. Other arrays (qpos, qvel, button_states, next_observations) are
left on the disk.

Departures: pictures and discrete actions are refused, as no method here takes them.

Dimensions: N stored states, O observation, A action, M states that have a successor.
"""

from __future__ import annotations

import json
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxalign.core.checkpoint import cache_directory, replacing, writing
from jaxalign.core.types import Array, UserError

Arrays = dict[str, np.ndarray]
Provenance = dict[str, Any]

HOME = "https://rail.eecs.berkeley.edu/datasets/ogbench"
RANKS = {"observations": 2, "actions": 2, "terminals": 1}
SLACK = 1e-3  # how far beyond [-1, 1] an action may lie: what rounding does, and no more


class Trajectories(NamedTuple):
    """Episodes one after the other, and where each state's own episode ends.

    observations: `[N, O] f32`.
    actions: `[N, A] f32`; that of an episode's last state means nothing.
    end: `[N] i32`, the index of the last state of the state's own episode.
    valid: `[M] i32`, rising, the indices of the states that have a successor.
    """

    observations: Array | np.ndarray
    actions: Array | np.ndarray
    end: Array | np.ndarray
    valid: Array | np.ndarray


def index(arrays: Mapping[str, np.ndarray]) -> Trajectories:
    """The trajectories of arrays as `read` gives them, on the host; `jax.device_put` moves them."""
    last = np.flatnonzero(arrays["terminals"])
    rows = np.arange(len(arrays["terminals"]))
    end = last[np.searchsorted(last, rows)]
    return Trajectories(
        observations=arrays["observations"],
        actions=arrays["actions"],
        end=end.astype(np.int32),
        valid=np.flatnonzero(rows < end).astype(np.int32),
    )


# ---------------------------------------------------------------- files


def read(path: str | Path) -> tuple[Arrays, Provenance]:
    """A data set from its file, checked.

    Returns observations `[N, O] f32`, actions `[N, A] f32` and terminals `[N] bool`, and the
    provenance, whose "source" is "downloaded" where the file says nothing.
    Raises: UserError where there is no such file, where it cannot be read, or where an array is
        missing or not as the head of this module has it.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"data set {path} does not exist: 'python -m experiments.hiql' makes those of "
            "pointmaze, cube, scene and puzzle by itself; download any other from "
            f"{HOME}/{path.name} and put it there"
        )
    if not zipfile.is_zipfile(path):
        raise UserError(f"data set {path} is no npz file, or not all of one: download it again")
    try:
        # Opened here, as numpy leaves a broken file open.
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            raw = {name: file[name] for name in RANKS if name in file}
            text = str(file["provenance"]) if "provenance" in file else None
        provenance = json.loads(text) if text else {"source": "downloaded", "file": path.name}
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"data set {path} cannot be read ({reason}): download or make it again"
        ) from None
    return _checked(path, raw), provenance


def write(
    path: str | Path, arrays: Mapping[str, np.ndarray], provenance: Mapping[str, Any]
) -> None:
    """Stores a data set in one piece: a reader sees all of it, or what was there before.

    provenance: what JSON can hold.
    Raises: UserError when the disk is full.
    """
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    everything: dict[str, Any] = {**arrays, "provenance": np.array(json.dumps(dict(provenance)))}
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **everything)


def stored(
    name: str, make: Callable[[int], tuple[Arrays, Provenance]], seed: int
) -> tuple[Arrays, Provenance]:
    """What `read` gives of datasets/NAME-SEED.npz in the cache; made first if it is not there.

    name: says all that the data depend on, but for the seed: a smaller set is another name.
    make: gives the arrays and provenance of a seed.
    """
    path = cache_directory() / "datasets" / f"{name}-{seed}.npz"
    if path.exists():
        try:
            return read(path)
        except UserError as error:
            warnings.warn(f"{error}; it is made again now", stacklevel=2)
    write(path, *make(seed))
    return read(path)


# ---------------------------------------------------------------- checks


def _checked(path: Path, raw: Arrays) -> Arrays:
    """The arrays in the types that are used. Raises: UserError for the first fault."""
    missing = [name for name in RANKS if name not in raw]
    if missing:
        raise UserError(
            f"data set {path} has no {' and no '.join(missing)}: it needs {', '.join(RANKS)}, as "
            f"the files of {HOME}"
        )
    _check_types(path, raw)
    _check_shapes(path, raw)
    with np.errstate(over="ignore"):  # a number too large for f32 is infinite: told below
        observations, actions = (
            raw[name].astype(np.float32, copy=False) for name in ("observations", "actions")
        )
    last = raw["terminals"] == 1
    _check_episodes(path, raw["terminals"])
    _check_finite(path, "observations", observations)
    # What stands in an episode's last row was never done, so it may be anything.
    done = np.where(last[:, None], np.float32(0), actions)
    _check_finite(path, "actions", done)
    _check_range(path, done)
    return {"observations": observations, "actions": actions, "terminals": last}


def _check_types(path: Path, raw: Arrays) -> None:
    for name, kind in (("observations", "pictures"), ("actions", "discrete actions")):
        if not np.issubdtype(raw[name].dtype, np.floating):
            raise UserError(
                f"data set {path}: {name} are {raw[name].dtype}, and {kind} are not supported; "
                "use a data set of states and continuous actions, which are floats"
            )
    if raw["terminals"].dtype.kind not in "biuf":
        raise UserError(
            f"data set {path}: terminals are {raw['terminals'].dtype}; store 0 and 1, as bool, "
            "integer or float"
        )


def _check_shapes(path: Path, raw: Arrays) -> None:
    for name, rank in RANKS.items():
        if raw[name].ndim != rank or 0 in raw[name].shape:
            wanted = {1: "[N]", 2: "[N, size]"}[rank]
            raise UserError(
                f"data set {path}: {name} have shape {raw[name].shape}; store {wanted}, a row for "
                "each state, none of them empty"
            )
    lengths = {name: len(raw[name]) for name in RANKS}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{length} {name}" for name, length in lengths.items())
        raise UserError(f"data set {path} has {told}; store one of each for every state")


def _check_episodes(path: Path, terminals: np.ndarray) -> None:
    wrong = (terminals != 0) & (terminals != 1)
    if wrong.any():
        row = int(wrong.argmax())
        raise UserError(
            f"data set {path}: terminals[{row}] is {terminals[row]}; store 1 on the last state of "
            "an episode, and 0 elsewhere"
        )
    last = np.flatnonzero(terminals)
    if not terminals[-1]:
        found = f"the last 1 is in row {last[-1]}" if last.size else "there is no 1 at all"
        raise UserError(
            f"data set {path}: terminals end with 0 ({found}); store 1 on the last state of every "
            "episode, that in the last row included"
        )
    short = np.diff(last, prepend=-1) < 2
    if short.any():
        raise UserError(
            f"data set {path}: row {last[short.argmax()]} is an episode of one state, which has no "
            "transition; leave it out, and store terminals of 1 on last states only"
        )


def _check_finite(path: Path, name: str, values: np.ndarray) -> None:
    bad = ~np.isfinite(values)
    if bad.any():
        row, column = (int(place) for place in np.unravel_index(bad.argmax(), bad.shape))
        raise UserError(
            f"data set {path}: {name}[{row}, {column}] is {values[row, column]}, the first of "
            f"{bad.sum()} that are not finite; leave out the episodes that have them"
        )


def _check_range(path: Path, actions: np.ndarray) -> None:
    bad = np.abs(actions) > 1 + SLACK
    if bad.any():
        row, column = (int(place) for place in np.unravel_index(bad.argmax(), bad.shape))
        raise UserError(
            f"data set {path}: actions[{row}, {column}] is {actions[row, column]:g}, the first of "
            f"{bad.sum()} outside [-1, 1]; divide the actions by the environment's range"
        )
