"""Play data made with OGBench's own scripts: its layout, its seeds, and what is in it."""

from __future__ import annotations

import numpy as np
import pytest

from jaxalign.core.types import UserError
from jaxalign.data import ogbench_play, trajectories

pytest.importorskip("mujoco")
pytest.importorskip("ogbench")

pytestmark = pytest.mark.parity


@pytest.fixture(autouse=True)
def _no_display(monkeypatch):
    """Nothing is drawn; the search for a display warns where there is none."""
    monkeypatch.setenv("MUJOCO_GL", "disabled")


def test_a_set_is_the_same_however_it_is_made(tmp_path):
    done = []
    arrays, provenance = ogbench_play.generate(
        "cube-single", range(2, 5), seed=7, workers=2, length=40, progress=done.append
    )
    assert done == [1, 2, 3]
    # Here the episodes are made in another order, by one environment.
    alone = {number: ogbench_play.episode("cube-single", 7, number, 40) for number in (4, 2)}
    for place, number in ((0, 2), (2, 4)):
        for field, values in alone[number].items():
            np.testing.assert_array_equal(arrays[field][40 * place : 40 * (place + 1)], values)
    assert not np.array_equal(alone[2]["observations"], alone[4]["observations"])
    assert provenance["source"] == "regenerated"
    assert (provenance["environment"], provenance["seed"]) == ("cube-single", 7)
    assert (provenance["first_episode"], provenance["episodes"]) == (2, 3)
    assert provenance["versions"].keys() == {"ogbench", "mujoco", "gymnasium", "numpy"}
    trajectories.write(tmp_path / "a.npz", arrays, provenance)
    again, told = trajectories.read(tmp_path / "a.npz")
    assert told == provenance
    data = trajectories.index(again)
    assert data.end.tolist() == [39] * 40 + [79] * 40 + [119] * 40
    assert np.abs(data.actions).max() <= 1


def test_another_seed_gives_another_episode():
    first, second = (ogbench_play.episode("cube-single", seed, 0, 10) for seed in (0, 1))
    assert not np.array_equal(first["observations"], second["observations"])


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("cube-double", {"observations": 37, "qpos": 28, "qvel": 26}),
        ("scene", {"observations": 40, "qpos": 25, "qvel": 24, "button_states": 2}),
        ("puzzle-4x4", {"observations": 83, "qpos": 30, "qvel": 30, "button_states": 16}),
    ],
)
def test_each_family_has_the_published_columns(name, sizes):
    arrays = ogbench_play.episode(name, 0, 0, 12)
    assert {field: arrays[field].shape for field in sizes} == {
        field: (12, size) for field, size in sizes.items()
    }
    assert arrays["actions"].shape == (12, 5)
    assert arrays["terminals"].tolist() == [False] * 11 + [True]
    assert arrays["observations"].dtype == arrays["qpos"].dtype == np.float32


def test_the_state_after_a_row_is_the_next_row():
    """Replayed in an environment of its own, the actions lead from each row to the next."""
    import gymnasium

    arrays = ogbench_play.episode("cube-single", 3, 1, 30)
    words = np.random.SeedSequence((3, 1, 0)).generate_state(1)
    environment = gymnasium.make(
        "cube-single-v0", mode="data_collection", max_episode_steps=30, disable_env_checker=True
    )
    observation, _ = environment.reset(seed=int(words[0]))
    for row in range(29):
        np.testing.assert_allclose(arrays["observations"][row], observation, atol=1e-5)
        observation, *_ = environment.step(arrays["actions"][row])


def test_the_arm_plays_with_the_cube():
    """In 400 steps of the script the cube is lifted, and the hand opens and closes."""
    arrays = ogbench_play.episode("cube-single", 0, 0, 400)
    height = arrays["qpos"][:, ogbench_play.CUBE][:, 2]
    assert height.min() < 0.03
    assert height.max() > 0.1
    assert arrays["actions"][:, 4].min() < -0.3
    assert arrays["actions"][:, 4].max() > 0.3


def test_a_scene_whose_cube_is_lost_is_unhealthy():
    qpos = np.zeros((5, 25))
    qpos[:, 16] = 0.02
    assert ogbench_play.is_healthy(qpos)
    for sideways, height, healthy in (
        (0.28, 0.02, True),
        (0.29, 0.02, False),
        (-0.29, 0.02, True),
        (-0.31, 0.02, False),
        (-0.31, 0.07, True),
        (-0.31, 0.09, False),
    ):
        qpos[3, 15:17] = sideways, height
        assert ogbench_play.is_healthy(qpos) is healthy


def test_an_unhealthy_scene_is_made_again(monkeypatch):
    judged = []

    def judge(qpos):
        judged.append(qpos)
        return len(judged) == 2

    monkeypatch.setattr(ogbench_play, "is_healthy", judge)
    arrays = ogbench_play.episode("scene", 0, 0, 5)
    assert len(judged) == 2
    assert not np.array_equal(judged[0], judged[1])
    np.testing.assert_array_equal(arrays["qpos"], judged[1])


def _die(*_):
    import os

    os._exit(9)


def test_a_process_that_dies_is_told(monkeypatch):
    monkeypatch.setattr(ogbench_play, "_start_worker", _die)
    with pytest.raises(UserError, match="'scene' died"):
        ogbench_play.generate("scene", range(1), 0, workers=1, length=5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cube-singel", range(1), 0), "did you mean 'cube-single'"),
        (("antmaze-large", range(1), 0), "use one of cube-single, "),
        (("scene", range(0), 0), "give one episode or more"),
        (("scene", range(-1, 3), 0), "numbers and seed from 0"),
        (("scene", range(1), -1), "numbers and seed from 0"),
    ],
)
def test_what_cannot_be_made_is_told(arguments, message):
    with pytest.raises(UserError, match=message):
        ogbench_play.generate(*arguments)


def test_a_missing_package_is_told(monkeypatch):
    monkeypatch.setattr(ogbench_play.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'jaxalign\[ogbench\]'"):
        ogbench_play.generate("scene", range(1), 0)
