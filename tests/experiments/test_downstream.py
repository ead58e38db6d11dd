"""Control with frozen skills: where these come from, an epoch, seeds, resume, the report."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import shutil

import jax
import numpy as np
import pytest

from experiments import downstream, metra, report, seed_axis, skills
from experiments.downstream import Chooser, Experiment, Lab, Skills
from jaxalign.core import metrics as sinks
from jaxalign.core.checkpoint import Checkpoints
from jaxalign.core.types import UserError
from jaxalign.envs import plane, skill_tasks

TINY = downstream.tiny()
ROWS = TINY.sac.episodes * 200  # environment steps of an epoch
LEARNED = dataclasses.replace(metra.tiny(), arms=("metra",), shown=2, goals=2)


def folders(root, config):
    """A run's folders for two seeds, with the config in each."""
    directories = {seed: root / f"seed-{seed}" for seed in (0, 1)}
    for seed, directory in directories.items():
        directory.mkdir(parents=True)
        own = dataclasses.asdict(dataclasses.replace(config, seed=seed))
        sinks.write_json(directory / "config.json", own)
    return directories


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """What a run of experiments.metra with two seeds leaves, though it has learned nothing."""
    root = tmp_path_factory.mktemp("learned")
    directories = folders(root, LEARNED)
    with contextlib.closing(Checkpoints(directories[0] / "metra" / "ckpt")) as checkpoints:
        checkpoints.save(1, untrained(LEARNED.metra, (0, 1)), jax.random.key(0))
    return root


@functools.cache
def untrained(own, seeds):
    """METRA's state on the plane, as its run keeps it."""
    return skills.start_state(skills.metra, own, plane.environment(), LEARNED.buffer, seeds)


@pytest.fixture(scope="module")
def finished(learned, tmp_path_factory):
    """A run of two seeds with these skills."""
    root = tmp_path_factory.mktemp("downstream")
    downstream.run_arms(TINY, learned, folders(root, TINY), resume=False)
    return root


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: Experiment(control="moon"), "control = 'moon'"),
        (lambda: Experiment(arms=("random", "metra")), "arms = ('random', 'metra')"),
        (lambda: Experiment(epochs=15), "epochs = 15: must be a multiple"),
        (lambda: Experiment(shown=0), "shown = 0"),
        (lambda: downstream.check(Experiment(), 1), "skills = '', preset = ''"),
        (lambda: downstream.check(Experiment(preset="ant"), 1), "learned in 'plane'"),
        (lambda: downstream.check(Experiment(preset="claims"), 1), "preset = 'claims'"),
        (lambda: downstream.check(dataclasses.replace(TINY, arms=("no",)), 1), "arms: 'no'"),
        (lambda: downstream.check(Experiment(skills="/nowhere"), 1), "skills = '/nowhere'"),
        (lambda: downstream.check(dataclasses.replace(TINY, sac=ODD), 1), "sac.buffer = 100"),
    ],
)
def test_mistakes_are_named(made, said):
    with pytest.raises(UserError) as error:
        made()
    assert said in str(error.value) and "\n" not in str(error.value)


ODD = dataclasses.replace(TINY.sac, buffer=100)


def test_skills_of_another_environment_or_arm_are_refused(learned):
    with pytest.raises(UserError, match="learned in 'plane', but ant-multi-goals needs those"):
        downstream.find_skills(learned, Experiment(control="ant-multi-goals"))
    with pytest.raises(UserError, match="no checkpoint of 'diayn'"):
        downstream.find_skills(learned, Experiment())


# --- skills ---------------------------------------------------------------------------------------


def test_a_config_comes_back_from_its_file(learned):
    experiment, found = downstream.find_skills(learned, TINY)
    assert experiment == LEARNED and list(found) == [0, 1]


def test_policies_come_from_the_checkpoint_seed_by_seed(learned):
    experiment, found = downstream.find_skills(learned, TINY)
    low = downstream.load_skills(experiment, found, "metra", 3)
    params = untrained(LEARNED.metra, (0, 1)).params

    def same(three, two):
        np.testing.assert_array_equal(three, np.asarray(two)[np.array([0, 1, 0])])

    jax.tree.map(same, low.state.params, params)
    kernel = params["actor"]["mean"]["kernel"]
    assert not np.array_equal(kernel[0], kernel[1])


# --- an epoch -------------------------------------------------------------------------------------


