"""Whole runs on several processes: the same numbers as on one, saved, resumed, lost and stopped.

All launches are in this file, so that they run one after the other in one worker.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxalign.core.checkpoint import Checkpoints
from jaxalign.core.metrics import read_json_lines
from tpu.local import Pod

ROOT = Path(__file__).parents[2]
CLOCKS = ("seconds", "time", "per_second")

# What is enough to see a method train, evaluate and save on the mesh.
METHODS = {
    "metra": ("--arms", "metra", "--seeds", "8"),  # a seed a device
    "hiql": ("--arms", "hiql"),  # a seed, its batches shared
    "r3hf": ("--arms", "sparse", "--mesh", "data=-1,fsdp=2"),
    "b2_diffurl": ("--arms", "ddpo"),
    "downstream": (),
    "starc": ("--parts", "figure1"),
}

pytestmark = [pytest.mark.pods, pytest.mark.timeout(900)]


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)


def command(method: str, workdir: Path, *words: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        f"experiments.{method}",
        "tiny",
        "--workdir",
        str(workdir),
        *words,
    ]


def on_pod(count: int, devices: int, words: list[str], folder: Path, seconds: float = 240) -> int:
    """The exit code of a run on so many processes and devices of each."""
    folder.mkdir(parents=True, exist_ok=True)
    pod = Pod(words, count, devices, folder)
    code = pod.wait(seconds, grace=60)
    if code not in (0, 42):
        pod.show()
    return code


def alone(devices: int, words: list[str]) -> None:
    quick = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    subprocess.run(words, env={**os.environ, **quick}, check=True, timeout=240)


def numbers(workdir: Path) -> dict[str, float]:
    """All numbers that a run left but those of its clock, by file, row and name."""
    found = {}
    for file in sorted(workdir.rglob("metrics.jsonl")):
        for row in read_json_lines(file):
            where = f"{file.relative_to(workdir)}:{row['step']}"
            found |= {f"{where}/{name}": value for name, value in row.items()}
    for file in sorted(workdir.rglob("result.json")):
        row = json.loads(file.read_text())
        found |= {f"{file.relative_to(workdir)}/{name}": value for name, value in row.items()}
    return {
        name: value
        for name, value in found.items()
        if not isinstance(value, str) and not name.rsplit("/")[-1].endswith(CLOCKS)
    }


def assert_same(found: dict[str, float], wanted: dict[str, float], rtol: float) -> None:
    assert wanted and found.keys() == wanted.keys()
    wrong = [
        f"{name}: {found[name]} instead of {value}"
        for name, value in wanted.items()
        if not math.isclose(found[name] or 0, value or 0, rel_tol=rtol, abs_tol=rtol / 10)
    ]
    assert not wrong, wrong


# --- the same numbers -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def by_two(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A method's run on 2 x 4 devices, made at its first use."""
    root = tmp_path_factory.mktemp("by_two")

    def run(method: str) -> Path:
        workdir = root / method
        if not workdir.exists():
            words = command(method, workdir, *METHODS[method])
            assert on_pod(2, 4, words, root / f"{method}-logs") == 0
        return workdir

    return run


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_give_the_numbers_of_one(
    method: str, by_two: Callable[[str], Path], tmp_path: Path
):
    # What is cached was made on 2 x 4 devices: both runs start from the same.
    there = by_two(method)
    words = [word for word in METHODS[method] if word != "data=-1,fsdp=2" and word != "--mesh"]
    alone(1, command(method, tmp_path / "one", *words))
    assert_same(numbers(there), numbers(tmp_path / "one"), rtol=2e-4)
    (env, *_) = there.rglob("env.json")
    assert json.loads(env.read_text())["processes"] == 2


# --- saved by eight devices, read by others -------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "count", "devices"),
    [
        ("metra", 1, 8),
        ("metra", 4, 2),
        ("hiql", 1, 1),
        ("hiql", 4, 2),
    ],
)
def test_a_checkpoint_of_2_x_4_devices_goes_on_elsewhere(
    method: str, count: int, devices: int, by_two: Callable[[str], Path], tmp_path: Path
):
    there, workdir = by_two(method), tmp_path / "run"
    cut_to_the_first_checkpoint(there, workdir)
    words = command(method, workdir, *METHODS[method], "--resume")
    if count == 1:
        alone(devices, words)
    else:
        assert on_pod(count, devices, words, tmp_path / "logs") == 0
    assert_same(numbers(workdir), numbers(there), rtol=2e-4)


