"""The STARC experiment: its worlds, its statistics, and figure 1 in small."""

from __future__ import annotations

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import (
    bench_starc,
    starc,
    starc_continuous,
    starc_figure1,
    starc_monitor,
    starc_report,
    starc_small,
)
from experiments import starc_worlds as worlds
from experiments.starc_figure1 import L2, Points
from jaxalign.core.types import UserError
from jaxalign.data.preferences import Pairs, Responses
from jaxalign.ops import tabular
from jaxalign.ops.starc import CANONICALISATIONS

TINY = starc.tiny()


# --- worlds ---------------------------------------------------------------------------------------


def test_random_worlds_are_as_described():
    keys = jax.random.split(jax.random.key(0), 200)
    mdp = worlds.random_process(keys[0], 32, 4, 0.95)
    tabular.check(mdp)
    possible = np.asarray(mdp.transition) > 1e-6
    assert 0.12 < possible.mean() < 0.2  # a normal number is above 1 in 16 % of cases
    rewards = np.asarray(jax.jit(jax.vmap(worlds.random_reward, (0, None)))(keys, mdp))
    zeros = np.isclose(rewards, np.median(rewards, axis=(1, 2, 3), keepdims=True)).mean((1, 2, 3))
    assert 0.05 < (zeros > 0.9).mean() < 0.16  # a fifth is sparse, of which half is not shaped
    # Half are shaped: then means over arriving differ by state, beyond what noise explains.
    means = rewards.mean((1, 2))
    noise = rewards.std((1, 2)).mean(1) / np.sqrt(128)
    assert 0.4 < (means.std(1) > 2 * noise).mean() < 0.6


def test_an_unseen_reward_is_worth_nothing():
    mdp = worlds.random_process(jax.random.key(1), 5, 3, 0.9)
    unseen = worlds.unseen_reward(jax.random.key(2), mdp)
    assert jnp.abs(unseen).max() > 0.5
    np.testing.assert_allclose((mdp.transition * unseen).sum(-1), 0, atol=1e-6)


def test_the_gridworld_s_moves_and_rewards():
    mdp, rewards = worlds.gridworld()
    tabular.check(mdp, **rewards)
    arrived = np.asarray(mdp.transition).argmax(-1)
    assert arrived[4].tolist() == [4, 1, 7, 3, 5]  # stay, up, down, left, right of the centre
    assert arrived[0].tolist() == [0, 0, 3, 0, 1]  # walls
    assert rewards["goal"][5, 2, 8] == 1 and rewards["cliff"][1, 2, 4] == -1
    assert rewards["path"][0, 2, 3] == pytest.approx(0.1) and rewards["path"][1, 2, 4] == 0


# --- small parts ----------------------------------------------------------------------------------


def test_adversarial_rewards_fool_epic_and_not_starc(tmp_path):
    numbers = starc_small.adversarial(TINY, tmp_path).numbers
    for k in ("10", "1000"):
        assert numbers[f"same order {k}/val"] < 1e-3 < 1 < numbers[f"same order {k}/epic"]
        assert numbers[f"opposite order {k}/val"] > 1.99
        assert numbers[f"opposite order {k}/epic"] < 4 / float(k)
        assert numbers[f"same order {k}/worst regret"] < 1e-3
        assert numbers[f"opposite order {k}/worst regret"] == pytest.approx(1, abs=1e-3)


def test_values_of_the_continuous_world_solve_their_equation():
    """The policy's advantage over its own values has mean 0, by sampling."""
    reward = starc_continuous.rewards()["elsewhere"]
    value = starc_continuous.value(reward)
    canonical = starc_continuous.expected(reward) + starc_continuous.ahead(value)
    rng = np.random.default_rng(0)
    for y in (np.array([0.3, -1.0, 1.0]), np.array([-2.0, 0.5, 1.0])):
        action = y @ starc_continuous.GAIN + starc_continuous.SPREAD * rng.normal(size=200_000)
        u = np.concatenate([np.broadcast_to(y, (len(action), 3)), action[:, None]], 1)
        advantage = np.einsum("ni,ij,nj->n", u, canonical, u)
        assert advantage.mean() == pytest.approx(0, abs=5 * advantage.std() / np.sqrt(len(u)))


