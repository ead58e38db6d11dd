"""Measurements against drawn strokes, the classifier on unseen digits, and the order of rewards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.data import digits as data
from jaxalign.rewards import digits as reading

# Compiled: op by op, most of the time would go into compiling small programs.
REWARDS = {
    "digits": jax.jit(reading.reward),
    "digit": jax.jit(reading.digit_reward),
    "style": jax.jit(reading.style_reward),
}
SUCCESS, FACTORS = jax.jit(reading.success), jax.jit(reading.read_factors)
FINE = 8  # drawn at 8 times the resolution, then averaged


def picture(ink):
    """`[224, 224]` of booleans to `[1, 28, 28, 1]` in [-1, 1]."""
    coarse = np.asarray(ink, np.float32).reshape(28, FINE, 28, FINE).mean((1, 3))
    return jnp.asarray(2 * coarse - 1)[None, ..., None]


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


@pytest.fixture(scope="session")
def params():
    return data.reward_params()


@pytest.fixture(scope="session")
def held():
    """Drawings of the held-out digits, and their labels."""
    images, labels = data.random_drawings(data.load_digits()[1], 1, np.random.default_rng(7))
    return jnp.asarray(images), labels


@pytest.fixture(scope="session")
def true_target(params, held):
    """What each held-out drawing shows, asked for: its label, and the words that hold."""
    style = np.asarray(reading.read_style(held[0], params))
    return np.concatenate([held[1][:, None], np.where(style == reading.MIDDLE, -1, style)], axis=-1)


@pytest.fixture(scope="session")
def odd_pictures():
    """Blanks, greys, and noise of three kinds."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(3, 28, 28, 1))
    flat = [np.full((1, 28, 28, 1), level) for level in (-1, -0.5, 0, 0.5, 1)]
    smooth = 5 * np.asarray(reading._blurred(jnp.asarray(noise, jnp.float32), 1.5)) - 0.3
    kinds = [*flat, noise, 0.3 * noise, np.sign(noise), np.clip(smooth, -1, 1)]
    return jnp.asarray(np.concatenate(kinds), jnp.float32)


# ---------------------------------------------------------------- measurements


@pytest.mark.parametrize("width", [1.5, 2.0, 3.0, 4.0])
def test_ring_has_its_stroke_width(width):
    np.testing.assert_allclose(reading.stroke_width(ring(width)), width, rtol=0.12)


def test_thick_bar_measures_thicker_by_the_right_factor():
    thin, thick = reading.stroke_width(bar(2.0)), reading.stroke_width(bar(4.0))
    expected = (4 * 18 / (4 + 18)) / (2 * 18 / (2 + 18))  # w L / (w + L), the formula's own value
    np.testing.assert_allclose(thick / thin, expected, rtol=0.03)


@pytest.mark.parametrize("slope", [-0.6, -0.3, 0.0, 0.3, 0.6])
def test_sheared_bar_has_its_slope(slope):
    np.testing.assert_allclose(reading.slant(bar(3.0, slope=slope)), slope, atol=0.03)


@pytest.mark.parametrize("height", [10.0, 15.0, 22.0])
def test_size_is_the_longer_side(height):
    upright = bar(3.0, height=height)
    # Rows that the bar touches count, so up to half a pixel more at each end.
    np.testing.assert_allclose(reading.size(upright), height + 0.4, atol=0.6)
    np.testing.assert_allclose(reading.size(upright.swapaxes(1, 2)), height + 0.4, atol=0.6)


def test_weight_does_not_change_with_size():
    small, large = (reading.measure(ring(r / 4, radius=r)).weight for r in (5.0, 10.0))
    np.testing.assert_allclose(small, large, rtol=0.08)


def test_measures_do_not_change_with_place():
    here = reading.measure(bar(3.0, slope=0.4, height=14.0))
    there = reading.measure(bar(3.0, slope=0.4, height=14.0, right=3.0, up=-4.0))
    np.testing.assert_allclose(jnp.stack(here), jnp.stack(there), rtol=1e-3)


def test_mirror_turns_the_slant_only(held):
    there, back = reading.measure(held[0]), reading.measure(held[0][:, :, ::-1])
    np.testing.assert_allclose(there.slant, -back.slant, atol=1e-4)
    np.testing.assert_allclose(there.weight, back.weight, rtol=1e-4)
    np.testing.assert_allclose(there.size, back.size, rtol=1e-4)


