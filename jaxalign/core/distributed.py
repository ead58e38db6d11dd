"""The same program on several processes: joining, values that all have, who writes, how it ends.

Every process runs the same lines on the same numbers and owns a part of the devices. What it must
not do alone is a computation on arrays of the whole mesh: whether there is one is decided from what
all processes know. Process 0 alone speaks and leaves the run's files; checkpoints are written by
all. On one process everything here does nothing, or what its name says and no more.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from jaxalign.core import mesh as meshes
from jaxalign.core.types import NonFinite, PyTree, UserError

# What says where the others are, on hosts that nobody else tells: JAX's own names.
COORDINATOR, PROCESSES, PROCESS = (
    "JAX_COORDINATOR_ADDRESS",
    "JAX_NUM_PROCESSES",
    "JAX_PROCESS_ID",
)
# Seconds after which a process that is not heard of is taken for dead, and the run ends.
HEARTBEAT = "JAXALIGN_HEARTBEAT_SECONDS"
JOIN_SECONDS, HEARTBEAT_SECONDS, LEAVE_SECONDS = 300, 30, 20

# What `raise_together` tells, by number (0: nothing), and in how many bytes.
KINDS, SAID = (type(None), UserError, NonFinite), 512

LOST = 134  # exit code: another process was lost; as of those that JAX itself ends


# --- joining -------------------------------------------------------------------------------------


def start(environ: Mapping[str, str] = os.environ) -> None:
    """Joins the run's other processes where there are any. Before the first use of a device.

    TPU slices, Slurm and Open MPI tell by themselves; other hosts by JAX_COORDINATOR_ADDRESS
    (HOST:PORT of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID.
    Raises: UserError when those are wrong, or the others do not come.
    """
    if jax.distributed.is_initialized() or not (given := _given(environ) or _told(environ)):
        return
    heartbeat = _whole(environ, HEARTBEAT, str(HEARTBEAT_SECONDS), 1)
    try:
        jax.distributed.initialize(
            **({} if given == "told" else given),  # ty: ignore[invalid-argument-type]
            initialization_timeout=JOIN_SECONDS,
            heartbeat_timeout_seconds=heartbeat,
            shutdown_timeout_seconds=LEAVE_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        line = str(error).strip().splitlines()[0]
        raise UserError(
            f"cannot join the run's other processes ({line}); start all of them within "
            f"{JOIN_SECONDS} seconds, each able to reach the first"
        ) from error


def _given(environ: Mapping[str, str]) -> dict[str, Any] | None:
    """What the environment says in our three names; None where it says nothing."""
    names = (COORDINATOR, PROCESSES, PROCESS)
    here = [name for name in names if environ.get(name)]
    if not here:
        return None
    if len(here) < len(names):
        missing = ", ".join(name for name in names if name not in here)
        raise UserError(f"{here[0]} is set without {missing}; set all three, or none")
    count = _whole(environ, PROCESSES, "", 1)
    index = _whole(environ, PROCESS, "", 0)
    if index >= count:
        raise UserError(f"{PROCESS}={index}: must be below {PROCESSES}, {count}; count from 0")
    address = environ[COORDINATOR]
    if not address.rpartition(":")[0] or not address.rpartition(":")[2].isdigit():
        raise UserError(f"{COORDINATOR}={address}: must be HOST:PORT of process 0")
    return {"coordinator_address": address, "num_processes": count, "process_id": index}


def _told(environ: Mapping[str, str]) -> str | None:
    """The word "told" where the machine knows of other processes, for JAX to ask it."""
    several = any(
        environ.get(name, "1") not in ("", "1")
        for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
    )
    on_tpu = environ.get("JAX_PLATFORMS", "tpu").startswith("tpu") and (
        "TPU_WORKER_HOSTNAMES" in environ
        or "MEGASCALE_COORDINATOR_ADDRESS" in environ
        or ((Path("/dev/accel0").exists() or Path("/dev/vfio/0").exists()) and _installed("libtpu"))
    )
    return "told" if several or on_tpu else None


def _installed(package: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(package) is not None


def _whole(environ: Mapping[str, str], name: str, default: str, least: int) -> int:
    text = environ.get(name, default)
    if not text.isdigit() or int(text) < least:
        raise UserError(f"{name}={text}: must be a whole number of at least {least}")
    return int(text)


def count() -> int:
    """How many processes the run has."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def is_main() -> bool:
    """Whether this process is the one that speaks and leaves the run's files.

    Alone it is, without a device being touched.
    """
    return not jax.distributed.is_initialized() or jax.process_index() == 0


# --- values --------------------------------------------------------------------------------------


def put(tree: PyTree, sharding: Any) -> PyTree:
    """The tree on the devices: `jax.device_put` that takes host values on any number of processes.

    tree: arrays, the same on every process where they are not global already.
    sharding: one, or a tree of them.
    """
    if count() == 1:
        return jax.device_put(tree, sharding)
    if isinstance(sharding, jax.sharding.Sharding):
        return jax.tree.map(lambda leaf: _put(leaf, sharding), tree)
    return jax.tree.map(_put, tree, sharding)


def _put(leaf: Any, sharding: jax.sharding.Sharding) -> Any:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        # A key is put by its numbers. Its own last axis, of the numbers, is never shared.
        numbers = _put(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(numbers, impl=jax.random.key_impl(leaf))
    host = np.asarray(leaf)
    # device_put would first compare the values of all processes, leaf by leaf. Like it, this is
    # meant, and no transfer to be guarded against.
    with jax.transfer_guard_host_to_device("allow"):
        return jax.make_array_from_callback(
            host.shape, sharding, lambda index: host[index], dtype=host.dtype
        )


def fetch(tree: PyTree) -> PyTree:
    """The tree as NumPy arrays, whole on every process; waits for the devices.

    All processes must ask for the same at the same point of the program.
    """
    if count() > 1:
        tree = jax.tree.map(_whole_array, tree)
    return jax.device_get(tree)


def _whole_array(leaf: Any) -> Any:
    """On the host, where it must be gathered: all of a tree would be too much for a device."""
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
        return leaf
    everywhere = NamedSharding(leaf.sharding.mesh, PartitionSpec())
    return jax.device_get(_copied(everywhere)(leaf))


@functools.cache
def _copied(sharding: NamedSharding) -> Callable[[PyTree], PyTree]:
    return jax.jit(lambda tree: tree, out_shardings=sharding)


def all_agree(here: bool) -> bool:
    """Whether it is so on every process; the same answer on all."""
    if count() == 1:
        return here
    return bool(multihost_utils.process_allgather(np.array(here)).all())


def broadcast(value: bytes) -> bytes:
    """What process 0 gives, on all; what the others give is not looked at."""
    if count() == 1:
        return value
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(value))))
    sent = np.zeros(size, np.uint8)
    if is_main():
        sent[:] = np.frombuffer(value, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(sent), np.uint8).tobytes()


