"""Whether a slice is sound: a few minutes before a run that takes days.

    python -m tpu.smoke [--quick] [--methods metra,hiql] [--workdir gs://BUCKET/smoke]

counts processes and devices, measures the all-reduce over all of them, compares the parameters
that every process has drawn, and runs `tiny` of every experiment (`--quick` leaves that out). One
CPU will do, and so will `python -m tpu.local -n 2 -d 4 -- python -m tpu.smoke`. On several machines
the experiments need a workdir that all of them see. Exit code 1 where something is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import importlib
import io
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments import cli
from jaxalign.core import distributed, places
from jaxalign.core.types import Array, UserError
from jaxalign.models import mlp

METHODS = ("b2_diffurl", "downstream", "hiql", "metra", "r3hf", "starc")
KIB, MIB = 2**10, 2**20
SIZES, QUICK_SIZES = (KIB, MIB, 16 * MIB, 256 * MIB), (KIB, MIB)
REPEATS = 5


# --- devices -------------------------------------------------------------------------------------


def devices() -> str:
    """What there is, in one line."""
    first = jax.devices()[0]
    return (
        f"{jax.process_count()} processes, {jax.device_count()} devices ({first.device_kind}), "
        f"{jax.local_device_count()} in this process; jax {jax.__version__}"
    )


def all_reduce(size: int) -> tuple[float, bool]:
    """Bytes a second that every device sends in a sum over all, and whether the sum is right.

    A ring sends 2 (n - 1) / n of the array from each of n devices; one device sends nothing.

    size: bytes of the float32 array that each device adds.
    """
    mesh = Mesh(np.array(jax.devices()), ("all",))
    count = jax.device_count()
    rows = NamedSharding(mesh, PartitionSpec("all"))
    make = jax.jit(_rows, static_argnums=(0, 1), out_shardings=rows)
    add = jax.jit(
        jax.shard_map(
            functools.partial(jax.lax.psum, axis_name="all"),
            mesh=mesh,
            in_specs=PartitionSpec("all"),
            out_specs=PartitionSpec(),
        )
    )
    given = make(count, size // 4)
    right = bool(np.all(distributed.fetch(add(given)) == count * (count + 1) / 2))
    best = min(_seconds(add, given) for _ in range(REPEATS))
    return 2 * (count - 1) / count * size / best, right


def _rows(count: int, width: int) -> Array:
    """`[count, width]`: device i adds i + 1."""
    return jnp.broadcast_to(jnp.arange(1, count + 1, dtype=jnp.float32)[:, None], (count, width))


def _seconds(function: Any, given: Array) -> float:
    jax.block_until_ready(given)
    start = time.perf_counter()
    jax.block_until_ready(function(given))
    return time.perf_counter() - start


# --- parameters ----------------------------------------------------------------------------------


def parameter_hashes() -> list[str]:
    """One hash for each process, of the parameters that it draws under jit from one key."""
    model = mlp.mlp(8, (64, 64), 4)
    params = jax.jit(model.init)(jax.random.key(0))
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        found.update(np.asarray(leaf).tobytes())
    here = np.frombuffer(found.digest()[:8], np.uint8)
    return [bytes(row).hex() for row in multihost_utils.process_allgather(here[None], tiled=True)]


# --- experiments ---------------------------------------------------------------------------------


def run_tiny(name: str, folder: str) -> float:
    """Seconds that `tiny` of an experiment took. Its errors are raised as they come."""
    module = importlib.import_module(f"experiments.{name}")
    run = cli.parse(name, module.PRESETS, "tiny", ["tiny", "--workdir", f"{folder}/{name}"])
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        module.run_all(dataclasses.replace(run, workdir=places.open_folder(run.workdir)))
        places.keep()
    return time.perf_counter() - start


def new_folder(workdir: str | None) -> str:
    """A folder that is not there yet, of the same name for every process."""
    name = f"{workdir or tempfile.gettempdir()}/jaxalign-smoke-{time.time_ns()}"
    return distributed.broadcast(name.encode() if distributed.is_main() else b"").decode()


# --- the command line ----------------------------------------------------------------------------


def check(sizes: Sequence[int], methods: Sequence[str], workdir: str | None = None) -> bool:
    """Everything, told line by line by process 0; whether all is well."""
    _say(devices())
    sound = True
    for size in sizes:
        rate, right = all_reduce(size)
        sound &= right
        wrong = "" if right else "  WRONG SUM"
        _say(f"all-reduce of {size / KIB:9,.0f} KiB: {rate / 1e9:8.3f} GB/s a device{wrong}")
    hashes = parameter_hashes()
    same = len(set(hashes)) == 1
    _say(f"parameters: {hashes[0]} in every process" if same else f"PARAMETERS DIFFER: {hashes}")
    folder = new_folder(workdir)
    for name in methods:
        _say(f"{name} tiny: {run_tiny(name, folder):.1f} s")
    shutil.rmtree(folder, ignore_errors=True)
    return sound and same


def _say(line: str) -> None:
    if distributed.is_main():
        print(line, flush=True)


def _chosen(text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    wrong = [name for name in names if name not in METHODS]
    if wrong:
        raise UserError(f"--methods {wrong[0]}: must be among {', '.join(METHODS)}")
    return names


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """The command line. Ends the process with the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tpu.smoke", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, no experiment")
    parser.add_argument("--methods", default=",".join(METHODS), help="whose tiny is run")
    parser.add_argument("--workdir", help="where they run (the machine's temporary folder)")
    options = parser.parse_args(sys.argv[1:] if argv is None else argv)
    with distributed.left_together(), cli.exit_codes():
        methods = _chosen(options.methods)
        cli.use_all_cores()
        cli.keep_compiled_programs()
        distributed.start()
        sizes = QUICK_SIZES if options.quick else SIZES
        sound = check(sizes, [] if options.quick else methods, options.workdir)
        if not sound:
            raise SystemExit(1)
    raise SystemExit(0)


if __name__ == "__main__":
    main()