def test_blank_measures_nothing():
    blank = jnp.full((1, 28, 28, 1), -1.0)
    np.testing.assert_allclose(jnp.stack(reading.measure(blank)), 0.0, atol=1e-4)


def test_real_strokes_made_thicker_measure_thicker(held):
    """Strokes grow when every pixel takes the darkest of its neighbourhood."""
    wide = jax.lax.reduce_window(held[0], -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 1, 1, 1), "SAME")
    assert np.all(reading.stroke_width(wide) > reading.stroke_width(held[0]) + 0.5)


# ---------------------------------------------------------------- classifier


def test_classifier_reads_held_out_digits(params):
    """Measured: 0.971 of the originals, 0.954 of the drawings at random sizes and places."""
    accuracy = data.accuracy(params)
    assert accuracy["original"] >= 0.955
    assert accuracy["drawn"] >= 0.935


def test_held_out_digits_are_not_taken_for_none(params, held):
    assert np.mean(FACTORS(held[0], params)[:, 0] == reading.NO_DIGIT) < 0.01


def test_classes_sum_to_one(params, held):
    total = jax.nn.logsumexp(reading.classify(params["classifier"], held[0]), axis=-1)
    np.testing.assert_allclose(total, 0.0, atol=1e-5)


def test_pixels_beyond_the_range_win_nothing(params, held):
    images, batch = 1.7 * held[0][:8], {"target": jnp.array([[3, 2, -1, 0]] * 8)}
    inside = jnp.clip(images, -1, 1)
    np.testing.assert_allclose(
        REWARDS["digits"](images, batch, params),
        REWARDS["digits"](inside, batch, params),
        rtol=1e-5,
    )


def test_made_no_digits_are_of_all_kinds(held):
    made = reading.no_digits(held[0][:12], jax.random.key(0))
    assert made.shape == (12, 28, 28, 1)
    assert np.abs(made).max() <= 1
    spread = np.asarray(made).std((1, 2, 3))
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
    right_score = REWARDS["digits"](held[0], {"target": true_target}, params)[changed]
    wrong_score = REWARDS["digits"](held[0], {"target": wrong}, params)[changed]
    assert np.mean(right_score > wrong_score) > 0.97
    share = 1 / (true_target[changed] >= 0).sum(-1)
    cost = np.asarray(right_score - wrong_score) / share
    assert 0.7 < np.median(cost) < 0.95
    assert np.max(cost) <= 1


def test_right_pictures_score_near_one(params, held, true_target):
    """Not at one: the words' logistics stay soft, so that a policy can still be told apart."""
    for name, reward in REWARDS.items():
        scores = reward(held[0], {"target": true_target}, params)
        assert np.max(scores) <= 1 + 1e-6, name
        assert np.mean(scores) > 0.78, name
        assert np.median(scores) > 0.8, name


def test_parts_answer_for_their_own_factors(params, held, true_target):
    digit, _ = opposed(true_target, 0)
    style, changed = opposed(true_target, 2)
    base, other, leaning = ({"target": t} for t in (true_target, digit, style))
    images = held[0]
    np.testing.assert_array_equal(
        REWARDS["style"](images, base, params), REWARDS["style"](images, other, params)
    )
    np.testing.assert_array_equal(
        REWARDS["digit"](images, base, params), REWARDS["digit"](images, leaning, params)
    )
    lost = REWARDS["style"](images, base, params) - REWARDS["style"](images, leaning, params)
    asked = (true_target[:, 1:] >= 0).sum(-1)
    assert np.all((lost * asked)[changed] > 0.4)
    assert np.all(lost[~changed] == 0)


def test_reward_is_the_mean_over_what_is_asked(params, held, true_target):
    batch = {"target": true_target}
    words = (true_target[:, 1:] >= 0).sum(-1)
    digit, style = (REWARDS[name](held[0], batch, params) for name in ("digit", "style"))
    expected = (digit + words * style) / (1 + words)
    np.testing.assert_allclose(REWARDS["digits"](held[0], batch, params), expected, rtol=1e-5)
    np.testing.assert_array_equal(style[words == 0], 1)
    assert set(words) == {0, 1, 2, 3}


