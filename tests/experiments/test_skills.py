"""Runs that learn skills: the epoch, its buffer, seeds side by side, resume, reports, tables."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import metra as presets
from experiments import pages, report, seed_axis, skill_plots, skill_tables, skills
from experiments.skill_tables import Claims
from jaxalign.core import metrics as sinks
from jaxalign.core.checkpoint import Checkpoints
from jaxalign.core.types import UserError
from jaxalign.rollout.episodes import Episodes

TINY = presets.tiny()
T = 200  # steps of an episode on the plane


@pytest.fixture(scope="module")
def lab():
    return skills.make_lab(TINY, 2)


@functools.cache
def stepper(arm, seeds):
    """One compilation for all tests of an arm and its seeds."""
    own_lab = skills.make_lab(TINY, len(seeds))
    return skills.make_training(skills.METHODS[arm], getattr(TINY, arm), own_lab, TINY, seeds)


def trained(arm, seeds, dispatches=2):
    method, own, own_lab = (
        skills.METHODS[arm],
        getattr(TINY, arm),
        skills.make_lab(TINY, len(seeds)),
    )
    state = skills.start_state(method, own, own_lab.environment, TINY.buffer, seeds)
    state, _ = seed_axis.spread(state, len(seeds), own_lab.mesh)
    key = jax.device_put(jax.random.key(3), state.step.sharding)
    for i in range(dispatches):
        state, log = stepper(arm, seeds)(state, own_lab.world, jax.random.fold_in(key, i))
    return state, log


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: dataclasses.replace(TINY, arms=("metro",)), "arms: 'metro'"),
        (lambda: dataclasses.replace(TINY, epochs=3), "epochs = 3: must be a multiple"),
        (lambda: dataclasses.replace(TINY, updates=0), "updates = 0"),
        (lambda: dataclasses.replace(TINY, goal_radius=0.0), "goal_radius = 0.0"),
        (lambda: skills.check(dataclasses.replace(TINY, buffer=1000), 1), "buffer = 1000"),
        (lambda: skills.check(dataclasses.replace(TINY, buffer=400, metra=BIG), 1), "batch = 512"),
        (lambda: skills.check(dataclasses.replace(TINY, environment="moon"), 1), "'moon'"),
        (lambda: presets.METRA(skill_size=0), "skill_size = 0"),
        (lambda: Claims("claims", ()), "settings = ()"),
        (lambda: skill_tables.run(None, Claims("claims", ("sea",)), {}), "settings: 'sea'"),
    ],
)
def test_mistakes_are_named(made, said):
    with pytest.raises(UserError) as error:
        made()
    assert said in str(error.value) and "\n" not in str(error.value)


BIG = dataclasses.replace(TINY.metra, batch=512)


def test_all_presets_fit_their_environments():
    for name, preset in presets.PRESETS.items():
        config = preset()
        if isinstance(config, Claims):
            assert set(config.settings) <= set(presets.settings())
        elif config.environment not in presets.skills.skill_worlds.GOAL_RANGE or name in (
            "plane",
            "tiny",
        ):
            skills.check(config, 1)


def test_more_episodes_keep_the_gradient_steps_of_a_transition():
    base = presets.plane()
    for count in presets.SIDE_BY_SIDE:
        config = presets.side_by_side(count)
        steps = config.epochs * config.environments
        assert steps == base.epochs * base.environments
        assert config.epochs * config.updates == base.epochs * base.updates
        skills.check(config, 1)


# --- an epoch -------------------------------------------------------------------------------------


def test_rows_of_episodes():
    seen = jnp.arange(4 * 2 * 3, dtype=jnp.float32).reshape(4, 2, 3)
    walked = Episodes(seen, jnp.zeros((3, 2, 1)), None)
    rows = skills.transitions(walked, jnp.array([[1.0], [2.0]]), TINY.metra)
    np.testing.assert_array_equal(rows.observation, seen[:-1].reshape(6, 3))
    np.testing.assert_array_equal(rows.next_observation, seen[1:].reshape(6, 3))
    np.testing.assert_array_equal(rows.skill[:, 0], [1, 2, 1, 2, 1, 2])
    np.testing.assert_array_equal(rows.terminal, [0, 0, 0, 0, 1, 1])
    endless = dataclasses.replace(TINY.metra, terminal_at_limit=False)
    assert not skills.transitions(walked, jnp.ones((2, 1)), endless).terminal.any()


def test_nothing_is_learned_before_the_buffer_has_warmed_up(lab):
    counts = [int(skills.updates_of(TINY, lab.environment, jnp.int32(i))) for i in range(4)]
    assert counts == [0, TINY.updates, TINY.updates, TINY.updates]  # 400 rows an epoch, of 800


def test_a_dispatch_fills_buffers_and_learns():
    state, log = trained("metra", (0, 1))
    memory = state.extra
    assert int(state.step) == 2 and stepper("metra", (0, 1))._cache_size() == 1
    assert int(memory.buffer.size) == 1200  # four epochs of 400 rows in a ring of 1200
    assert int(memory.buffer.at) == 400
    assert memory.visited.shape[0] == 2 and (memory.visited.sum((1, 2)) > 3).all()
    assert {"phi_loss", "constraint", "critic_loss"} <= set(log)
    assert all(v.shape == (2,) and np.isfinite(v).all() for v in log.values())
    skill = memory.buffer.data.skill
    np.testing.assert_allclose(jnp.linalg.norm(skill, axis=-1), 1.0, rtol=1e-5)
    moved = memory.buffer.data.next_observation - memory.buffer.data.observation
    np.testing.assert_allclose(moved, 0.2 * memory.buffer.data.action, atol=1e-5)


def test_a_seed_does_not_hang_on_the_others():
    several, alone = trained("metra", (4, 7))[0], trained("metra", (7,))[0]
    for name in ("params", "slow"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a[1], b[0], rtol=1e-4, atol=1e-5),
            getattr(several, name),
            getattr(alone, name),
        )


# --- whole runs -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two seeds."""
    root = tmp_path_factory.mktemp("skills")
    directories = {seed: root / f"seed-{seed}" for seed in (0, 1)}
    config = dataclasses.replace(TINY, arms=("metra", "random"))
    for seed, directory in directories.items():
        directory.mkdir()
        own = dataclasses.asdict(dataclasses.replace(config, seed=seed))
        (directory / "config.json").write_text(json.dumps(own))
    skills.run_arms(skills.make_lab(config, 2), config, directories, resume=False)
    return root


