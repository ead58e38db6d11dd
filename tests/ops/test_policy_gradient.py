"""Every estimator against plain Python loops over the same rewards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.ops import policy_gradient as pg

GROUPS, PROMPTS = 12, 4


def rewards_of(branches, seed=0):
    """Rewards `[G, K]`, the prompt of each group, and its prompt's mean and std (ddof 1)."""
    rng = np.random.default_rng(seed)
    prompt = np.arange(GROUPS) % PROMPTS
    rewards = rng.normal(size=(GROUPS, branches)).astype(np.float32) + prompt[:, None]
    rewards = rewards.astype(np.float32)
    mean = np.array([rewards[prompt == p].mean() for p in prompt], np.float32)
    std = np.array([rewards[prompt == p].std(ddof=1) for p in prompt], np.float32)
    return rewards, prompt, mean, std


def released_selection(z, threshold=0.5):
    """Which of a group's z-scores the released code keeps: the first best and the first worst."""
    keep = [False] * len(z)
    best, worst = z.index(max(z)), z.index(min(z))
    if z[best] >= threshold:
        keep[best] = True
    if z[worst] < -threshold:
        keep[worst] = True
    return keep


def test_prompt_z():
    rewards, _, mean, std = rewards_of(5)
    credit = pg.prompt_z(rewards, mean, std)
    for g in range(GROUPS):
        for k in range(5):
            expected = (rewards[g, k] - mean[g]) / std[g]
            assert credit.advantage[g, k] == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert bool(credit.keep.all())


def test_official_keeps_what_the_release_keeps():
    rewards, _, mean, std = rewards_of(5)
    credit = pg.official(rewards, mean, std)
    z = (rewards - mean[:, None]) / std[:, None]
    expected = [released_selection(list(row)) for row in z]
    assert 0 < np.sum(expected) < 2 * GROUPS  # groups that give 2, 1 and, below, 0
    np.testing.assert_array_equal(credit.keep, expected)
    np.testing.assert_allclose(credit.advantage, z, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("z", "keep"),
    [
        ([0.5, 0.0, 0.1], [1, 0, 0]),  # the upper threshold is in ...
        ([0.0, -0.5, 0.1], [0, 0, 0]),  # ... and the lower one is not
        ([0.4, -0.4, 0.0], [0, 0, 0]),
        ([0.9, 0.9, -0.2], [1, 0, 0]),  # ties: the first
        ([-0.9, 0.2, -0.9], [1, 0, 0]),
        ([0.9, 0.9, 0.9], [1, 0, 0]),
        ([-0.8, -0.7, -0.6], [1, 0, 0]),  # a bad group gives its worst only
        ([2.0, -2.0, 0.0], [1, 1, 0]),
        ([0.7], [1]),
    ],
)
def test_official_by_hand(z, keep):
    credit = pg.official(jnp.array([z], jnp.float32), jnp.zeros(1), jnp.ones(1))
    assert credit.keep.tolist() == [[bool(k) for k in keep]]


def test_equal_rewards_keep_nothing():
    credit = pg.official(jnp.full((3, 5), 2.0), jnp.full(3, 2.0), jnp.zeros(3))
    assert not bool(credit.keep.any())
    np.testing.assert_array_equal(credit.advantage, 0)


def test_extremes_selects_among_independent_rows():
    rewards, _, mean, std = rewards_of(1, seed=3)
    rewards, mean, std = (np.concatenate([a] * 5)[:40] for a in (rewards, mean, std))
    rewards = rewards + np.linspace(0, 1, 40, dtype=np.float32)[:, None]
    credit = pg.extremes(rewards, mean, std, size=4)
    z = ((rewards[:, 0] - mean) / (std + 1e-8)).tolist()
    expected = [keep for i in range(0, 40, 4) for keep in released_selection(z[i : i + 4])]
    np.testing.assert_array_equal(credit.keep[:, 0], expected)
    assert credit.advantage.shape == (40, 1)


