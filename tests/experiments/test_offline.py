"""Offline goal-conditioned runs: settings, seeds side by side, data, sinks, reports, the table."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest

from experiments import hiql as presets
from experiments import (
    hiql_table,
    maze_plots,
    offline,
    offline_data,
    offline_report,
    ogbench_settings,
    report,
    seed_axis,
    sweep,
)
from jaxalign.core import mesh as meshes
from jaxalign.core.types import UserError
from jaxalign.data import trajectories
from jaxalign.ops import goals

TINY = presets.tiny()
FAST = dataclasses.replace(TINY, evaluate_every=TINY.updates, attempts=1)
HORIZON = 20


@pytest.fixture(scope="module")
def lab():
    """The tiny preset's, on two devices."""
    made = offline.make_lab(TINY, 1)
    mesh = meshes.make_mesh({"data": 2}, jax.devices()[:2])
    data, maze = jax.device_put((made.data, made.maze), meshes.replicated(mesh))
    return made._replace(data=data, maze=maze, mesh=mesh)


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "method", "path", "expected"),
    [
        ("pointmaze-medium-navigate", "gciql", "alpha", 0.003),
        ("pointmaze-giant-stitch", "hiql", "goals.discount", 0.995),
        ("pointmaze-giant-stitch", "hiql", "goals.actor_random", 0.5),
        ("antmaze-large-explore", "hiql", "low_alpha", 10.0),
        ("antmaze-large-explore", "crl", "alpha", 0.003),
        ("humanoidmaze-medium-navigate", "hiql", "goals.subgoal_steps", 100),
        ("scene-play", "hiql", "goals.subgoal_steps", 10),
        ("scene-play", "qrl", "alpha", 0.3),
        ("cube-single-noisy", "gciql", "alpha", 0.03),
    ],
)
def test_settings_follow_the_task(task, method, path, expected):
    value = ogbench_settings.settings(task)[method]
    for name in path.split("."):
        value = getattr(value, name)
    assert value == expected


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ogbench_settings.split("pointmaze"), "ENVIRONMENT-KIND"),
        (lambda: dataclasses.replace(TINY, arms=("iql",)), "arms: 'iql'"),
        (lambda: dataclasses.replace(TINY, updates=45), "multiple of at_once = 10"),
        (lambda: dataclasses.replace(TINY, data_episodes=-1), "data_episodes = -1"),
        (lambda: offline.check(dataclasses.replace(TINY, mesh="data=3"), 2), "mesh data=3"),
        (lambda: hiql_table.Table(tasks=("pointmaze",)), "tasks: 'pointmaze'"),
        (lambda: hiql_table.Table(repeats=0), "repeats = 0"),
        (
            lambda: offline_data.read("antmaze-medium-navigate", "", 0, 0),
            "cannot be made here; download",
        ),
    ],
)
def test_bad_configurations_are_refused_in_one_line(make, message):
    with pytest.raises(UserError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("arm", list(ogbench_settings.METHODS))
def test_a_preset_is_one_program_at_full_size(arm):
    """Traced, not run: shapes fit, the state goes in as it comes out."""
    config = presets.pointmaze_giant()
    method, own = ogbench_settings.METHODS[arm], getattr(config, arm)
    arrays = [np.zeros((4004, 2), np.float32)] * 2
    ends = np.repeat(np.arange(2001, 4004, 2002), 2002)[:4004].astype(np.int32)
    data = trajectories.Trajectories(*arrays, ends, np.arange(2001, dtype=np.int32))
    state = jax.eval_shape(lambda: offline.start_state(method, own, data, [0, 1]))
    train = offline.make_training(method, own, [0, 1], config.at_once)
    after, log = jax.eval_shape(train, state, data, jax.random.key(0))
    described = [jax.tree.map(lambda a: (a.shape, a.dtype), s) for s in (state, after)]
    assert described[0] == described[1]
    assert {leaf.shape for leaf in log.values()} == {(2,)}


# --- training -------------------------------------------------------------------------------------


def trained(lab, seeds, dispatches=2):
    state = offline.start_state(offline.METHODS["gcbc"], TINY.gcbc, lab.data, seeds)
    state, rows = seed_axis.spread(state, len(seeds), lab.mesh)
    assert (rows is None) == (len(seeds) == 2)
    key = jax.device_put(jax.random.key(3), meshes.replicated(lab.mesh))
    step = offline.make_training(offline.METHODS["gcbc"], TINY.gcbc, seeds, 5, rows)
    for i in range(dispatches):
        state, log = step(state, lab.data, jax.random.fold_in(key, i))
    assert step._cache_size() == 1 and int(state.step) == dispatches
    return state, log


def test_a_seed_does_not_hang_on_the_others_nor_on_devices(lab):
    """Two seeds on two devices, one each, and one seed whose batches are shared."""
    several, log = trained(lab, [4, 7])
    alone, own = trained(lab, [7])
    assert set(own) == set(log)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a[1], b[0], rtol=1e-4, atol=1e-5),
        several.params,
        alone.params,
    )


