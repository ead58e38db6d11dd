"""Distances between reward functions: STARC, and EPIC and DARD for comparison.

STARC (STAndardised Reward Comparison), Skalse et al. 2024 (arXiv 2309.15257). Two rewards order all
policies alike exactly when they differ by potential shaping, by moving reward between next states
at equal mean, and by a positive factor. So a reward is first made canonical, which takes the first
two out, then divided by a norm, which takes the third out, and what is left is compared:

    distance(R1, R2) = m(c(R1) / n(c(R1)), c(R2) / n(c(R2))).

Canonicalisations c; the first three are the paper's, the others are for comparison:

- val: E[R(s, a, S') - V(s) + discount V(S')], V of a fixed policy under R: its advantage.
- minimal: the smallest of all equivalent rewards in the l2 norm weighted with the transitions;
  minimal_l2: in the plain one.
- val_potential, minimal_potential: shaping only, so that rewards moved between next states differ.
- epic: Gleave et al. 2021, states and actions uniform. dard: Wulfe et al. 2022, uniform actions.
- none.

Norms n and metrics m over all (s, a, s'): l1, l2, linf are sums and maxima, not means; the weighted
ones take |x| or x^2 times the transition's probability. With norm and metric l2 a distance lies in
[0, 2]: 0 for equivalent rewards, sqrt(2) for unrelated ones, 2 for opposites. EPIC as published is
half of that (it centres too, which canonical rewards of mean 0 need not).

Departures: the paper's code minimises by Adam and sweeps for V; here both are exact, with one
factorisation a process for all rewards. A canonical reward that is only rounding counts as 0.

Dimensions: S states, A actions, N rewards. A canonical reward is `[N, S, A, S]`, or `[N, S, A, 1]`
where it is the same for all next states.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from jaxalign.core.types import Array, UserError
from jaxalign.ops import tabular
from jaxalign.ops.tabular import MDP

Canonicalisation = Literal[
    "val", "minimal", "minimal_l2", "val_potential", "minimal_potential", "epic", "dard", "none"
]
Norm = Literal["l1", "l2", "linf", "weighted_l1", "weighted_l2", "weighted_linf"]
CANONICALISATIONS: tuple[Canonicalisation, ...] = get_args(Canonicalisation)
NORMS: tuple[Norm, ...] = get_args(Norm)
# Those that see a reward only as its mean over next states.
STARC: tuple[Canonicalisation, ...] = CANONICALISATIONS[:3]
ROUNDINGS = 100  # what is smaller than so many roundings of a reward counts as nothing of it


def distance(
    mdp: MDP,
    first: Array,
    second: Array,
    *,
    canonicalisation: Canonicalisation = "val",
    norm: Norm = "l2",
    metric: Norm = "l2",
    policy: Array | None = None,
) -> Array:
    """The distance `[...]` of two rewards, or of many, pair by pair.

    first, second: `[..., S, A, S]`, of leading shapes that broadcast. policy: `[S, A]`, of `val`
    and `val_potential`; uniform by default. Differentiable in the rewards, with gradient 0 at
    distance 0 and for trivial rewards (equal returns for all policies). Those have distance 0 to
    each other, and to all others 1 where norm and metric are the same.

    Raises: UserError for transitions that are no distributions, a discount outside [0, 1), shapes
    that do not fit, numbers that are not finite, and unknown names.
    """
    tabular.check(mdp, first=first, second=second)
    _check_names(canonicalisation, norm, metric)
    sizes = jnp.shape(first)[-3:]
    lead = jnp.broadcast_shapes(jnp.shape(first)[:-3], jnp.shape(second)[:-3])
    both = [jnp.broadcast_to(r, (*lead, *sizes)).reshape(-1, *sizes) for r in (first, second)]
    one, two = (
        standardised(canonical(mdp, r, canonicalisation, policy), mdp.transition, norm)
        for r in both
    )
    return size(one - two, mdp.transition, metric).reshape(lead)


def distances(
    mdp: MDP,
    rewards: Array,
    *,
    canonicalisation: Canonicalisation = "val",
    norm: Norm = "l2",
    metric: Norm = "l2",
    policy: Array | None = None,
) -> Array:
    """All distances `[N, N]` between rewards `[N, S, A, S]`; arguments and errors of `distance`."""
    tabular.check(mdp, rewards=rewards)
    _check_names(canonicalisation, norm, metric)
    if jnp.ndim(rewards) != 4:
        raise UserError(f"rewards has shape {jnp.shape(rewards)}: must be (N, S, A, S); stack them")
    made = canonical(mdp, jnp.asarray(rewards), canonicalisation, policy)
    made = standardised(made, mdp.transition, norm)
    # Row by row, as all differences at once need N times the memory; a Gram matrix would be
    # smaller still, but loses half of the digits where distances are small.
    return jax.lax.map(lambda row: size(row[None] - made, mdp.transition, metric), made)


def _check_names(canonicalisation: str, norm: str, metric: str) -> None:
    for what, name, known in (
        ("canonicalisation", canonicalisation, CANONICALISATIONS),
        ("norm", norm, NORMS),
        ("metric", metric, NORMS),
    ):
        if name not in known:
            raise UserError(f"{what} {name!r}: must be one of {', '.join(known)}")


# --- norms ----------------------------------------------------------------------------------------


def size(x: Array, transition: Array, norm: Norm) -> Array:
    """The norm `[N]` of functions of (s, a, s'), `[N, S, A, S]` or `[N, S, A, 1]`.

    transition: `[S, A, S]`, the weights.
    """
    axes, last = (1, 2, 3), x.shape[-1]
    copies = transition.shape[-1] // last  # how often each number stands
    if norm == "linf":
        return jnp.abs(x).max(axes)
    if norm == "weighted_linf":
        most = transition if copies == 1 else transition.max(-1, keepdims=True)
        return (most[None] * jnp.abs(x)).max(axes)
    if norm in ("l1", "l2"):
        total = copies * (jnp.abs(x) if norm == "l1" else x**2).sum(axes)
    else:
        each = jnp.abs(x) if norm == "weighted_l1" else x**2
        total = (transition[None] * each if copies == 1 else each).sum(axes)
    return total if norm.endswith("l1") else _root(total)


def _root(x: Array) -> Array:
    """The square root, with gradient 0 at 0."""
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1)), 0)


def standardised(canonical: Array, transition: Array, norm: Norm) -> Array:
    """canonical `[N, S, A, .]` divided by its norm; 0 stays 0, without NaN in the gradient."""
    length = size(canonical, transition, norm)[:, None, None, None]
    return jnp.where(length > 0, canonical / jnp.where(length > 0, length, 1), 0)


# --- canonicalisations ----------------------------------------------------------------------------


def canonical(
    mdp: MDP, reward: Array, name: Canonicalisation = "val", policy: Array | None = None
) -> Array:
    """The canonical form of each reward `[N, S, A, S]`: `[N, S, A, S]` or `[N, S, A, 1]`.

    What is only rounding (`ROUNDINGS`) is exactly 0. policy: as in `distance`.
    """
    if policy is None:
        policy = tabular.uniform_policy(mdp)
    make = functools.partial(_VAL[name], policy=policy) if name in _VAL else _OTHERS[name]
    # Constants are shaping. They go first, as they cost the most digits; not where they count.
    rest = reward if name == "none" else reward - _mean(mdp, reward, name)[:, None, None, None]
    made = make(mdp, rest)
    # Seen through transitions a reward's rounding is that of its mean magnitude.
    seen: Norm = "weighted_l2" if name in STARC else "l2"
    full = tabular.expected_reward(mdp, jnp.abs(rest))[..., None] if name in STARC else rest
    floor = ROUNDINGS * jnp.finfo(reward.dtype).eps * size(full, mdp.transition, seen)
    real = size(made, mdp.transition, seen) > floor
    return jnp.where(real[:, None, None, None], made, 0)


def _mean(mdp: MDP, reward: Array, name: Canonicalisation) -> Array:
    """`[N]`, over what the canonicalisation sees of the reward."""
    if name in STARC:
        return tabular.expected_reward(mdp, reward).mean((1, 2))
    return reward.mean((1, 2, 3))


def val(mdp: MDP, reward: Array, policy: Array) -> Array:
    """`[N, S, A, 1]`: the advantage of a fixed policy `[S, A]`."""
    return tabular.advantages(mdp, policy, tabular.expected_reward(mdp, reward))[..., None]


def val_potential(mdp: MDP, reward: Array, policy: Array) -> Array:
    """`[N, S, A, S]`: R - V(s) + discount V(s')."""
    values = tabular.state_values(mdp, policy, tabular.expected_reward(mdp, reward))
    return _shaped(mdp, reward, values)


def _shaped(mdp: MDP, reward: Array, potential: Array) -> Array:
    """reward `[N, S, A, S]` with a potential `[N, S]`: plus discount P(s') - P(s)."""
    return reward + mdp.discount * potential[:, None, None, :] - potential[:, :, None, None]


def minimal(mdp: MDP, reward: Array) -> Array:
    """`[N, S, A, 1]`: of all equivalent rewards the smallest in l2 weighted with transitions.

    Equal numbers for all next states are smallest there, so what remains is to take the part of
    r(s, a) out that potentials span.
    """
    r = tabular.expected_reward(mdp, reward)
    rest = _residual(_potential_basis(mdp), r.reshape(len(r), -1))
    return rest.reshape(r.shape)[..., None]


def minimal_l2(mdp: MDP, reward: Array) -> Array:
    """`[N, S, A, S]`: of all equivalent rewards the smallest in plain l2.

    At a given mean the smallest over next states is proportional to their probabilities, so each
    (s, a) counts with the inverse of their sum of squares.
    """
    r = tabular.expected_reward(mdp, reward)
    power = (mdp.transition**2).sum(-1)
    root = jnp.sqrt(power).reshape(-1)
    rest = _residual(_potential_basis(mdp) / root[:, None], r.reshape(len(r), -1) / root[None])
    share = mdp.transition / jnp.sqrt(power)[..., None]
    return rest.reshape(r.shape)[..., None] * share[None]


def _potential_basis(mdp: MDP) -> Array:
    """`[S A, S]`: what potentials do to r(s, a). Spans discount E[P(S')] - P(s) for all P."""
    states = mdp.transition.shape[0]
    here = jnp.eye(states, dtype=mdp.transition.dtype)[:, None, :]
    effect = mdp.discount * mdp.transition - jnp.broadcast_to(here, mdp.transition.shape)
    # A constant potential does the same everywhere. Said with a 1 instead of 1 - discount the
    # columns stay independent as the discount goes to 1.
    ones = jnp.ones((*effect.shape[:2], 1), effect.dtype)
    return jnp.concatenate([ones, effect[..., 1:]], -1).reshape(-1, states)


def _residual(basis: Array, r: Array) -> Array:
    """r `[N, S A]` without its part in the span of the columns of `basis`."""
    q, _ = jnp.linalg.qr(basis)
    rest = r - (r @ q) @ q.T
    return rest - (rest @ q) @ q.T  # once more, for what rounding has left


def minimal_potential(mdp: MDP, reward: Array) -> Array:
    """`[N, S, A, S]`: the smallest in plain l2 that potential shaping can reach.

    The normal equations of rewards of mean 0 are a multiple of the identity.
    """
    _, states, actions, _ = reward.shape
    reward = reward - reward.mean((1, 2, 3), keepdims=True)
    arriving, leaving = reward.sum((1, 2)), reward.sum((2, 3))
    scale = states * actions * (1 + mdp.discount**2)
    return _shaped(mdp, reward, (leaving - mdp.discount * arriving) / scale)


def epic(mdp: MDP, reward: Array) -> Array:
    """`[N, S, A, S]`: R + E[g R(s', A, S') - R(s, A, S') - g R(S, A, S')], all drawn uniformly."""
    mean = reward.mean((2, 3))
    return _shaped(mdp, reward, mean) - _constant(mdp.discount * mean.mean(1))


def _constant(x: Array) -> Array:
    return x[:, None, None, None]


def dard(mdp: MDP, reward: Array) -> Array:
    """`[N, S, A, S]`: R + E[g R(s', A, S'') - R(s, A, S') - g R(S', A, S'')].

    A uniform, the same in all terms; S' follows s, and S'' follows s'.
    """
    mean = tabular.expected_reward(mdp, reward).mean(2)
    actions = mdp.transition.shape[1]
    ways = jnp.einsum("sax,nxay,tay->nst", mdp.transition, reward, mdp.transition) / actions
    return _shaped(mdp, reward, mean) - mdp.discount * ways[:, :, None, :]


def _same(mdp: MDP, reward: Array) -> Array:
    del mdp
    return reward


_VAL: Mapping[str, Callable[..., Array]] = {"val": val, "val_potential": val_potential}
_OTHERS: Mapping[str, Callable[[MDP, Array], Array]] = {
    "minimal": minimal,
    "minimal_l2": minimal_l2,
    "minimal_potential": minimal_potential,
    "epic": epic,
    "dard": dard,
    "none": _same,
}
