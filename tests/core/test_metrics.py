"""Metric files, sinks, progress and the record of the environment."""

import errno
import json
import math
import os
import re
import subprocess
import sys
import time
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.core import metrics
from jaxalign.core.types import UserError


def test_json_lines_read_back_equal(tmp_path):
    values = {
        "a": 0.1 + 0.2,
        "b": float(np.float32(1e-7)),
        "nan": math.nan,
        "inf": -math.inf,
        "n": 3,
    }
    sink = metrics.JsonLines(tmp_path / "m.jsonl")
    sink.write(5, values)
    line = (tmp_path / "m.jsonl").read_text()  # before close: each line is flushed
    assert line.startswith('{"step": 5, ') and line.endswith("\n")
    assert json.loads(line) == {"step": 5, **values, "nan": None, "inf": None}
    sink.close()


def test_json_lines_takes_array_scalars(tmp_path):
    sink = metrics.JsonLines(tmp_path / "m.jsonl")
    row: dict[str, Any] = {"f": jnp.float32(0.5), "b": jnp.bfloat16(2), "i": np.int64(7)}
    sink.write(1, row)
    sink.close()
    assert metrics.read_json_lines(tmp_path / "m.jsonl") == [
        {"step": 1, "f": 0.5, "b": 2.0, "i": 7}
    ]


def test_resume_drops_later_rows_and_a_half_line(tmp_path):
    path = tmp_path / "m.jsonl"
    sink = metrics.JsonLines(path)
    for step in (0, 2, 4, 6):
        sink.write(step, {"x": step / 10})
    sink.close()
    with open(path, "a") as file:
        file.write('{"step": 8, "x": 0.')
    assert [row["step"] for row in metrics.read_json_lines(path)] == [0, 2, 4, 6]

    sink = metrics.JsonLines(path)
    assert sink.resume(4) == {"step": 4, "x": 0.4}
    sink.write(6, {"x": 9.0})
    sink.close()
    assert [row["step"] for row in metrics.read_json_lines(path)] == [0, 2, 4, 6]
    assert metrics.read_json_lines(path)[-1]["x"] == 9.0
    metrics.JsonLines(path, resume_step=2).close()
    assert [row["step"] for row in metrics.read_json_lines(path)] == [0, 2]
    assert [file.name for file in tmp_path.iterdir()] == ["m.jsonl"]


def test_resume_at_zero_starts_anew(tmp_path):
    path = tmp_path / "m.jsonl"
    sink = metrics.JsonLines(path)
    sink.write(0, {"x": 1.0})
    assert sink.resume(0) is None
    sink.write(0, {"x": 1.0})
    sink.close()
    assert len(metrics.read_json_lines(path)) == 1


def test_a_half_line_is_dropped_before_more_is_written(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"st')
    sink = metrics.JsonLines(path)
    sink.write(2, {})
    sink.close()
    assert metrics.read_json_lines(path) == [{"step": 1}, {"step": 2}]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the device /dev/full is Linux only")
def test_json_lines_on_a_full_disk(tmp_path):
    sink = metrics.JsonLines(tmp_path / "m.jsonl")
    sink._file.close()
    with open("/dev/full", "w") as sink._file:
        with pytest.raises(UserError, match=r"m\.jsonl: the disk is full"):
            sink.write(1, {"x": 1.0})
        sink.close()


def test_write_json_in_one_piece(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    metrics.write_json(path, {"a": np.float32(0.5), "n": math.nan, "t": (1, 2), "p": tmp_path})
    before = path.read_text()
    assert json.loads(before) == {"a": 0.5, "n": None, "t": [1, 2], "p": str(tmp_path)}

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match=r"result\.json: the disk is full.*free some space"):
        metrics.write_json(path, {"a": 1})
    assert path.read_text() == before
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]