def barrier(name: str, seconds: float = JOIN_SECONDS) -> None:
    """Waits until every process is here. name: a new one each time.

    Raises: UserError when one does not come in time.
    """
    if count() == 1:
        return
    from jax._src.distributed import global_state  # JAX's own barrier knows no time limit

    assert global_state.client is not None
    try:
        global_state.client.wait_at_barrier(name, round(1000 * seconds))
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"a process of the run did not come to {name} within {seconds:g} seconds; "
            "look at what it last said, then go on with --resume"
        ) from error


# --- rows, each process its own ------------------------------------------------------------------


def lay_by_rows(tree: PyTree) -> PyTree:
    """Arrays of the whole mesh laid so that every row is whole on some process, and all alike.

    tree: arrays `[B, ...]`, the first of which tells the mesh. Returns at once; all processes call
        it at the same point of the program. `own_rows` may come later, at any time.
    """
    if count() == 1:
        return tree
    first = jax.tree.leaves(tree)[0]
    mesh = first.sharding.mesh
    even = len(first) % meshes.data_devices(mesh) == 0
    return _copied(meshes.batch_sharding(mesh) if even else meshes.replicated(mesh))(tree)


def own_rows(tree: PyTree) -> tuple[np.ndarray, PyTree]:
    """The rows that this process is to see to: their numbers, and what lies in them, of NumPy.

    Over all processes every row comes once; alone, a process has all. Waits for the devices, and
    for no other process. tree: of `lay_by_rows`.
    """
    first = jax.tree.leaves(tree)[0]
    if count() == 1:
        return np.arange(len(first)), jax.device_get(tree)
    where = first.sharding.devices_indices_map(first.shape)
    holders = [(index[0], device.process_index) for device, index in where.items()]
    held, mine = share_of(holders, len(first), jax.process_index())
    return held[mine], jax.tree.map(lambda leaf: _held(leaf)[mine], tree)


