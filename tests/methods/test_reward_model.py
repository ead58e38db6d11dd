"""A reward model learns preferences; calibration moves its prefix scores and not its final ones."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.core.types import UserError
from jaxalign.data.preferences import Pairs, Responses
from jaxalign.methods import reward_model
from jaxalign.models import gpt2
from jaxalign.models.scalar_head import with_scalar_head
from jaxalign.ops import redistribution as rd

PROMPT, LENGTH, VOCABULARY, STOP, GOOD = 2, 6, 8, 0, 4
MODEL = gpt2.gpt2(gpt2.Config(VOCABULARY, 16, 1, 2, 32, context=16))
INIT, SCORES = with_scalar_head(MODEL)
CONFIG = reward_model.Config(updates=150, batch=32, learning_rate=1e-2)


STEP = reward_model.make_step(SCORES, CONFIG)
CALIBRATE = reward_model.make_calibration_step(SCORES, CONFIG, LENGTH)


@functools.cache
def base():
    return jax.jit(INIT)(jax.random.key(0))


def responses(seed, rows=256):
    rng = np.random.default_rng(seed)
    count, size = rng.integers(2, LENGTH + 1, rows), rng.integers(1, PROMPT + 1, rows)
    slot = np.arange(PROMPT + LENGTH)[None]
    mask = (slot >= PROMPT - size[:, None]) & (slot < PROMPT + count[:, None])
    ids = rng.integers(1, VOCABULARY, mask.shape)
    ids[np.arange(rows), PROMPT + count - 1] = STOP
    return Responses(jnp.asarray(ids, jnp.int32), jnp.asarray(mask))


def good(batch):
    """The share of tokens from GOOD on among the response's."""
    real = batch.mask[:, PROMPT:]
    return ((batch.ids[:, PROMPT:] >= GOOD) & real).sum(1) / real.sum(1)


def pairs():
    """Labelled without noise by the share of good tokens; ties by the first."""
    one, two = responses(1), responses(2)
    first = (good(one) >= good(two))[:, None]

    def pick(which):
        return Responses(*(jnp.where(which, a, b) for a, b in zip(one, two, strict=True)))

    return Pairs(pick(first), pick(~first))


@functools.cache
def trained():
    """Parameters after training on preferences, and the metrics of each update."""
    state, data, log = reward_model.init(base(), CONFIG), pairs(), []
    for i in range(CONFIG.updates):
        state, metrics = STEP(state, data, jax.random.fold_in(jax.random.key(1), i))
        log.append({name: float(value) for name, value in metrics.items()})
    return state.params, log


@functools.cache
def _scored():
    return jax.jit(SCORES)


def test_preference_loss_by_hand():
    data = jax.tree.map(lambda a: a[:16], pairs())
    loss = jax.jit(functools.partial(reward_model.preference_loss, SCORES))
    mean, metrics = loss(base(), data, jax.random.key(0))
    final = []
    for batch in data:
        score, mask = np.asarray(_scored()(base(), *batch)), np.asarray(batch.mask)
        final.append([s[np.flatnonzero(m)[-1]] for s, m in zip(score, mask, strict=True)])
    margin = np.array(final[0]) - np.array(final[1])
    assert mean.value() == pytest.approx(np.log1p(np.exp(-margin)).mean(), rel=1e-5)
    assert metrics["accuracy"].value() == pytest.approx((margin > 0).mean())
    assert metrics["margin"].value() == pytest.approx(margin.mean(), abs=1e-5)


def test_equal_scores_are_half_right():
    data = jax.tree.map(lambda a: a[:16], pairs())
    flat = {**base(), "head": jax.tree.map(jnp.zeros_like, base()["head"])}
    loss = jax.jit(functools.partial(reward_model.preference_loss, SCORES))
    mean, metrics = loss(flat, data, jax.random.key(0))
    assert metrics["accuracy"].value() == 0.5
    assert mean.value() == pytest.approx(np.log(2), rel=1e-5)