def test_disk_full_is_found_in_causes_only():
    try:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise ValueError("background") from error
    except ValueError as error:
        assert metrics.disk_full(error)
    assert metrics.disk_full(ValueError("RESOURCE_EXHAUSTED: x: No space left on device"))
    assert not metrics.disk_full(OSError(errno.ENOENT, "none"))
    with pytest.raises(KeyError), metrics.writing("x"):
        raise KeyError("other faults stay what they are")


def test_tensorboard(tmp_path):
    sink = metrics.TensorBoard(tmp_path)
    sink.resume(4)
    sink.write(5, {"loss": 0.25})
    sink.close()
    (events,) = tmp_path.iterdir()
    assert events.name.startswith("events.out.tfevents")
    assert b"loss" in events.read_bytes()


def test_wandb_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    sink = metrics.WandB(tmp_path, project="p", name="n", config={"lr": 0.1, "where": tmp_path})
    sink.write(1, {"loss": 0.25})
    sink.close()
    (name,) = (tmp_path / "wandb").glob("offline-run-*")
    (log,) = name.glob("*.wandb")
    # wandb's own process writes the file, and on a busy machine not before `finish` returns.
    deadline = time.monotonic() + 60
    while b"loss" not in log.read_bytes() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert b"loss" in log.read_bytes()
    assert name.name.endswith((tmp_path / "wandb_id").read_text().strip())


@pytest.mark.parametrize(
    "package,extra,make",
    [("tensorboardX", "tensorboard", metrics.TensorBoard), ("wandb", "wandb", metrics.WandB)],
)
def test_a_missing_package_names_its_extra(tmp_path, monkeypatch, package, extra, make):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=re.escape(f"pip install 'jaxalign[{extra}]'")):
        make(tmp_path)


def test_progress_prints_seldom_where_there_is_no_terminal(capfd, monkeypatch):
    monkeypatch.delenv("JAXALIGN_PROGRESS", raising=False)
    with metrics.Progress(500, "train", start=100) as bar:
        for step in range(101, 501):
            bar.update(step, loss=step / 1000, absent=None)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    assert re.fullmatch(r"train 500/500  \S+ steps/s  0:00 left  loss 0\.5  0:0\d gone", lines[0])

    monkeypatch.setattr(metrics.Progress, "seconds_between_lines", 0.0)
    with metrics.Progress(2) as bar:
        bar.update(1)
        assert capfd.readouterr().err.startswith("1/2  ")


def test_progress_on_a_terminal_and_off(capfd, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("JAXALIGN_PROGRESS", "off")
    with metrics.Progress(10, "silent") as bar:
        bar.update(10, loss=0.5)
    assert capfd.readouterr().err == ""
    monkeypatch.delenv("JAXALIGN_PROGRESS")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    with metrics.Progress(10, "[draw]") as bar:
        bar.update(10, loss=0.5)
    drawn = capfd.readouterr().err
    assert "[draw]" in drawn and "10/10" in drawn and "loss 0.5" in drawn


def test_environment_is_flat_and_names_nobody():
    found = metrics.environment()
    json.dumps(found)
    assert found["devices"] == 8 and found["backend"] == "cpu"
    assert all(found[name] for name in ("python", "jax", "jaxlib", "numpy", "orbax-checkpoint"))
    assert os.uname().nodename not in json.dumps(found).split('"')


def test_commit_and_dirty(tmp_path, monkeypatch):
    assert metrics.commit(tmp_path) == {}
    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_NAME", "n")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "e@example.org")

    def git(*words):
        subprocess.run(["git", "-C", tmp_path, *words], check=True, capture_output=True)

    git("init")
    (tmp_path / "code.py").write_text("1")
    assert metrics.commit(tmp_path) == {}  # not known to git
    git("add", ".")
    git("commit", "-m", "m")
    found = metrics.commit(tmp_path)
    assert re.fullmatch("[0-9a-f]{40}", found["commit"]) and found["dirty"] is False
    (tmp_path / "code.py").write_text("2")
    assert metrics.commit(tmp_path)["dirty"] is True


def test_commit_without_git(tmp_path, monkeypatch):
    def absent(*_, **__):
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", absent)
    assert metrics.commit(tmp_path) == {}
