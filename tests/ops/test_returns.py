"""Advantages against loops in NumPy, and what must hold whatever the numbers."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.ops import redistribution as rd
from jaxalign.ops import returns

ROWS, LENGTH = 6, 9
COUNTS = np.array([9, 4, 1, 0, 7, 2])
MASK = np.arange(LENGTH)[None] < COUNTS[:, None]


def numbers(seed):
    return np.random.default_rng(seed).normal(size=(ROWS, LENGTH)).astype(np.float32)


def slow_gae(reward, value, count, discount, decay):
    """One row: the sum of discounted errors, written out."""
    advantage = np.zeros(LENGTH)
    for t in range(count):
        for k in range(t, count):
            ahead = value[k + 1] if k + 1 < count else 0.0
            error = reward[k] + discount * ahead - value[k]
            advantage[t] += (discount * decay) ** (k - t) * error
    return advantage


@pytest.mark.parametrize(("discount", "decay"), [(1.0, 0.95), (1.0, 1.0), (0.9, 0.5), (0.9, 0.0)])
def test_gae_equals_the_sum(discount, decay):
    reward, value = numbers(0), numbers(1)
    advantage, target = returns.gae(reward, value, MASK, discount, decay)
    for row, count in enumerate(COUNTS):
        expected = slow_gae(reward[row], value[row], count, discount, decay)
        np.testing.assert_allclose(advantage[row], expected, rtol=1e-4, atol=1e-5)
        values = np.where(MASK[row], value[row], 0)
        np.testing.assert_allclose(target[row], expected + values, rtol=1e-4, atol=1e-5)


def test_without_decay_the_target_is_the_return():
    reward, value = numbers(2), numbers(3)
    _, target = returns.gae(reward, value, MASK, 1.0, 1.0)
    for row, count in enumerate(COUNTS):
        expected = np.cumsum(reward[row, :count][::-1])[::-1]
        np.testing.assert_allclose(target[row, :count], expected, rtol=1e-4, atol=1e-5)


def test_numbers_behind_the_end_do_not_matter():
    reward, value = numbers(4), numbers(5)
    clean = returns.gae(reward, value, MASK, 1.0, 0.95)
    reward[~MASK], value[~MASK] = np.nan, np.inf
    for a, b in zip(returns.gae(reward, value, MASK, 1.0, 0.95), clean, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.95, 1.0])
def test_redistribution_is_a_residual_critic(decay):
    """At discount 1: the advantages of sparse rewards with the critic V + score of the prefix."""
    rng = np.random.default_rng(6)
    scores = rng.normal(size=(ROWS, 3 + LENGTH)).astype(np.float32)
    value = numbers(7)
    potential = rd.prefix_scores(scores, MASK)
    dense, dense_target = returns.gae(rd.redistributed(scores, MASK), value, MASK, 1.0, decay)
    sparse, target = returns.gae(rd.sparse(scores, MASK), value + potential, MASK, 1.0, decay)
    np.testing.assert_allclose(dense, sparse, atol=3e-6)
    np.testing.assert_allclose(dense_target, target - potential, atol=3e-6)
    discounted, _ = returns.gae(rd.redistributed(scores, MASK), value, MASK, 0.9, decay)
    other, _ = returns.gae(rd.sparse(scores, MASK), value + potential, MASK, 0.9, decay)
    assert np.abs(discounted - other).max() > 0.01  # a discount breaks it


def test_leave_one_out_equals_the_loop():
    score = np.random.default_rng(8).normal(size=12).astype(np.float32)
    out = np.asarray(returns.leave_one_out(score, 4))
    for i in range(12):
        others = [score[j] for j in range(12) if j // 4 == i // 4 and j != i]
        assert out[i] == pytest.approx(score[i] - np.mean(others), abs=1e-5)
    equal = returns.leave_one_out(jnp.full(6, 0.1), 3)
    assert not np.asarray(equal).any()


def test_sums_of_redistributed_rewards_leave_leave_one_out_unchanged():
    """The prompt's score is the same for the whole group, and cancels."""
    rng = np.random.default_rng(9)
    scores = rng.normal(size=(8, 3 + LENGTH)).astype(np.float32)
    scores[:, 2] = np.repeat(scores[::4, 2], 4)
    mask = np.arange(LENGTH)[None] < rng.integers(1, LENGTH + 1, 8)[:, None]
    dense = returns.leave_one_out(rd.redistributed(scores, mask).sum(1), 4)
    sparse = returns.leave_one_out(rd.sparse(scores, mask).sum(1), 4)
    np.testing.assert_allclose(dense, sparse, atol=3e-6)


def test_whiten_and_centre():
    x = 3 * numbers(10) + 5
    x[~MASK] = np.nan
    white = np.asarray(returns.whiten(x, MASK))
    expected = (x[MASK] - x[MASK].mean()) / x[MASK].std()
    np.testing.assert_allclose(white[MASK], expected, rtol=1e-4, atol=1e-5)
    centred = np.asarray(returns.centre(x, MASK))
    for row, count in enumerate(COUNTS):
        if count:
            expected = x[row, :count] - x[row, :count].mean()
            np.testing.assert_allclose(centred[row, :count], expected, atol=1e-5)
    assert not white[~MASK].any()
    assert not centred[~MASK].any()
    assert returns.masked_mean(x, np.zeros_like(MASK)) == 0


def test_value_loss_is_clipped_where_that_is_worse():
    value, old, target = jnp.array([2.0, 0.1, -3.0]), jnp.zeros(3), jnp.array([2.0, 1.0, 1.0])
    loss = returns.clipped_value_loss(value, old, target, 0.5)
    np.testing.assert_allclose(loss, [0.5 * 1.5**2, 0.5 * 0.9**2, 0.5 * 16.0], rtol=1e-6)


def test_explained_variance():
    target = numbers(11)
    assert returns.explained_variance(target, target, MASK) == pytest.approx(1.0)
    assert returns.explained_variance(target + 3, target, MASK) == pytest.approx(1.0, abs=1e-5)
    assert returns.explained_variance(0 * target, target, MASK) == pytest.approx(0.0, abs=1e-5)
