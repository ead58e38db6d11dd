"""Several seeds trained as one program: every leaf of their state has the seeds as its first axis.

Dimensions: S seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jaxalign.core import mesh as meshes
from jaxalign.core import metrics as sinks
from jaxalign.core.state import TrainState

# Leading axes of a training state's parts: seeds everywhere, but steps are counted together.
OF = TrainState(step=None, params=0, opt_state=0, slow=0, extra=0)  # ty: ignore[invalid-argument-type]


def make_mesh(spec: str, seeds: int) -> jax.sharding.Mesh:
    """The mesh `spec` of a run of so many seeds; on a CPU over as many devices as divide them.

    A CPU's devices are threads. Batches of small networks are sooner done whole than shared among
    them, and where all cores are busy, sums over devices may wait for each other for ever.
    Raises: UserError when the mesh does not fit the devices.
    """
    devices = jax.devices()
    if devices[0].platform == "cpu":
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
    dealt = seeds % math.prod(mesh.shape[axis] for axis in meshes.data_axes(mesh)) == 0
    state = jax.tree.map(
        lambda leaf: jax.device_put(leaf, rows if dealt and leaf.ndim else everywhere), state
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
