"""Flags of the TPU compiler: where they go, and that the compiler takes them where there is one."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tpu.flags import FLAGS, VARIABLE, environment, flags
from tpu.topologies import TOPOLOGIES, find

ROOT = Path(__file__).parents[2]

# A network sharded over data and parameters, compiled with and without every flag.
COMPILE = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from tpu.flags import FLAGS
from tpu.topologies import find

USUAL = [
    "xla_tpu_enable_async_collective_fusion",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather",
    "xla_tpu_enable_async_collective_fusion_multiple_steps",
    "xla_tpu_overlap_compute_collective_tc",
    "xla_enable_async_collective_permute",
    "xla_tpu_enable_latency_hiding_scheduler",
]

def loss(w, x):
    out, _ = jax.lax.scan(lambda h, k: (h + jax.nn.relu(h @ k), ()), x, w)
    return (out ** 2).mean()

def compiled(lowered, options):
    return lowered.compile(compiler_options=options).as_text()

for name in ("v4-8", "v5litepod-4", "v6e-4"):
    row = find(name)
    topology = topologies.get_topology_desc(
        topology_name=row.compiler_name, platform="tpu", **row.compiler_options
    )
    mesh = Mesh(np.array(topology.devices).reshape(2, 2), ("data", "fsdp"))
    weights = NamedSharding(mesh, P(None, "fsdp"))
    w = jax.ShapeDtypeStruct((4, 512, 512), jnp.float32, sharding=weights)
    x = jax.ShapeDtypeStruct((256, 512), jnp.float32, sharding=NamedSharding(mesh, P("data")))
    lowered = jax.jit(jax.grad(loss), out_shardings=weights).lower(w, x)
    plain = compiled(lowered, {})
    for flag in FLAGS:
        if row.generation in flag.generations:
            print(name, flag.name, "taken", compiled(lowered, {flag.name: flag.value}) != plain)
    for flag in USUAL:
        print(name, flag, "default", compiled(lowered, {flag: "true"}) == plain)
    try:
        compiled(lowered, {"xla_tpu_no_such_flag": "true"})
    except Exception:
        print(name, "refused")
"""


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_tpu_flags_never_stand_where_a_cpu_dies_of_them(name: str):
    found = environment(find(name), "gs://bucket/compiled")
    assert "XLA_FLAGS" not in found
    chosen = flags(find(name).generation)
    assert found.get(VARIABLE, "").split() == [f"--{f.name}={f.value}" for f in chosen]
    assert found["JAX_COMPILATION_CACHE_DIR"] == "gs://bucket/compiled"
    assert "JAX_COMPILATION_CACHE_DIR" not in environment(find(name))


def test_every_flag_is_for_a_generation_and_says_why():
    known = {row.generation for row in TOPOLOGIES.values()}
    assert all(flag.generations and set(flag.generations) <= known for flag in FLAGS)
    assert all(len(flag.reason.split()) > 5 for flag in FLAGS)
    assert not any(flag.name.startswith("-") for flag in FLAGS)


@pytest.mark.parity
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra tpu")
def test_the_compiler_takes_the_flags_and_has_the_usual_ones_on():
    alone = {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
    }
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        cwd=ROOT,
        env={**os.environ, **alone},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["v4-8", "xla_enable_async_all_gather", "taken", "True"] in lines
    assert ["v6e-4", "xla_tpu_scoped_vmem_limit_kib", "taken"] in [line[:3] for line in lines]
    assert all(line[3] == "True" for line in lines if line[2:3] == ["default"])
    assert sum(line[1] == "refused" for line in lines) == 3
