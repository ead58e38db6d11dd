"""The sampled distribution against sorting by hand, and draws against their probabilities."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxalign.core.types import UserError
from jaxalign.ops import sampling as ops
from jaxalign.ops.sampling import DROPPED, TWO_STAGES, Sampling, entropy, log_density

adjust = jax.jit(ops.adjust, static_argnames="sampling")
draw = jax.jit(ops.draw)

ROWS, VOCABULARY = 5, 23


def logits(seed: int = 0, levels: int = 0, vocabulary: int = VOCABULARY) -> np.ndarray:
    """Random logits; with `levels`, few enough values that many are equal."""
    x = np.random.default_rng(seed).normal(size=(ROWS, vocabulary)).astype(np.float32)
    return np.round(x * levels) / levels if levels else x


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x.astype(np.float64) - x.max())
    return e / e.sum()


def by_sorting(row: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Probabilities of one row: sorts, smallest ids first among equals, and cuts."""
    if sampling.temperature == 0:
        return np.eye(len(row))[row.argmax()]
    row = row.astype(np.float64) / sampling.temperature
    if sampling.top_k:
        row[np.argsort(-row, kind="stable")[sampling.top_k :]] = -np.inf
    p = softmax(row)
    order = np.argsort(-p, kind="stable")
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= sampling.top_p * (1 - 1e-6)]] = 0
    return p / p.sum()


HOW = [
    Sampling(),
    Sampling(temperature=0),
    Sampling(temperature=0.6),
    Sampling(top_k=1),
    Sampling(top_k=7),
    Sampling(top_k=VOCABULARY + 4),
    Sampling(top_p=0.55),
    Sampling(top_p=1e-6),
    Sampling(top_p=0.999999),
    Sampling(temperature=1.7, top_k=9, top_p=0.8),
]


@pytest.mark.parametrize("levels", [0, 2], ids=["distinct", "ties"])
@pytest.mark.parametrize("sampling", HOW, ids=str)
def test_probabilities_are_those_of_sorting(sampling, levels):
    x = logits(levels=levels)
    got = np.asarray(jax.nn.softmax(adjust(jnp.asarray(x), sampling)))
    np.testing.assert_allclose(got, [by_sorting(row, sampling) for row in x], atol=1e-6)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    values=st.lists(st.floats(-30, 30, width=32), min_size=8, max_size=8),
    k=st.integers(1, 8),
    p=st.sampled_from([0.1, 0.5, 0.9]),
)
def test_truncation_keeps_the_fewest_that_suffice(values, k, p):
    x = jnp.asarray(values, jnp.float32)
    kept = np.asarray(adjust(x, Sampling(top_k=k)) > DROPPED)
    assert kept.sum() == k and np.min(x[kept]) >= np.max(x[~kept], initial=-np.inf)
    weight = softmax(np.asarray(x))
    kept = np.asarray(adjust(x, Sampling(top_p=p)) > DROPPED)
    mass, least = weight[kept].sum(), weight[kept].min()
    assert mass >= p - 1e-5 and mass - least <= p + 1e-5
    assert least >= weight[~kept].max(initial=0) - 1e-7


@pytest.mark.parametrize("sampling", HOW, ids=str)
def test_a_token_known_to_be_drawn_is_kept(sampling):
    x = jnp.asarray(logits())
    token = jnp.asarray(x.argmin(-1), jnp.int32)
    density = log_density(adjust(x, sampling, token), token)
    alone = adjust(x, sampling)
    mass = jax.nn.logsumexp(alone, axis=-1)
    lowest = x.min(-1) / max(sampling.temperature, 1)
    if sampling.temperature == 0:
        np.testing.assert_array_equal(density, 0)
    elif sampling.temperature == 1 and 0 < sampling.top_k < VOCABULARY:
        np.testing.assert_allclose(density, lowest - jnp.logaddexp(mass, lowest), rtol=1e-5)
    assert np.all(np.asarray(density) > -100)
    top = jnp.asarray(x.argmax(-1), jnp.int32)  # which is never dropped: nothing changes
    np.testing.assert_array_equal(adjust(x, sampling, top), alone)


@pytest.mark.parametrize("sampling", HOW, ids=str)
@pytest.mark.parametrize("forbidden", [-jnp.inf, DROPPED])
def test_forbidden_tokens_have_no_share_and_no_nan(sampling, forbidden):
    allowed = np.arange(VOCABULARY) % 3 == 1
    one = np.arange(VOCABULARY) == 4
    allowed = jnp.asarray(np.stack([allowed, ~allowed, one, one | allowed, ~one]))
    token = jnp.full(ROWS, 4, jnp.int32).at[1].set(3).at[4].set(5)

    def value(x):
        adjusted = adjust(jnp.where(allowed, x, forbidden), sampling, token)
        return log_density(adjusted, token).sum() + entropy(adjusted).sum(), adjusted

    x = jnp.asarray(logits())
    (total, adjusted), gradient = jax.jit(jax.value_and_grad(value, has_aux=True))(x)
    assert np.isfinite(total) and np.isfinite(gradient).all()
    np.testing.assert_array_equal(np.where(allowed, 0, gradient), 0)
    np.testing.assert_array_equal(np.where(allowed, 0, jax.nn.softmax(adjusted)), 0)
    np.testing.assert_allclose(log_density(adjusted, token)[2], 0, atol=1e-6)
    np.testing.assert_allclose(entropy(adjusted)[2], 0, atol=1e-6)


