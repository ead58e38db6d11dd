"""Measurements against drawn strokes, the classifier on unseen digits, and the order of rewards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.data import digits as data
from jaxalign.rewards import digits as reading

# Compiled, and always for the same number of pictures: most of the time would go into compiling.
REWARDS = {
    "digits": jax.jit(reading.reward),
    "digit": jax.jit(reading.digit_reward),
    "style": jax.jit(reading.style_reward),
}
SUCCESS, FACTORS = jax.jit(reading.success), jax.jit(reading.read_factors)
MEASURE, STROKE_WIDTH = jax.jit(reading.measure), jax.jit(reading.stroke_width)
CLASSIFY = jax.jit(reading.classify)
BATCH = 1000  # pictures a call; as many as are held out
FINE = 8  # drawn at 8 times the resolution, then averaged


def picture(ink):
    """`[224, 224]` of booleans to `[1, 28, 28, 1]` in [-1, 1]."""
    coarse = np.asarray(ink, np.float32).reshape(28, FINE, 28, FINE).mean((1, 3))
    return (2 * coarse - 1)[None, ..., None]


def plane():
    """Height above and distance right of the centre of the picture, in pixels."""
    place = (np.arange(28 * FINE) + 0.5) / FINE - 14
    return -place[:, None], place[None]


def bar(width, *, height=18.0, slope=0.0, right=0.0, up=0.0):
    """An upright or sheared bar, its width measured across the stroke."""
    y, x = plane()
    across = np.abs(x - right - slope * (y - up)) <= width / 2 * np.sqrt(1 + slope**2)
    return picture(across & (np.abs(y - up) <= height / 2))


def ring(width, radius=8.0):
    y, x = plane()
    return picture(np.abs(np.hypot(y, x) - radius) <= width / 2)


def scores(reward, images, target, params):
    """A reward of at most BATCH pictures, `[N]`."""
    fill = np.arange(BATCH) % len(images)
    batch = {"target": np.asarray(target, np.int32)[fill]}
    return np.asarray(reward(np.asarray(images)[fill], batch, params))[: len(images)]


def factors(images, params):
    return np.asarray(FACTORS(np.resize(images, (BATCH, 28, 28, 1)), params))[: len(images)]


def measure(images):
    measured = MEASURE(np.resize(images, (BATCH, 28, 28, 1)))
    return reading.Measures(*(np.asarray(value)[: len(images)] for value in measured))


def stroke_width(images):
    return np.asarray(STROKE_WIDTH(np.resize(images, (BATCH, 28, 28, 1))))[: len(images)]


@pytest.fixture(scope="module")
def params(optimised):
    return data.reward_params()


@pytest.fixture(scope="module")
def held():
    """Drawings of the held-out digits, and their labels."""
    images, labels = data.random_drawings(data.load_digits()[1], 1, np.random.default_rng(7))
    return images, labels


@pytest.fixture(scope="module")
def true_target(params, held):
    """What each held-out drawing shows, asked for: its label, and the words that hold."""
    style = factors(held[0], params)[:, 1:]
    return np.concatenate([held[1][:, None], np.where(style == reading.MIDDLE, -1, style)], axis=-1)


@pytest.fixture(scope="module")
def odd_pictures():
    """Blanks, greys, and noise of three kinds."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(3, 28, 28, 1))
    flat = [np.full((1, 28, 28, 1), level) for level in (-1, -0.5, 0, 0.5, 1)]
    smooth = 5 * np.asarray(reading._blurred(jnp.asarray(noise, jnp.float32), 1.5)) - 0.3
    kinds = [*flat, noise, 0.3 * noise, np.sign(noise), np.clip(smooth, -1, 1)]
    return np.concatenate(kinds).astype(np.float32)


# ---------------------------------------------------------------- measurements


@pytest.mark.parametrize("width", [1.5, 2.0, 3.0, 4.0])
def test_ring_has_its_stroke_width(width):
    np.testing.assert_allclose(stroke_width(ring(width)), width, rtol=0.12)


def test_thick_bar_measures_thicker_by_the_right_factor():
    thin, thick = stroke_width(bar(2.0)), stroke_width(bar(4.0))
    expected = (4 * 18 / (4 + 18)) / (2 * 18 / (2 + 18))  # w L / (w + L), the formula's own value
    np.testing.assert_allclose(thick / thin, expected, rtol=0.03)


@pytest.mark.parametrize("slope", [-0.6, -0.3, 0.0, 0.3, 0.6])
def test_sheared_bar_has_its_slope(slope):
    np.testing.assert_allclose(measure(bar(3.0, slope=slope)).slant, slope, atol=0.03)


@pytest.mark.parametrize("height", [10.0, 15.0, 22.0])
def test_size_is_the_longer_side(height):
    upright = bar(3.0, height=height)
    # Rows that the bar touches count, so up to half a pixel more at each end.
    np.testing.assert_allclose(measure(upright).size, height + 0.4, atol=0.6)
    np.testing.assert_allclose(measure(upright.swapaxes(1, 2)).size, height + 0.4, atol=0.6)


