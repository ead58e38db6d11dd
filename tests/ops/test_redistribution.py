"""Token rewards against hand-computed numbers; what sums to what; what must not matter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.ops import redistribution as rd

ROWS, PROMPT, LENGTH = 5, 3, 6
COUNTS = np.array([6, 1, 3, 0, 5])  # response tokens of each row
RESPONSE = np.arange(LENGTH)[None] < COUNTS[:, None]
FULL = COUNTS > 0


def scores_of(seed=0):
    return np.random.default_rng(seed).normal(size=(ROWS, PROMPT + LENGTH)).astype(np.float32)


def final_of(scores):
    return np.array(
        [row[PROMPT + n - 1] if n else 0.0 for row, n in zip(scores, COUNTS, strict=True)]
    )


def test_redistributed_by_hand():
    scores = jnp.array([[9.0, 0.5, 0.25, 1.0, -1.0, 7.0]])
    response = jnp.array([[True, True, True, False]])
    assert rd.redistributed(scores, response).tolist() == [[-0.25, 0.75, -2.0, 0.0]]
    assert rd.without_first(scores, response).tolist() == [[0.0, 0.75, -2.0, 0.0]]
    assert rd.sparse(scores, response).tolist() == [[0.0, 0.0, -1.0, 0.0]]
    assert rd.prefix_scores(scores, response).tolist() == [[0.5, 0.25, 1.0, 0.0]]
    assert rd.uniform(3 * scores, response).tolist() == [[-1.0, -1.0, -1.0, 0.0]]


def test_redistributed_telescopes():
    scores = scores_of()
    reward = rd.redistributed(scores, RESPONSE)
    expected = np.where(FULL, final_of(scores) - scores[:, PROMPT - 1], 0)
    np.testing.assert_allclose(reward.sum(1), expected, rtol=1e-5, atol=1e-6)
    # Not only the whole: what is still to come at each token is the score that is still to come.
    for row, count in enumerate(COUNTS):
        ahead = np.cumsum(np.asarray(reward)[row, :count][::-1])[::-1]
        before = scores[row, PROMPT - 1 : PROMPT - 1 + count]
        np.testing.assert_allclose(ahead, final_of(scores)[row] - before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("control", ["uniform", "random_credit", "sparse", "shuffled"])
def test_controls_keep_the_total(control):
    scores, key = scores_of(1), jax.random.key(2)
    if control in ("random_credit", "shuffled"):
        reward = getattr(rd, control)(key, scores, RESPONSE)
    else:
        reward = getattr(rd, control)(scores, RESPONSE)
    expected = final_of(scores)
    if control == "shuffled":
        expected = np.where(FULL, expected - scores[:, PROMPT - 1], 0)
    np.testing.assert_allclose(reward.sum(1), expected, rtol=1e-5, atol=1e-6)
    assert not np.asarray(reward)[~RESPONSE].any()
    assert reward.dtype == jnp.float32


def test_shuffled_permutes_within_each_response():
    scores = scores_of(3)
    plain = np.asarray(rd.redistributed(scores, RESPONSE))
    mixed = np.asarray(rd.shuffled(jax.random.key(0), scores, RESPONSE))
    for row, count in enumerate(COUNTS):
        assert sorted(mixed[row, :count]) == sorted(plain[row, :count])
    assert (mixed[0] != plain[0]).any()
    # Each of 6 places is taken by each reward equally often.
    keys = jax.random.split(jax.random.key(1), 3000)
    many = np.asarray(jax.vmap(lambda key: rd.shuffled(key, scores, RESPONSE))(keys))[:, 0]
    for reward in plain[0]:
        np.testing.assert_allclose((many == reward).mean(0), 1 / 6, atol=0.03)


def test_random_shares_are_uniform_on_the_simplex():
    """Of n shares the mean is 1/n and the variance (n-1) / (n^2 (n+1))."""
    scores = np.ones((1, PROMPT + LENGTH), np.float32)
    response = np.arange(LENGTH)[None] < 4
    keys = jax.random.split(jax.random.key(1), 4000)
    share = np.asarray(jax.vmap(lambda key: rd.random_credit(key, scores, response))(keys))[
        :, 0, :4
    ]
    np.testing.assert_allclose(share.mean(0), 0.25, atol=0.015)
    np.testing.assert_allclose(share.var(0), 3 / (16 * 5), atol=0.005)


def test_mix_interpolates_between_dense_and_final():
    scores = scores_of(4)
    dense, final = rd.redistributed(scores, RESPONSE), rd.sparse(scores, RESPONSE)
    np.testing.assert_array_equal(rd.mix(dense, final, 1.0), dense)
    np.testing.assert_array_equal(rd.mix(dense, final, 0.0), final)
    np.testing.assert_allclose(rd.mix(dense, final, 0.25), 0.25 * dense + 0.75 * final, rtol=1e-6)


def test_penalty_is_the_signed_log_ratio():
    rng = np.random.default_rng(5)
    reward, ours, theirs = (rng.normal(size=(ROWS, LENGTH)).astype(np.float32) for _ in range(3))
    ours[~RESPONSE] = np.nan  # what lies behind the end must not matter
    out = np.asarray(rd.penalised(reward * RESPONSE, ours, theirs, RESPONSE, 0.5))
    np.testing.assert_allclose(out[RESPONSE], (reward - 0.5 * (ours - theirs))[RESPONSE], rtol=1e-5)
    assert (out[~RESPONSE] == 0).all()
    assert (ours - theirs)[RESPONSE].min() < 0 < (ours - theirs)[RESPONSE].max()


def test_missing_stop_is_charged_at_the_last_token_of_truncated_responses():
    stopped = jnp.array([False, True, False, False, True])
    penalty = np.asarray(rd.missing_stop(RESPONSE, stopped, 1.5))
    expected = np.zeros((ROWS, LENGTH))
    expected[0, 5] = expected[2, 2] = -1.5
    np.testing.assert_array_equal(penalty, expected)


def test_two_models_combine_linearly():
    """Rewards of the combined score are the combined rewards, so either may be combined."""
    reward, cost = scores_of(6), scores_of(7)
    both = rd.combined(rd.redistributed(reward, RESPONSE), rd.redistributed(cost, RESPONSE), -1.0)
    joint = rd.redistributed(rd.combined(reward, cost, -1.0), RESPONSE)
    np.testing.assert_allclose(both, joint, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        both.sum(1)[0], 0.5 * (reward - cost)[0, [2, -1]] @ [-1, 1], rtol=1e-4
    )


def test_final_score_reads_the_last_real_token():
    scores = scores_of(8)
    mask = np.concatenate([np.ones((ROWS, PROMPT), bool), RESPONSE], 1)
    mask[:, 0] = False  # left padding
    expected = [row[PROMPT + n - 1] for row, n in zip(scores, COUNTS, strict=True)]
    np.testing.assert_array_equal(rd.final_score(scores, mask), expected)
    assert rd.final_score(scores, np.zeros_like(mask)).tolist() == [0.0] * ROWS


@pytest.mark.parametrize("function", [rd.redistributed, rd.without_first, rd.sparse, rd.uniform])
def test_slots_off_the_response_do_not_matter(function):
    """Neither scores behind the end, nor more padding on either side."""
    scores, rng = scores_of(9), np.random.default_rng(0)
    reward = np.asarray(function(scores, RESPONSE))
    behind = np.concatenate([np.zeros((ROWS, PROMPT), bool), ~RESPONSE], 1)
    np.testing.assert_array_equal(function(np.where(behind, 1e6, scores), RESPONSE), reward)
    wide = np.concatenate([rng.normal(size=(ROWS, 2)), scores, rng.normal(size=(ROWS, 3))], 1)
    wide_response = np.pad(RESPONSE, ((0, 0), (0, 3)))
    padded = function(wide.astype(np.float32), wide_response)
    np.testing.assert_allclose(padded[:, :LENGTH], reward, rtol=1e-6)
    assert not np.asarray(padded)[:, LENGTH:].any()


def test_fractional_rewards_stay_fractional():
    """A buffer made like the token ids would round 0.7 to 0."""
    scores = jnp.full((1, 4), 0.7)
    for reward in (rd.sparse(scores, jnp.ones((1, 2), bool)), rd.uniform(scores, RESPONSE[:1, :2])):
        assert reward.dtype == jnp.float32
        assert float(reward.sum()) == pytest.approx(0.7)
