"""STARC against slow NumPy, and the properties that make it a distance between preferences."""

from __future__ import annotations

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.core.types import UserError
from jaxalign.ops import starc, tabular
from jaxalign.ops.starc import CANONICALISATIONS, NORMS
from jaxalign.ops.tabular import MDP
from tests.ops import starc_reference as slow

REFERENCE = {
    "val": slow.val,
    "minimal": functools.partial(slow.smallest, weighted=True),
    "minimal_l2": slow.smallest,
    "val_potential": slow.val_potential,
    "minimal_potential": functools.partial(slow.smallest, moves=False),
    "epic": slow.epic,
    "dard": slow.dard,
    "none": lambda mdp, reward: reward,
}


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def on_device(mdp):
    return MDP(*map(jnp.asarray, mdp[:2]), mdp.discount)


@functools.partial(jax.jit, static_argnames=("canonicalisation", "norm", "metric"))
def traced(mdp, first, second, canonicalisation="val", norm="l2", metric="l2"):
    return starc.distance(
        mdp, first, second, canonicalisation=canonicalisation, norm=norm, metric=metric
    )


def distance(*args, **kwargs):
    """`starc.distance` compiled, as NumPy's numbers."""
    return np.asarray(traced(*args, **kwargs))


@functools.partial(jax.jit, static_argnames="name")
def canonical(mdp, reward, name="val"):
    return starc.canonical(mdp, reward, name)


@pytest.mark.parametrize("name", CANONICALISATIONS)
def test_canonical_rewards_are_those_of_literal_numpy(name):
    # Where a move is impossible the weighted norm leaves rewards open: here none is.
    mdp, rewards = slow.random_world(3, rewards=2, sparse=False)
    ours = np.broadcast_to(canonical(on_device(mdp), jnp.array(rewards), name), rewards.shape)
    np.testing.assert_allclose(ours, [REFERENCE[name](mdp, r) for r in rewards], atol=1e-10)


@hypothesis.settings(max_examples=5, deadline=None, derandomize=True, database=None)
@hypothesis.given(
    st.integers(0, 2**30), st.sampled_from([0.5, 0.9, 0.99]), st.floats(0.01, 1e3), st.booleans()
)
@pytest.mark.parametrize("name", CANONICALISATIONS)
def test_what_changes_nothing_is_not_seen(name, seed, discount, scale, sparse):
    """Shaping, unseen rewards, constants and scale; the ablations see what they do not take out."""
    mdp, rewards = slow.random_world(seed, discount=discount, rewards=2, sparse=sparse)
    one, two = rewards
    shaped = scale * one + slow.shaping(mdp, seed, scale)[0] + scale * 7
    moved = one + slow.unseen(mdp, seed)
    first, second = np.stack([one, one, one, two]), np.stack([shaped, moved, -one, one])
    same, unseen, opposite, back = distance(on_device(mdp), first, second, name)
    there = distance(on_device(mdp), one, two, name)
    assert (same < 1e-9) == (name != "none")
    assert (unseen < 1e-9) == (name in starc.STARC)
    assert opposite == pytest.approx(2, abs=1e-10)
    assert back == pytest.approx(there, abs=1e-12)
    assert 0 < there <= 2


@pytest.mark.parametrize("name", CANONICALISATIONS)
def test_canonicalisation_is_linear_and_settles_at_once(name):
    mdp, rewards = slow.random_world(5, rewards=2)
    mixed = np.stack([*rewards, 2 * rewards[0] - 3 * rewards[1]])
    made = canonical(on_device(mdp), jnp.array(mixed), name)
    np.testing.assert_allclose(made[2], 2 * made[0] - 3 * made[1], atol=1e-12)
    again = canonical(on_device(mdp), jnp.broadcast_to(made, mixed.shape), name)
    error = float(jnp.abs(again - made).max())
    assert (error < 1e-12) == (name != "dard"), "DARD needs more than one go"


@pytest.mark.parametrize("norm", NORMS)
def test_norms_by_hand(norm):
    transition = np.array([[[0.25, 0.75]], [[1.0, 0.0]]])
    x = np.array([[[1.0, -2.0]], [[3.0, 0.5]]])
    expected = {
        "l1": 6.5, "l2": np.sqrt(1 + 4 + 9 + 0.25), "linf": 3.0,
        "weighted_l1": 0.25 + 1.5 + 3, "weighted_l2": np.sqrt(0.25 + 3 + 9), "weighted_linf": 3.0,
    }  # fmt: skip
    ours = starc.size(jnp.array(x)[None], jnp.array(transition), norm)
    assert ours[0] == pytest.approx(expected[norm])
    same = np.array([[[2.0]], [[-1.0]]])  # for all next states
    short, long = (
        starc.size(jnp.array(y)[None], jnp.array(transition), norm)[0]
        for y in (same, np.repeat(same, 2, axis=2))
    )
    assert short == pytest.approx(float(long))


