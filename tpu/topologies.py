"""What is known of each TPU slice: its size, its chips, its names at the compiler, gcloud and GKE.

A slice is named as its user orders it: the number after the dash counts TensorCores up to v5p and
in TPU7x (two a chip), and chips in v5e and v6e. The slices of every size that Cloud TPU or GKE
lists up to 256 chips are here, and larger ones up to 1,024.

Figures a chip are the published ones:
  v4   https://docs.cloud.google.com/tpu/docs/v4 (275 TFLOP/s, 32 GiB, 1200 GB/s) and Jouppi et al.
       2023, arXiv 2304.01433, table 4 (6 links of 50 GB/s each way)
  v5e  https://docs.cloud.google.com/tpu/docs/v5e
  v5p  https://docs.cloud.google.com/tpu/docs/v5p
  v6e  https://docs.cloud.google.com/tpu/docs/v6e
  7x   https://docs.cloud.google.com/tpu/docs/tpu7x
and runtimes are those of https://docs.cloud.google.com/tpu/docs/runtimes. Those pages state the
interconnect in both directions together; a chip sends half of it, which is what counts here.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from jaxalign.core.types import UserError


@dataclass(frozen=True)
class Topology:
    """One slice. Figures are a chip's; bytes are bytes, not GiB; rates are a second's.

    name: as ordered from Cloud TPU, for example "v5litepod-16".
    generation: "v4", "v5e", "v5p", "v6e" or "tpu7x".
    compiler_name: what `jax.experimental.topologies.get_topology_desc` calls it.
    compiler_options: what that function needs besides the name.
    hosts, chips: machines, and chips in all of them.
    hbm_bytes: memory that the maker states; see `available_bytes`.
    ici_bandwidth: bytes a second that a chip sends to its neighbours over all its links.
    runtime: image of a Cloud TPU VM; None where GKE alone offers the slice.
    gke_accelerator, gke_topology: node selectors of GKE.
    """

    name: str
    generation: str
    compiler_name: str
    compiler_options: Mapping[str, Any]
    hosts: int
    chips: int
    hbm_bytes: int
    peak_bf16_flops: float
    hbm_bandwidth: float
    ici_bandwidth: float
    runtime: str | None
    gke_accelerator: str
    gke_topology: str

    @property
    def chips_per_host(self) -> int:
        return self.chips // self.hosts

    @property
    def devices(self) -> int:
        """What JAX counts: the two cores of a chip are one device up to v5p, and two in TPU7x."""
        return self.chips * (2 if self.generation == "tpu7x" else 1)

    @property
    def available_bytes(self) -> int:
        """What the compiler lets a program use of a device's memory, by its own words."""
        return round(_AVAILABLE_GIB[self.generation] * GIB)


# "Ran out of memory on HBM, ... exceeds available HBM (15.75G)", as libtpu 0.0.42 says it.
_AVAILABLE_GIB = {"v4": 30.75, "v5e": 15.75, "v5p": 95.74, "v6e": 31.25, "tpu7x": 94.75}


@dataclass(frozen=True)
class _Generation:
    """What the slices of one generation share, and their shapes."""

    prefix: str
    cores: int  # that a name counts for each chip
    compiler: str
    shapes: tuple[str, ...]
    chip: Mapping[str, Any]


GIB = 2**30
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8")
_SQUARES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")

_GENERATIONS = {
    "v4": _Generation(
        prefix="v4",
        cores=2,
        compiler="v4",
        shapes=(*_CUBES, "8x8x8", "8x8x16"),
        chip={
            "hbm_bytes": 32 * GIB,
            "peak_bf16_flops": 275e12,
            "hbm_bandwidth": 1200e9,
            "ici_bandwidth": 300e9,
            "runtime": "tpu-ubuntu2204-base",
            "gke_accelerator": "tpu-v4-podslice",
        },
    ),
    "v5e": _Generation(
        prefix="v5litepod",
        cores=1,
        compiler="v5e",
        shapes=_SQUARES,
        chip={
            "hbm_bytes": 16 * GIB,
            "peak_bf16_flops": 197e12,
            "hbm_bandwidth": 819e9,
            "ici_bandwidth": 200e9,
            "runtime": "v2-alpha-tpuv5-lite",
            "gke_accelerator": "tpu-v5-lite-podslice",
        },
    ),
    "v5p": _Generation(
        prefix="v5p",
        cores=2,
        compiler="v5p",
        shapes=(*_CUBES, "8x8x8", "8x8x16"),
        chip={
            "hbm_bytes": 95 * GIB,
            "peak_bf16_flops": 459e12,
            "hbm_bandwidth": 2765e9,
            "ici_bandwidth": 600e9,
            "runtime": "v2-alpha-tpuv5",
            "gke_accelerator": "tpu-v5p-slice",
        },
    ),
    "v6e": _Generation(
        prefix="v6e",
        cores=1,
        compiler="v6e",
        shapes=_SQUARES,
        chip={
            "hbm_bytes": 32 * GIB,
            "peak_bf16_flops": 918e12,
            "hbm_bandwidth": 1638e9,
            "ici_bandwidth": 400e9,
            "runtime": "v2-alpha-tpuv6e",
            "gke_accelerator": "tpu-v6e-slice",
        },
    ),
    "tpu7x": _Generation(
        prefix="tpu7x",
        cores=2,
        compiler="tpu7x",
        shapes=(*_CUBES, "8x8x8", "8x8x16"),
        chip={
            "hbm_bytes": 192 * GIB,
            "peak_bf16_flops": 2307e12,
            "hbm_bandwidth": 7380e9,
            "ici_bandwidth": 600e9,
            "runtime": None,
            "gke_accelerator": "tpu7x",
        },
    ),
}


def _rows() -> Iterator[Topology]:
    for generation, kind in _GENERATIONS.items():
        for shape in kind.shapes:
            chips = math.prod(int(side) for side in shape.split("x"))
            bounds = _host_bounds(generation, chips)
            options: dict[str, Any] = {"chips_per_host_bounds": bounds}
            if generation in ("v4", "v5p"):
                options["chip_config_name"] = "megacore"  # the two cores of a chip as one device
            yield Topology(
                name=f"{kind.prefix}-{chips * kind.cores}",
                generation=generation,
                compiler_name=f"{kind.compiler}:{shape}",
                compiler_options=MappingProxyType(options),
                hosts=chips // math.prod(bounds),
                chips=chips,
                gke_topology=shape,
                **kind.chip,
            )


def _host_bounds(generation: str, chips: int) -> tuple[int, int, int]:
    """The block of chips in one machine: 8 where v5e or v6e serve them as one, else up to 4."""
    if chips == 1:
        return (1, 1, 1)
    return (2, 4, 1) if chips == 8 and generation in ("v5e", "v6e") else (2, 2, 1)


TOPOLOGIES: Mapping[str, Topology] = MappingProxyType({row.name: row for row in _rows()})


def find(name: str) -> Topology:
    """The slice that the user calls `name`.

    Raises: UserError with the nearest names for one that the table lacks.
    """
    if name not in TOPOLOGIES:
        near = difflib.get_close_matches(name, TOPOLOGIES, n=3, cutoff=0.3) or list(TOPOLOGIES)
        raise UserError(f"topology {name!r} is not known; the nearest are {', '.join(near)}")
    return TOPOLOGIES[name]
