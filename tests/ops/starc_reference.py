"""Slow, literal NumPy for what `ops.tabular` and `ops.starc` compute; and random worlds."""

from __future__ import annotations

import itertools

import numpy as np

from jaxalign.ops.tabular import MDP


def random_world(seed, states=4, actions=3, discount=0.9, rewards=3, sparse=True):
    """A process, half of whose moves are impossible, and normal rewards `[N, S, A, S]`."""
    rng = np.random.default_rng(seed)
    weight = rng.exponential(size=(states, actions, states))
    if sparse:
        weight *= rng.random(weight.shape) < 0.5
        weight[..., 0] += 1e-3  # so that none is empty
    start = rng.exponential(size=states)
    mdp = MDP(weight / weight.sum(-1, keepdims=True), start / start.sum(), discount)
    return mdp, rng.normal(size=(rewards, states, actions, states))


def shaping(mdp, seed, scale=1.0):
    """A reward `[S, A, S]` that is only potential, and the potential `[S]`."""
    states, actions, _ = mdp.transition.shape
    potential = scale * np.random.default_rng(seed).normal(size=states)
    change = mdp.discount * potential[None, None, :] - potential[:, None, None]
    return np.broadcast_to(change, (states, actions, states)), potential


def unseen(mdp, seed):
    """A reward `[S, A, S]` whose mean over next states is 0."""
    noise = np.random.default_rng(seed).normal(size=mdp.transition.shape)
    return noise - (mdp.transition * noise).sum(-1, keepdims=True)


def swept_values(mdp, policy, reward):
    """V `[S]` of a policy `[S, A]` under a reward `[S, A, S]`, by sweeps with loops."""
    states, actions, _ = mdp.transition.shape
    values = np.zeros(states)
    for _ in range(3000):
        new = np.zeros(states)
        for s, a, t in itertools.product(range(states), range(actions), range(states)):
            gain = reward[s, a, t] + mdp.discount * values[t]
            new[s] += policy[s, a] * mdp.transition[s, a, t] * gain
        if np.abs(new - values).max() < 1e-13:
            break
        values = new
    return new


def deterministic(mdp):
    """All deterministic policies `[P, S]`."""
    states, actions, _ = mdp.transition.shape
    return np.array(list(itertools.product(range(actions), repeat=states)))


def visits(mdp, policy):
    """Discounted visits `[S, A]` of a deterministic policy `[S]`."""
    states, actions, _ = mdp.transition.shape
    chain = mdp.transition[np.arange(states), policy]
    found = np.linalg.solve((np.eye(states) - mdp.discount * chain).T, mdp.start)
    return found[:, None] * np.eye(actions)[policy]


def all_returns(mdp, reward):
    """J `[P]` of all deterministic policies under a reward `[S, A, S]`."""
    r = (mdp.transition * reward).sum(-1)
    return np.array([(visits(mdp, policy) * r).sum() for policy in deterministic(mdp)])


def brute_worst_regret(first, second):
    """The worst normalised regret from the returns `[P]` of all policies under two rewards.

    What pairs of mixed policies gain of both fills the hull of what pairs of policies gain, so the
    answer is the hull's upper edge where the second gain is 0, or its top where it is negative.
    """
    gain = np.stack([(j[:, None] - j[None]).ravel() for j in (second, first)], 1)
    hull: list[np.ndarray] = []
    for point in gain[np.lexsort(gain.T)]:
        while len(hull) > 1 and left_turn(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    edge = np.array(hull)
    best = max(np.interp(0, *edge.T), edge[edge[:, 0] <= 0, 1].max())
    return best / np.ptp(first)


def left_turn(one, two, three):
    """Whether the second point lies on or below the line from the first to the third."""
    a, b = two - one, three - one
    return a[0] * b[1] >= a[1] * b[0]


# --- canonicalisations ----------------------------------------------------------------------------


def val(mdp, reward):
    policy = np.full(mdp.transition.shape[:2], 1 / mdp.transition.shape[1])
    values = swept_values(mdp, policy, reward)
    result = np.zeros(reward.shape)
    for s, a in np.ndindex(reward.shape[:2]):
        mean = (mdp.transition[s, a] * (reward[s, a] + mdp.discount * values)).sum()
        result[s, a] = mean - values[s]
    return result


def val_potential(mdp, reward):
    policy = np.full(mdp.transition.shape[:2], 1 / mdp.transition.shape[1])
    values = swept_values(mdp, policy, reward)
    return reward - values[:, None, None] + mdp.discount * values[None, None, :]


def epic(mdp, reward):
    result, states = np.zeros(reward.shape), len(reward)
    for s, a, t in np.ndindex(reward.shape):
        terms = [
            mdp.discount * reward[t, b, u] - reward[s, b, u] - mdp.discount * reward[v, b, u]
            for b in range(reward.shape[1])
            for u in range(states)
            for v in range(states)
        ]
        result[s, a, t] = reward[s, a, t] + np.mean(terms)
    return result


def dard(mdp, reward):
    result, states, actions = np.zeros(reward.shape), len(reward), reward.shape[1]
    for s, a, t in np.ndindex(reward.shape):
        total = 0.0
        for b, v, u in itertools.product(range(actions), range(states), range(states)):
            chance = mdp.transition[s, b, v] * mdp.transition[t, b, u] / actions
            ahead = mdp.discount * (reward[t, b, u] - reward[v, b, u])
            total += chance * (ahead - reward[s, b, v])
        result[s, a, t] = reward[s, a, t] + total
    return result


def _potentials(mdp):
    """`[S A S, S]`: shaping by each state's potential."""
    states, actions, _ = mdp.transition.shape
    columns = []
    for unit in np.eye(states):
        change = mdp.discount * unit[None, None, :] - unit[:, None, None]
        columns.append(np.broadcast_to(change, (states, actions, states)).ravel())
    return np.stack(columns, 1)


def _moves(mdp):
    """`[S A S, .]`: what moves reward between next states at an equal mean."""
    states, actions, _ = mdp.transition.shape
    columns = []
    for s, a in np.ndindex(states, actions):
        for row in np.linalg.svd(mdp.transition[s, a][None])[2][1:]:
            column = np.zeros(mdp.transition.shape)
            column[s, a] = row
            columns.append(column.ravel())
    return np.stack(columns, 1)


def smallest(mdp, reward, weighted=False, moves=True):
    """The smallest equivalent reward in l2, by least squares over all that changes nothing."""
    basis = _potentials(mdp)
    if moves:
        basis = np.concatenate([basis, _moves(mdp)], 1)
    root = np.sqrt(mdp.transition.ravel()) if weighted else np.ones(reward.size)
    found = np.linalg.lstsq(root[:, None] * basis, root * reward.ravel(), rcond=1e-12)[0]
    return (reward.ravel() - basis @ found).reshape(reward.shape)