def test_distances_are_a_metric_on_rewards():
    mdp, rewards = slow.random_world(11, rewards=6)
    pairs = np.asarray(jax.jit(starc.distances)(on_device(mdp), jnp.array(rewards)))
    np.testing.assert_allclose(pairs, pairs.T, atol=1e-14)
    assert not np.diag(pairs).any()
    assert (pairs[:, None] <= pairs[:, :, None] + pairs[None] + 1e-12).all()
    one_by_one = distance(on_device(mdp), rewards[:, None], rewards[None])
    np.testing.assert_allclose(pairs, one_by_one, atol=1e-14)


def test_norms_p_and_weighted_p_differ_by_a_factor_for_val():
    """As its numbers are the same for all next states, whose probabilities sum to 1."""
    mdp, rewards = slow.random_world(12, rewards=2)
    made = canonical(on_device(mdp), jnp.array(rewards))
    for norm, factor in (("l1", 4), ("l2", 2)):
        plain, weighted = (
            starc.size(made, jnp.array(mdp.transition), n) for n in (norm, f"weighted_{norm}")
        )
        np.testing.assert_allclose(plain / weighted, factor, rtol=1e-12)


def test_distance_is_0_just_where_all_policies_are_ordered_alike():
    """By the returns of all 81 policies."""
    mdp, rewards = slow.random_world(13, rewards=4)
    same = 2 * rewards[0] + slow.shaping(mdp, 1)[0] + slow.unseen(mdp, 2)
    candidates = [same, rewards[1], rewards[0] + 0.2 * rewards[2], -rewards[0]]
    first = np.array([slow.all_returns(mdp, rewards[0])] * 4)
    second = np.array([slow.all_returns(mdp, r) for r in candidates])

    def order(returns):
        return np.sign((returns[:, None] - returns[None]).round(9))

    alike = [(order(a) == order(b)).all() for a, b in zip(first, second, strict=True)]
    found = distance(on_device(mdp), rewards[0], np.stack(candidates))
    assert alike == [True, False, False, False]
    assert (np.asarray(found) < 1e-9).tolist() == alike


def test_returns_differ_from_canonical_ones_by_the_start_alone():
    mdp, rewards = slow.random_world(14, rewards=1)
    values = slow.swept_values(mdp, np.full((4, 3), 1 / 3), rewards[0])
    made = np.broadcast_to(canonical(on_device(mdp), jnp.array(rewards))[0], rewards[0].shape)
    change = slow.all_returns(mdp, rewards[0]) - slow.all_returns(mdp, made)
    np.testing.assert_allclose(change, mdp.start @ values, atol=1e-10)


@pytest.mark.parametrize("k", [10.0, 1000.0])
def test_epic_and_dard_fail_both_ways_where_starc_does_not(k):
    mdp, rewards = slow.random_world(15, states=8, rewards=1, sparse=False)
    r, u = rewards[0], k * slow.unseen(mdp, 3)
    for name in ("epic", "dard", "val_potential"):
        same, opposite = distance(on_device(mdp), np.stack([r, u + r]), np.stack([r + u, u - r]),
                                  name)  # fmt: skip
        assert same > 1 and opposite < 4 / k, name
    for name in starc.STARC:
        same, opposite = distance(on_device(mdp), np.stack([r, u + r]), np.stack([r + u, u - r]),
                                  name)  # fmt: skip
        assert same < 1e-9 and opposite == pytest.approx(2, abs=1e-9)


def test_epic_is_half_of_l2_l2_where_canonical_rewards_are_centred():
    mdp, rewards = slow.random_world(16, rewards=2)
    made = canonical(on_device(mdp), jnp.array(rewards), "epic")
    made = np.asarray(made - made.mean((1, 2, 3), keepdims=True)).reshape(2, -1)
    pearson = np.sqrt((1 - np.corrcoef(made)[0, 1]) / 2)
    made = jnp.array(made.reshape(rewards.shape))
    one, two = starc.standardised(made, jnp.array(mdp.transition), "l2")
    ours = starc.size((one - two)[None], jnp.array(mdp.transition), "l2")[0]
    assert ours / 2 == pytest.approx(pearson, abs=1e-12)


