"""The loop: resume after any kind of end equals a run that never ended; and how runs end.

Run as a program, this file is one training run in a directory, for the tests that kill it.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.core import mesh
from jaxalign.core.checkpoint import Checkpoints
from jaxalign.core.loop import Hook, Preempted, fit
from jaxalign.core.metrics import JsonLines, read_json_lines
from jaxalign.core.types import NonFinite, UserError

STEPS, SAVE_EVERY, HOOK_EVERY = 20, 4, 6


class State(NamedTuple):
    step: Any
    params: Any
    momentum: Any


@partial(jax.jit, donate_argnums=0)
def train_step(state, batch, key):
    """A noisy least squares step: every number depends on all the steps and keys before."""
    error = batch["x"] @ state.params["w"] - batch["y"]
    gradient = batch["x"].T @ error / len(error) + 0.1 * jax.random.normal(key, (3,))
    momentum = 0.9 * state.momentum + gradient
    params = {"w": state.params["w"] - 0.05 * momentum}
    metrics = {"loss": jnp.mean(error**2), "norm": jnp.linalg.norm(momentum), "count": state.step}
    return State(state.step + 1, params, momentum), metrics


def make_batch(i):
    rng = np.random.default_rng(i)
    x = rng.normal(size=(8, 3)).astype(np.float32)
    return {"x": x, "y": x @ np.array([1, -2, 3], np.float32)}


def new_state():
    return State(jnp.int32(0), {"w": jnp.zeros(3)}, jnp.zeros(3))


def measure(state, n):
    return {"first": state.params["w"][0], "twice": 2 * n}


class Ticks:
    """A clock that goes on by one second each time it is looked at."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        self.now += 1
        return self.now


def train(directory, step=train_step, batches=make_batch, hook=measure, resume=False, **options):
    """One run with everything on; the sink and the checkpoints are closed however it ends."""
    directory.mkdir(exist_ok=True)
    checkpoints, sink = Checkpoints(directory / "ckpt"), JsonLines(directory / "metrics.jsonl")
    defaults: dict[str, Any] = {"steps": STEPS, "save_every": SAVE_EVERY, "clock": Ticks()}
    try:
        return fit(
            new_state(),
            step,
            batches,
            jax.random.key(7),
            checkpoints=checkpoints,
            hooks=[Hook(HOOK_EVERY, hook)],
            resume=resume,
            sinks=[sink],
            **{**defaults, **options},
        )
    finally:
        sink.close()
        checkpoints.close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(state, text of the metric file) of a run that nothing interrupted."""
    directory = tmp_path_factory.mktemp("whole")
    state = train(directory)
    return state, (directory / "metrics.jsonl").read_text()


def assert_equals_whole(state, directory, whole, skip=()):
    for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(whole[0]), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
    rows = read_json_lines(directory / "metrics.jsonl")
    expected = [json.loads(line) for line in whole[1].splitlines()]
    for row in (*rows, *expected):
        for name in skip:
            row.pop(name, None)
    assert rows == expected


# --- what an undisturbed run does ----------------------------------------------------------------


def test_a_whole_run(whole, tmp_path):
    state, text = whole
    rows = [json.loads(line) for line in text.splitlines()]
    assert int(state.step) == STEPS
    assert [row["step"] for row in rows] == list(range(STEPS + 1))
    assert [row["step"] for row in rows if "first" in row] == [0, 6, 12, 18, 20]
    assert set(rows[0]) == {"step", "first", "twice", "seconds"}
    assert set(rows[6]) == {"step", "loss", "norm", "count", "first", "twice", "seconds"}
    assert rows[6]["twice"] == 12 and rows[6]["count"] == 5
    assert rows[-1]["loss"] < rows[1]["loss"]
    assert [row["seconds"] for row in rows] == list(range(STEPS + 1))

    # The same by hand, with the keys and batches that the loop promises.
    plain = new_state()
    for i in range(STEPS):
        plain, metrics = train_step(plain, make_batch(i), jax.random.fold_in(jax.random.key(7), i))
    np.testing.assert_array_equal(plain.params["w"], state.params["w"])
    assert rows[-1]["loss"] == float(metrics["loss"])


def test_numbers_are_read_one_step_late_and_hooks_are_not_timed():
    order = []
    clock = Ticks()

    class Metric:
        """A number that notes when it is read."""

        def __init__(self, n):
            self.n = n

        def __array__(self, dtype=None, copy=None):
            order.append(f"read {self.n}")
            return np.float32(self.n)

    def step(state, batch, key):
        n = int(jax.device_get(state.step)) + 1
        order.append(f"step {n}")
        return state._replace(step=jax.device_put(np.int32(n))), {"m": Metric(n)}

    def slow_hook(state, n):
        order.append(f"hook {n}")
        clock.now += 1000

    class Seconds:
        def write(self, step, metrics):
            order.append(f"write {step}")
            self.last = metrics["seconds"]

        def resume(self, step):
            pytest.fail("not a run that goes on")

        def close(self):
            pytest.fail("left to the caller")

    sink = Seconds()
    fit(
        State(jnp.int32(0), {}, ()),
        step,
        lambda i: (),
        jax.random.key(0),
        steps=4,
        hooks=[Hook(3, slow_hook)],
        sinks=[sink],
        clock=clock,
    )
    assert order == [
        *("hook 0", "step 1", "step 2", "read 1", "write 1", "step 3", "read 2", "write 2"),
        *("read 3", "hook 3", "write 3", "step 4", "read 4", "hook 4", "write 4"),
    ]
    assert sink.last < 1000


def test_metrics_may_be_absent_and_a_finished_run_does_nothing(tmp_path):
    train(tmp_path, lambda *inputs: (train_step(*inputs)[0], {}), steps=3)
    assert [row["step"] for row in read_json_lines(tmp_path / "metrics.jsonl")] == [0, 3]
    before = (tmp_path / "metrics.jsonl").read_text()
    state = train(tmp_path, lambda *_: pytest.fail("a step after the last"), steps=3, resume=True)
    assert int(state.step) == 3
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_implicit_transfers_are_errors(tmp_path):
    def leaky(state, batch, key):
        return train_step(state, jax.tree.map(np.asarray, jax.device_get(batch)), key)

    with pytest.raises(Exception, match=r"[Dd]isallowed host-to-device transfer"):
        train(tmp_path, leaky)


def test_eight_devices_give_the_answer_of_one(whole):
    grid = mesh.make_mesh()
    state = jax.device_put(new_state(), mesh.replicated(grid))
    state = fit(
        state,
        train_step,
        make_batch,
        jax.random.key(7),
        steps=STEPS,
        put=lambda batch: jax.device_put(batch, mesh.batch_sharding(grid)),
    )
    np.testing.assert_allclose(state.params["w"], whole[0].params["w"], rtol=1e-5)


def test_resume_on_a_mesh(tmp_path):
    grid = mesh.make_mesh()
    run = partial(
        fit,
        step=train_step,
        batches=make_batch,
        key=jax.random.key(7),
        put=lambda batch: jax.device_put(batch, mesh.batch_sharding(grid)),
    )
    place = partial(jax.device_put, device=mesh.replicated(grid))
    want = run(place(new_state()), steps=6)
    checkpoints = Checkpoints(tmp_path / "ckpt")
    run(place(new_state()), steps=3, checkpoints=checkpoints)
    other = jax.random.key(99)  # the key comes from the checkpoint
    got = run(place(new_state()), key=other, steps=6, checkpoints=checkpoints, resume=True)
    checkpoints.close()
    np.testing.assert_array_equal(got.params["w"], want.params["w"])
    assert got.params["w"].sharding.is_equivalent_to(mesh.replicated(grid), 1)


# --- resume --------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for the end of the process: nothing in the loop may catch it."""


