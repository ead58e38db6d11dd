"""Finite decision processes, exactly: values, returns, best and worst policies, regret.

Policy evaluation and value iteration as in Puterman 1994, chapter 6; the stopping rule is that of
his theorem 6.6.6, the span of a sweep's changes. Regret of one reward's optimum under another, and
the worst case over all pairs of policies, as in STARC, Skalse et al. 2024 (arXiv 2309.15257). That
worst case is a linear programme over occupancies, and its dual has one variable,

    max of J1(p) - J1(q) over policies with J2(q) >= J2(p)
        = min over x >= 0 of  max_p J_{R1 - x R2}(p) - min_q J_{R1 - x R2}(q),

convex and piecewise linear in x, which `worst_regret` follows from vertex to vertex.

Rewards enter as r(s, a), the mean over next states (`expected_reward`). Their mean is taken off
before anything is solved: it changes every return by the same known amount, and left in it costs
float32 two digits more at a discount of .999.

Departures: none. All programmes are for one process and many rewards; `jax.vmap` adds processes.

Dimensions: S states, A actions, N rewards.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxalign.core.types import Array, UserError

TOLERANCE = 1e-6  # of value iteration, in float32 about 16 roundings
SWEEPS = 10_000  # at most, of value iteration
PROBES = 64  # at most, of the dual's variable


class MDP(NamedTuple):
    """A finite decision process without its reward.

    transition: `[S, A, S] f32`, a distribution over the last axis. start: `[S] f32`, one too.
    discount: gamma in [0, 1).
    """

    transition: Array
    start: Array
    discount: float | Array


class Extremes(NamedTuple):
    """Occupancies `[N, S, A]` of a best and a worst deterministic policy for each reward."""

    best: Array
    worst: Array


# --- input ----------------------------------------------------------------------------------------


def check(mdp: MDP, **rewards: Any) -> None:
    """Raises UserError, naming the entry, for what is no decision process or no reward for it.

    rewards: by the name that the user knows them by, each `[..., S, A, S]`. What is being traced
    by JAX has no values, so only its shape is looked at.
    """
    transition = mdp.transition
    shape = np.shape(transition)
    if len(shape) != 3 or shape[0] != shape[2] or 0 in shape:
        raise UserError(f"transition has shape {shape}: must be (S, A, S); transpose or reshape it")
    if np.shape(mdp.start) != shape[:1]:
        raise UserError(
            f"start has shape {np.shape(mdp.start)}: must be {shape[:1]}, a probability a state"
        )
    for name, reward in rewards.items():
        if np.shape(reward)[-3:] != shape:
            raise UserError(
                f"{name} has shape {np.shape(reward)}: must end in (S, A, S) = {shape}, as "
                "transition does; broadcast it over what it does not depend on"
            )
    _check_discount(mdp.discount)
    _check_distribution("transition", transition, "transition[s, a] must sum to 1 over next states")
    _check_distribution("start", mdp.start, "it must sum to 1")
    for name, reward in rewards.items():
        _check_finite(name, reward)


def _check_discount(discount: Any) -> None:
    if not isinstance(discount, Tracer) and not 0 <= float(discount) < 1:
        raise UserError(
            f"discount = {float(discount):g}: must be at least 0 and below 1; try 0.95, and for "
            "rewards of single steps `starc_sampled.one_step`"
        )


def _check_finite(name: str, values: Any) -> None:
    if isinstance(values, Tracer):
        return
    values = np.asarray(values)
    if not np.isfinite(values).all():
        at = np.argwhere(~np.isfinite(values))[0].tolist()
        raise UserError(f"{name}{at} is {values[tuple(at)]}: must be finite; replace or clip it")


def _check_distribution(name: str, values: Any, rule: str) -> None:
    if isinstance(values, Tracer):
        return
    _check_finite(name, values)
    values = np.asarray(values, np.float64)
    if (values < 0).any():
        at = np.argwhere(values < 0)[0].tolist()
        raise UserError(f"{name}{at} is {values[tuple(at)]:g}: must not be negative; mend it")
    total = values.sum(-1)
    wrong = np.abs(total - 1) > 1e-4
    if wrong.any():
        at = np.argwhere(wrong)[0].tolist()
        where, total = (f"{name}{at}", total[tuple(at)]) if at else (name, total)
        raise UserError(f"{where} sums to {total:.6g}: {rule}; divide it by its sum")


# --- evaluation -----------------------------------------------------------------------------------


def uniform_policy(mdp: MDP) -> Array:
    """`[S, A]`, each action as likely as the others."""
    states, actions, _ = mdp.transition.shape
    return jnp.full((states, actions), 1 / actions, mdp.transition.dtype)


def expected_reward(mdp: MDP, reward: Array) -> Array:
    """r `[N, S, A]`, the mean of `reward` `[N, S, A, S]` over next states."""
    return jnp.einsum("sap,nsap->nsa", mdp.transition, reward)


def centred(reward: Array) -> tuple[Array, Array]:
    """`reward` `[N, S, A]` without its mean, and that mean `[N]`."""
    mean = reward.mean((1, 2))
    return reward - mean[:, None, None], mean


def next_values(mdp: MDP, values: Array) -> Array:
    """`[N, S, A]`, discount times the expected value of the next state. values: `[N, S]`."""
    return mdp.discount * jnp.einsum("sap,np->nsa", mdp.transition, values)


def state_values(mdp: MDP, policy: Array, reward: Array) -> Array:
    """V `[N, S]` of a policy `[S, A]` under each reward `[N, S, A]`; one factorisation for all."""
    rest, mean = centred(reward)
    values = _solve(mdp, policy, rest)
    return values + (mean / (1 - mdp.discount))[:, None]


def advantages(mdp: MDP, policy: Array, reward: Array) -> Array:
    """Q - V `[N, S, A]` of a policy `[S, A]` under each reward `[N, S, A]`."""
    rest, _ = centred(reward)
    values = _solve(mdp, policy, rest)
    return rest + next_values(mdp, values) - values[..., None]


def policy_returns(mdp: MDP, policy: Array, reward: Array) -> Array:
    """J `[N]`, the expected discounted sum of each reward `[N, S, A]` under a policy `[S, A]`."""
    return state_values(mdp, policy, reward) @ mdp.start


def _solve(mdp: MDP, policy: Array, reward: Array) -> Array:
    """V `[N, S]`, by elimination."""
    chain = jnp.einsum("sa,sap->sp", policy, mdp.transition)
    right = jnp.einsum("sa,nsa->sn", policy, reward)
    return jnp.linalg.solve(_evaluation_matrix(mdp, chain), right).T


def _evaluation_matrix(mdp: MDP, chain: Array) -> Array:
    """1 - discount * chain, of chains `[..., S, S]`."""
    identity = jnp.broadcast_to(jnp.eye(chain.shape[-1], dtype=chain.dtype), chain.shape)
    return identity - mdp.discount * chain


def occupancy(mdp: MDP, policy: Array) -> Array:
    """Discounted visits `[N, S, A]` of deterministic policies, actions `[N, S] i32`.

    They sum to 1 / (1 - discount), and J of a reward `[S, A]` is its inner product with them.
    """
    states, actions, _ = mdp.transition.shape
    rows = jnp.arange(states)[None, :]
    chain = mdp.transition[jnp.broadcast_to(rows, policy.shape), policy]
    start = jnp.broadcast_to(mdp.start[None, :], policy.shape)
    visits = solve_dominant(_evaluation_matrix(mdp, chain).swapaxes(1, 2), start)
    # Their sum is known exactly, which takes most of the rounding out.
    visits = visits / (visits.sum(-1, keepdims=True) * (1 - mdp.discount))
    return visits[..., None] * jax.nn.one_hot(policy, actions, dtype=visits.dtype)


def solve_dominant(matrix: Array, right: Array) -> Array:
    """x `[N, S]` with matrix `[N, S, S]` x = right `[N, S]`, by elimination without pivots.

    For matrices such as 1 - discount * chain: stable, as the diagonal outweighs the rest of rows.
    Not LAPACK's, whose batches wait for each other for ever inside a loop inside a loop on the CPU
    (jax 0.10).
    """
    whole = jnp.concatenate([matrix, right[..., None]], -1)

    def clear(i: Array, whole: Array) -> Array:
        pivot = jax.lax.dynamic_slice_in_dim(whole, i, 1, axis=1)
        pivot = pivot / jax.lax.dynamic_slice_in_dim(pivot, i, 1, axis=2)
        column = jax.lax.dynamic_slice_in_dim(whole, i, 1, axis=2)
        others = whole - column * pivot
        return jax.lax.dynamic_update_slice_in_dim(others, pivot, i, axis=1)

    return jax.lax.fori_loop(0, matrix.shape[-1], clear, whole)[..., -1]


def earned(occupancies: Array, reward: Array) -> Array:
    """J `[N]` of each reward under the policy with these occupancies, both `[N, S, A]`.

    The rewards' mean is left out where two such numbers are compared: see `spread`.
    """
    return (occupancies * reward).sum((1, 2))


# --- best and worst policies ----------------------------------------------------------------------


def best_policy(
    mdp: MDP, reward: Array, tolerance: float = TOLERANCE, sweeps: int = SWEEPS
) -> Array:
    """Actions `[N, S] i32` of a best policy for each reward `[N, S, A]`, by value iteration.

    It stops when a sweep changes all states' values by the same amount, up to `tolerance` times the
    range of rewards and values. What the policy loses against the best is at most that range times
    tolerance * discount / (1 - discount), from any state. At most `sweeps` sweeps.
    """
    rest, _ = centred(jax.lax.stop_gradient(reward))
    reward_range = jnp.ptp(rest, axis=(1, 2))

    def unsettled(carry: tuple[Array, Array, Array]) -> Array:
        values, change, sweep = carry
        size = jnp.maximum(reward_range, jnp.ptp(values, axis=1))
        return (sweep < sweeps) & jnp.any(change > tolerance * size)

    def update(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        values, _, sweep = carry
        new = (rest + next_values(mdp, values)).max(-1)
        change = jnp.ptp(new - values, axis=1)
        # A constant on all values changes no choice; without it they stay small.
        return new - new.min(-1, keepdims=True), change, sweep + 1

    start = jnp.zeros(rest.shape[:2], rest.dtype)
    begin = (start, jnp.full(rest.shape[:1], jnp.inf, rest.dtype), jnp.int32(0))
    values, _, _ = jax.lax.while_loop(unsettled, update, begin)
    return (rest + next_values(mdp, values)).argmax(-1).astype(jnp.int32)


def extremes(mdp: MDP, reward: Array, tolerance: float = TOLERANCE) -> Extremes:
    """Best and worst policy for each reward `[N, S, A]`, as exact occupancies.

    tolerance: of `best_policy`.
    """
    both = jnp.concatenate([reward, -reward])
    occupancies = occupancy(mdp, best_policy(mdp, both, tolerance))
    best, worst = jnp.split(occupancies, 2)
    return Extremes(best, worst)


def spread(mdp: MDP, reward: Array, own: Extremes) -> Array:
    """max J - min J `[N]`, exactly 0 where only rounding tells best from worst.

    own: the extremes of the same rewards `[N, S, A]`.
    """
    rest, _ = centred(reward)
    width = earned(own.best, rest) - earned(own.worst, rest)
    noise = 100 * jnp.finfo(rest.dtype).eps * jnp.abs(rest).max((1, 2)) / (1 - mdp.discount)
    return jnp.where(width > noise, width, 0)


# --- regret ---------------------------------------------------------------------------------------


def _safe(divisor: Array) -> Array:
    return jnp.where(divisor == 0, 1, divisor)


def regret(mdp: MDP, reward: Array, own: Extremes, occupancies: Array) -> Array:
    """What policies lose, `[N]`: 0 at the reward's best, 1 at its worst, 0 for trivial rewards.

    own: the extremes of `reward` `[N, S, A]`. occupancies: of the policies judged.
    """
    rest, _ = centred(reward)
    width = spread(mdp, reward, own)
    lost = earned(own.best, rest) - earned(occupancies, rest)
    return jnp.where(width > 0, jnp.clip(lost / _safe(width), 0, 1), 0)


def mutual_regret(
    mdp: MDP, first: Array, first_own: Extremes, second: Array, second_own: Extremes
) -> Array:
    """`[N]`: the regret of the second reward's best policy under the first, and the other way
    round, averaged. STARC, section 5.
    """
    there = regret(mdp, first, first_own, second_own.best)
    back = regret(mdp, second, second_own, first_own.best)
    return (there + back) / 2


class WorstRegret(NamedTuple):
    """Largest regret between two policies that another reward allows, `[N]`, in [0, 1].

    value: from policies that were found. error: at most so much above the true one.
    """

    value: Array
    error: Array


def worst_regret(
    mdp: MDP, first: Array, second: Array, tolerance: float = 1e-5, sweep_tolerance: float = 1e-6
) -> WorstRegret:
    """max of (J1(p) - J1(q)) / (max J1 - min J1) over policies with J2(q) >= J2(p).

    first, second: `[N, S, A]`. 0 where `first` is trivial, and 1 where only `second` is. The dual's
    variable moves to where the tangents on both sides meet, until they are `tolerance` apart.
    sweep_tolerance: of value iteration.
    """
    policy = uniform_policy(mdp)
    scaled = []
    for reward in (first, second):
        # The advantage orders policies alike and is as small as can be, perhaps but rounding.
        part = advantages(mdp, policy, reward)
        floor = 100 * jnp.finfo(part.dtype).eps * jnp.abs(centred(reward)[0]).max((1, 2))
        part = jnp.where(_wide(jnp.abs(part).max((1, 2)) > floor), part, 0)
        width = spread(mdp, part, extremes(mdp, part, sweep_tolerance))
        scaled.append(jnp.where((width > 0)[:, None, None], part / _wide(_safe(width)), 0))
    one, two = scaled

    def probe(x: Array) -> tuple[Array, Array]:
        """The tangent at x `[N]`: its height at 0, and its descent."""
        own = extremes(mdp, one - _wide(x) * two, sweep_tolerance)
        apart = own.best - own.worst
        return earned(apart, one), earned(apart, two)

    def meet(carry: tuple[Array, ...]) -> tuple[Array, Array]:
        """Where the two tangents meet: place and height."""
        a, b, c, d, *_ = carry
        x = jnp.where(b - d > 0, (a - c) / _safe(b - d), 0)
        return x, a - x * b

    def open_ones(carry: tuple[Array, ...]) -> Array:
        value, count = carry[4], carry[5]
        return (count < PROBES) & jnp.any(value - meet(carry)[1] > tolerance)

    def narrow(carry: tuple[Array, ...]) -> tuple[Array, ...]:
        a, b, c, d, value, count = carry
        x, _ = meet(carry)
        height, descent = probe(x)
        falls = descent > 0
        left = (jnp.where(falls, height, a), jnp.where(falls, descent, b))
        right = (jnp.where(falls, c, height), jnp.where(falls, d, descent))
        return *left, *right, jnp.minimum(value, height - x * descent), count + 1

    # Ranges of 1 make the dual at least x - 1, so its minimum lies in [0, 2].
    begin, end = probe(jnp.zeros_like(one[:, 0, 0])), probe(jnp.full_like(one[:, 0, 0], 2))
    rises = begin[1] <= 0  # from 0 on: nothing to gain
    begin = (begin[0], jnp.where(rises, 0, begin[1]))
    end = tuple(jnp.where(rises, b, e) for b, e in zip(begin, end, strict=True))
    value = jnp.minimum(begin[0], end[0] - 2 * end[1])
    carry = (*begin, *end, jnp.where(rises, begin[0], value), jnp.int32(0))
    carry = jax.lax.while_loop(open_ones, narrow, carry)
    value, lowest = carry[4], meet(carry)[1]
    return WorstRegret(jnp.clip(value, 0, 1), jnp.maximum(value - lowest, 0))


def _wide(x: Array) -> Array:
    return x[:, None, None]


def regret_bound(mdp: MDP, canonical: Array, width: Array, distance: Array) -> Array:
    """A certificate `[N]`: no policy pair that the second reward allows has more regret.

    U * d, with U = sqrt(2) |A| / ((1 - discount)(max J - min J)). Occupancies of two policies are
    at most sqrt(2) / (1 - discount) apart in l2, and regret is their difference times A.

    canonical: A `[N, S, A]`, the first reward's advantages, or any canonical form constant in the
    next state. width: `spread` of the first reward. distance: STARC's with norm and metric l2, or
    both weighted l2. Infinite for trivial rewards, which have no regret to bound.
    """
    length = jnp.sqrt((canonical**2).sum((1, 2)))
    bound = jnp.sqrt(2.0) * length / ((1 - mdp.discount) * _safe(width))
    return jnp.where(width > 0, bound.astype(distance.dtype) * distance, jnp.inf)