def test_exact_distances_of_the_continuous_world():
    names = list(starc_continuous.rewards())
    for minimal in (False, True):
        found = dict(zip(names, starc_continuous.exact(minimal)[0], strict=True))
        assert found["shaped"] == pytest.approx(0, abs=1e-7)
        assert found["redistributed"] == pytest.approx(0, abs=1e-7)
        assert found["opposite"] == pytest.approx(2, abs=1e-7)
        assert 0.1 < found["dear actions"] < 1


def test_estimates_approach_the_exact_distances(tmp_path):
    config = dataclasses.replace(TINY, samples=256)
    result = starc_continuous.run(config, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["samples"] for row in rows] == [64, 256]
    for name in ("rollouts", "lstd"):
        assert rows[1][f"{name}/error"] < 0.06
        assert result.numbers[f"shaped/{name}"] < 1e-3
        # One estimator for all rewards is what does it.
        assert result.numbers[f"shaped/{name}"] < 0.1 * result.numbers["shaped/separate"]


def test_the_hook_sees_what_pairs_can_teach():
    """Not what a prompt adds, nor the scale; and opposite scores are 2 apart."""
    rng = np.random.default_rng(0)
    mask = np.ones((30, 4), bool)
    prompt, chosen, rejected = (rng.integers(1, 9, (30, 2)) for _ in range(3))
    pairs = Pairs(*(Responses(np.hstack([prompt, r]), mask) for r in (chosen, rejected)))
    ids = np.concatenate([pairs.chosen.ids, pairs.rejected.ids])
    gold = ids[:, 2:].sum(1).astype(np.float32)

    def scores(params, ids, mask):
        own = params["slope"] * ids[:, 2:].sum(1) + params["prompt"] * ids[:, 0]
        return jnp.broadcast_to(own[:, None], mask.shape)

    problem = types.SimpleNamespace(
        test_pairs=pairs, gold_params=(), gold=lambda params, ids, mask: jnp.array(gold)
    )
    found = starc_monitor.hook(problem, scores, 5)
    for slope, expected in ((0.5, 0.0), (-3.0, 2.0)):
        state = types.SimpleNamespace(params={"slope": slope, "prompt": 7.0})
        assert found.run(state, 0)["starc"] == pytest.approx(expected, abs=1e-3)
    assert found.every == 5


# --- figure 1 -------------------------------------------------------------------------------------


def test_the_scatter_of_returns_is_that_of_rollouts():
    mdp = worlds.random_process(jax.random.key(3), 3, 2, 0.8)
    reward = np.asarray(jax.random.normal(jax.random.key(4), (3, 2, 3)))
    policy, transition = np.array([1, 0, 1]), np.asarray(mdp.transition)
    rng, rollouts = np.random.default_rng(0), 4000
    state, total = np.repeat(np.arange(3), rollouts), 0.0
    for step in range(60):
        chance = transition[state, policy[state]].cumsum(-1)
        following = (rng.random((len(state), 1)) > chance[:, :-1]).sum(-1)
        total += 0.8**step * reward[state, policy[state], following]
        state = following
    variance = total.reshape(3, rollouts).var(1).mean()
    found = starc_figure1._scatter(mdp, jnp.array(reward)[None], jnp.array(policy)[None])
    assert found[0] == pytest.approx(np.sqrt(variance / (3 * 2)), rel=0.03)


def made_points(seed=0, count=40):
    """Distances that correlate with regret by .9 for VAL, and not at all for the others."""
    rng = np.random.default_rng(seed)
    shape = (count, len(CANONICALISATIONS), 7, 6, 16)
    regret = rng.normal(size=(count, 16))
    distance = rng.normal(size=shape)
    distance[:, 0, L2, L2] = 0.9 * regret + np.sqrt(0.19) * distance[:, 0, L2, L2]
    return Points(distance, regret, regret, regret, 0 * regret, regret)


def test_correlations_and_their_intervals():
    points = made_points()
    table = starc_figure1.correlations(points)
    for i, j, k in ((0, L2, L2), (3, 2, 5)):
        expected = np.corrcoef(points.distance[:, i, j, k].ravel(), points.regret.ravel())[0, 1]
        assert table[i, j, k] == pytest.approx(expected, abs=1e-12)
    cell = starc_figure1.with_interval(points.distance[:, 0, L2, L2], points.regret)
    assert cell["low"] < 0.9 < cell["high"]
    assert cell["high"] - cell["low"] < 0.06
    drawn = starc_figure1.resampled(points.distance[:, 0, L2, L2], points.regret)
    assert np.median(drawn) == pytest.approx(cell["mean"], abs=0.005)
    ahead = starc_figure1.ahead_of(points, "val", "epic")
    assert ahead["low"] < 0.9 < ahead["high"] and ahead["low"] > 0.7
    assert starc_figure1.correlation(np.ones(5), np.arange(5)) == 0.0


