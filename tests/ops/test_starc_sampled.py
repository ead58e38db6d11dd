"""Sampled STARC against the exact one, and what one estimator for all rewards keeps exact."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.core.types import UserError
from jaxalign.ops import starc
from jaxalign.ops import starc_sampled as sampled
from jaxalign.ops.tabular import MDP
from tests.ops import starc_reference as slow


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


distances = jax.jit(sampled.distances, static_argnames=("norm", "metric"))
one_step = jax.jit(sampled.one_step)
regression = jax.jit(sampled.by_regression)
lstd = jax.jit(sampled.by_lstd)
from_rollouts = jax.jit(sampled.from_rollouts)
exact_distances = jax.jit(starc.distances, static_argnames="canonicalisation")


def tabular_samples(seed=0, rewards=3):
    """A small process with every (s, a) once: rewards, one-hot features, and the uniform policy's.

    Of the rewards `[N + 1, S, A, S]` the last is the first with shaping.
    """
    mdp, made = slow.random_world(seed, rewards=rewards)
    made = np.concatenate([made, made[:1] + slow.shaping(mdp, 1)[0][None]])
    r = (mdp.transition[None] * made).sum(-1)
    here = np.repeat(np.eye(4), 3, axis=0)
    there = mdp.transition.reshape(-1, 4)
    followed = (r.mean(2), np.eye(4), mdp.transition.mean(1))
    parts = (r.reshape(len(r), -1), here, there, followed)
    return mdp, made, *jax.tree.map(jnp.array, parts)


def exact(mdp, rewards, name):
    mdp = MDP(*map(jnp.array, mdp[:2]), mdp.discount)
    return np.asarray(exact_distances(mdp, jnp.array(rewards), canonicalisation=name))


def test_lstd_with_every_state_is_val():
    mdp, rewards, r, here, there, followed = tabular_samples()
    made = lstd(r, here, there, followed, mdp.discount, ridge=1e-14)
    np.testing.assert_allclose(distances(made), exact(mdp, rewards, "val"), atol=1e-8)


def test_regression_with_every_state_is_minimal():
    mdp, rewards, r, here, there, _ = tabular_samples()
    made = regression(r, here, there, mdp.discount)
    found = np.asarray(distances(made))
    np.testing.assert_allclose(found, exact(mdp, rewards, "minimal"), atol=1e-10)
    assert found[0, 3] < 1e-10
    few = regression(r, here[:, :1], there[:, :1], mdp.discount)
    assert distances(few)[0, 3] > 0.05, "a potential outside the span stays"


def test_values_make_val():
    mdp, rewards, r, _, there, _ = tabular_samples()
    policy = np.full((4, 3), 1 / 3)
    values = jnp.array([slow.swept_values(mdp, policy, reward) for reward in rewards])
    ahead = values @ there.T
    made = from_rollouts(r, jnp.repeat(values, 3, axis=1), ahead, mdp.discount)
    np.testing.assert_allclose(distances(made), exact(mdp, rewards, "val"), atol=1e-10)


def test_shaping_telescopes_in_shared_rollouts():
    """All that remains is discount^T (discount P(end of the rollout from s') - P(that from s))."""
    rng, discount, steps = np.random.default_rng(0), 0.9, 12
    # Potentials at s and along a rollout from it; at s' and along a rollout from there.
    here, ahead = rng.normal(size=(2, 50, steps + 1))

    def change(path):
        return discount * path[:, 1:] - path[:, :-1]

    reward = discount * ahead[:, 0] - here[:, 0]
    value, following = (sampled.returns(jnp.array(change(p)), discount) for p in (here, ahead))
    made = sampled.from_rollouts(jnp.array(reward)[None], value[None], following[None], discount)
    expected = discount**steps * (discount * ahead[:, -1] - here[:, -1])
    np.testing.assert_allclose(made[0], expected, atol=1e-12)


def test_one_step_sees_neither_prompts_nor_scale():
    rng = np.random.default_rng(1)
    r = rng.normal(size=(20, 4))
    rewards = jnp.array([r, 3 * r + rng.normal(size=(20, 1)), -r, np.repeat(r[:, :1], 4, axis=1)])
    made = one_step(rewards)
    found = np.asarray(distances(made))
    np.testing.assert_allclose(found[0], [0, 0, 2, 1], atol=1e-12)
    assert not made[3].any(), "what depends on the prompt alone is nothing"
    # Weighted means: weights of one response make it the baseline.
    first = one_step(rewards, jnp.array(np.eye(4)[:1].repeat(20, 0)))
    np.testing.assert_allclose(first[0].reshape(20, 4), r - r[:, :1], atol=1e-12)


@pytest.mark.parametrize("count", [2, 4, 8, 16])
def test_baselines_of_their_own_keep_equal_rewards_apart(count):
    """sqrt(2 / (M + 1)), where shared responses give exactly 0."""
    rng = np.random.default_rng(count)
    baselines = rng.normal(size=(2, count, 4000)).mean(1)
    found = distances(jnp.array(rng.normal(size=(1, 4000)) - baselines))[0, 1]
    assert found == pytest.approx(np.sqrt(2 / (count + 1)), abs=0.03)


def test_norms_and_distances_by_hand():
    x = jnp.array([[3.0, -4.0], [0.0, 0.0]])
    assert [float(sampled.size(x, norm)[0]) for norm in ("l1", "l2", "linf")] == [
        3.5, pytest.approx(np.sqrt(12.5)), 4.0,
    ]  # fmt: skip
    assert not sampled.standardised(x)[1].any()
    assert not jax.grad(lambda y: distances(y).sum())(jnp.zeros((2, 3))).any()
    pairs = distances(jnp.array([[1.0, 1.0], [2.0, -2.0]]), norm="linf", metric="l1")
    assert pairs[0, 1] == pytest.approx(1.0)


def test_bootstrap_covers_and_keeps_groups_together():
    """Two rewards at a known distance: intervals of 95 % hold it about as often as they say."""
    correlation = 0.8
    truth = np.sqrt(2 - 2 * correlation)
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(2, 40, 100))
    pairs = jnp.array(np.stack([one, correlation * one + 0.6 * other], 1))
    single = jax.jit(lambda c, k: sampled.bootstrap(c, k, resamples=200))
    found = [single(pair, jax.random.key(i)) for i, pair in enumerate(pairs)]
    assert sum(bool(f.low[0, 1] <= truth <= f.high[0, 1]) for f in found) >= 33
    # A sample that stands ten times in its group tells no more than once.
    tenfold = jax.jit(lambda c, k: sampled.bootstrap(c, k, groups=100, resamples=200))
    wide = tenfold(jnp.repeat(pairs[0], 10, axis=1), jax.random.key(0))
    np.testing.assert_allclose(wide.low, found[0].low, atol=1e-12)


def test_noise_floor_is_the_distance_to_oneself_with_nothing_added():
    rng = np.random.default_rng(3)
    canonical, nothing = jnp.array(rng.normal(size=(2, 60))), jnp.array(rng.normal(size=(3, 60)))
    noise_floor = jax.jit(sampled.noise_floor)
    floor = noise_floor(canonical, 0.1 * nothing)
    assert floor.shape == (2, 3)
    pair = jnp.stack([canonical[1], canonical[1] + 0.1 * nothing[2]])
    assert floor[1, 2] == pytest.approx(float(distances(pair)[0, 1]), abs=1e-12)
    assert not noise_floor(canonical, 0 * nothing).any()


def test_bad_input_is_named():
    r = np.zeros((2, 5, 3))
    with pytest.raises(UserError, match=r"\(2, 5, 1\): must be \(N, X, M\) with at least 2"):
        sampled.one_step(r[..., :1])
    r[1, 4, 2] = np.nan
    with pytest.raises(UserError, match=r"reward\[1, 4, 2\] is nan: must be finite"):
        sampled.one_step(r)
    with pytest.raises(UserError, match=r"features have shapes \(4, 2\) and \(4, 2\)"):
        sampled.by_regression(np.zeros((2, 5)), np.zeros((4, 2)), np.zeros((4, 2)), 0.9)
    with pytest.raises(UserError, match=r"value has shape \(2, 4\): must be \(2, 5\)"):
        sampled.from_rollouts(np.zeros((2, 5)), np.zeros((2, 4)), np.zeros((2, 5)), 0.9)
