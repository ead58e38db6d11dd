"""Values, best policies and regret against sweeps, and against enumeration of all policies."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.core.types import UserError
from jaxalign.ops import starc, tabular
from jaxalign.ops.tabular import MDP
from tests.ops import starc_reference as slow

SEEDS = range(6)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def jax_world(seed, **sizes):
    mdp, rewards = slow.random_world(seed, **sizes)
    return mdp, rewards, MDP(jnp.array(mdp.transition), jnp.array(mdp.start), mdp.discount)


@jax.jit
def everything(mdp, rewards):
    """What the tests look at, in one program: first and second halves of the rewards are pairs."""
    r = tabular.expected_reward(mdp, rewards)
    own = tabular.extremes(mdp, r, 1e-13)
    one, two = jnp.split(r, 2)
    owns = [tabular.Extremes(*(jnp.split(o, 2)[i] for o in own)) for i in range(2)]
    policy = tabular.uniform_policy(mdp)
    width = tabular.spread(mdp, one, owns[0])
    distance = starc.distance(mdp, *jnp.split(rewards, 2))
    return {
        "values": tabular.state_values(mdp, policy, r),
        "returns": tabular.policy_returns(mdp, policy, r),
        "best": tabular.earned(own.best, r),
        "worst": tabular.earned(own.worst, r),
        "occupancy": own.best,
        "spread": tabular.spread(mdp, r, own),
        "regret": tabular.regret(mdp, one, owns[0], owns[1].best),
        "mutual": tabular.mutual_regret(mdp, one, owns[0], two, owns[1]),
        "worst_regret": tabular.worst_regret(mdp, one, two, 1e-11, 1e-13),
        "bound": tabular.regret_bound(
            mdp, tabular.advantages(mdp, policy, one), width, distance
        ),
    }  # fmt: skip


def test_values_are_those_of_sweeps():
    mdp, rewards, ours = jax_world(0, rewards=4)
    found = everything(ours, jnp.array(rewards))
    policy = np.full((4, 3), 1 / 3)
    expected = [slow.swept_values(mdp, policy, reward) for reward in rewards]
    np.testing.assert_allclose(found["values"], expected, atol=1e-10)
    np.testing.assert_allclose(found["returns"], np.array(expected) @ mdp.start, atol=1e-10)


@pytest.mark.parametrize("seed", SEEDS)
def test_regrets_are_those_of_all_policies(seed):
    mdp, rewards, ours = jax_world(seed, rewards=4, sparse=seed % 2 == 0)
    found = everything(ours, jnp.array(rewards))
    returns = np.array([slow.all_returns(mdp, reward) for reward in rewards])
    np.testing.assert_allclose(found["best"], returns.max(1), atol=1e-10)
    np.testing.assert_allclose(found["worst"], returns.min(1), atol=1e-10)
    np.testing.assert_allclose(found["spread"], np.ptp(returns, axis=1), atol=1e-10)
    np.testing.assert_allclose(found["occupancy"].sum((1, 2)), 10.0, rtol=1e-12)
    for i, (one, two) in enumerate(zip(returns[:2], returns[2:], strict=True)):
        lost = (one.max() - one[two.argmax()]) / np.ptp(one)
        back = (two.max() - two[one.argmax()]) / np.ptp(two)
        assert found["regret"][i] == pytest.approx(lost, abs=1e-10)
        assert found["mutual"][i] == pytest.approx((lost + back) / 2, abs=1e-10)
        worst = slow.brute_worst_regret(one, two)
        assert found["worst_regret"].value[i] == pytest.approx(worst, abs=1e-9)
        assert found["worst_regret"].error[i] <= 1e-9
        assert lost - 1e-10 <= worst <= found["bound"][i] + 1e-10


def test_worst_regret_of_related_rewards():
    mdp, rewards, ours = jax_world(7, rewards=2)
    shaped = 3 * rewards[0] + slow.shaping(mdp, 0)[0] + slow.unseen(mdp, 1) + 5
    nothing = slow.shaping(mdp, 2)[0]
    pairs = [
        (rewards[0], shaped, 0.0),
        (rewards[0], -shaped, 1.0),
        (rewards[0], nothing, 1.0),
        (nothing, rewards[0], 0.0),
        (nothing, nothing, 0.0),
    ]
    first, second, expected = map(np.array, zip(*pairs, strict=True))
    r = [tabular.expected_reward(ours, jnp.array(x)) for x in (first, second)]
    solve = jax.jit(functools.partial(tabular.worst_regret, tolerance=1e-11, sweep_tolerance=1e-13))
    np.testing.assert_allclose(solve(ours, *r).value, expected, atol=1e-9)


def test_nothing_is_lost_under_a_trivial_reward():
    mdp, rewards, ours = jax_world(8, rewards=1)
    trivial = np.stack([np.zeros_like(rewards[0]), slow.shaping(mdp, 0, 100.0)[0]])
    r = tabular.expected_reward(ours, jnp.array(trivial))
    own = tabular.extremes(ours, r)
    assert not tabular.spread(ours, r, own).any()
    assert not tabular.regret(ours, r, own, own.worst).any()
    assert jnp.isinf(tabular.regret_bound(ours, r, tabular.spread(ours, r, own), jnp.ones(2))).all()


def test_float32_keeps_its_digits_at_long_horizons():
    """Values of a reward with a large mean, and the regret, against float64."""
    mdp, rewards = slow.random_world(0, states=32, actions=4, discount=0.999, rewards=4)
    rewards = rewards + 3
    solve = jax.jit(lambda mdp, r: (
        tabular.advantages(mdp, tabular.uniform_policy(mdp), tabular.expected_reward(mdp, r)),
        tabular.worst_regret(mdp, *jnp.split(tabular.expected_reward(mdp, r), 2)).value,
    ))  # fmt: skip
    exact = solve(MDP(*map(jnp.array, mdp[:2]), 0.999), jnp.array(rewards))
    with jax.enable_x64(False):
        single = solve(MDP(*map(jnp.float32, mdp[:2]), 0.999), jnp.float32(rewards))
    size = np.abs(exact[0]).max()
    np.testing.assert_allclose(single[0], exact[0], atol=1e-5 * size)  # 2e-4 with the mean in
    np.testing.assert_allclose(single[1], exact[1], atol=1e-3)


def spoiled(array, at, value):
    array = np.array(array)
    array[at] = value
    return array


def bad_inputs():
    mdp, rewards = slow.random_world(0)
    t, start, g = mdp
    return {
        "sum": (MDP(spoiled(t, (2, 1), 0.5), start, g), rewards, r"transition\[2, 1\] sums to 2:"),
        "negative": (MDP(spoiled(t, (1, 0, 2), -0.5), start, g), rewards,
                     r"transition\[1, 0, 2\] is -0.5: must not be negative"),
        "not finite": (MDP(spoiled(t, (0, 0, 0), np.nan), start, g), rewards,
                       r"transition\[0, 0, 0\] is nan"),
        "shape": (MDP(t[:2], start, g), rewards, r"transition has shape \(2, 3, 4\)"),
        "start": (MDP(t, start[:3], g), rewards, r"start has shape \(3,\): must be \(4,\)"),
        "start sum": (MDP(t, start / 2, g), rewards, "start sums to 0.5"),
        "discount 1": (MDP(t, start, 1.0), rewards, "discount = 1: must be at least 0 and below 1"),
        "discount -1": (MDP(t, start, -1.0), rewards, "discount = -1"),
        "reward": (mdp, spoiled(rewards, (1, 3, 2, 0), np.inf),
                   r"first\[1, 3, 2, 0\] is inf: must be finite"),
        "reward shape": (mdp, rewards[..., :3], r"first has shape \(3, 4, 3, 3\): must end in"),
    }  # fmt: skip


@pytest.mark.parametrize("name", bad_inputs())
def test_bad_input_is_named(name):
    mdp, reward, said = bad_inputs()[name]
    with pytest.raises(UserError, match=said) as refused:
        starc.distance(mdp, reward, reward)
    assert "\n" not in str(refused.value)