def trivial_rewards(mdp, rewards):
    return np.stack([np.zeros_like(rewards[0]), np.full_like(rewards[0], 3.0),
                     slow.shaping(mdp, 0)[0], slow.unseen(mdp, 1)])  # fmt: skip


def test_trivial_rewards_are_alike_and_without_nan():
    mdp, rewards = slow.random_world(17, rewards=1)
    trivial = trivial_rewards(mdp, rewards)
    for name in starc.STARC:
        pairs = distance(on_device(mdp), trivial[:, None], trivial[None], name)
        assert not pairs.any()
        np.testing.assert_allclose(distance(on_device(mdp), trivial, rewards[0], name), 1.0)
    grads = jax.jit(jax.vmap(jax.grad(traced, argnums=1), (None, 0, 0)))
    first = np.concatenate([trivial, trivial[:1], rewards])
    second = np.concatenate([np.repeat(rewards, 4, axis=0), trivial[1:2], rewards])
    assert not grads(on_device(mdp), jnp.array(first), jnp.array(second)).any()


def test_gradient_is_that_of_differences():
    mdp, rewards = slow.random_world(18, rewards=3)
    one, two, way = (jnp.array(r) for r in rewards)
    found = (jax.grad(traced, argnums=1)(on_device(mdp), one, two) * way).sum()
    ends = [distance(on_device(mdp), one + step * way, two) for step in (1e-6, -1e-6)]
    assert found == pytest.approx(float(ends[0] - ends[1]) / 2e-6, rel=1e-5)


def test_many_processes_at_once():
    worlds = [slow.random_world(seed, rewards=2) for seed in range(3)]
    mdp = MDP(*(jnp.stack([jnp.array(w[0][i]) for w in worlds]) for i in range(2)), 0.9)
    rewards = jnp.stack([jnp.array(w[1]) for w in worlds])
    together = jax.vmap(traced, (MDP(0, 0, None), 0, 0))(mdp, rewards[:, 0], rewards[:, 1])
    alone = [distance(on_device(w[0]), *w[1]) for w in worlds]
    np.testing.assert_allclose(together, alone, atol=1e-12)


@pytest.mark.parametrize(("discount", "tolerance"), [(0.95, 2e-6), (0.999, 5e-6), (0.9999, 5e-5)])
def test_float32(discount, tolerance):
    """Distances of rewards with a large mean and shaping, against float64."""
    mdp, rewards = slow.random_world(19, states=32, actions=4, discount=discount, rewards=3)
    rewards = rewards + 3 + slow.shaping(mdp, 0)[0]
    for name in ("val", "minimal"):
        exact = distance(on_device(mdp), rewards[0], rewards[1:], name)
        with jax.enable_x64(False):
            single = MDP(*map(jnp.float32, mdp[:2]), discount)
            ours = distance(single, jnp.float32(rewards[0]), jnp.float32(rewards[1:]), name)
        np.testing.assert_allclose(ours, exact, atol=tolerance)


def test_unknown_names():
    mdp, rewards = slow.random_world(0, rewards=2)
    with pytest.raises(UserError, match="canonicalisation 'VAL': must be one of val, minimal"):
        starc.distance(mdp, *rewards, canonicalisation="VAL")
    with pytest.raises(UserError, match="metric 2: must be one of l1"):
        starc.distance(mdp, *rewards, metric=2)
    with pytest.raises(UserError, match=r"rewards has shape \(4, 3, 4\): must be \(N, S, A, S\)"):
        starc.distances(mdp, rewards[0])


def test_val_is_the_advantage_of_its_policy():
    mdp, rewards = slow.random_world(20, rewards=2)
    rng = np.random.default_rng(0)
    policy = rng.dirichlet(np.ones(3), size=4)
    made = starc.canonical(on_device(mdp), jnp.array(rewards), "val", jnp.array(policy))
    assert made.shape == (2, 4, 3, 1)
    # Advantages have mean 0 under their own policy, and no other canonical reward need have.
    np.testing.assert_allclose((np.asarray(made[..., 0]) * policy).sum(-1), 0, atol=1e-12)
    r = tabular.expected_reward(on_device(mdp), jnp.array(rewards))
    np.testing.assert_allclose(
        made[..., 0], tabular.advantages(on_device(mdp), jnp.array(policy), r), atol=1e-12
    )