def test_preferences_are_learned():
    params, log = trained()
    assert log[0]["loss"] > 0.6  # chance is log 2
    assert np.mean([row["loss"] for row in log[-20:]]) < 0.35
    assert np.mean([row["accuracy"] for row in log[-20:]]) > 0.85
    fresh = responses(5)
    final = rd.final_score(_scored()(params, *fresh), fresh.mask)
    assert np.corrcoef(final, good(fresh))[0, 1] > 0.8
    assert STEP._cache_size() == 1
    assert not jax.tree.leaves(base())[0].is_deleted()  # copied before it was donated


def test_calibration_teaches_prefixes_and_keeps_the_final_score():
    params, _ = trained()
    state, data = reward_model.init_calibration(params, CONFIG), responses(3)
    teacher = jax.device_get(state.slow["teacher"])
    log = []
    for i in range(CONFIG.updates):
        state, metrics = CALIBRATE(state, data, jax.random.fold_in(jax.random.key(2), i))
        log.append({name: float(value) for name, value in metrics.items()})
    jax.tree.map(np.testing.assert_array_equal, state.slow["teacher"], teacher)  # frozen
    assert log[0]["drift"] == pytest.approx(0, abs=1e-9)
    fresh = responses(6)
    before, after = (_scored()(p, *fresh) for p in (params, state.params))
    final = rd.final_score(before, fresh.mask)
    spread = float(final.var())
    drift = float(((rd.final_score(after, fresh.mask) - final) ** 2).mean())
    assert drift < 0.1 * spread
    response = fresh.mask[:, PROMPT:]
    for said in (0, 1, 3):  # response tokens in the prefix
        here = np.asarray(response[:, said])
        errors = [
            ((rd.prefix_scores(s, response)[here, said] - final[here]) ** 2).mean()
            for s in (before, after)
        ]
        assert errors[1] < 0.5 * errors[0]
    start, end = (np.mean([row["prefix_error"] for row in rows]) for rows in (log[:5], log[-20:]))
    assert end < 0.5 * start
    # Rewards still sum to what the model says of the whole, less what it says of the prompt.
    total = rd.redistributed(after, response).sum(1)
    expected = rd.final_score(after, fresh.mask) - after[:, PROMPT - 1]
    np.testing.assert_allclose(total, expected, rtol=1e-4, atol=1e-5)


def test_calibration_loss_by_hand():
    data = jax.tree.map(lambda a: a[:8], responses(4))
    params = jax.tree.map(lambda a: 1.1 * a, base())
    loss = jax.jit(functools.partial(reward_model.calibration_loss, SCORES, LENGTH, 2.0))
    mean, metrics = loss(base(), params, data, jax.random.key(0))
    ours, theirs = (np.asarray(_scored()(p, *data)) for p in (params, base()))
    prefix, drift = [], []
    for row, real in enumerate(np.asarray(data.mask)):
        last = np.flatnonzero(real)[-1]
        before = ours[row, PROMPT - 1 : last]  # the prompt, up to one token less than the whole
        prefix.append(((before - theirs[row, last]) ** 2).mean())
        drift.append((ours[row, last] - theirs[row, last]) ** 2)
    assert metrics["prefix_error"].value() == pytest.approx(np.mean(prefix), rel=1e-4)
    assert metrics["drift"].value() == pytest.approx(np.mean(drift), rel=1e-4)
    assert mean.value() == pytest.approx(np.mean(prefix) + 2 * np.mean(drift), rel=1e-4)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"updates": 0}, "updates = 0"),
        ({"batch": 0}, "batch = 0"),
        ({"learning_rate": 0.0}, "learning_rate = 0.0"),
        ({"anchor": 0.0}, "anchor = 0.0"),
        ({"micro_batches": 5}, "micro_batches = 5: must divide batch = 32"),
    ],
)
def test_impossible_configs(change, says):
    with pytest.raises(UserError, match=says):
        dataclasses.replace(CONFIG, **change)