@pytest.mark.parametrize("branches", [2, 5])
def test_branch_loo_is_the_reward_without_the_mean_of_the_others(branches):
    rewards, _, _, std = rewards_of(branches)
    credit = pg.branch_loo(rewards, std)
    plain = pg.branch_loo(rewards, jnp.ones(()))  # one scale for all groups
    for g in range(GROUPS):
        for k in range(branches):
            others = [rewards[g, j] for j in range(branches) if j != k]
            expected = rewards[g, k] - np.mean(others)
            assert plain.advantage[g, k] == pytest.approx(expected, abs=1e-5)
            assert credit.advantage[g, k] == pytest.approx(expected / std[g], abs=1e-4)
    assert bool(credit.keep.all())


def test_branch_z():
    rewards, _, _, _ = rewards_of(5)
    for row, seen in zip(rewards, pg.branch_z(rewards).advantage, strict=True):
        np.testing.assert_allclose(seen, (row - row.mean()) / row.std(ddof=1), atol=1e-5)


def test_grpo_has_no_history_and_pools_a_prompts_groups():
    rewards, prompt, _, _ = rewards_of(3)
    prompt = np.where(prompt == 3, 0, prompt)  # one prompt was not drawn, one has twice as many
    seen = pg.grpo(rewards, jnp.asarray(prompt), PROMPTS).advantage
    for p in range(3):
        scores = rewards[prompt == p]
        expected = (scores - scores.mean()) / scores.std(ddof=1)
        np.testing.assert_allclose(np.asarray(seen)[prompt == p], expected, atol=1e-4)


@jax.jit
def all_credits(rewards):
    """Advantages by every estimator where each reward ever seen is in `rewards`."""
    prompt = jnp.zeros(len(rewards), jnp.int32)
    now = pg.moments_by(jnp.zeros(rewards.size, jnp.int32), rewards.reshape(-1), 1)
    pooled = pg.pool(pg.push(pg.push(pg.empty_history(3, 1), now), now))
    mean, std, factors = pooled.mean[prompt], pooled.std()[prompt], rewards.shape[1:]
    credits = (
        pg.branch_z(rewards),
        pg.grpo(rewards, prompt, 1),
        pg.prompt_z(rewards, mean, std),
        pg.branch_loo(rewards, std),
        pg.telescope(rewards, mean, std, factors),
        pg.telescope_shrunk(rewards, mean, std, factors),
    )
    return [credit.advantage for credit in credits]


@pytest.mark.parametrize("branches", [3, 7])
def test_rewards_that_are_all_alike_get_no_credit(branches):
    """A mean of equal numbers may be off by its last bit; that must not become a z-score."""
    for value in (0.1, -4.05, 1 / 3, 7.7):
        for advantage in all_credits(jnp.full((4, branches), value, jnp.float32)):
            np.testing.assert_array_equal(advantage, 0)


