"""A profile of a few steps, and its table."""

import contextlib
import gzip
import json
import shutil
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest

from jaxalign.core.checkpoint import Checkpoints
from jaxalign.core.loop import fit
from jaxalign.core.profile import FOLDER, asking, recorded
from jaxalign.core.types import UserError
from tpu import profile


class Counted(NamedTuple):
    """What the loop takes for a state."""

    step: jax.Array
    value: jax.Array


@jax.jit
def step(state, batch, key):
    return state + jnp.tanh(batch @ batch), {"loss": state.sum()}


def run(directory: Path, calls: int, steps: int, skip: int = 2):
    state = jnp.zeros((64, 64))
    with recorded(step, directory, steps, skip) as function:
        for i in range(calls):
            state, _ = function(state, jnp.ones((64, 64)), i)
    return state


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run") / "profile"
    run(directory, calls=6, steps=3)
    return directory


def calls(directory: Path) -> int:
    """How often the product was computed while recorded."""
    [file] = profile.newest(directory)
    rows = profile.operations(json.loads(gzip.decompress(file.read_bytes())))
    return max(row.calls for row in rows)


def test_only_the_chosen_steps_are_recorded(profiled: Path):
    assert list(profiled.rglob("*.xplane.pb")), "what xprof reads"
    assert calls(profiled) == 3


def test_a_run_that_ends_early_leaves_what_it_came_to(tmp_path: Path):
    run(tmp_path, calls=2, steps=9, skip=1)
    assert calls(tmp_path) == 1


def test_no_profile_is_no_change(tmp_path: Path):
    with recorded(step, tmp_path, 0) as function:
        assert function is step
    run(tmp_path, calls=2, steps=3)
    assert not list(tmp_path.iterdir())


def test_numbers_are_the_same_under_the_profiler(profiled: Path, tmp_path: Path):
    assert jnp.array_equal(run(tmp_path, 4, 1), run(tmp_path, 4, 0))


def test_the_table_is_printed(profiled: Path, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as end:
        profile.main([str(profiled.parent), "--top", "1"])
    assert end.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert "operation" in lines[1]
    assert lines[2].split()[2] == "3"


def test_without_a_profile_it_says_how_to_make_one(tmp_path: Path, capsys):
    with pytest.raises(UserError, match="--profile"):
        profile.newest(tmp_path)
    with pytest.raises(SystemExit) as end:
        profile.main([str(tmp_path)])
    assert end.value.code == 2


def test_the_newest_profile_counts(tmp_path: Path):
    for time, host in [("2026_01_01", "a"), ("2026_01_02", "a"), ("2026_01_02", "b")]:
        file = tmp_path / "plugins" / "profile" / time / f"{host}.trace.json.gz"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    found = profile.newest(tmp_path)
    assert [(file.parent.name, file.name[0]) for file in found] == [
        ("2026_01_02", "a"),
        ("2026_01_02", "b"),
    ]


def event(tid: int, ts: float, dur: float, name: str, **args: str):
    return {"ph": "X", "pid": 1, "tid": tid, "ts": ts, "dur": dur, "name": name, "args": args}


def test_a_tpus_operations_are_told_from_the_rest():
    trace = {
        "traceEvents": [
            {"ph": "M", "pid": 1, "name": "process_name", "args": {"name": "/device:TPU:0"}},
            {"ph": "M", "pid": 2, "name": "process_name", "args": {"name": "/host:CPU"}},
            {"ph": "M", "pid": 1, "tid": 1, "name": "thread_name", "args": {"name": "XLA Ops"}},
            {"ph": "M", "pid": 1, "tid": 2, "name": "thread_name", "args": {"name": "Steps"}},
            event(1, 0, 100, "while.1", hlo_category="while"),
            event(1, 10, 30, "fusion.2", hlo_category="convolution fusion"),
            event(1, 50, 30, "fusion.2", hlo_category="convolution fusion"),
            event(1, 100, 20, "all-reduce.3", hlo_category="all-reduce"),
            event(2, 0, 120, "0"),
            {**event(1, 0, 500, "host", hlo_op="x"), "pid": 2},
        ]
    }
    rows = profile.operations(trace)
    assert [(row.operation, row.calls) for row in rows] == [
        ("fusion.2", 2),
        ("while.1", 1),
        ("all-reduce.3", 1),
    ]
    assert [round(row.seconds * 1e6) for row in rows] == [60, 40, 20], "own time, loop less body"
    assert profile.table(rows, 1).splitlines()[-1].split()[0] == "50.0%"


def test_a_run_is_asked_for_a_profile_once(tmp_path: Path):
    """The first loop that keeps checkpoints records, however short it is; a later one does not."""
    given, key = jnp.ones((64, 64)), jax.random.key(0)

    def advance(state, batch, key):
        value, metrics = step(state.value, batch, key)
        return state._replace(value=value), metrics

    def train(folder: Path):
        start = Counted(jnp.asarray(0), jnp.zeros((64, 64)))
        with contextlib.closing(Checkpoints(folder)) as saved:
            fit(start, advance, lambda i: given, key, steps=2, checkpoints=saved)

    with asking(tmp_path / FOLDER, 1):
        train(tmp_path / "a")
        assert calls(tmp_path / FOLDER) == 1
        shutil.rmtree(tmp_path / FOLDER)
        train(tmp_path / "b")
    assert not (tmp_path / FOLDER).exists()