def cut_to_the_first_checkpoint(there: Path, workdir: Path) -> None:
    """The run as it was when its first arm had just saved its first checkpoint."""
    shutil.copytree(there, workdir)
    for result in workdir.rglob("result.json"):
        result.unlink()
    (folder,) = workdir.rglob("ckpt")
    _, *later = sorted(int(path.name) for path in folder.iterdir())
    assert later, "there is nothing left to do"
    for step in later:
        shutil.rmtree(folder / str(step))


def test_parameters_are_read_to_the_bit(by_two: Callable[[str], Path]):
    """On one and on eight devices of this process, as the two processes wrote them."""
    from experiments import metra, seed_axis, skills

    (folder,) = by_two("metra").rglob("ckpt")
    config = metra.PRESETS["tiny"]()
    environment = skills.skill_worlds.make(config.environment, config.physics)
    state = jax.eval_shape(
        lambda: skills.start_state(
            skills.METHODS["metra"], config.metra, environment, config.buffer, range(8)
        )
    )
    read = []
    for devices in (1, 8):
        mesh = seed_axis.meshes.make_mesh({"data": -1}, jax.devices()[:devices])
        rows, everywhere = seed_axis.meshes.batch_sharding(mesh), seed_axis.meshes.replicated(mesh)
        target = jax.tree.map(
            lambda leaf, r=rows, e=everywhere: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=r if leaf.ndim else e
            ),
            state,
        )
        checkpoints = Checkpoints(folder)
        found = checkpoints.restore(target)
        checkpoints.close()
        assert found is not None
        assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(found[0])} == {devices}
        read.append(jax.device_get(jax.tree.leaves(found[0].params)))
    assert all(np.array_equal(a, b) and a.any() for a, b in zip(*read, strict=True) if a.ndim > 2)


# --- stopped and lost -----------------------------------------------------------------------------

LONG = ("--arms", "metra", "--epochs", "100000", "--save-every", "100000")


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Pod]:
    """A long run on 2 x 2 devices that has trained some epochs."""
    words = command("metra", tmp_path / "run", *LONG)
    logs = tmp_path / "logs"
    logs.mkdir()
    pod = Pod(words, 2, 2, logs)
    metrics, end = tmp_path / "run" / "metra" / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and len(read_json_lines(metrics)) > 2):
        assert time.monotonic() < end and all(each.poll() is None for each in pod.processes)
        time.sleep(0.2)
    yield pod
    pod.pass_on(signal.SIGKILL)
    pod.wait(10, 10)


def test_a_signal_to_one_process_saves_all_and_the_run_goes_on(running: Pod, tmp_path: Path):
    running.processes[1].send_signal(signal.SIGTERM)
    assert running.wait(60, 60) == 42
    rows = read_json_lines(tmp_path / "run" / "metra" / "metrics.jsonl")
    folder = tmp_path / "run" / "metra" / "ckpt"
    (saved,) = (int(path.name) for path in folder.iterdir())
    assert saved == rows[-1]["step"]

    words = [*command("metra", tmp_path / "run", *LONG), "--resume"]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    going_on = subprocess.Popen(words, env=env)
    end, metrics = time.monotonic() + 120, tmp_path / "run" / "metra" / "metrics.jsonl"
    while read_json_lines(metrics)[-1]["step"] < saved + 2:
        assert time.monotonic() < end and going_on.poll() is None
        time.sleep(0.2)
    going_on.send_signal(signal.SIGTERM)
    assert going_on.wait(60) == 42
    steps = [row["step"] for row in read_json_lines(metrics)]
    assert steps == list(range(len(steps))), "no row is lost, none is there twice"


def test_a_killed_process_ends_the_run_within_a_minute(running: Pod):
    begun = time.monotonic()
    running.processes[1].kill()
    assert running.wait(120, 120) == 137
    assert time.monotonic() - begun < 60
    assert running.processes[0].returncode in (134, -signal.SIGABRT)