def telescope_by_loops(rewards, mean, scale, factors):
    """Level by level: mean of the leaves below a row minus that of its other siblings."""
    columns = []
    for level in range(len(factors) + 1):
        rows = int(np.prod(factors[:level]))
        below = len(rewards) // rows
        value = [np.mean(rewards[r * below : (r + 1) * below]) for r in range(rows)]
        for r in range(rows):
            if level == 0:
                columns.append((value[0] - mean) / scale)
                continue
            k = factors[level - 1]
            family = range(r // k * k, r // k * k + k)
            others = [value[s] for s in family if s != r]
            columns.append((value[r] - np.mean(others)) / scale)
    return columns


@pytest.mark.parametrize("factors", [(5,), (2, 3), (3, 2, 2)])
def test_telescope(factors):
    rewards, _, mean, std = rewards_of(int(np.prod(factors)))
    credit = pg.telescope(rewards, mean, std, factors)
    for g in range(GROUPS):
        expected = telescope_by_loops(rewards[g], mean[g], std[g], factors)
        np.testing.assert_allclose(credit.advantage[g], expected, atol=1e-4)
    assert bool(credit.keep.all())


@pytest.mark.parametrize("factors", [(5,), (2, 3), (3, 2, 2)])
def test_a_shared_stretch_weighs_as_many_as_its_leaves(factors):
    rewards, _, mean, std = rewards_of(int(np.prod(factors)))
    credit = pg.telescope(rewards, mean, std, factors)
    first = 0
    for level in range(len(factors) + 1):
        rows = int(np.prod(factors[:level]))
        np.testing.assert_array_equal(
            credit.weight[:, first : first + rows], np.prod(factors[level:])
        )
        first += rows
    assert credit.weight.shape == (GROUPS, first)


def shrunk_by_loops(rewards, mean, scale, factors):
    """Least-squares slope of a row's excess on that of its other siblings, level by level."""
    groups = len(rewards)
    baseline = {(g, 0): mean[g] for g in range(groups)}
    columns = [[(np.mean(rewards[g]) - mean[g]) / scale[g]] for g in range(groups)]
    slopes = []
    for level, k in enumerate(factors):
        rows = int(np.prod(factors[: level + 1]))
        value = rewards.reshape(groups, rows, -1).mean(-1)
        own, rest = {}, {}
        for g in range(groups):
            for r in range(rows):
                others = [value[g, s] for s in range(r // k * k, r // k * k + k) if s != r]
                own[g, r] = value[g, r] - baseline[g, r // k]
                rest[g, r] = np.mean(others) - baseline[g, r // k]
        slope = sum(own[i] * rest[i] for i in own) / sum(rest[i] ** 2 for i in own)
        slopes.append(min(max(slope, 0), 1))
        for g in range(groups):
            columns[g] += [(own[g, r] - slopes[-1] * rest[g, r]) / scale[g] for r in range(rows)]
        baseline = {(g, r): baseline[g, r // k] + slopes[-1] * rest[g, r] for g, r in own}
    return columns, slopes


@pytest.mark.parametrize("factors", [(5,), (2, 3), (3, 2, 2)])
def test_telescope_shrunk(factors):
    rewards, _, mean, std = rewards_of(int(np.prod(factors)))
    prefix = np.random.default_rng(9).normal(size=(GROUPS, 1)).astype(np.float32)
    for share in (0.0, 1.0, 30.0):  # of what the shared prefix decides
        scores = rewards + share * prefix
        expected, slopes = shrunk_by_loops(scores.astype(np.float64), mean, std, factors)
        credit = pg.telescope_shrunk(scores, mean, std, factors)
        np.testing.assert_allclose(credit.advantage, expected, rtol=1e-3, atol=2e-4)
    assert slopes[0] > 0.95  # siblings that agree are the baseline: leave-one-out
    assert bool(credit.keep.all())


def test_telescope_shrunk_keeps_a_share_of_each_level():
    """Those of largest credit: of 12 trunks, 24 branches and 72 twigs a quarter each."""
    rewards, _, mean, std = rewards_of(6)
    credit = pg.telescope_shrunk(rewards, mean, std, (2, 3), 0.25)
    size, keep = np.abs(credit.advantage), np.asarray(credit.keep)
    for columns, kept in ((slice(0, 1), 3), (slice(1, 3), 6), (slice(3, 9), 18)):
        assert keep[:, columns].sum() == kept
        level, mask = size[:, columns], keep[:, columns]
        assert level[mask].min() >= level[~mask].max()


@pytest.mark.parametrize("factors", [(5,), (2, 3), (3, 2, 2)])
def test_credits_along_a_path_sum_to_the_reward(factors):
    """Without the K/(K-1) of leaving oneself out: trunk, branch, twig sum to reward - mean."""
    leaves = int(np.prod(factors))
    rewards, _, mean, _ = rewards_of(leaves)
    advantage = np.asarray(pg.telescope(rewards, mean, jnp.ones(GROUPS), factors).advantage)
    for leaf in range(leaves):
        total, first = advantage[:, 0], 1
        for level, k in enumerate(factors):
            row = leaf // int(np.prod(factors[level + 1 :]))
            total = total + advantage[:, first + row] * (k - 1) / k
            first += int(np.prod(factors[: level + 1]))
        np.testing.assert_allclose(total, rewards[:, leaf] - mean, atol=1e-5)


def test_pool_of_nine_stages_is_the_moments_of_all_their_scores():
    """Scores of the current stage and of eight before it, joined and then measured (ddof 1)."""
    rng = np.random.default_rng(5)
    history, stages = pg.empty_history(9, PROMPTS), []

    @jax.jit
    def remember(history, prompt, scores):
        history = pg.push(history, pg.moments_by(prompt, scores, PROMPTS))
        return history, pg.pool(history), pg.pool(history).std()

    for stage in range(13):
        prompt = rng.integers(0, PROMPTS - 1, 7)  # the last prompt is never drawn
        scores = (rng.normal(size=7) + stage - 50).astype(np.float32)
        stages.append((prompt, scores))
        history, pooled, std = jax.device_get(remember(history, prompt, scores))
        prompt, scores = (np.concatenate(parts) for parts in zip(*stages[-9:], strict=True))
        for p in range(PROMPTS - 1):
            mine = scores[prompt == p]
            assert pooled.count[p] == len(mine)
            if len(mine) > 1:
                assert pooled.mean[p] == pytest.approx(mine.mean(), rel=1e-5)
                assert std[p] == pytest.approx(mine.std(ddof=1), rel=1e-3)
    assert pooled.count[-1] == 0
    assert std[-1] == 0


def test_one_score_has_no_spread():
    now = pg.moments_by(jnp.array([1]), jnp.array([3.0]), 2)
    assert now.mean.tolist() == [0.0, 3.0]
    assert now.std().tolist() == [0.0, 0.0]


def test_within_share():
    rewards, prompt, _, _ = rewards_of(4)
    rewards = rewards + np.repeat(np.arange(GROUPS), 4).reshape(GROUPS, 4).astype(np.float32) / 3
    within = np.mean([row.var(ddof=1) for row in rewards])
    deviations = [
        (rewards[prompt == p] - rewards[prompt == p].mean()).reshape(-1) for p in range(PROMPTS)
    ]
    total = np.sum(np.concatenate(deviations) ** 2) / (rewards.size - PROMPTS)
    seen = pg.within_share(rewards, jnp.asarray(prompt), PROMPTS)
    assert seen == pytest.approx(within / total, rel=1e-4)
    assert 0.05 < seen < 0.95


@pytest.mark.parametrize(("branches_differ", "expected"), [(False, 0.0), (True, 1.0)])
def test_within_share_at_its_ends(branches_differ, expected):
    rewards = np.tile(np.arange(4, dtype=np.float32)[:, None], (1, 4))
    rewards = rewards.T if branches_differ else rewards
    seen = pg.within_share(jnp.asarray(rewards), jnp.zeros(4, jnp.int32), 1)
    assert seen == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.05, 2.0, -2.1, -2.0),
        (1.5, 2.0, -2.2, 0.0),  # improved enough: no more gain
        (0.5, 2.0, -1.0, -2.0),  # made worse: full pull back
        (1.5, -2.0, 3.0, 2.0),
        (0.5, -2.0, 1.8, 0.0),
    ],
)
def test_clipped_surrogate(ratio, advantage, loss, slope):

    def value(ratio):
        return pg.clipped_surrogate(jnp.log(ratio)[None], jnp.array([advantage]), 0.1)[0]

    assert value(jnp.float32(ratio)) == pytest.approx(loss, rel=1e-5)
    assert jax.grad(value)(jnp.float32(ratio)) == pytest.approx(slope, rel=1e-5)