@functools.cache
def lab_and_skills(own):
    """Skills that were never trained, of one seed."""
    environment = plane.environment()
    lab = Lab(
        skill_tasks.make("plane-multi-goals", environment), (), seed_axis.make_mesh("data=-1", 1)
    )
    state = skills.learner(untrained(own, (0,)))
    return lab, Skills(skills.metra, own, state._replace(opt_state={}, slow={}))


ONE_HOT = dataclasses.replace(LEARNED.metra, skill_size=3, discrete=True)


def test_random_choices_are_skills_and_earn_what_the_steps_earn():
    lab, low = lab_and_skills(ONE_HOT)
    high = downstream.chooser(TINY, "random", ONE_HOT)
    task = lab.task._replace(hold=2)
    low = low._replace(state=jax.tree.map(lambda leaf: leaf[0] if leaf.ndim else leaf, low.state))
    walk = jax.jit(lambda key: downstream.walk(high, low, task, None, (), 6, key, 0.0))
    walked = walk(jax.random.key(0))
    assert walked.actions.shape == (8, 6, 3) and walked.observations.shape == (9, 6, 4)
    assert (walked.actions.sum(-1) == 1).all() and (walked.actions.sum((0, 1)) > 5).all()
    made = downstream.choices(walked)
    np.testing.assert_array_equal(made.next_observation[:-1], made.observation[1:])
    np.testing.assert_array_equal(made.terminal.sum(0), np.ones(6))
    np.testing.assert_array_equal(made.terminal[-1], np.ones(6))
    assert ((made.reward >= 0) & (made.reward <= 2)).all()


def test_one_hot_skills_are_picked_by_ppo():
    lab, low = lab_and_skills(ONE_HOT)
    ppo = dataclasses.replace(TINY.ppo, hidden=(8,), episodes=2, batch=8)
    config = dataclasses.replace(TINY, ppo=ppo, at_once=1)
    high = downstream.chooser(config, "metra", ONE_HOT)
    assert high == Chooser(downstream.skill_control_ppo, ppo, False)
    state = downstream.start_state(high, ONE_HOT, lab.task, [0])
    before = jax.tree.map(np.asarray, state.params)
    train = downstream.make_training(high, low, lab, config, [0])
    state, log = train(state, (low.state, ()), jax.random.key(0))
    assert int(state.step) == 1 and {"value_loss", "train/return"} <= set(log)
    assert all(value.shape == (1,) and np.isfinite(value).all() for value in log.values())
    apart = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), before, state.params)
    assert min(jax.tree.leaves(apart)) > 0


# --- whole runs -----------------------------------------------------------------------------------


def test_a_run_leaves_numbers_and_a_picture(finished):
    result = json.loads((finished / "seed-1" / "result.json").read_text())
    assert result["metra/environment_steps"] == TINY.epochs * ROWS
    assert 0 <= result["random/return"] <= 200 and "metra/critic_loss" in result
    rows = sinks.read_json_lines(finished / "seed-0" / "metra" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2] and "return" in rows[0]
    page = report.build(finished).read_text()
    assert page.count("<figure") == 1 and "plane-multi-goals" in page
    assert "without noise" in report.table(finished)


def test_random_choices_are_judged_alike_at_all_times(finished):
    rows = sinks.read_json_lines(finished / "seed-0" / "random" / "metrics.jsonl")
    assert len({row["return"] for row in rows}) == 1


def test_resuming_equals_no_interruption(learned, finished, tmp_path):
    """The last dispatch is done again."""
    shutil.copytree(finished, tmp_path / "again")
    directories = {seed: tmp_path / "again" / f"seed-{seed}" for seed in (0, 1)}
    shutil.rmtree(directories[0] / "metra" / "ckpt" / "2")
    config = dataclasses.replace(TINY, arms=("metra",))
    downstream.run_arms(config, learned, directories, resume=True)
    for directory in directories.values():
        path = directory.relative_to(tmp_path / "again") / "metra" / "metrics.jsonl"
        before, after = (sinks.read_json_lines(r / path) for r in (finished, tmp_path / "again"))
        assert before[-1].pop("seconds") != after[-1].pop("seconds")
        assert before == after


def test_presets_are_of_their_environments():
    for name, preset in downstream.PRESETS.items():
        config = preset()
        wanted = skill_tasks.find(config.control).environment
        assert wanted == {"ant": "ant", "plane": "plane", "tiny": "plane"}.get(name, "half-cheetah")
        if config.preset:
            downstream.check(config, 1)
