"""The claims' bookkeeping: the rate that an arm takes, and comparisons at equal budgets."""

import json

import pytest

from experiments import b2_claims, b2_tables, comparison
from experiments.b2_claims import Claims
from jaxalign.core.types import UserError


def a_run(rewards, entropies, cost_a_stage):
    """An `ArmRun` evaluated after each stage."""
    rows = [
        {"step": i, "cost": i * cost_a_stage, "train/reward": r, "train/entropy": e}
        for i, (r, e) in enumerate(zip(rewards, entropies, strict=True))
    ]
    return comparison.ArmRun(rows, {}, {}, finished=True)


def test_at_equal_cost_the_dearer_arm_is_read_off_earlier():
    cheap = a_run([0.0, 0.2, 0.4], [2.0, 2.0, 2.0], cost_a_stage=10)
    dear = a_run([0.0, 0.4, 0.8], [2.0, 2.0, 2.0], cost_a_stage=40)
    assert b2_tables.at_equal_cost(cheap, dear) == pytest.approx((0.4, 0.2))
    assert b2_tables.at_end("train/reward")(cheap, dear) == pytest.approx((0.4, 0.8))


def test_entropy_is_compared_where_both_first_reach_the_same_reward():
    slow = a_run([0.0, 0.1, 0.2], [2.0, 1.8, 1.6], cost_a_stage=1)
    fast = a_run([0.0, 0.4, 0.3], [2.0, 1.0, 0.5], cost_a_stage=1)
    assert b2_tables.entropy_at_equal_reward(slow, fast) == pytest.approx((1.6, 1.5))


def test_a_run_that_never_improves_is_compared_at_its_start():
    flat = a_run([0.5, 0.4], [2.0, 1.0], cost_a_stage=1)
    better = a_run([0.4, 0.6], [2.0, 1.0], cost_a_stage=1)
    assert b2_tables.entropy_at_equal_reward(flat, better) == pytest.approx((2.0, 1.5))


def test_each_arm_takes_the_rate_that_did_best_on_the_tuning_seeds(tmp_path):
    claims = Claims(
        settings=("sprites-early", "digits"), arms=("ddpo",), rates=(0.1, 0.2), tuning_seeds=2
    )
    rewards = {0.1: (0.9, 0.1), 0.2: (0.6, 0.6)}  # the mean counts, not the best seed
    for job in b2_claims.tuning_jobs(tmp_path, claims):
        job.directory.mkdir(parents=True)
        value = {"train/reward": rewards[job.rate][job.seed - 1000]}
        (job.directory / "result.json").write_text(json.dumps(value))
    assert b2_claims.chosen_rates(tmp_path, claims) == {
        ("sprites-early", "ddpo"): 0.2,
        ("digits", "ddpo"): 0.2,
    }


def test_rates_of_the_sprites_are_tuned_once_where_the_mixed_reward_is_compared():
    settings = ("sprites-early", "sprites-mixed")
    assert b2_claims.tuned_on("sprites-early", settings) == "sprites-mixed"
    assert b2_claims.tuned_on("digits", settings) == "digits"


def test_jobs_come_seed_by_seed_and_all_arms_get_the_same_budget(tmp_path):
    claims = Claims(settings=("digits",), repeats=2)
    rates = dict.fromkeys((("digits", arm) for arm in claims.arms), 1e-4)
    jobs = list(b2_claims.final_jobs(tmp_path, claims, rates))
    assert [job.seed for job in jobs] == [0] * len(claims.arms) + [1] * len(claims.arms)
    configs = [b2_claims.ARMS[job.arm](b2_claims.experiment(job).b2) for job in jobs]
    assert {c.stages * c.groups * c.leaves for c in configs} == {claims.stages * 160}
    assert len({(c.epochs, c.updates, c.step_weight, c.kl_weight, c.steps) for c in configs}) == 1


def test_unknown_settings_and_arms_are_told():
    with pytest.raises(UserError, match="'ddqo' is not one of ddpo"):
        Claims(arms=("ddqo",))
