"""Samplers of diffusion and flow models as Gaussian policies, and what follows from that.

Every sampler here draws the next latent from a normal distribution whose mean is linear in the
latent and in the network's output,

    x_{i+1} ~ N(keep_i * x_i + push_i * out_i, std_i^2),

so a sampler is four arrays over its steps, and density, divergence, branching and credit are
written once for all of them. Steps are counted in sampling order: i = 0 starts from noise, i = T-1
ends at the picture.

Sources: DDIM, Song et al. 2021, eq. 12 and 16 (eta = 1 is the DDPM posterior on the chosen
subsequence); DDPM, Ho et al. 2020, eq. 7 with the larger variance beta; v-prediction, Salimans & Ho
2022, appendix D; the stochastic sampler of flow matching, Liu et al. 2025 (Flow-GRPO), eq. 9.

Dimensions: T steps, B rows, `...` any latent shape.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.core.types import Array, UserError

Prediction = Literal["epsilon", "v"]


class Sampler(NamedTuple):
    """The steps of a sampler; a pytree of arrays, so that it can be an argument of compiled code.

    timestep: `[T] f32`, what the network is told.
    keep: `[T] f32`, share of the current latent in the mean.
    push: `[T] f32`, share of the network's output in the mean: d mean / d out.
    std: `[T] f32`, standard deviation of the step; positive at every step.
    """

    timestep: Array
    keep: Array
    push: Array
    std: Array

    @property
    def steps(self) -> int:
        return self.timestep.shape[-1]


class Gaussian(NamedTuple):
    """One step's distribution: mean `[B, ...]`, std broadcastable to it."""

    mean: Array
    std: Array


def scaled_linear_alphas(
    start: float = 0.00085, stop: float = 0.012, count: int = 1000
) -> np.ndarray:
    """Cumulative signal shares `[count] f64` of Stable Diffusion, linear in sqrt(beta)."""
    beta = np.linspace(start**0.5, stop**0.5, count, dtype=np.float64) ** 2
    return np.cumprod(1 - beta)


