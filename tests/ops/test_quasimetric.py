"""Interval quasimetrics against a sweep over end points, and what makes them distances."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.ops import quasimetric


def swept(lower, upper):
    """The measure of a union of intervals: pieces between neighbouring end points."""
    ends = np.sort(np.concatenate([lower, upper]))
    middles = (ends[1:] + ends[:-1]) / 2
    inside = ((lower < middles[:, None]) & (middles[:, None] < upper)).any(1)
    return (np.diff(ends) * inside).sum()


def test_union_length_is_that_of_a_sweep():
    rng = np.random.default_rng(0)
    lower, upper = rng.normal(size=(2, 300, 8))
    expected = [swept(a, b) for a, b in zip(lower, upper, strict=True)]
    ours = quasimetric.union_length(jnp.array(lower), jnp.array(upper))
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)
    # On a coarse grid many end points coincide.
    lower, upper = rng.integers(0, 4, size=(2, 300, 5)).astype(float)
    expected = [swept(a, b) for a, b in zip(lower, upper, strict=True)]
    ours = quasimetric.union_length(jnp.array(lower), jnp.array(upper))
    np.testing.assert_allclose(ours, expected, atol=1e-6)


def test_it_is_a_quasimetric():
    x, y, z = jax.random.normal(jax.random.key(0), (3, 200, 24))
    mix = jnp.float32(0.3)

    def distance(a, b):
        return np.asarray(quasimetric.iqe(a, b, 8, mix))

    assert not distance(x, x).any()
    assert (distance(x, z) <= distance(x, y) + distance(y, z) + 1e-5).all()
    assert abs(distance(x, y) - distance(y, x)).mean() > 0.1
    one = jnp.array([[0.0, 0, 0, 0, 0, 0]]), jnp.array([[2.0, 1, -1, 0.5, -1, -1]])
    # Two components of three intervals: lengths 2 and 0.5.
    np.testing.assert_allclose(quasimetric.iqe(*one, 3, mix), [0.3 * 1.25 + 0.7 * 2], rtol=1e-6)


def test_gradients_are_those_of_the_end_points_that_stick_out():
    lower = jnp.array([[0.0, 1.0, 5.0, 9.0]])
    upper = jnp.array([[2.0, 3.0, 6.0, 8.0]])  # the last is empty; the first two make [0, 3]
    by_lower, by_upper = jax.grad(
        lambda a, b: quasimetric.union_length(a, b).sum(), argnums=(0, 1)
    )(lower, upper)
    np.testing.assert_array_equal(by_lower, [[-1, 0, -1, 0]])
    np.testing.assert_array_equal(by_upper, [[0, 1, 1, 0]])
    same = jax.grad(lambda a: quasimetric.iqe(a, lower, 2, jnp.float32(0.5)).sum())(lower)
    np.testing.assert_array_equal(same, [[0, 0, 0, 0]])
