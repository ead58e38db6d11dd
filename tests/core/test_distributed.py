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
from jaxalign.core.types import UserError

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
