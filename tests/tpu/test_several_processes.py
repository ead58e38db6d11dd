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


# --- rewards on the host --------------------------------------------------------------------------


def test_a_reward_on_the_host_gives_the_numbers_of_one_process(tmp_path: Path):
    """JPEG sizes: in training, in evaluations and in the pictures that are kept."""
    words = ("--arms", "ddpo", "--reward", "compressibility")
    there, here = tmp_path / "two", tmp_path / "one"
    assert on_pod(2, 4, command("b2_diffurl", there, *words), tmp_path / "logs") == 0
    alone(1, command("b2_diffurl", here, *words))
    assert_same(numbers(there), numbers(here), rtol=2e-4)
    assert len(set(numbers(there).values())) > 20
    for name in ("samples-before.npz", "samples-after.npz"):
        (two, one) = (np.load(folder / "ddpo" / name) for folder in (there, here))
        np.testing.assert_allclose(two["train/reward"], one["train/reward"], rtol=1e-3)
        assert np.unique(one["train/reward"]).size > 1


ROWS = """
import jax, numpy as np
from experiments.cli import exit_codes
from jaxalign.core import distributed
from jaxalign.core import mesh as meshes
from jaxalign.rewards.host import HostReward
with distributed.left_together(), exit_codes():
    distributed.start()
    seen = []
    def score(images, batch):
        seen.append(len(images))
        assert (images[:, 0, 0, 0] == batch["prompt"]).all() and len(images)
        return 10.0 * batch["target"]["shape"][:, 1]
    for text, rows, mine in {cases}:
        mesh = meshes.make_mesh(meshes.parse_mesh(text))
        number = np.arange(rows, dtype=np.int32)
        images = np.tile(number.astype(np.uint8)[:, None, None, None], (1, 2, 2, 3))
        batch = {{"prompt": number, "target": {{"shape": np.stack([0 * number, number], 1)}}}}
        asked = distributed.put((images, batch), meshes.replicated(mesh))
        with HostReward("mine", score) as reward, jax.transfer_guard("disallow"):
            found = [reward.result(a) for a in [reward.submit(*asked) for _ in range(2)]]
        np.testing.assert_array_equal(found, np.stack(2 * [10.0 * number]))
        own = mine[jax.process_index()]
        assert seen == (2 * [own] if own else []), (text, rows, seen)
        seen.clear()
"""


def test_every_picture_is_scored_once(tmp_path: Path):
    """On meshes where several processes hold the same pictures, and of numbers that do not divide.

    A case: the mesh, pictures, and how many each process scores.
    """
    cases = [
        ("data=-1", 16, (8, 8)),
        ("data=-1", 3, (2, 1)),
        ("data=-1", 1, (1, 0)),
        ("tensor=2,data=4", 8, (4, 4)),
        ("data=4,tensor=2", 8, (4, 4)),
        ("tensor=8", 5, (3, 2)),
    ]
    words = [sys.executable, "-c", ROWS.format(cases=cases)]
    assert on_pod(2, 4, words, tmp_path) == 0


FAILS = """
import time
import jax, numpy as np
from experiments.cli import exit_codes
from jaxalign.core import distributed
from jaxalign.core import mesh as meshes
from jaxalign.rewards.host import HostReward
def score(images, batch):
    if jax.process_index() == 1:
        {fails}
    return np.zeros(len(images))
with distributed.left_together(), exit_codes():
    distributed.start()
    pictures = np.zeros((8, 2, 2, 3), np.uint8)
    asked = distributed.put(pictures, meshes.batch_sharding(meshes.make_mesh()))
    with HostReward("mine", score, timeout=2) as reward:
        found = [reward.submit(asked, {{}}) for _ in range(3)]
        reward.result(found[0])
"""


@pytest.mark.parametrize(
    ("fails", "code", "said"),
    [
        ("raise ValueError('odd')", 2, "reward mine: raised ValueError: odd; mend the reward"),
        ("return images.sum((1, 2, 3)) + np.nan", 3, "first nan in row 4; mend the reward"),
        ("time.sleep(1000)", 2, "reward mine: no answer within 2 seconds"),
    ],
)
def test_a_reward_that_fails_on_one_process_ends_the_run_on_all(
    fails: str, code: int, said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    words, begun = [sys.executable, "-c", FAILS.format(fails=fails)], time.monotonic()
    assert on_pod(2, 4, words, tmp_path) == code
    assert time.monotonic() - begun < 100, "nobody waited to be killed"
    (line,) = (line for line in capfd.readouterr().err.splitlines() if "on process 1" in line)
    assert line.startswith("error: on process 1: reward mine: ") and said in line
    log = (tmp_path / "process-1.log").read_text()
    assert "error: reward mine: " in log and said in log and "Traceback" not in log


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