def test_tables_name_every_cell_and_the_paper_s():
    summary, ahead, cells = starc_figure1.tables(made_points())
    assert [row[0] for row in summary["rows"]] == list(CANONICALISATIONS)
    assert summary["rows"][0][2] == "0.856" and summary["rows"][1][2] == "left out"
    assert len(cells["rows"]) == len(CANONICALISATIONS) * 7
    val_l2 = next(row for row in cells["rows"] if row[:2] == ["val", "l2"])
    assert val_l2[2 + L2].endswith("(0.856)")
    for table in (summary, ahead, cells):
        assert all(len(row) == len(table["columns"]) for row in table["rows"])


def test_figure_1_goes_on_where_it_was(tmp_path):
    whole = starc_figure1.run(TINY, tmp_path / "whole")
    half = dataclasses.replace(TINY, worlds=8)
    starc_figure1.run(half, tmp_path / "cut")
    kept = (tmp_path / "cut" / "batches" / "0000.npz").stat().st_mtime_ns
    resumed = starc_figure1.run(TINY, tmp_path / "cut")
    for a, b in zip(whole, resumed, strict=True):
        np.testing.assert_array_equal(a, b)
    assert (tmp_path / "cut" / "batches" / "0000.npz").stat().st_mtime_ns == kept
    assert whole.distance.shape == (16, len(CANONICALISATIONS), 7, 6, 2)
    assert (whole.regret <= whole.worst + 1e-4).all()
    assert (whole.worst <= whole.bound + 1e-4).all()


@pytest.mark.slow
@pytest.mark.usefixtures("optimised")
def test_figure_1_in_small(tmp_path):
    """1,024 pairs at the paper's sizes: the order, the gap, and the value of VAL."""
    config = dataclasses.replace(starc.figure1_preset(), worlds=8)
    numbers = starc_figure1.numbers(starc_figure1.run(config, tmp_path))
    ablations = [numbers[f"{name}/l2-l2"] for name in ("epic", "dard")]
    assert numbers["val/l2-l2"] - max(ablations) >= 0.05
    assert min(ablations) > numbers["none/l2-l2"]
    assert numbers["val/l2-l2"] == pytest.approx(0.88, abs=0.05)


# --- the bench -----------------------------------------------------------------------------------


def test_the_bench_s_loops_and_program_agree(capsys):
    config = bench_starc.Bench("starc", batches=(3,), states=4, actions=2, discount=0.8, repeats=1)
    problem = bench_starc.make_problem(config, 3)
    ours = bench_starc.judge(problem, True)
    runs = [bench_starc.loop_judge(problem, 0.8, True, seed) for seed in range(3)]
    assert runs[0][0] == pytest.approx(float(ours[0][0]), abs=1e-5)
    assert np.mean([regret for _, regret in runs]) == pytest.approx(float(ours[1][0]), abs=0.15)
    lines = bench_starc.run(config)
    assert [line["pairs"] for line in lines] == [3, 1]
    assert lines[0]["pair_ratio"] == pytest.approx(1)
    assert "pair ratio" in capsys.readouterr().err


# --- the command ----------------------------------------------------------------------------------


def test_impossible_configs():
    for changes, said in (
        ({"parts": ("figure2",)}, "'figure2' is not one of figure1"),
        ({"discount": 1.0}, "discount = 1.0: must be at least 0 and below 1"),
        ({"at_once": 5}, "at_once = 5: must divide worlds = 128"),
        ({"states": 1}, "states = 1: must be at least 2"),
        ({"updates": 0}, "updates = 0"),
    ):
        with pytest.raises(UserError, match=said):
            dataclasses.replace(starc.figure1_preset(), **changes)


def test_a_cell_as_text():
    assert starc_report.cell({"mean": 0.5, "low": 0.4, "high": 0.6}) == "0.50 [0.40, 0.60]"
    assert starc_report.cell({"value": 0.25}) == "0.250"
    assert starc_report.cell("left out") == "left out"
