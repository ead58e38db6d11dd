"""Entropy and distance against counting and loops."""

from collections import Counter

import jax.numpy as jnp
import numpy as np

from jaxalign.ops import diversity


def test_code_entropy_is_that_of_the_counts():
    codes = np.random.default_rng(0).integers(0, 5, (6, 40))
    for row, seen in zip(codes, diversity.code_entropy(jnp.asarray(codes)), strict=True):
        share = np.array(list(Counter(row.tolist()).values())) / 40
        np.testing.assert_allclose(seen, -(share * np.log(share)).sum(), rtol=1e-5)


def test_code_entropy_at_its_ends():
    codes = jnp.array([[7] * 8, list(range(8))])
    np.testing.assert_allclose(diversity.code_entropy(codes), [0.0, np.log(8)], atol=1e-6)


def test_pairwise_distance_is_that_of_a_loop():
    pictures = np.random.default_rng(1).normal(size=(3, 5, 4, 4, 2)).astype(np.float32)
    for group, seen in zip(pictures, diversity.pairwise_distance(pictures), strict=True):
        pairs = [
            np.sqrt(((group[i] - group[j]) ** 2).mean())
            for i in range(5)
            for j in range(5)
            if i != j
        ]
        np.testing.assert_allclose(seen, np.mean(pairs), rtol=1e-4)


def test_equal_pictures_and_single_pictures_have_no_distance():
    picture = np.random.default_rng(2).normal(size=(2, 1, 4, 4, 1)).astype(np.float32)
    np.testing.assert_allclose(diversity.pairwise_distance(picture), 0, atol=1e-6)
    # Through the square root the rounding of two equal squares shows: it stays below 1e-3.
    np.testing.assert_allclose(diversity.pairwise_distance(picture.repeat(4, 1)), 0, atol=1e-3)
