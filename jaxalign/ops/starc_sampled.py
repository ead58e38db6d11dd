"""STARC distances from samples: continuous or large spaces, language models, pictures.

Canonicalisation is linear in the reward. So here one estimator, made from one set of samples,
serves all rewards that are compared: what it gets wrong about a potential it gets wrong in the same
way on both sides. With a value network fitted to each reward anew, as in the experiments of Skalse
et al. 2024 (arXiv 2309.15257), equivalent rewards come out as far apart as unrelated ones.

Three estimators of the canonical reward at N_s sampled states and actions:

- `from_rollouts`: V by truncated rollouts. A potential telescopes to discount^T times its value at
  the end; nothing else of it remains.
- `by_regression`: least squares of r(s, a) on what potentials in the span of given features do: the
  minimal canonical reward. Potentials in the span vanish to rounding, others do not.
- `by_lstd`: V by least-squares temporal differences (Bradtke and Barto 1996) on the same features.

and `one_step` for responses to prompts, where nothing follows: the reward minus its mean over
responses to the same prompt. Whatever depends on the prompt alone vanishes, which is all that
preferences leave open (Bradley and Terry 1952) apart from scale.

Norms are means over samples, so that of l2 is a root mean square under the sampling distribution:
that distribution is part of the distance.

Dimensions: N rewards, B samples of (s, a), K next states of each, T steps of a rollout, F features,
X prompts, M responses to each.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxalign.core.types import Array, UserError
from jaxalign.ops.starc import ROUNDINGS

Norm = Literal["l1", "l2", "linf"]


class Interval(NamedTuple):
    """Distances `[N, N]` with the ends of a bootstrap interval of 95 %."""

    distance: Array
    low: Array
    high: Array


# --- canonical rewards ----------------------------------------------------------------------------


def returns(rewards: Array, discount: float | Array) -> Array:
    """The discounted sum `[...]` over the last axis of rewards `[..., T]`."""
    weight = discount ** jnp.arange(rewards.shape[-1], dtype=rewards.dtype)
    return rewards @ weight


def from_rollouts(reward: Array, value: Array, next_value: Array, discount: float | Array) -> Array:
    """r + discount V(s') - V(s) `[N, B]`.

    reward: `[N, B]`, the mean over next states. value: `[N, B]`, the mean return of rollouts from
    s. next_value: `[N, B]`, of rollouts from the next states. All from the same next states,
    rollouts and random numbers for every reward, which is what makes shaping cancel.
    """
    _check_rewards(reward=reward, value=value, next_value=next_value)
    return _counted(reward + discount * next_value - value, reward)


def by_regression(
    reward: Array, features: Array, next_features: Array, discount: float | Array
) -> Array:
    """The part of r `[N, B]` that no potential in the span of the features explains.

    features: `[B, F]`, at s. next_features: `[B, F]`, the mean over next states. A constant is
    always among the features.
    """
    _check_rewards(reward=reward)
    _check_features(reward, features, next_features)
    effect = discount * next_features - features
    ones = jnp.ones_like(effect[:, :1])
    basis = jnp.concatenate([ones, effect], axis=1)
    # Columns of one size, and none that the others explain already: an SVD tells.
    basis = basis / jnp.maximum(jnp.sqrt((basis**2).sum(0, keepdims=True)), 1e-30)
    u, s, _ = jnp.linalg.svd(basis, full_matrices=False)
    u = jnp.where((s > s[0] * 1e3 * jnp.finfo(s.dtype).eps)[None], u, 0)
    rest = reward - reward.mean(1, keepdims=True)
    for _ in range(2):  # once more, for what rounding has left
        rest = rest - (rest @ u) @ u.T
    return _counted(rest, reward)


def by_lstd(
    reward: Array,
    features: Array,
    next_features: Array,
    followed: tuple[Array, Array, Array],
    discount: float | Array,
    ridge: float = 1e-6,
) -> Array:
    """r + discount V(s') - V(s) `[N, B]`, with V linear in the features.

    followed: states that the policy visits: rewards `[N, C]`, features there `[C, F]`, and at what
    follows `[C, F]`. ridge: times the mean diagonal, added to it. A constant is always among the
    features.
    """
    _check_rewards(reward=reward)
    _check_features(reward, features, next_features)
    earned, here, there = followed
    _check_features(earned, here, there)
    features, next_features, here, there = (
        jnp.concatenate([jnp.ones_like(f[:, :1]), f], axis=1)
        for f in (features, next_features, here, there)
    )
    matrix = here.T @ (here - discount * there) / len(here)
    matrix = matrix + ridge * jnp.trace(matrix) / len(matrix) * jnp.eye(len(matrix))
    weight = jnp.linalg.solve(matrix, here.T @ earned.T / len(here))
    return _counted(reward + ((discount * next_features - features) @ weight).T, reward)


def one_step(reward: Array, weight: Array | None = None) -> Array:
    """reward minus its mean over each prompt's responses `[N, X, M]`, as rows `[N, X M]`.

    reward: `[N, X, M]`, all rewards on the same responses; with responses of their own two equal
    rewards come out sqrt(2 / (M + 1)) apart. weight: `[X, M]`, of the responses in the mean, for
    responses that were not drawn from the policy of interest; even by default.

    Raises: UserError for fewer than two responses, or what is not finite.
    """
    _check_rewards(reward=reward)
    if jnp.ndim(reward) != 3 or reward.shape[2] < 2:
        raise UserError(
            f"reward has shape {jnp.shape(reward)}: must be (N, X, M) with at least 2 responses "
            "to each of X prompts; draw more"
        )
    if weight is None:
        weight = jnp.ones(reward.shape[1:], reward.dtype)
    share = weight / weight.sum(1, keepdims=True)
    mean = (share[None] * reward).sum(2, keepdims=True)
    flat = (reward - mean).reshape(len(reward), -1)
    return _counted(flat, reward.reshape(len(reward), -1))


def _counted(canonical: Array, reward: Array) -> Array:
    """canonical `[N, B]`, and exactly 0 where it is but rounding of the reward."""
    floor = ROUNDINGS * jnp.finfo(reward.dtype).eps * size(reward, "l2")
    return jnp.where((size(canonical, "l2") > floor)[:, None], canonical, 0)


# --- distances ------------------------------------------------------------------------------------


def size(x: Array, norm: Norm) -> Array:
    """The norm over the last axis: a mean of |x|, a root mean square, or a maximum."""
    if norm == "linf":
        return jnp.abs(x).max(-1)
    return jnp.abs(x).mean(-1) if norm == "l1" else _root((x**2).mean(-1))


def _root(x: Array) -> Array:
    """The square root, with gradient 0 at 0."""
    return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1)), 0)


def standardised(canonical: Array, norm: Norm = "l2") -> Array:
    """canonical `[N, B]` divided by its norm; 0 stays 0."""
    length = size(canonical, norm)[:, None]
    return jnp.where(length > 0, canonical / jnp.where(length > 0, length, 1), 0)


def distances(canonical: Array, norm: Norm = "l2", metric: Norm = "l2") -> Array:
    """`[N, N]` between canonical rewards `[N, B]`; in l2, 0 for equivalent and 2 for opposites."""
    rows = standardised(canonical, norm)
    return jax.lax.map(lambda row: size(row[None] - rows, metric), rows)


def bootstrap(
    canonical: Array,
    key: Array,
    *,
    groups: int | None = None,
    resamples: int = 500,
    norm: Norm = "l2",
    metric: Norm = "l2",
) -> Interval:
    """Distances `[N, N]` of canonical rewards `[N, B]`, and how far samples leave them open.

    groups: of as many consecutive samples that are drawn together, such as the X prompts; every
    sample on its own by default. resamples: of the samples, with replacement.
    """
    grouped = canonical.reshape(len(canonical), groups or canonical.shape[1], -1)
    count = grouped.shape[1]

    def once(key: Array) -> Array:
        drawn = jax.random.randint(key, (count,), 0, count)
        return distances(grouped[:, drawn].reshape(canonical.shape), norm, metric)

    drawn = jax.lax.map(once, jax.random.split(key, resamples))
    low, high = jnp.quantile(drawn, jnp.asarray([0.025, 0.975]), axis=0)
    return Interval(distances(canonical, norm, metric), low, high)


def noise_floor(canonical: Array, nothing: Array, norm: Norm = "l2", metric: Norm = "l2") -> Array:
    """`[N, Z]`: how far each reward comes out from itself plus something that changes nothing.

    A distance below it means nothing. canonical: `[N, B]`. nothing: `[Z, B]`, what the same
    estimator makes of rewards that are equivalent to 0, such as shaping of the rewards' own size.
    """
    shifted = canonical[:, None] + nothing[None]
    ours = standardised(canonical, norm)[:, None]
    theirs = standardised(shifted.reshape(-1, canonical.shape[1]), norm).reshape(shifted.shape)
    return size(jnp.broadcast_to(ours, shifted.shape) - theirs, metric)


# --- input ----------------------------------------------------------------------------------------


def _check_rewards(**rewards: Any) -> None:
    first = next(iter(rewards.values()))
    for name, reward in rewards.items():
        if jnp.shape(reward) != jnp.shape(first):
            raise UserError(
                f"{name} has shape {jnp.shape(reward)}: must be {jnp.shape(first)}, as reward has"
            )
        if isinstance(reward, Tracer):
            continue
        values = np.asarray(reward)
        if not np.isfinite(values).all():
            at = np.argwhere(~np.isfinite(values))[0].tolist()
            found = values[tuple(at)]
            raise UserError(f"{name}{at} is {found}: must be finite; replace or clip it")


def _check_features(reward: Array, features: Array, next_features: Array) -> None:
    shape = jnp.shape(features)
    if len(shape) != 2 or shape[0] != reward.shape[1] or jnp.shape(next_features) != shape:
        raise UserError(
            f"features have shapes {shape} and {jnp.shape(next_features)}: both must be "
            f"({reward.shape[1]}, F), a row for each sample of the reward"
        )
