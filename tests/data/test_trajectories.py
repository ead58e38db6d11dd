"""Offline trajectories: the index of episodes, files and their provenance, faults, the cache."""

import numpy as np
import pytest

from jaxalign.core.types import UserError
from jaxalign.data import trajectories

LENGTHS = (3, 2, 4)
ROWS = sum(LENGTHS)


def some_arrays() -> dict[str, np.ndarray]:
    """Episodes of 3, 2 and 4 states."""
    rng = np.random.default_rng(0)
    terminals = np.zeros(ROWS, bool)
    terminals[np.cumsum(LENGTHS) - 1] = True
    return {
        "observations": rng.normal(size=(ROWS, 5)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (ROWS, 2)).astype(np.float32),
        "terminals": terminals,
    }


def test_index_ends_each_episode_at_its_own_last_state():
    arrays = some_arrays()
    data = trajectories.index(arrays)
    assert data.end.tolist() == [2, 2, 2, 4, 4, 8, 8, 8, 8]
    assert data.valid.tolist() == [0, 1, 3, 5, 6, 7]
    assert data.end.dtype == data.valid.dtype == np.int32
    assert data.observations is arrays["observations"]
    assert data.actions is arrays["actions"]


def test_write_then_read_gives_the_same(tmp_path):
    arrays = some_arrays()
    provenance = {"source": "regenerated", "seed": 3, "versions": {"ogbench": "1.2.2"}}
    path = tmp_path / "new" / "maze.npz"
    trajectories.write(path, {**arrays, "qpos": np.zeros((ROWS, 7))}, provenance)
    again, told = trajectories.read(path)
    assert told == provenance
    assert set(again) == set(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(again[name], array)
        assert again[name].dtype == array.dtype
    assert [file.name for file in path.parent.iterdir()] == ["maze.npz"]


@pytest.mark.parametrize("kind", [bool, np.float32, np.int64])
def test_a_file_of_others_is_read_in_the_types_that_are_used(tmp_path, kind):
    arrays = some_arrays()
    arrays["terminals"] = arrays["terminals"].astype(kind)
    arrays["observations"] = arrays["observations"].astype(np.float64)
    np.savez_compressed(tmp_path / "a.npz", **arrays)
    again, provenance = trajectories.read(tmp_path / "a.npz")
    assert provenance == {"source": "downloaded", "file": "a.npz"}
    assert again["terminals"].dtype == bool
    assert again["observations"].dtype == np.float32
    np.testing.assert_array_equal(again["observations"], some_arrays()["observations"])


def test_the_action_of_a_last_state_may_be_anything(tmp_path):
    arrays = some_arrays()
    arrays["actions"][arrays["terminals"]] = np.nan
    np.savez(tmp_path / "a.npz", **arrays)
    again, _ = trajectories.read(tmp_path / "a.npz")
    assert np.isnan(again["actions"]).any(axis=1).tolist() == arrays["terminals"].tolist()


def without(*names: str):
    return lambda arrays: [arrays.pop(name) for name in names]


def changed(name: str, change):
    return lambda arrays: arrays.update({name: change(arrays[name])})


def put(name: str, place, value):
    return lambda arrays: arrays[name].__setitem__(place, value)


FAULTS = {
    "no terminals": (without("terminals"), "has no terminals: it needs observations, actions"),
    "two missing": (without("actions", "terminals"), "has no actions and no terminals"),
    "pictures": (
        changed("observations", lambda o: o.astype(np.uint8)),
        "observations are uint8, and pictures are not supported",
    ),
    "discrete": (changed("actions", lambda a: a.astype(np.int32)), "actions are int32"),
    "objects": (changed("actions", lambda a: a.astype(object)), "cannot be read .*allow_pickle"),
    "text": (changed("terminals", lambda t: t.astype(str)), "terminals are <U5"),
    "rank": (changed("observations", lambda o: o[:, 0]), r"observations have shape \(9,\)"),
    "columns": (changed("terminals", lambda t: t[:, None]), r"terminals have shape \(9, 1\)"),
    "empty": (changed("actions", lambda a: a[:, :0]), r"actions have shape \(9, 0\)"),
    "lengths": (
        changed("actions", lambda a: a[:-1]),
        "has 9 observations, 8 actions, 9 terminals; store one of each",
    ),
    "NaN": (put("observations", (6, 3), np.nan), r"observations\[6, 3\] is nan, the first of 1"),
    "inf": (put("actions", (5, 1), -np.inf), r"actions\[5, 1\] is -inf"),
    "too large for f32": (
        changed("observations", lambda o: o.astype(np.float64) + 1e300),
        r"observations\[0, 0\] is inf, the first of 45",
    ),
    "unnormalised": (put("actions", (3, 0), 1.002), r"actions\[3, 0\] is 1.002, the first of 1"),
    "terminals of 2": (changed("terminals", lambda t: 2 * t), r"terminals\[2\] is 2"),
    "no episode": (changed("terminals", lambda t: 0 * t), "there is no 1 at all"),
    "cut off": (put("terminals", -1, False), "the last 1 is in row 4"),
    "short first": (put("terminals", 0, True), "row 0 is an episode of one state"),
    "short later": (put("terminals", 3, True), "row 3 is an episode of one state"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_told_in_one_line(tmp_path, fault):
    break_it, message = FAULTS[fault]
    arrays = some_arrays()
    break_it(arrays)
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UserError, match=message) as caught:
        trajectories.read(tmp_path / "a.npz")
    assert str(tmp_path / "a.npz") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_rounding_of_actions_is_let_pass(tmp_path):
    arrays = some_arrays()
    arrays["actions"][0] = 1.0005
    np.savez(tmp_path / "a.npz", **arrays)
    assert trajectories.read(tmp_path / "a.npz")[0]["actions"][0, 0] > 1


def test_a_missing_file_says_where_it_comes_from(tmp_path):
    with pytest.raises(UserError, match=r"experiments.hiql.*/ogbench/antmaze.npz and put it there"):
        trajectories.read(tmp_path / "antmaze.npz")


def test_a_file_that_is_cut_short_or_of_another_kind_is_told(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros(3))
    with pytest.raises(UserError, match="no npz file"):
        trajectories.read(tmp_path / "a.npy")
    path = tmp_path / "a.npz"
    np.savez(path, **some_arrays())
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="not all of one"):
        trajectories.read(path)
    path.write_bytes(whole[:200] + b"!" + whole[201:])
    with pytest.raises(UserError, match=r"cannot be read.*CRC"):
        trajectories.read(path)


def test_the_cache_makes_each_name_and_seed_once(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXALIGN_CACHE", str(tmp_path))
    made = []

    def make(seed):
        made.append(seed)
        arrays = some_arrays()
        return {**arrays, "observations": arrays["observations"] + seed}, {"seed": seed}

    for seed in (0, 1, 0):
        arrays, provenance = trajectories.stored("toy", make, seed)
        assert provenance == {"seed": seed}
        np.testing.assert_array_equal(arrays["observations"], make(seed)[0]["observations"])
        made.pop()
    assert made == [0, 1]
    assert sorted(file.name for file in (tmp_path / "datasets").iterdir()) == [
        "toy-0.npz",
        "toy-1.npz",
    ]


def test_the_cache_makes_a_broken_file_again(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXALIGN_CACHE", str(tmp_path))
    path = tmp_path / "datasets" / "toy-0.npz"
    path.parent.mkdir()
    path.write_bytes(b"half of a file")
    with pytest.warns(UserWarning, match=r"no npz file.*made again"):
        arrays, _ = trajectories.stored("toy", lambda seed: (some_arrays(), {}), 0)
    np.testing.assert_array_equal(arrays["actions"], some_arrays()["actions"])
    assert trajectories.read(path)[0]["terminals"].sum() == 3


def test_a_maker_that_fails_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXALIGN_CACHE", str(tmp_path))

    def make(seed):
        raise UserError("cannot")

    with pytest.raises(UserError, match="cannot"):
        trajectories.stored("toy", make, 0)
    assert not list(tmp_path.rglob("*.npz*"))