def test_a_run_leaves_numbers_and_pictures(finished):
    result = json.loads((finished / "seed-1" / "result.json").read_text())
    assert result["metra/environment_steps"] == 4 * 2 * T
    assert 0 < result["random/coverage"] < 200 and 0 <= result["metra/goal/reached"] <= 1
    rows = sinks.read_json_lines(finished / "seed-0" / "metra" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2] and "coverage" in rows[-1]
    run = report.comparison.read(finished)
    shown = skill_plots.read_skills(run)
    assert shown["metra"]["place"].shape == (T + 1, TINY.shown, 2)
    assert shown["metra"]["latent"].shape == (T + 1, TINY.shown, 2)
    assert "latent" not in shown["random"]
    assert report.build(finished).read_text().count("<figure") == 3
    assert "coverage" in report.table(finished)
    assert set(pages.differences(run, "coverage")) == {"random"}


def test_resuming_equals_no_interruption(finished, tmp_path):
    """Half a run, then the other half, buffer and all."""
    own_lab, seeds = skills.make_lab(TINY, 2), (0, 1)
    directories = {seed: tmp_path / f"seed-{seed}" for seed in seeds}
    half = dataclasses.replace(TINY, epochs=2, evaluate_every=2)
    skills.train_arm(own_lab, half, "metra", directories, resume=False)
    skills.train_arm(own_lab, TINY, "metra", directories, resume=True)
    start = skills.start_state(skills.metra, TINY.metra, own_lab.environment, TINY.buffer, seeds)
    ends = []
    for folder in (finished / "seed-0" / "metra", tmp_path / "seed-0"):
        with contextlib.closing(Checkpoints(folder / "ckpt")) as saved:
            ends.append(saved.restore(start)[0])
    jax.tree.map(np.testing.assert_array_equal, *ends)


def test_tables_pair_seeds(finished, monkeypatch, tmp_path):
    monkeypatch.setattr(skill_tables, "RESULTS", tmp_path)
    (tmp_path / "plane").symlink_to(finished)
    claims = Claims("claims", ("plane",), repeats=2)
    made = json.loads(skill_tables.summarise(tmp_path, claims).read_text())
    numbers, pairs = made["tables"]
    assert [row[0] for row in numbers["rows"]] == ["metra", "random"]
    assert pairs["rows"][0][:2] == ["plane", "metra, random"]
    assert set(pairs["rows"][0][3]) == {"mean", "low", "high"}
    assert (tmp_path / "metra_claims-plane-paths.png").exists()
