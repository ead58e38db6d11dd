"""Samplers against the textbook and golden numbers, and what rounding of latents does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.core.types import UserError
from jaxalign.ops import diffusion
from jaxalign.ops.diffusion import Gaussian

ALPHAS = diffusion.scaled_linear_alphas()

# Stable Diffusion, eta 1. steps -> timestep: (alpha, alpha before, std, d mean / d epsilon)
GOLDEN = {
    20: {
        951: (0.008155, 0.014005, 0.644391, -0.549635),
        501: (0.274999, 0.345558, 0.429321, -0.268818),
        101: (0.892980, 0.950524, 0.167295, -0.190926),
        51: (0.950524, 0.998296, 0.040597, -0.220478),
        1: (0.998296, 0.999150, 0.020648, -0.020714),
    },
    50: {
        981: (0.005775, 0.007282, 0.454463, -0.232936),
        21: (None, None, 0.039480, -0.129287),
        1: (0.998296, 0.999150, 0.020648, -0.020714),
    },
}


@pytest.mark.parametrize(("steps", "timestep"), [(s, t) for s in GOLDEN for t in GOLDEN[s]])
def test_golden_numbers(steps, timestep):
    sampler = diffusion.ddim_sampler(ALPHAS, steps)
    alpha, before, std, push = GOLDEN[steps][timestep]
    (i,) = np.flatnonzero(np.asarray(sampler.timestep) == timestep)
    assert sampler.std[i] == pytest.approx(std, abs=1e-6)
    assert sampler.push[i] == pytest.approx(push, abs=1e-6)
    if alpha:
        assert ALPHAS[timestep] == pytest.approx(alpha, abs=1e-6)
        assert ALPHAS[max(timestep - 1000 // steps, 0)] == pytest.approx(before, abs=1e-6)
        assert sampler.keep[i] == pytest.approx(np.sqrt(before / alpha), rel=1e-4)


def test_timesteps_have_leading_spacing_and_offset_one():
    assert diffusion.ddim_sampler(ALPHAS, 20).timestep.tolist() == list(range(951, 0, -50))
    assert diffusion.ddim_sampler(ALPHAS, 3).timestep.tolist() == [667, 334, 1]


def test_policy_gain_is_as_measured_on_twenty_steps():
    gain = np.asarray(diffusion.policy_gain(diffusion.ddim_sampler(ALPHAS, 20)))
    assert gain[-2:] == pytest.approx([5.43, 1.00], abs=0.005)  # t = 51, 1
    assert gain[-3] == pytest.approx(1.14, abs=0.005)  # t = 101
    assert gain[:-3].min() == pytest.approx(0.62, abs=0.01)
    assert gain[:-3].max() == pytest.approx(0.87, abs=0.01)


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ddim_is_equation_12(eta):
    rng = np.random.default_rng(0)
    x, epsilon = rng.normal(size=(2, 6, 5)).astype(np.float32)
    sampler = diffusion.ddim_sampler(ALPHAS, 10, eta=eta)
    for i, t in enumerate(range(901, 0, -100)):
        a, before = ALPHAS[t], ALPHAS[max(t - 100, 0)]
        std = eta * np.sqrt((1 - before) / (1 - a)) * np.sqrt(1 - a / before)
        clean = (x - np.sqrt(1 - a) * epsilon) / np.sqrt(a)
        mean = np.sqrt(before) * clean + np.sqrt(1 - before - std**2) * epsilon
        ours = diffusion.transition(sampler, jnp.asarray(i), x, epsilon)
        np.testing.assert_allclose(ours.mean, mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(np.squeeze(ours.std), std, rtol=1e-5)


def ten_betas():
    """A schedule visited at every step: alphas of times 0 .. 10, and betas of times 1 .. 10."""
    alphas = diffusion.scaled_linear_alphas(0.02, 0.3, 11)
    return alphas, 1 - alphas[1:] / alphas[:-1]


def test_ddpm_is_the_textbook_step():
    alphas, betas = ten_betas()
    sampler = diffusion.ddpm_sampler(alphas, 10)
    rng = np.random.default_rng(1)
    x, epsilon = rng.normal(size=(2, 4, 3)).astype(np.float32)
    for i, t in enumerate(range(10, 0, -1)):
        beta = betas[t - 1]
        mean = (x - beta / np.sqrt(1 - alphas[t]) * epsilon) / np.sqrt(1 - beta)
        ours = diffusion.transition(sampler, jnp.asarray(i), x, epsilon)
        np.testing.assert_allclose(ours.mean, mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(np.squeeze(ours.std), np.sqrt(beta), rtol=1e-6)


def test_ddim_with_eta_one_is_the_posterior_of_ddpm():
    alphas, betas = ten_betas()
    sampler = diffusion.ddim_sampler(alphas, 10)
    rng = np.random.default_rng(2)
    clean, epsilon = rng.normal(size=(2, 4, 3)).astype(np.float32)
    for i, t in enumerate(range(10, 0, -1)):
        a, before, beta = alphas[t], alphas[t - 1], betas[t - 1]
        x = np.sqrt(a) * clean + np.sqrt(1 - a) * epsilon
        mean = np.sqrt(before) * beta * clean + np.sqrt(1 - beta) * (1 - before) * x
        ours = diffusion.transition(sampler, jnp.asarray(i), x, epsilon)
        np.testing.assert_allclose(ours.mean, mean / (1 - a), rtol=1e-4, atol=1e-5)
        variance = beta * (1 - before) / (1 - a)
        np.testing.assert_allclose(np.squeeze(ours.std), np.sqrt(variance), rtol=1e-5)


def flow_grpo_step(grid, i, level, x, velocity):
    """Mean and std of Flow-GRPO's stochastic step from time grid[i] to grid[i+1], literally."""
    t, dt = grid[i], grid[i + 1] - grid[i]
    sigma = level * np.sqrt(t / (1 - (grid[1] if t == 1 else t)))
    mean = x * (1 + sigma**2 / (2 * t) * dt)
    mean = mean + velocity * (1 + sigma**2 * (1 - t) / (2 * t)) * dt
    return mean, sigma * np.sqrt(-dt)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_sampler_is_flow_grpos(shift):
    steps, level = 10, 0.7
    grid = np.linspace(1, 0, steps + 1)
    grid = shift * grid / (1 + (shift - 1) * grid)
    sampler = diffusion.flow_sampler(steps, level=level, shift=shift)
    np.testing.assert_allclose(sampler.timestep, 1000 * grid[:-1], rtol=1e-6)
    rng = np.random.default_rng(3)
    x, velocity = rng.normal(size=(2, 4, 3)).astype(np.float32)
    for i in range(steps):
        mean, std = flow_grpo_step(grid, i, level, x, velocity)
        ours = diffusion.transition(sampler, jnp.asarray(i), x, velocity)
        np.testing.assert_allclose(ours.mean, mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(np.squeeze(ours.std), std, rtol=1e-5)


def flow_end(steps, mean, std):
    """Mean and variance where the flow ends, for data N(mean, std^2) with its exact velocity."""
    arrays = [np.asarray(a, np.float64) for a in diffusion.flow_sampler(steps)]
    m, v = 0.0, 1.0
    for i in range(steps):
        t, keep, push, noise = (a[i] for a in arrays)
        t = t / 1000
        variance = (1 - t) ** 2 * std**2 + t**2
        # E[noise - data | x] of jointly normal noise, data and x = (1 - t) data + t noise
        slope = (t - (1 - t) * std**2) / variance
        offset = -mean - slope * (1 - t) * mean
        gain = keep + push * slope
        m, v = gain * m + push * offset, gain**2 * v + noise**2
    return m, v


def test_flow_noise_keeps_the_marginals():
    """Noise is added and drift corrected: with small steps the data's distribution comes out."""
    mean, variance = flow_end(1000, 1.5, 0.5)
    assert mean == pytest.approx(1.5, abs=1e-4)
    assert variance == pytest.approx(0.25, rel=0.005)
    coarse = abs(flow_end(10, 1.5, 0.5)[1] - 0.25)
    assert abs(variance - 0.25) < coarse / 10


@pytest.mark.parametrize("make", [diffusion.ddim_sampler, diffusion.ddpm_sampler])
def test_v_and_epsilon_prediction_take_the_same_step(make):
    x, epsilon = jax.random.normal(jax.random.key(0), (2, 20, 3, 3))
    step = jnp.arange(20)
    a = jnp.asarray(ALPHAS, jnp.float32)[jnp.arange(951, 0, -50)][:, None, None]
    v = (epsilon - jnp.sqrt(1 - a) * x) / jnp.sqrt(a)
    by_epsilon = diffusion.transition(make(ALPHAS, 20), step, x, epsilon)
    by_v = diffusion.transition(make(ALPHAS, 20, prediction="v"), step, x, v)
    np.testing.assert_allclose(by_v.mean, by_epsilon.mean, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(by_v.std, by_epsilon.std)


def test_transition_of_rows_at_different_steps():
    sampler = diffusion.ddim_sampler(ALPHAS, 20)
    x, out = jax.random.normal(jax.random.key(1), (2, 3, 4, 2, 2))
    rows = diffusion.transition(sampler, jnp.array([0, 7, 19]), x, out)
    for row, step in enumerate((0, 7, 19)):
        alone = diffusion.transition(sampler, jnp.asarray(step), x[row], out[row])
        np.testing.assert_array_equal(rows.mean[row], alone.mean)
        np.testing.assert_array_equal(rows.std[row].item(), alone.std.item())


@pytest.mark.parametrize("shape", [(7,), (4, 8, 8), (2, 3, 4, 5)])
def test_log_density_is_the_mean_over_dimensions(shape):
    rng = np.random.default_rng(4)
    mean, x = rng.normal(size=(2, 5, *shape)).astype(np.float32)
    std = np.float32([0.02, 0.1, 0.5, 1.0, 3.0]).reshape(5, *(1,) * len(shape))
    ours = diffusion.log_density(Gaussian(mean, std), x)
    std = np.broadcast_to(std, x.shape).astype(np.float64)
    item = -((x - mean) ** 2) / (2 * std**2) - np.log(std * np.sqrt(2 * np.pi))
    np.testing.assert_allclose(ours, item.reshape(5, -1).mean(1), rtol=2e-5)
    assert ours.shape == (5,)


def change_by_rounding(dtype, timestep):
    """Change of the log-density of 100 unit-variance latents when they are stored as `dtype`."""
    sampler = diffusion.ddim_sampler(ALPHAS, 20)
    std = sampler.std[np.flatnonzero(np.asarray(sampler.timestep) == timestep)[0]]
    keys = jax.random.split(jax.random.key(5), 2)
    x, noise = (jax.random.normal(key, (100, 4, 64, 64)) for key in keys)
    step = Gaussian(x - std * noise, std)
    rounded = x.astype(dtype).astype(jnp.float32)
    change = diffusion.log_density(step, rounded) - diffusion.log_density(step, x)
    return float(change.mean()), float(change.std())


@pytest.mark.parametrize(
    ("dtype", "timestep", "mean", "spread"),
    [
        ("float16", 1, -6e-5, 9e-5),
        ("bfloat16", 1, -3.2e-3, 6e-4),
        ("bfloat16", 51, -8.0e-4, None),
        ("bfloat16", 501, 0.0, None),
    ],
)
def test_what_rounding_the_stored_latent_does(dtype, timestep, mean, spread):
    seen, seen_spread = change_by_rounding(dtype, timestep)
    tolerance = {1: 2e-4 if dtype == "bfloat16" else 3e-5, 51: 1e-4, 501: 5e-5}[timestep]
    assert seen == pytest.approx(mean, abs=tolerance)
    if spread:
        assert seen_spread == pytest.approx(spread, rel=0.25)


def test_rounding_to_float32_changes_nothing_that_matters():
    rng = np.random.default_rng(6)
    std = float(diffusion.ddim_sampler(ALPHAS, 20).std[-1])
    x, noise = rng.normal(size=(2, 4 * 64 * 64))
    z = (x.astype(np.float32) - (x - std * noise)) / std
    assert abs((-0.5 * z**2 + 0.5 * noise**2).mean()) < 5e-8


def test_divergence_is_the_closed_form_and_the_mean_log_ratio():
    keys = jax.random.split(jax.random.key(7), 3)
    p, q = (Gaussian(jax.random.normal(k, (3, 2, 2)), jnp.float32(0.7)) for k in keys[:2])
    seen = diffusion.divergence(p, q)
    expected = ((np.asarray(p.mean) - np.asarray(q.mean)) ** 2).sum((1, 2)) / (2 * 0.7**2)
    np.testing.assert_allclose(seen, expected, rtol=1e-5)
    x = p.mean[None] + 0.7 * jax.random.normal(keys[2], (100_000, 3, 2, 2))
    ratio = jax.vmap(lambda x: diffusion.log_density(p, x) - diffusion.log_density(q, x))(x)
    np.testing.assert_allclose(4 * ratio.mean(0), seen, rtol=0.03)  # 4 dimensions


def test_guide():
    conditional, unconditional = jnp.array([[1.0, 4.0]]), jnp.array([[2.0, 2.0]])
    for scale, expected in {0.0: [2, 2], 1.0: [1, 4], 5.0: [-3, 12]}.items():
        seen = diffusion.guide(conditional, unconditional, scale)
        np.testing.assert_array_equal(seen, [expected])


@pytest.mark.parametrize(
    "kind", ["uniform", "inverse_gain", "noise_level", "latent_change", "drop_last"]
)
def test_step_weights_have_mean_one(kind):
    sampler = diffusion.ddim_sampler(ALPHAS, 20)
    weight = diffusion.step_weights(kind, sampler, jnp.linspace(0.1, 2.0, 20))
    assert weight.shape == (20,)
    assert weight.mean() == pytest.approx(1.0, rel=1e-6)
    assert np.all(np.asarray(weight) >= 0)


def test_step_weights_are_what_they_say():
    sampler, change = diffusion.ddim_sampler(ALPHAS, 20), jnp.linspace(0.1, 2.0, 20)
    weight = {
        kind: np.asarray(diffusion.step_weights(kind, sampler, change))
        for kind in ("uniform", "noise_level", "latent_change", "drop_last")
    }
    assert set(weight["uniform"]) == {1.0}
    np.testing.assert_allclose(weight["drop_last"], [20 / 18] * 18 + [0, 0], rtol=1e-6)
    np.testing.assert_allclose(weight["noise_level"] / weight["noise_level"][0],
                               sampler.std / sampler.std[0], rtol=1e-5)  # fmt: skip
    np.testing.assert_allclose(weight["latent_change"], change / change.mean(), rtol=1e-5)


def test_inverse_gain_gives_every_step_a_gradient_of_equal_length():
    sampler = diffusion.ddim_sampler(ALPHAS, 20)
    x, out, noise = jax.random.normal(jax.random.key(8), (3, 20, 6, 6))
    step = jnp.arange(20)
    at = diffusion.transition(sampler, step, x, out)
    x_next = at.mean + at.std * noise

    def density(out):
        return diffusion.log_density(diffusion.transition(sampler, step, x, out), x_next).sum()

    length = np.linalg.norm(np.asarray(jax.grad(density)(out)).reshape(20, -1), axis=1)
    length = length / np.linalg.norm(np.asarray(noise).reshape(20, -1), axis=1)  # same draw
    weighted = length * np.asarray(diffusion.step_weights("inverse_gain", sampler, jnp.ones(20)))
    assert weighted.max() / weighted.min() == pytest.approx(1.0, rel=2e-3)
    assert length.max() / length.min() > 5  # it is not so without


def test_diffuse_gives_back_picture_and_noise():
    alphas = jnp.asarray(ALPHAS, jnp.float32)
    picture = jax.random.normal(jax.random.key(9), (4, 8, 8, 1))
    timestep = jnp.array([0, 10, 500, 999])
    x, v = diffusion.diffuse(alphas, jax.random.key(10), picture, timestep)
    a = alphas[timestep].reshape(4, 1, 1, 1)
    np.testing.assert_allclose(jnp.sqrt(a) * x - jnp.sqrt(1 - a) * v, picture, atol=1e-5)
    noise = jnp.sqrt(1 - a) * x + jnp.sqrt(a) * v
    np.testing.assert_allclose(noise, jax.random.normal(jax.random.key(10), x.shape), atol=1e-5)
    level = diffusion.noise_level(timestep.astype(jnp.float32), ALPHAS)
    np.testing.assert_allclose(level, np.sqrt(1 - ALPHAS[np.array(timestep)]), rtol=1e-4)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: diffusion.ddim_sampler(ALPHAS, 0), "steps = 0"),
        (lambda: diffusion.ddim_sampler(ALPHAS, 1000), "1 to 999 steps"),
        (lambda: diffusion.ddpm_sampler(ALPHAS, -3), "steps = -3"),
        (lambda: diffusion.ddim_sampler(ALPHAS, 20, eta=0.0), "eta = 0.0"),
        (lambda: diffusion.ddim_sampler(ALPHAS, 20, eta=1.5), "eta = 1.5"),
        (lambda: diffusion.flow_sampler(10, level=0.0), "level = 0.0"),
        (lambda: diffusion.flow_sampler(0), "steps = 0"),
        (lambda: diffusion.flow_sampler(10, shift=0.0), "shift = 0.0"),
    ],
)
def test_impossible_samplers(make, says):
    with pytest.raises(UserError, match=says) as error:
        make()
    assert "\n" not in str(error.value)