def test_gradient_flows_through_the_kept_only():
    x, sampling = jnp.asarray(logits()), Sampling(temperature=0.5, top_k=6)
    token = jnp.asarray(x.argmax(-1), jnp.int32)
    gradient = jax.grad(lambda x: log_density(adjust(x, sampling), token).sum())(x)
    kept = adjust(x, sampling) > DROPPED
    probability = jax.nn.softmax(adjust(x, sampling))
    chosen = jax.nn.one_hot(token, VOCABULARY)
    np.testing.assert_allclose(
        gradient, jnp.where(kept, (chosen - probability) / 0.5, 0), atol=1e-6
    )


def test_log_density_and_entropy_are_those_of_the_probabilities():
    adjusted = adjust(jnp.asarray(logits()), Sampling(temperature=0.8, top_p=0.7))
    p = np.asarray(jax.nn.softmax(adjusted), np.float64)
    token = p.argmax(-1)
    np.testing.assert_allclose(
        log_density(adjusted, jnp.asarray(token)), np.log(p[np.arange(ROWS), token]), atol=1e-6
    )
    plogp = p * np.log(np.where(p > 0, p, 1))
    np.testing.assert_allclose(entropy(adjusted), -plogp.sum(-1), atol=1e-6)


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("vocabulary", [12, TWO_STAGES + 5], ids=["one stage", "two stages"])
def test_frequencies_of_draws(vocabulary):
    """Chi-square over a few classes of tokens, with a bound that a right sampler passes 99.99%."""
    draws, classes = 20_000, 12
    x = jnp.asarray(logits(3, vocabulary=vocabulary)[0])
    adjusted = adjust(x, Sampling(temperature=0.9, top_k=vocabulary - 3))
    rows = jnp.broadcast_to(adjusted, (2000, vocabulary))
    keys = jax.random.split(jax.random.key(1), (10, 2000))
    counts = sum(np.bincount(draw(k, rows), minlength=vocabulary) for k in keys)
    p = np.asarray(jax.nn.softmax(adjusted), np.float64)
    assert counts.sum() == draws and counts[p == 0].sum() == 0
    # Neighbouring ids in different classes, so that a wrong place within a block would be seen.
    group = np.arange(vocabulary) % classes
    if vocabulary > classes:
        blocks = np.arange(vocabulary) // 128
        sums = [np.bincount(blocks, weights) for weights in (counts, draws * p)]
        assert chi_square(*sums) < 30  # 8 degrees of freedom
    pooled = [np.bincount(group, weights) for weights in (counts, draws * p)]
    pooled = [c[pooled[1] > 0] for c in pooled]
    assert chi_square(*pooled) < 38  # 11 degrees of freedom at most


@pytest.mark.parametrize("vocabulary", [12, TWO_STAGES + 5])
def test_a_draw_depends_on_its_own_row(vocabulary):
    adjusted = adjust(jnp.asarray(logits(vocabulary=vocabulary)), Sampling())
    keys = jax.random.split(jax.random.key(5), ROWS)
    together = draw(keys, adjusted)
    alone = [int(draw(keys[i : i + 1], adjusted[i : i + 1])[0]) for i in range(ROWS)]
    np.testing.assert_array_equal(together, alone)
    assert len(set(alone)) > 1


@pytest.mark.parametrize("vocabulary", [12, TWO_STAGES + 5])
def test_only_an_allowed_token_is_drawn(vocabulary):
    allowed = np.zeros((ROWS, vocabulary), bool)
    only = np.arange(ROWS) * 2 + vocabulary - 2 * ROWS
    allowed[np.arange(ROWS), only] = True
    adjusted = adjust(jnp.where(allowed, logits(vocabulary=vocabulary), -jnp.inf), Sampling())
    for seed in range(5):
        keys = jax.random.split(jax.random.key(seed), ROWS)
        np.testing.assert_array_equal(draw(keys, adjusted), only)


def test_half_precision_logits_are_adjusted_in_single():
    x = jnp.asarray(logits(), jnp.bfloat16)
    for sampling in (Sampling(), Sampling(temperature=0), Sampling(top_p=0.5)):
        assert adjust(x, sampling).dtype == jnp.float32


@pytest.mark.parametrize(
    "wrong",
    [
        dict(temperature=-0.1),
        dict(temperature=math.nan),
        dict(temperature=math.inf),
        dict(top_k=-1),
        dict(top_p=0.0),
        dict(top_p=1.01),
        dict(top_p=math.nan),
    ],
    ids=str,
)
def test_wrong_settings_are_refused(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(UserError, match=f"^{name} = {value}: [^\n]*$"):
        Sampling(**wrong)


def test_adjust_and_draw_under_vmap():
    stacked = jnp.stack([jnp.asarray(logits(seed)) for seed in range(3)])
    sampling = Sampling(top_k=9, top_p=0.8)
    keys = jax.random.split(jax.random.key(0), (3, ROWS))
    both = jax.jit(jax.vmap(lambda k, x: ops.draw(k, ops.adjust(x, sampling))))(keys, stacked)
    apart = jnp.stack([draw(k, adjust(x, sampling)) for k, x in zip(keys, stacked, strict=True)])
    np.testing.assert_array_equal(both, apart)