def test_weight_does_not_change_with_size():
    small, large = (measure(ring(r / 4, radius=r)).weight for r in (5.0, 10.0))
    np.testing.assert_allclose(small, large, rtol=0.08)


def test_measures_do_not_change_with_place():
    here = measure(bar(3.0, slope=0.4, height=14.0))
    there = measure(bar(3.0, slope=0.4, height=14.0, right=3.0, up=-4.0))
    np.testing.assert_allclose(np.stack(here), np.stack(there), rtol=1e-3)


def test_mirror_turns_the_slant_only(held):
    there, back = measure(held[0]), measure(held[0][:, :, ::-1])
    np.testing.assert_allclose(there.slant, -back.slant, atol=1e-4)
    np.testing.assert_allclose(there.weight, back.weight, rtol=1e-4)
    np.testing.assert_allclose(there.size, back.size, rtol=1e-4)


def test_blank_measures_nothing():
    blank = np.full((1, 28, 28, 1), -1.0)
    np.testing.assert_allclose(np.stack(measure(blank)), 0.0, atol=1e-4)


def test_real_strokes_made_thicker_measure_thicker(held):
    """Strokes grow when every pixel takes the darkest of its neighbourhood."""
    padded = np.pad(held[0], ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-1.0)
    shifted = [padded[:, i : i + 28, j : j + 28] for i in range(3) for j in range(3)]
    wide = np.max(shifted, axis=0)
    assert np.all(stroke_width(wide) > stroke_width(held[0]) + 0.5)


# ---------------------------------------------------------------- classifier


def test_classifier_reads_held_out_digits(params):
    """Measured: 0.971 of the originals, 0.954 of the drawings at random sizes and places."""
    accuracy = data.accuracy(params)
    assert accuracy["original"] >= 0.955
    assert accuracy["drawn"] >= 0.935


def test_held_out_digits_are_not_taken_for_none(params, held):
    assert np.mean(factors(held[0], params)[:, 0] == reading.NO_DIGIT) < 0.01


def test_classes_sum_to_one(params, held):
    total = np.exp(CLASSIFY(params["classifier"], held[0])).sum(-1)
    np.testing.assert_allclose(total, 1.0, atol=1e-5)


def test_pixels_beyond_the_range_win_nothing(params, held):
    images, target = 1.7 * held[0][:8], [[3, 2, -1, 0]] * 8
    loud, inside = (
        scores(REWARDS["digits"], pixels, target, params)
        for pixels in (images, np.clip(images, -1, 1))
    )
    np.testing.assert_allclose(loud, inside, rtol=1e-5)


def test_made_no_digits_are_of_all_kinds(held):
    made = np.asarray(jax.jit(reading.no_digits)(held[0][:12], jax.random.key(0)))
    assert made.shape == (12, 28, 28, 1)
    assert np.abs(made).max() <= 1
    spread = made.std((1, 2, 3))
    assert spread[1] < 0.1 < spread[4]  # a flat grey, a negative
    np.testing.assert_allclose(made[4], -held[0][4])
    np.testing.assert_allclose(np.sort(made[5].ravel()), np.sort(held[0][5].ravel()))


# ---------------------------------------------------------------- rewards


def opposed(target, factor):
    """The same, but with another digit or the opposite word asked; and which rows that changed."""
    changed = target[:, factor] >= 0
    other = (target[:, 0] + 3) % 10 if factor == 0 else 2 - target[:, factor]
    wrong = target.copy()
    wrong[changed, factor] = other[changed]
    return wrong, changed


@pytest.mark.parametrize("factor", range(4))
def test_right_scores_above_wrong(params, held, true_target, factor):
    """And each wrong thing costs about as much: most of its share, one over what is asked."""
    wrong, changed = opposed(true_target, factor)
    right_score = scores(REWARDS["digits"], held[0], true_target, params)[changed]
    wrong_score = scores(REWARDS["digits"], held[0], wrong, params)[changed]
    assert np.mean(right_score > wrong_score) > 0.97
    share = 1 / (true_target[changed] >= 0).sum(-1)
    cost = np.asarray(right_score - wrong_score) / share
    assert 0.7 < np.median(cost) < 0.95
    assert np.max(cost) <= 1


def test_right_pictures_score_near_one(params, held, true_target):
    """Not at one: the words' logistics stay soft, so that a policy can still be told apart."""
    for name, reward in REWARDS.items():
        right = scores(reward, held[0], true_target, params)
        assert np.max(right) <= 1 + 1e-6, name
        assert np.mean(right) > 0.75, name
        assert np.median(right) > 0.75, name


def test_parts_answer_for_their_own_factors(params, held, true_target):
    digit, _ = opposed(true_target, 0)
    style, changed = opposed(true_target, 2)
    by_digit, by_style = (
        [scores(REWARDS[name], held[0], target, params) for target in (true_target, digit, style)]
        for name in ("digit", "style")
    )
    np.testing.assert_array_equal(by_style[0], by_style[1])
    np.testing.assert_array_equal(by_digit[0], by_digit[2])
    lost = by_style[0] - by_style[2]
    asked = (true_target[:, 1:] >= 0).sum(-1)
    assert np.all((lost * asked)[changed] > 0.4)
    assert np.all(lost[~changed] == 0)


