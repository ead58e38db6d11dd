"""Devices as a named mesh, and where arrays lie on it.

A mesh has named axes; the batch is spread over those in `DATA_AXES`, parameters over whatever the
sharding rules of their model say. Every mesh is made with `AxisType.Auto`: the partitioner inserts
the communication, and results do not depend on the number of devices.

Devices may come in slices, fast inside and joined by a network (a multislice TPU). Then only the
axis "data" leads from slice to slice: it is outermost, and gradients are all that crosses.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxalign.core.types import PyTree, UserError

DATA_AXES = ("data", "fsdp")
ALL_DEVICES = MappingProxyType({"data": -1})
Rules = Sequence[tuple[str, PartitionSpec]]


def parse_mesh(text: str) -> dict[str, int]:
    """`"data=-1,fsdp=2"` as `{"data": -1, "fsdp": 2}`.

    Raises: UserError for anything that is not `name=size` pairs with positive sizes or one -1.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        found = re.fullmatch(r"\s*([A-Za-z_]\w*)\s*=\s*(-?\d+)\s*", part)
        if not found or found[1] in sizes:
            raise UserError(
                f"mesh {text!r}: {part!r} is not a new NAME=SIZE; write for example data=-1,fsdp=2"
            )
        sizes[found[1]] = int(found[2])
    _check_sizes(sizes)
    return sizes


def make_mesh(
    sizes: Mapping[str, int] = ALL_DEVICES, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh over all `devices` (default: every device of the run).

    sizes: axis name to size; one size may be -1, which takes the devices that are left.
    Raises: UserError when the sizes do not multiply to the number of devices, or "data" cannot be
        shared out to the slices.
    """
    _check_sizes(sizes)
    devices = list(jax.devices() if devices is None else devices)
    known = math.prod(size for size in sizes.values() if size != -1)
    filled = {name: len(devices) // known if n == -1 else n for name, n in sizes.items()}
    if math.prod(filled.values()) != len(devices):
        shown = ",".join(f"{name}={size}" for name, size in sizes.items())
        raise UserError(
            f"mesh {shown}: the sizes must multiply to the number of devices, {len(devices)}; "
            f"change them, or let one be -1 with the others dividing {len(devices)}"
        )
    if (slices := _slices(devices)) > 1:
        return _over_slices(filled, devices, slices)
    # An axis of 8 in a torus of 4 x 4 x 4 takes one side and half of another.
    ordered = mesh_utils.create_device_mesh(
        tuple(filled.values()), devices, allow_split_physical_axes=True
    )
    return Mesh(ordered, tuple(filled), axis_types=(AxisType.Auto,) * len(filled))


def _slices(devices: Sequence[jax.Device]) -> int:
    """How many slices of a TPU; other machines may number their hosts so, but are one."""
    return len({getattr(each, "slice_index", 0) for each in devices if each.platform == "tpu"})


def _over_slices(sizes: Mapping[str, int], devices: Sequence[jax.Device], slices: int) -> Mesh:
    """A mesh whose "data" axis is made of the slices, and of what it has inside of each."""
    if sizes.get("data", 1) % slices:
        shown = ",".join(f"{name}={size}" for name, size in sizes.items())
        raise UserError(
            f"mesh {shown}: data must be a multiple of {slices}, the number of slices, as it alone "
            f"leads from one to another; use for example data=-1 with the others inside a slice"
        )
    across = [slices if name == "data" else 1 for name in sizes]
    inside = [size // n for size, n in zip(sizes.values(), across, strict=True)]
    ordered = mesh_utils.create_hybrid_device_mesh(
        inside, across, devices, allow_split_physical_axes=True
    )
    return Mesh(np.asarray(ordered), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def _check_sizes(sizes: Mapping[str, int]) -> None:
    bad = {name: size for name, size in sizes.items() if size != -1 and size < 1}
    if not sizes or bad or list(sizes.values()).count(-1) > 1:
        raise UserError(f"mesh {dict(sizes)}: sizes must be positive, and at most one may be -1")


def data_axes(mesh: Mesh) -> tuple[str, ...]:
    """The axes of this mesh over which a batch is spread."""
    return tuple(name for name in DATA_AXES if name in mesh.axis_names)


def data_devices(mesh: Mesh) -> int:
    """How many devices share a batch."""
    return math.prod(mesh.shape[axis] for axis in data_axes(mesh))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis over all axes that carry data, the other axes whole."""
    axes = data_axes(mesh)
    return NamedSharding(mesh, PartitionSpec(axes) if axes else PartitionSpec())


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def check_divisible(what: str, size: int, mesh: Mesh) -> None:
    """Raises UserError unless `size` items can be spread evenly over the data axes.

    what: the name that the user knows the number by, for example `--batch`.
    """
    parts = data_devices(mesh)
    if size < 1 or size % parts:
        near = max(parts, round(size / parts) * parts)
        raise UserError(
            f"{what} {size}: must be a positive multiple of {parts}, the number of devices that "
            f"share the batch; use for example {near}"
        )


def shardings(tree: PyTree, mesh: Mesh, rules: Rules) -> PyTree:
    """A `NamedSharding` for each leaf of `tree` (arrays or `ShapeDtypeStruct`s).

    rules: ordered `(regular expression, PartitionSpec)`; the first whose expression is found in
        the leaf's path ("params/dense_0/kernel") holds, a leaf without rule is replicated. Axes
        that the mesh lacks are left out, so that one set of rules serves every mesh.
    Raises: UserError where a rule does not fit the leaf's shape.
    """

    def choose(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = next((spec for rule, spec in rules if re.search(rule, name)), PartitionSpec())
        spec = PartitionSpec(*(_present(axes, mesh) for axes in spec))
        _check_fits(name, leaf.shape, spec, mesh)
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(choose, tree)


def lying(tree: PyTree, mesh: Mesh, rules: Rules) -> PyTree:
    """The shapes of `tree` with their places by `rules`; nothing is allocated."""
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        tree,
        shardings(tree, mesh, rules),
    )


def _present(axes: str | tuple[str, ...] | None, mesh: Mesh) -> str | tuple[str, ...] | None:
    """One entry of a spec without the axes that the mesh lacks."""
    if axes is None or isinstance(axes, str):
        return axes if axes in mesh.axis_names else None
    return tuple(axis for axis in axes if axis in mesh.axis_names) or None


def _check_fits(name: str, shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh) -> None:
    if len(spec) > len(shape):
        raise UserError(f"{name} of shape {shape}: the rule {spec} has more axes; mend the rule")
    for size, axes in zip(shape, spec, strict=False):
        axes = (axes,) if isinstance(axes, str) else axes or ()
        parts = math.prod(mesh.shape[axis] for axis in axes)
        if size % parts:
            raise UserError(
                f"{name} of shape {shape}: {size} does not divide by {parts}, the size of mesh "
                f"axis {'+'.join(axes)}; change the model's size or the mesh"
            )