def _leading_timesteps(count: int, steps: int) -> np.ndarray:
    """Timesteps in sampling order, "leading" spacing, offset 1: 951, 901, ..., 1 for 20 of 1000."""
    if not 1 <= steps < count:
        raise UserError(
            f"steps = {steps}: a sampler takes 1 to {count - 1} steps; choose one of these"
        )
    return (np.arange(steps) * (count // steps))[::-1] + 1


def _from_epsilon(
    timestep: np.ndarray,
    alpha: np.ndarray,
    keep: np.ndarray,
    push: np.ndarray,
    std: np.ndarray,
    prediction: str,
) -> Sampler:
    """Turns arrays for epsilon to arrays for v where asked: eps = sqrt(a) v + sqrt(1-a) x."""
    if prediction == "v":
        keep, push = keep + push * np.sqrt(1 - alpha), push * np.sqrt(alpha)
    as_f32 = [jnp.asarray(a, jnp.float32) for a in (timestep, keep, push, std)]
    return Sampler(*as_f32)


def ddim_sampler(
    alphas: np.ndarray, steps: int, *, eta: float = 1.0, prediction: Prediction = "epsilon"
) -> Sampler:
    """DDIM with noise. `alphas` are cumulative signal shares `[count]`; eta in (0, 1].

    The last step goes to alphas[0] instead of to a clean picture, so that it too has a density;
    this is what the released DDPO and B2-DiffuRL samplers do, and Stable Diffusion's own
    `set_alpha_to_one=False`.
    """
    if not 0 < eta <= 1:
        raise UserError(
            f"eta = {eta}: a policy needs noise, 0 < eta <= 1; use 1.0 for the paper's sampler"
        )
    t = _leading_timesteps(len(alphas), steps)
    a, prev = alphas[t], alphas[np.maximum(t - len(alphas) // steps, 0)]
    std = eta * np.sqrt((1 - prev) / (1 - a) * (1 - a / prev))
    keep = np.sqrt(prev / a)
    push = np.sqrt(1 - prev - std**2) - keep * np.sqrt(1 - a)
    return _from_epsilon(t, a, keep, push, std, prediction)


def ddpm_sampler(alphas: np.ndarray, steps: int, *, prediction: Prediction = "epsilon") -> Sampler:
    """Ancestral sampling with the larger of DDPM's two variances (beta), same subsequence."""
    t = _leading_timesteps(len(alphas), steps)
    a, prev = alphas[t], alphas[np.maximum(t - len(alphas) // steps, 0)]
    beta = 1 - a / prev
    keep = 1 / np.sqrt(a / prev)
    return _from_epsilon(t, a, keep, -keep * beta / np.sqrt(1 - a), np.sqrt(beta), prediction)


def flow_sampler(steps: int, *, level: float = 0.7, shift: float = 1.0) -> Sampler:
    """The stochastic sampler of a flow model x_t = (1-t) data + t noise, output v = noise - data.

    level: noise level a in sigma_t = a sqrt(t / (1-t)), > 0.
    shift: the resolution shift of the time grid.
    Where sigma_t would be infinite (t = 1) the grid's next time is taken for it, as Flow-GRPO does.
    """
    if level <= 0:
        raise UserError(f"level = {level}: a policy needs noise; give a positive one, such as 0.7")
    if steps < 1 or shift <= 0:
        raise UserError(f"steps = {steps}, shift = {shift}: both must be positive; try 10 and 1.0")
    grid = np.linspace(1.0, 0.0, steps + 1)
    grid = shift * grid / (1 + (shift - 1) * grid)
    t, dt = grid[:-1], grid[1:] - grid[:-1]
    sigma = level * np.sqrt(t / (1 - np.where(t == 1, grid[1], t)))
    drift = sigma**2 / (2 * t)
    keep, push = 1 + drift * dt, (1 + drift * (1 - t)) * dt
    arrays = (1000 * t, keep, push, sigma * np.sqrt(-dt))
    return Sampler(*(jnp.asarray(a, jnp.float32) for a in arrays))


def _per_row(value: Array, like: Array) -> Array:
    """`[]` or `[B]` made broadcastable to `[B, ...]`."""
    return value.reshape(value.shape + (1,) * (like.ndim - value.ndim))


def transition(sampler: Sampler, step: Array, x: Array, out: Array) -> Gaussian:
    """The distribution of the next latent. step: `[]` or `[B] i32`; x, out: `[B, ...]`."""
    keep, push, std = (_per_row(a[step], x) for a in (sampler.keep, sampler.push, sampler.std))
    return Gaussian(keep * x + push * out, std)


def log_density(gaussian: Gaussian, x: Array) -> Array:
    """Log-density `[B]` of `x [B, ...]`, averaged (not summed) over the latent's dimensions.

    The average is what DDPO's and B2-DiffuRL's code uses; their clip ranges are meant for it.
    """
    z = (x - gaussian.mean) / gaussian.std
    item = -0.5 * z**2 - jnp.log(gaussian.std) - 0.5 * math.log(2 * math.pi)
    # Divided before the sum: a product behind it would be fused with the subtraction of a density
    # ratio, which then rounds differently from the stored density and is not exactly 1 on policy.
    return (item / math.prod(x.shape[1:])).sum(axis=tuple(range(1, x.ndim)))


def divergence(p: Gaussian, q: Gaussian) -> Array:
    """KL(p || q) `[B]` of two steps of equal std, summed over the latent's dimensions, in nats."""
    z = (p.mean - q.mean) / p.std
    return 0.5 * (z**2).sum(axis=tuple(range(1, z.ndim)))


def guide(conditional: Array, unconditional: Array, scale: float | Array) -> Array:
    """Classifier-free guidance (Ho & Salimans 2022, eq. 6): unconditional + scale * difference."""
    return unconditional + scale * (conditional - unconditional)


def policy_gain(sampler: Sampler) -> Array:
    """How far one unit of change in the output moves each step: |push| / std `[T]`.

    Half its square is the divergence per dimension that such a change causes.
    """
    return jnp.abs(sampler.push) / sampler.std


def noise_level(timestep: Array, alphas: np.ndarray) -> Array:
    """sqrt(1 - alpha_bar) `[...]` at the given timesteps."""
    return jnp.sqrt(1 - jnp.asarray(alphas, jnp.float32))[timestep.astype(jnp.int32)]


def diffuse(alphas: Array, key: Array, x: Array, timestep: Array) -> tuple[Array, Array]:
    """Noised pictures and their v targets, both `[B, ...]`.

    alphas: `[count] f32`. timestep: `[B] i32`.
    v = sqrt(a) eps - sqrt(1-a) x (Salimans & Ho 2022). On small pictures a network that predicts v
    learns several times faster than one that predicts epsilon.
    """
    noise = jax.random.normal(key, x.shape, x.dtype)
    a = _per_row(alphas[timestep], x)
    return jnp.sqrt(a) * x + jnp.sqrt(1 - a) * noise, jnp.sqrt(a) * noise - jnp.sqrt(1 - a) * x


StepWeight = Literal["uniform", "inverse_gain", "noise_level", "latent_change", "drop_last"]


def step_weights(kind: StepWeight, sampler: Sampler, change: Array) -> Array:
    """Weights `[T]` of the steps in a policy loss, mean 1.

    The density of a step moves with the network's output in proportion to `policy_gain`, which near
    the end of 20-step DDIM is 5 to 9 times its usual size: under uniform weights one step gets most
    of the update, and its pictures break. change: `[T]`, mean squared latent change of each step.

    inverse_gain: every step's gradient has the same expected length.
    noise_level: in proportion to the step's own standard deviation (TempFlow-GRPO).
    latent_change: in proportion to how far the step moves the latent.
    drop_last: the last two steps run but are not trained.
    """
    steps = sampler.steps
    weight = {
        "uniform": jnp.ones(steps),
        "inverse_gain": 1 / policy_gain(sampler),
        "noise_level": sampler.std,
        "latent_change": change,
        "drop_last": jnp.where(jnp.arange(steps) < steps - 2, 1.0, 0.0),
    }[kind]
    return weight / weight.mean()