def test_reward_is_the_mean_over_what_is_asked(params, held, true_target):
    words = (true_target[:, 1:] >= 0).sum(-1)
    total, digit, style = (scores(r, held[0], true_target, params) for r in REWARDS.values())
    np.testing.assert_allclose(total, (digit + words * style) / (1 + words), atol=1e-6)
    np.testing.assert_array_equal(style[words == 0], 1)
    assert set(words) == {0, 1, 2, 3}


def test_score_at_the_threshold_is_a_coin_toss(params, held):
    """A digit whose slant is exactly at the threshold of the word asked is half as asked."""
    some_digit = 1 - np.exp(CLASSIFY(params["classifier"], held[0]))[:8, reading.NO_DIGIT]
    target = [[-1, -1, reading.HIGH, -1]] * 8
    for row, slant in enumerate(measure(held[0][:8]).slant):
        low, high = np.array(params["low"]), np.array(params["high"])
        low[1], high[1] = slant - 0.2, slant
        at = {**params, "low": low, "high": high}
        score = scores(REWARDS["style"], held[0][:8], target, at)[row]
        np.testing.assert_allclose(score, 0.5 * some_digit[row], rtol=1e-3)


def test_success_is_all_that_is_asked(params, held, true_target):
    images, right = held[0], factors(held[0], params)
    assert np.all(scores(SUCCESS, images, right, params) == 1)
    for factor in range(4):
        wrong, free = right.copy(), right.copy()
        wrong[:, factor] = (right[:, factor] + 1) % 3
        free[:, factor] = -1
        assert np.all(scores(SUCCESS, images, wrong, params) == 0)
        assert np.all(scores(SUCCESS, images, free, params) == 1)
    assert np.mean(scores(SUCCESS, images, true_target, params)) > 0.93


def test_factors_stay_within_their_sizes(params, held, odd_pictures):
    for images in (held[0], odd_pictures):
        found = factors(images, params)
        assert found.dtype == np.int32
        assert np.all((found >= 0) & (found < np.array([reading.FACTOR_SIZES])))


def test_blanks_greys_and_noise_score_low(params, held, true_target, odd_pictures):
    """Below the average picture with a wrong digit, whatever is asked, and never a success."""
    asked = data.splits()[0].target
    wrong, _ = opposed(true_target, 0)
    half_right = scores(REWARDS["digits"], held[0], wrong, params)[(wrong >= 0).sum(-1) > 1]
    images = np.repeat(odd_pictures, len(asked), axis=0)
    target = np.tile(asked, (len(odd_pictures), 1))
    assert np.max(scores(REWARDS["digits"], images, target, params)) < min(0.3, half_right.mean())
    assert np.max(scores(REWARDS["digit"], images, target, params)) < 0.1
    assert np.max(scores(REWARDS["style"], images, target, params)) < 0.4
    assert np.max(scores(SUCCESS, images, target, params)) == 0
    assert np.all(factors(odd_pictures, params)[:, 0] == reading.NO_DIGIT)


def test_more_noise_scores_lower_by_degrees(params, held, true_target):
    noise = np.random.default_rng(0).normal(size=held[0].shape).astype(np.float32)
    means = [
        float(scores(REWARDS["digits"], held[0] + s * noise, true_target, params).mean())
        for s in (0.0, 0.3, 0.6, 1.0, 2.0)
    ]
    assert means == sorted(means, reverse=True)
    assert means[0] > 0.75
    assert 0.3 < means[2] < 0.7
    assert means[4] < 0.1


@pytest.mark.parametrize("name", list(REWARDS))
def test_gradients_are_finite_and_point_upwards(params, held, true_target, odd_pictures, name):
    """On odd pictures, right ones, and wrong ones, where a small step must help."""
    digit, _ = opposed(true_target, 0)
    wrong, _ = opposed(digit, 1)
    odd = np.tile([[7, 2, 0, 2]], (len(odd_pictures), 1))
    images = np.concatenate([odd_pictures, held[0][::20], held[0][::20]])
    target = np.concatenate([odd, true_target[::20], wrong[::20]])
    total = jax.jit(jax.grad(lambda x: REWARDS[name](x, {"target": target}, params).sum()))
    slope = np.asarray(total(images))
    assert np.all(np.isfinite(slope))
    length = np.sqrt((slope**2).sum((1, 2, 3), keepdims=True))
    step = 0.02 * slope / np.maximum(length, 1e-9)
    before, after = (
        scores(REWARDS[name], pixels, target, params) for pixels in (images, images + step)
    )
    last = length[-50:, 0, 0, 0] > 1e-3
    assert last.sum() >= 10
    assert np.mean((after > before)[-50:][last]) > 0.9