def test_checkpoints_are_not_overwritten_without_resume(tmp_path):
    train(tmp_path, steps=4)
    with pytest.raises(UserError, match=r"checkpoints up to step 4: .*--resume"):
        train(tmp_path, steps=4)


@pytest.mark.parametrize(
    "where,at",
    [
        *(("batch", 0), ("batch", 4), ("batch", 11), ("step", 0), ("step", 8), ("step", 19)),
        *(("hook", 0), ("hook", 12), ("hook", 20), ("write", 0), ("write", 4), ("write", 13)),
        *(("before save", 4), ("before save", 12), ("after save", 4), ("after save", 20)),
    ],
)
def test_killed_anywhere_and_resumed_equals_the_whole(tmp_path, whole, monkeypatch, where, at):
    def kill(place, n):
        if place == where and n >= at:
            raise Killed

    def batches(i):
        kill("batch", i)
        return make_batch(i)

    def step(state, batch, key):
        kill("step", int(jax.device_get(state.step)))
        return train_step(state, batch, key)

    def hook(state, n):
        kill("hook", n)
        return measure(state, n)

    save, write = Checkpoints.save, JsonLines.write

    def killed_save(self, n, state, key):
        kill("before save", n)
        save(self, n, state, key)
        kill("after save", n)

    def killed_write(self, n, row):
        write(self, n, row)
        kill("write", n)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", killed_save)
        patch.setattr(JsonLines, "write", killed_write)
        with pytest.raises(Killed):
            train(tmp_path, step, batches, hook)
    state = train(tmp_path, resume=True)
    assert_equals_whole(state, tmp_path, whole)


def test_resume_over_a_broken_checkpoint(tmp_path, whole):
    train(tmp_path, steps=12)
    os.truncate(next((tmp_path / "ckpt" / "12").rglob("manifest.ocdbt")), 3)
    with pytest.warns(UserWarning, match="12 is broken"):
        state = train(tmp_path, resume=True)
    # The first run ended at 12, so it has a hook and a save there that the whole has as well.
    assert_equals_whole(state, tmp_path, whole)


