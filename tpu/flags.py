"""The environment that a run on TPUs gets: flags of the TPU compiler, and its caches.

TPU flags go into LIBTPU_INIT_ARGS and nowhere else: in XLA_FLAGS every process without a TPU dies
of them ("Unknown flag in XLA_FLAGS"), and a misspelt one in LIBTPU_INIT_ARGS ends a process that
has one. So the list is short, and `tests/tpu/test_flags.py` has the compiler accept every name.

Recipes of others list a dozen flags that make collectives asynchronous, fuse them and hide their
latency. In today's compiler those are on by default: compiled with and without them, a sharded
network gave the same program (`tests/tpu/test_flags.py` does it again). Only what changes the
program is here. No time was measured on a TPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from tpu.topologies import Topology


class Flag(NamedTuple):
    """One flag of the TPU compiler.

    generations: those that it is set for.
    reason: what it does for them.
    """

    name: str
    value: str
    generations: tuple[str, ...]
    reason: str


FLAGS = (
    Flag(
        "xla_enable_async_all_gather",
        "true",
        ("v4",),
        "fsdp gathers the next layer's parameters while this one computes; v4 alone has it off",
    ),
    Flag(
        "xla_tpu_scoped_vmem_limit_kib",
        "98304",
        ("v6e",),
        "an operation may fill 96 MiB of vector memory instead of 32, for larger tiles: two layers "
        "2,048 wide take half as long by the compiler's own estimate",
    ),
)

VARIABLE = "LIBTPU_INIT_ARGS"


def flags(generation: str) -> tuple[Flag, ...]:
    """The flags for chips of `generation`, such as "v5e"; none for one that needs none."""
    return tuple(flag for flag in FLAGS if generation in flag.generations)


def environment(topology: Topology, cache: str | None = None) -> Mapping[str, str]:
    """The environment variables of a run on `topology`.

    cache: directory of compiled programs, such as "gs://bucket/compiled", which later runs of the
        same program, and its restarts, start from at once. Whoever may write there can make the
        readers run anything.
    """
    found = {
        # Without a chip to be had jax would go on, on the CPU, at the price of a TPU.
        "JAX_PLATFORMS": "tpu,cpu",
        # Programs of at least a second: smaller ones cost more to fetch than to compile.
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1",
    }
    if chosen := flags(topology.generation):
        found[VARIABLE] = " ".join(f"--{flag.name}={flag.value}" for flag in chosen)
    if cache is not None:
        found["JAX_COMPILATION_CACHE_DIR"] = cache
    return found
