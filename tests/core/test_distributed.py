"""What the environment says of other processes, and where a run's files lie; without any process.

Whole runs on several processes are in tests/tpu/test_several_processes.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from jaxalign.core import distributed, places
from jaxalign.core.checkpoint import SIZES, Checkpoints
from jaxalign.core.types import NonFinite, UserError

THREE = {
    distributed.COORDINATOR: "10.0.0.1:8000",
    distributed.PROCESSES: "2",
    distributed.PROCESS: "1",
}


def test_alone_nothing_is_started():
    distributed.start({"JAX_PLATFORMS": "cpu", "SLURM_STEP_NUM_TASKS": "1"})
    assert distributed.count() == 1 and distributed.is_main()
    assert not distributed.stop_is_due()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({distributed.PROCESS: ""}, "is set without JAX_PROCESS_ID; set all three"),
        ({distributed.PROCESS: "2"}, "JAX_PROCESS_ID=2: must be below JAX_NUM_PROCESSES, 2"),
        ({distributed.PROCESSES: "two"}, "JAX_NUM_PROCESSES=two: must be a whole number"),
        ({distributed.COORDINATOR: "10.0.0.1"}, "must be HOST:PORT"),
        ({distributed.HEARTBEAT: "0"}, "at least 1"),
    ],
)
def test_what_the_environment_gets_wrong_is_said(change, message):
    with pytest.raises(UserError, match=message):
        distributed.start({**THREE, **change})


def test_values_go_to_the_devices_and_come_back():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.NamedSharding(mesh, jax.P("data"))
    tree = {"a": np.arange(8), "key": jax.random.split(jax.random.key(0), 8)}
    put = distributed.put(tree, rows)
    assert {leaf.sharding for leaf in jax.tree.leaves(put)} == {rows}
    assert np.array_equal(distributed.fetch(put["a"]), tree["a"])


# --- rows, each process its own -------------------------------------------------------------------


def shares(holders: list[tuple[slice, int]], count: int, processes: int) -> list[list[int]]:
    """The rows that each process is to see to."""
    found = []
    for process in range(processes):
        held, mine = distributed.share_of(holders, count, process)
        assert len(held) == len(mine) and (np.diff(held) > 0).all()
        found.append(held[mine].tolist())
    return found


def test_rows_of_one_process_are_its_own_whatever_the_order_of_devices():
    holders = [(slice(4, 6), 0), (slice(0, 2), 1), (slice(6, None), 0), (slice(2, 4), 1)]
    assert shares(holders, 8, 2) == [[4, 5, 6, 7], [0, 1, 2, 3]]


def test_rows_that_several_processes_hold_are_taken_in_turns():
    everywhere = [(slice(None), process) for process in (0, 0, 1, 2)]
    assert shares(everywhere, 5, 3) == [[0, 3], [1, 4], [2]]
    assert shares(everywhere, 1, 3) == [[0], [], []]
    # data=2, tensor=2 on four processes, the axis of data inside
    crossed = [(slice(0, 3), 0), (slice(3, 6), 1), (slice(0, 3), 2), (slice(3, 6), 3)]
    assert shares(crossed, 6, 4) == [[0, 2], [4], [1], [3, 5]]


def test_alone_a_process_has_all_rows(monkeypatch):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    tree = (np.arange(16), {"b": np.arange(32).reshape(16, 2)})
    put = distributed.put(tree, jax.NamedSharding(mesh, jax.P("data")))
    assert distributed.lay_by_rows(put) is put
    numbers, own = distributed.own_rows(put)
    np.testing.assert_array_equal(numbers, np.arange(16))
    jax.tree.map(np.testing.assert_array_equal, own, tree)
    # As if it were one of several, all of whose devices are here.
    monkeypatch.setattr(distributed, "count", lambda: 2)
    for layout in (jax.P("data"), jax.P()):
        laid = distributed.lay_by_rows(jax.device_put(put, jax.NamedSharding(mesh, layout)))
        numbers, own = distributed.own_rows(laid)
        np.testing.assert_array_equal(numbers, np.arange(16))
        jax.tree.map(np.testing.assert_array_equal, own, tree)


@pytest.mark.parametrize("kind", [UserError, NonFinite])
def test_what_goes_wrong_on_one_process_is_raised_on_the_others(monkeypatch, kind):
    sent = []
    monkeypatch.setattr(distributed, "count", lambda: 2)
    monkeypatch.setattr(distributed, "barrier", lambda name, seconds: None)
    monkeypatch.setattr(distributed, "_gathered", lambda here: sent.append(here) or here[None])
    distributed.raise_together(None, "nothing")
    with pytest.raises(kind, match=r"^it is späte"):
        distributed.raise_together(kind("it is späte" + 1000 * "ä"), "it")
    well, wrong = sent
    assert not well.any() and well.shape == wrong.shape
    monkeypatch.setattr(distributed, "_gathered", lambda here: np.stack([here, wrong]))
    with pytest.raises(UserError, match=r"^on process 1: it is späteä+$") as caught:
        distributed.raise_together(None, "it")
    assert type(caught.value) is kind


# --- a bucket, played by a local directory --------------------------------------------------------


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    monkeypatch.setattr(places, "in_bucket", lambda path: "bucket" in str(path))
    monkeypatch.setattr(places, "_homes", {})
    monkeypatch.setattr(places, "_kept", {})
    return tmp_path / "bucket" / "run"


def test_a_run_in_a_bucket_is_kept_at_every_checkpoint_and_brought_back(bucket):
    folder = places.open_folder(bucket)
    (folder / "arm").mkdir(parents=True)
    (folder / "arm" / "metrics.jsonl").write_text("row 1\n")
    (folder / "half.tmp").write_text("")
    checkpoints = Checkpoints(folder / "arm" / "ckpt")
    checkpoints.save(1, {"w": jnp.ones(3)}, jax.random.key(0))
    checkpoints.close()
    assert (bucket / "arm" / "metrics.jsonl").read_text() == "row 1\n"
    assert (bucket / "arm" / "ckpt" / "1" / SIZES).exists()
    assert not (folder / "arm" / "ckpt").exists() and not (bucket / "half.tmp").exists()

    (folder / "arm" / "metrics.jsonl").write_text("row 1\nrow 2\n")
    places.keep()
    again = places.open_folder(bucket)  # as another machine would
    assert again != folder
    assert (again / "arm" / "metrics.jsonl").read_text() == "row 1\nrow 2\n"
    assert not (again / "arm" / "ckpt").exists()
    checkpoints = Checkpoints(again / "arm" / "ckpt")
    assert checkpoints.steps() == [1]
    checkpoints.close()


def test_a_bucket_keeps_its_slashes_and_a_local_path_becomes_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(places.shared("gs://somewhere/run")) == "gs://somewhere/run"
    assert str(epath.Path("gs://somewhere/run") / "ckpt") == "gs://somewhere/run/ckpt"
    assert places.shared("runs/ckpt") == tmp_path / "runs" / "ckpt"
    assert places.open_folder("runs") == places.Path("runs")