def share_of(
    holders: Sequence[tuple[slice, int]], count: int, process: int
) -> tuple[np.ndarray, np.ndarray]:
    """The rows, of `count`, that a process holds, and which of those are its to see to.

    holders: for each device the rows on it, and its process. Rows that several processes hold are
    taken in turns. Returns: numbers, rising, and as many bools.
    """
    parts: dict[int, tuple[range, set[int]]] = {}
    for rows, holder in holders:
        numbers = range(*rows.indices(count))
        parts.setdefault(numbers.start, (numbers, set()))[1].add(holder)
    here = [(rows, sorted(who)) for _, (rows, who) in sorted(parts.items()) if process in who]
    held = [row for rows, _ in here for row in rows]
    mine = [who[row % len(who)] == process for rows, who in here for row in rows]
    return np.array(held, int), np.array(mine, bool)


def _held(array: jax.Array) -> np.ndarray:
    """The rows that lie on this process, in their order, each once."""
    parts = {shard.index[0].indices(len(array))[0]: shard for shard in array.addressable_shards}
    return np.concatenate(jax.device_get([parts[first].data for first in sorted(parts)]))


def total(here: np.ndarray) -> np.ndarray:
    """The sum of what the processes have, on all; exact where all but one have 0."""
    return here if count() == 1 else _gathered(here).sum(0)


_met = 0


def raise_together(error: UserError | None, what: str, seconds: float = JOIN_SECONDS) -> None:
    """Raises on every process what went wrong on any of them, so that none waits for another.

    All must ask at the same point of the program. error: what went wrong here. what: was done.
    seconds: that others may need longer for it.
    """
    global _met
    if count() > 1:
        _met += 1
        barrier(f"{what} {_met}", seconds)  # devices may wait for one another less long
        kind = 0 if error is None else KINDS.index(type(error))
        said = str(error or "").encode()[: SAID - 1]
        sent = np.frombuffer(bytes([kind]) + said.ljust(SAID - 1, b"\0"), np.uint8)
        found = _gathered(sent)
        for process in np.flatnonzero(found[:, 0]) if error is None else ():
            text = found[process, 1:].tobytes().rstrip(b"\0").decode(errors="ignore")
            raise KINDS[found[process, 0]](f"on process {process}: {text}")
    if error is not None:
        raise error


def _gathered(here: np.ndarray) -> np.ndarray:
    """What each process has, `[processes, ...]`, on all."""
    with jax.transfer_guard("allow"):  # it reads its own answer
        return multihost_utils.process_allgather(here)


# --- ending --------------------------------------------------------------------------------------

_asked = 0


def stop_is_due() -> bool:
    """Whether any process got SIGTERM, told to all at the same call; they must call in step."""
    global _asked
    if count() == 1:
        return False
    _asked += 1  # JAX wants a number that rises as long as the process lives
    return multihost_utils.reached_preemption_sync_point(_asked)


def is_lost(error: BaseException) -> bool:
    """Whether the error comes of another process that is gone."""
    words = ("gloo", "Connection closed by peer", "Connection reset", "heartbeat", "UNAVAILABLE")
    return (
        count() > 1
        and isinstance(error, jax.errors.JaxRuntimeError)
        and any(word.lower() in str(error).lower() for word in words)
    )


@contextlib.contextmanager
def left_together() -> Generator[None, None, None]:
    """Ends the process's part in a run, so that none waits for another for ever.

    A run that ends as planned (SystemExit among it) waits a little for the others; one that breaks
    does not, and the others end as soon as they miss it.
    """
    code = 0
    try:
        yield
    except SystemExit as end:
        code = end.code
        raise
    except BaseException as error:
        if jax.distributed.is_initialized():
            sys.excepthook(type(error), error, error.__traceback__)
            _leave_at_once(1)
        raise
    finally:
        if jax.distributed.is_initialized():
            _leave(code)


def _leave(code: Any) -> None:
    if code == LOST:
        _leave_at_once(LOST)
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        jax.distributed.shutdown()


def _leave_at_once(code: int) -> None:
    """Not by `sys.exit`: on its way out JAX would wait for the others."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