def test_score_at_the_threshold_is_a_coin_toss(params, held):
    """A digit whose slant is exactly at the threshold of the word asked is half as asked."""
    images = held[0][:8]
    digit = np.exp(reading.classify(params["classifier"], images))
    asked = {"target": jnp.array([[-1, -1, reading.HIGH, -1]] * 8)}
    for row, slant in enumerate(reading.slant(images)):
        low, high = params["low"].at[1].set(slant - 0.2), params["high"].at[1].set(slant)
        score = REWARDS["style"](images, asked, {**params, "low": low, "high": high})[row]
        np.testing.assert_allclose(score, 0.5 * (1 - digit[row, reading.NO_DIGIT]), rtol=1e-3)


def test_success_is_all_that_is_asked(params, held, true_target):
    images, right = held[0], FACTORS(held[0], params)
    assert np.all(SUCCESS(images, {"target": right}, params) == 1)
    for factor in range(4):
        wrong = right.at[:, factor].set((right[:, factor] + 1) % 3)
        assert np.all(SUCCESS(images, {"target": wrong}, params) == 0)
        free = right.at[:, factor].set(-1)
        assert np.all(SUCCESS(images, {"target": free}, params) == 1)
    assert np.mean(SUCCESS(images, {"target": true_target}, params)) > 0.93


def test_factors_stay_within_their_sizes(params, held, odd_pictures):
    for images in (held[0], odd_pictures):
        factors = FACTORS(images, params)
        assert factors.dtype == jnp.int32
        assert np.all((factors >= 0) & (factors < np.array([reading.FACTOR_SIZES])))


def test_blanks_greys_and_noise_score_low(params, held, true_target, odd_pictures):
    """Below any half-right picture's fair share, whatever is asked, and never a success."""
    asked = jnp.asarray(data.splits()[0].target)
    wrong, _ = opposed(true_target, 0)
    half_right = REWARDS["digits"](held[0], {"target": wrong}, params)[(wrong >= 0).sum(-1) > 1]
    images = jnp.repeat(odd_pictures, len(asked), axis=0)
    batch = {"target": jnp.tile(asked, (len(odd_pictures), 1))}
    assert np.max(REWARDS["digits"](images, batch, params)) < min(0.3, np.mean(half_right))
    assert np.max(REWARDS["digit"](images, batch, params)) < 0.1
    assert np.max(REWARDS["style"](images, batch, params)) < 0.4
    assert np.max(SUCCESS(images, batch, params)) == 0
    assert np.all(FACTORS(odd_pictures, params)[:, 0] == reading.NO_DIGIT)


def test_more_noise_scores_lower_by_degrees(params, held, true_target):
    noise = jax.random.normal(jax.random.key(0), held[0].shape)
    scores = [
        float(REWARDS["digits"](held[0] + s * noise, {"target": true_target}, params).mean())
        for s in (0.0, 0.3, 0.6, 1.0, 2.0)
    ]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] > 0.75
    assert 0.3 < scores[2] < 0.7
    assert scores[4] < 0.1


@pytest.mark.parametrize("name", list(REWARDS))
def test_gradients_are_finite_and_point_upwards(params, held, true_target, odd_pictures, name):
    """On odd pictures, right ones, and wrong ones, where a small step must help."""
    digit, _ = opposed(true_target, 0)
    wrong, _ = opposed(digit, 1)
    odd = np.tile([[7, 2, 0, 2]], (len(odd_pictures), 1))
    images = jnp.concatenate([odd_pictures, held[0][::20], held[0][::20]])
    batch = {"target": jnp.asarray(np.concatenate([odd, true_target[::20], wrong[::20]]))}
    slope = jax.jit(jax.grad(lambda pixels: REWARDS[name](pixels, batch, params).sum()))(images)
    assert np.all(np.isfinite(slope))
    length = jnp.sqrt((slope**2).sum((1, 2, 3), keepdims=True))
    step = 0.02 * slope / jnp.maximum(length, 1e-9)
    gain = REWARDS[name](images + step, batch, params) - REWARDS[name](images, batch, params)
    last = np.asarray(length[:, 0, 0, 0] > 0.05)[-50:]
    assert last.sum() >= 10
    assert np.mean(gain[-50:][last] > 0) > 0.9
