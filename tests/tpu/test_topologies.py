"""The table of slices: its arithmetic always, and each row against the TPU compiler where it is."""

import importlib.util
import math
import subprocess
import sys
from pathlib import Path

import pytest

from jaxalign.core.types import UserError
from tpu.topologies import TOPOLOGIES, find

ROWS = [pytest.param(row, id=name) for name, row in TOPOLOGIES.items()]

# In a process of its own: the compiler's plugin reads its environment once, and leaves threads.
INSTANTIATE = """
from jax.experimental import topologies
from tpu.topologies import TOPOLOGIES

for name, row in TOPOLOGIES.items():
    slice_ = topologies.get_topology_desc(
        topology_name=row.compiler_name, platform="tpu", **row.compiler_options
    )
    hosts = {device.process_index for device in slice_.devices}
    print(name, len(slice_.devices), len(hosts))
"""


@pytest.mark.parametrize("row", ROWS)
def test_the_arithmetic_of_a_row(row):
    assert math.prod(int(side) for side in row.gke_topology.split("x")) == row.chips
    assert row.hosts * row.chips_per_host == row.chips
    assert row.chips_per_host in (1, 4, 8)
    assert math.prod(row.compiler_options["chips_per_host_bounds"]) == row.chips_per_host
    assert row.compiler_name.split(":")[1] == row.gke_topology
    # Names count cores where a chip has two, and chips where it has one.
    cores = 2 if row.generation in ("v4", "v5p", "tpu7x") else 1
    assert int(row.name.split("-")[1]) == cores * row.chips


def test_the_sizes_that_users_order_are_there():
    v5e = [f"v5litepod-{chips}" for chips in (1, 4, 8, 16, 32, 64, 128, 256)]
    cubes = [f"{name}-{8 * 2**i}" for name in ("v4", "v5p") for i in range(7)]
    assert {*v5e, *cubes, "v6e-1", "v6e-256", "v5p-2048"} <= TOPOLOGIES.keys()
    assert find("v5p-2048").chips == 1024


def test_figures_of_one_generation_are_the_same_in_all_its_rows():
    for row in TOPOLOGIES.values():
        other = next(r for r in TOPOLOGIES.values() if r.generation == row.generation)
        for field in ("hbm_bytes", "peak_bf16_flops", "hbm_bandwidth", "ici_bandwidth", "runtime"):
            assert getattr(row, field) == getattr(other, field)


def test_an_unknown_name_is_answered_with_its_neighbours():
    with pytest.raises(UserError, match=r"'v5e-256'.*v5litepod-256|v6e-256"):
        find("v5e-256")
    with pytest.raises(UserError, match="v5p-2048"):
        find("v5p-2084")


@pytest.mark.parity
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="the extra `tpu` is missing")
def test_the_compiler_knows_every_row():
    done = subprocess.run(
        [sys.executable, "-c", INSTANTIATE],
        cwd=Path(__file__).parents[2],
        env={"PATH": "", "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()}
    assert told == {name: [str(r.devices), str(r.hosts)] for name, r in TOPOLOGIES.items()}