@pytest.mark.parametrize("arm", ["hiql", "qrl"])
def test_numbers_side_by_side_are_those_alone(lab, arm):
    """Two rates, weights and discounts as one program, and each as settings of its own."""
    method, own = ogbench_settings.METHODS[arm], getattr(TINY, arm)
    words = ["learning_rate=1e-3,3e-3", "goals.discount=0.9"]
    if arm == "hiql":
        words += ["low_alpha=0.5", "expectile=0.9"]
    variants = list(sweep.variants(words, own, arm).values())

    def run(config, rows, numbers):
        state = offline.start_state(method, config, lab.data, [5] * rows)
        step = offline.make_training(method, config, [5] * rows, 3, None, numbers)
        return step(state, lab.data, jax.random.key(1))[0].params

    both = run(own, 2, sweep.stacked(variants))
    for i, numbers in enumerate(variants):
        alone = run(sweep.checked(own, numbers), 1, {})
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(a[i], b[0], rtol=1e-4, atol=1e-5),
            both,
            alone,
        )
    first, second = (jax.tree.leaves(jax.tree.map(lambda a, i=i: a[i], both))[0] for i in (0, 1))
    assert not np.allclose(first, second, atol=1e-5)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("batch=3,4", "batch is no number of hiql"),
        ("low_alpha", "give numbers, as in low_alpha=1,3,10"),
        ("low_alpha=1,x", "give numbers"),
        ("expectile=0.5,1.5", "expectile = 1.5"),
        ("goals.discount=2", "discount = 2"),
    ],
)
def test_a_sweep_of_what_is_no_number(word, said):
    with pytest.raises(UserError, match=said):
        dataclasses.replace(TINY, sweep=(word,))


def test_a_sweep_leaves_a_folder_for_each_variant(lab, tmp_path):
    config = dataclasses.replace(
        TINY, arms=("gcbc",), sweep=("learning-rate=1e-4,1e-3",), updates=10, evaluate_every=10
    )
    offline.run_arms(lab, config, {3: tmp_path}, resume=False)
    result = json.loads((tmp_path / "result.json").read_text())
    for rate in (0.0001, 0.001):
        assert f"gcbc learning_rate={rate}/success" in result
        assert result[f"gcbc learning_rate={rate}/learning_rate"] == rate
        assert (tmp_path / f"gcbc learning_rate={rate}" / "walks.npz").exists()


def test_goals_of_a_batch_lie_in_their_data(lab):
    batch = goals.sample(lab.data, TINY.hiql.goals, jax.random.key(0), 64)
    stored = np.asarray(lab.data.observations)
    assert np.isin(np.asarray(batch.value_goal), stored).all()


# --- whole runs -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(lab, tmp_path_factory):
    """A run of two seeds of two methods."""
    root = tmp_path_factory.mktemp("offline")
    directories = {seed: root / f"seed-{seed}" for seed in (0, 1)}
    config = dataclasses.replace(FAST, arms=("hiql", "crl"))
    for seed, directory in directories.items():
        directory.mkdir()
        own = dataclasses.asdict(dataclasses.replace(config, seed=seed))
        (directory / "config.json").write_text(json.dumps(own))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offline.pointmaze, "HORIZON", HORIZON)
        offline.run_arms(lab, config, directories, resume=False)
    return root


def test_a_run_leaves_numbers_walks_and_a_report(finished):
    text = report.table(finished)
    assert "hiql" in text and "Means over 2 seeds" in text and "79±5" in text
    assert "source regenerated" in text
    result = json.loads((finished / "seed-1" / "result.json").read_text())
    assert 0 <= result["crl/success_last3"] <= 1
    assert result["hiql/updates"] == TINY.updates
    page = report.build(finished).read_text()
    assert page.count("<figure") == 3
    run = report.comparison.read(finished)
    walks = maze_plots.read_walks(run)
    assert set(walks) == {"hiql", "crl"}
    hiql = walks["hiql"]
    places = len(hiql.place)
    assert hiql.value.shape == (5, places) and hiql.subgoal.shape == (5, places, 2)
    assert walks["crl"].subgoal is None
    assert (hiql.position.shape[0] == HORIZON + 1) and (hiql.reached >= 0).all()
    assert np.isfinite(offline_report.last_three(run.of("hiql"), "success")).all()


def test_the_table_says_what_was_not_run(finished, monkeypatch, tmp_path):
    monkeypatch.setattr(hiql_table, "RESULTS", tmp_path)
    (tmp_path / "pointmaze-medium-navigate").symlink_to(finished)
    config = hiql_table.Table(tasks=("pointmaze-medium-navigate",), arms=("hiql",), scale="small")
    made = json.loads(hiql_table.summarise(tmp_path, config).read_text())
    rows = {(row[0], row[1]): row[2:] for row in made["tables"][0]["rows"]}
    ours, real, seconds, theirs = rows["pointmaze-medium-navigate", "hiql"]
    assert set(ours) == {"mean", "low", "high"} and real == "not run" and seconds["value"] > 0
    assert theirs == "79 ± 5"
    assert rows["pointmaze-large-navigate", "qrl"][:2] == ["not run", "not run"]
    assert made["command"].endswith(
        "table --scale small --tasks pointmaze-medium-navigate --arms hiql"
    )
