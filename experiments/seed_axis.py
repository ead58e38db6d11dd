"""Several seeds trained as one program: every leaf of their state has the seeds as its first axis.

Dimensions: S seeds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxalign.core import distributed
from jaxalign.core import mesh as meshes
from jaxalign.core import metrics as sinks
from jaxalign.core.checkpoint import Checkpoints
from jaxalign.core.loop import Hook, Step, fit
from jaxalign.core.state import TrainState
from jaxalign.core.types import Array, PyTree

# Leading axes of a training state's parts: seeds everywhere, but steps are counted together.
OF = TrainState(step=None, params=0, opt_state=0, slow=0, extra=0)  # ty: ignore[invalid-argument-type]


def make_mesh(spec: str, seeds: int) -> jax.sharding.Mesh:
    """The mesh `spec` of a run of so many seeds; on a CPU over as many devices as divide them.

    A CPU's devices are threads. Batches of small networks are sooner done whole than shared among
    them, and where all cores are busy, sums over devices may wait for each other for ever. With
    several processes, the rehearsal of a pod, the mesh has all devices as a pod's has.
    Raises: UserError when the mesh does not fit the devices.
    """
    devices = jax.devices()
    if devices[0].platform == "cpu" and distributed.count() == 1:
        devices = devices[: math.gcd(seeds, len(devices))]
    return meshes.make_mesh(meshes.parse_mesh(spec), devices)


def spread(
    state: TrainState, seeds: int, mesh: jax.sharding.Mesh
) -> tuple[TrainState, jax.sharding.NamedSharding | None]:
    """The state on the devices, and how its batches lie there.

    Seeds are dealt out to the devices where they divide, as they have nothing to tell each other;
    else every device has all of them and a part of each batch. Numbers that all seeds have in
    common lie everywhere.
    """
    everywhere, rows = meshes.replicated(mesh), meshes.batch_sharding(mesh)
    dealt = seeds % meshes.data_devices(mesh) == 0
    state = jax.tree.map(
        lambda leaf: distributed.put(leaf, rows if dealt and leaf.ndim else everywhere), state
    )
    return state, None if dealt else rows


class BySeed:
    """A sink that hands each seed's own sinks its number of those that are a list, and the rest.

    by_seed: the sinks of each seed, in the order of the lists.
    """

    def __init__(self, by_seed: Mapping[int, Sequence[sinks.Sink]]) -> None:
        self._sinks = by_seed

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        for i, own in enumerate(self._sinks.values()):
            row = {name: x[i] if isinstance(x, list) else x for name, x in metrics.items()}
            for sink in own:
                sink.write(step, row)

    def resume(self, step: int) -> dict[str, Any] | None:
        rows = [sink.resume(step) for own in self._sinks.values() for sink in own]
        return next((row for row in rows if row), None)

    def close(self) -> None:
        for own in self._sinks.values():
            for sink in own:
                sink.close()


def train(
    state: TrainState,
    step: Step,
    given: PyTree,
    key: Array,
    config: Any,
    arm: str,
    directories: Mapping[int, Path],
    hook: Hook,
    *,
    steps: int,
    save_every: int,
    speed: tuple[int, str],
    shown: str,
    resume: bool,
) -> TrainState:
    """The state of all seeds after `steps` dispatches; each seed has its rows in its own folder.

    given: what `step` takes every time, on the devices.
    config: of the experiment, which says what sinks there are.
    directories: of the arm, by seed. The checkpoints lie in the first one.
    hook, save_every, speed, shown: as in `fit`, counted in dispatches.
    """
    for directory in directories.values():
        directory.mkdir(parents=True, exist_ok=True)
    opened = BySeed({s: sinks.open_sinks(config, d, arm) for s, d in directories.items()})
    first = next(iter(directories.values()))
    with contextlib.closing(Checkpoints(first / "ckpt")) as checkpoints:
        state = fit(
            state,
            step,
            lambda i: given,
            key,
            steps=steps,
            checkpoints=checkpoints,
            save_every=save_every,
            resume=resume,
            sinks=[opened],
            hooks=[hook],
            title=arm,
            speed=speed,
            shown=(shown,),
            put=lambda given: given,
        )
        opened.close()
    return state


def gather(
    directories: Mapping[int, Path], arms: Sequence[str], common: Mapping[str, Any] | None = None
) -> None:
    """Every seed's `result.json`: what its arms left in theirs, as "ARM/NUMBER".

    common: numbers of the run, which come first.
    """
    for directory in directories.values():
        result = dict(common or {})
        for arm in arms:
            found = json.loads((directory / arm / "result.json").read_text())
            result |= {f"{arm}/{name}": v for name, v in found.items() if name != "arm"}
        sinks.write_json(directory / "result.json", result)


def run_settings(
    root: Path,
    settings: Mapping[str, Any],
    seeds: Sequence[int],
    env: Mapping[str, Any],
    run: Callable[[Any, Mapping[int, Path]], None],
) -> None:
    """Runs each setting with all seeds in a folder of its own, unless it is done; resumable.

    settings: experiments by name. env: for every folder's `env.json`.
    run: `(experiment, folders by seed)`, goes on where it stopped.
    """
    for name, each in settings.items():
        directories = {seed: root / name / f"seed-{seed}" for seed in seeds}
        if all((directory / "result.json").exists() for directory in directories.values()):
            continue
        for seed, directory in directories.items():
            directory.mkdir(parents=True, exist_ok=True)
            own = dataclasses.asdict(dataclasses.replace(each, seed=seed))
            sinks.write_json(directory / "config.json", own)
            sinks.write_json(directory / "env.json", {**env, "preset": name})
        run(each, directories)