def test_sigkill(tmp_path, whole):
    directory = tmp_path / "run"
    child = subprocess.Popen([sys.executable, __file__, str(directory)], env=environment())
    wait_for_rows(directory / "metrics.jsonl", 10, child)
    child.kill()
    assert child.wait() == -signal.SIGKILL
    assert not (directory / "done").exists()
    assert_equals_whole(train(directory, resume=True), directory, whole, skip=["seconds"])


# --- how runs end --------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops(tmp_path, whole, number, capfd):
    before = signal.getsignal(number)

    def batches(i):
        if i == 6:
            os.kill(os.getpid(), number)
        return make_batch(i)

    with pytest.raises(Preempted, match="stopped at step 7; its state is saved") as caught:
        train(tmp_path, batches=batches)
    assert caught.value.step == 7 and caught.value.saved
    assert signal.getsignal(number) is before
    assert "stopping after this step" in capfd.readouterr().err
    assert_equals_whole(train(tmp_path, resume=True), tmp_path, whole)


def test_a_signal_in_the_last_step_is_not_lost(tmp_path, whole):
    def batches(i):
        if i == STEPS - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return make_batch(i)

    with pytest.raises(Preempted):
        train(tmp_path, batches=batches)
    assert_equals_whole(train(tmp_path, resume=True), tmp_path, whole)


def test_a_second_interrupt_is_at_once(tmp_path):
    def batches(i):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("went on")

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, batches=batches)


def test_without_checkpoints_nothing_is_said_to_be_saved():
    def batches(i):
        os.kill(os.getpid(), signal.SIGTERM)
        return make_batch(i)

    with pytest.raises(Preempted, match="nothing is saved"):
        fit(new_state(), train_step, batches, jax.random.key(0), steps=3)


def test_in_a_thread_no_handlers_are_set():
    before, found = signal.getsignal(signal.SIGTERM), []

    def work():
        fit(
            new_state(),
            train_step,
            lambda i: found.append(signal.getsignal(signal.SIGTERM)) or make_batch(i),
            jax.random.key(0),
            steps=1,
        )

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_number_that_is_not_finite_stops_and_keeps_the_last_good(tmp_path, whole, bad):
    def batches(i):
        batch = make_batch(i)
        return {**batch, "y": batch["y"] * np.float32(bad)} if i >= 9 else batch

    with pytest.raises(
        NonFinite, match=r"step 10: loss is \w+; .*checkpoint is step 8 in .*ckpt; lower"
    ):
        train(tmp_path, batches=batches)
    rows = read_json_lines(tmp_path / "metrics.jsonl")
    assert rows[-1]["step"] == 10 and rows[-1]["loss"] is None and rows[-1]["count"] == 9
    assert_equals_whole(train(tmp_path, resume=True), tmp_path, whole)


def test_parameters_that_are_not_finite_are_not_saved(tmp_path):
    def step(state, batch, key):
        state, metrics = train_step(state, batch, key)
        params = jax.tree.map(lambda w: jnp.where(state.step >= poisoned, jnp.nan, w), state.params)
        return state._replace(params=params), {"count": metrics["count"]}

    poisoned = jnp.int32(8)
    with pytest.raises(NonFinite, match=r"step 8: a parameter is not finite; .*is step 4 in"):
        train(tmp_path, jax.jit(step))


def test_nonfinite_before_any_checkpoint(tmp_path):
    with pytest.raises(NonFinite, match="step 1: loss is nan; there is no checkpoint"):
        train(tmp_path, batches=lambda i: {**make_batch(i), "y": np.full(8, np.nan, np.float32)})


def test_numbers_of_several_seeds(tmp_path):
    """A list a row; one that is not finite stops as a single number does."""

    def step(state, batch, key):
        state, metrics = train_step(state, batch, key)
        last = jnp.where(state.step >= wrong, jnp.nan, 2.0)
        return state, {"loss": jnp.stack([metrics["loss"], last]), "count": metrics["count"]}

    wrong = jnp.int32(3)
    with pytest.raises(NonFinite, match=r"step 3: loss is \[.*, nan\]"):
        train(tmp_path, jax.jit(step))
    rows = [row for row in read_json_lines(tmp_path / "metrics.jsonl") if "loss" in row]
    assert [row["loss"][1] for row in rows] == [2.0, 2.0, None]


# --- this file as a program ----------------------------------------------------------------------


def environment():
    root = Path(__file__).parents[2]
    return {**os.environ, "PYTHONPATH": str(root), "JAXALIGN_PROGRESS": "off"}


def wait_for_rows(path, rows, child, seconds=60):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if path.exists() and path.read_text().count("\n") >= rows:
            return
        assert child.poll() is None, "ended before it could be killed"
        time.sleep(0.002)
    pytest.fail(f"no {rows} rows after {seconds} s")


def slow_batch(i):
    time.sleep(0.02)
    return make_batch(i)


if __name__ == "__main__":
    warnings.simplefilter("error")
    workdir = Path(sys.argv[1])
    workdir.mkdir(exist_ok=True)
    train(workdir, batches=slow_batch, resume=True)
    (workdir / "done").touch()
