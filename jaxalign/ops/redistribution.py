"""One score of a whole response as rewards of its tokens, and the controls to compare with.

R3HF / RED, Li et al. 2024 (arXiv 2411.08302), equations of the EMNLP 2025 version. A reward model
scores every prefix in one forward pass; a token's reward is the change of the score that it makes
(eq. 6), mixed with the score at the end (eq. 7), less the divergence from the reference (eq. 8).

Departures:
  - the pseudo-code of the paper's figure 4 gives the first token no reward; eq. 6 does, and is
    `redistributed`; the other is `without_first`;
  - the paper does not say what a response without a stop token earns: here the score of its last
    token and `missing_stop`, a penalty to choose.

Dimensions: B rows, P prompt slots, T response slots. Prompts end in slot P-1 and responses start in
slot P without gaps, so `scores[:, P-1]` is the score of the prompt alone.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxalign.core.types import Array


def last_token(mask: Array) -> Array:
    """`[B, L] bool`, true at the last true place of each row of mask `[B, L] bool`, if any."""
    after = jnp.cumsum(mask[:, ::-1], axis=1)[:, ::-1]
    return mask & (after == 1)


def final_score(scores: Array, mask: Array) -> Array:
    """The score of the whole sequence `[B]`: that of its last token.

    scores: `[B, L]`. mask: `[B, L] bool`, the tokens that are real.
    """
    return jnp.where(last_token(mask), scores, 0).sum(1)


def prefix_scores(scores: Array, response: Array) -> Array:
    """Scores of the prefix before each response token `[B, T]`, the prompt's first.

    This is the potential of eq. 6, and what a critic predicts from. scores: `[B, P+T]`. response:
    `[B, T] bool`.
    """
    length = response.shape[1]
    return jnp.where(response, scores[:, -length - 1 : -1], 0)


def redistributed(scores: Array, response: Array) -> Array:
    """Rewards of eq. 6 `[B, T]`: the score after each token minus the score before it.

    They sum to the score of the whole minus the score of the prompt. scores: `[B, P+T] f32`; at
    lower precision their differences are mostly rounding. response: `[B, T] bool`.
    """
    after = jnp.where(response, scores[:, -response.shape[1] :], 0)
    return after - prefix_scores(scores, response)


def without_first(scores: Array, response: Array) -> Array:
    """`redistributed` with nothing for the first token, the paper's "w.o/DI"."""
    first = jnp.arange(response.shape[1])[None] == 0
    return jnp.where(first, 0, redistributed(scores, response))


def sparse(scores: Array, response: Array) -> Array:
    """Eq. 3 `[B, T]`: the score of the whole at the response's last token, 0 elsewhere."""
    return jnp.where(last_token(response), scores[:, -response.shape[1] :], 0)


def uniform(scores: Array, response: Array) -> Array:
    """Control: the score of the whole in equal parts, which pays for length if it is positive."""
    count = jnp.maximum(response.sum(1, keepdims=True), 1)
    return response * (sparse(scores, response).sum(1, keepdims=True) / count)


def shuffled(key: Array, scores: Array, response: Array) -> Array:
    """Control: the rewards of eq. 6 in random order within each response."""
    rank = jnp.where(response, jax.random.uniform(key, response.shape), 2.0)
    order = jnp.argsort(rank, axis=1)  # the response's own places come first
    return jnp.take_along_axis(redistributed(scores, response), order, axis=1)


def random_credit(key: Array, scores: Array, response: Array) -> Array:
    """Control: the score of the whole in random parts, uniform among all shares that sum to 1."""
    part = jnp.where(response, jax.random.exponential(key, response.shape), 0)
    total = part.sum(1, keepdims=True)
    share = part / jnp.where(total == 0, 1, total)
    return share * sparse(scores, response).sum(1, keepdims=True)


def mix(dense: Array, final: Array, weight: float | Array) -> Array:
    """Eq. 7 `[B, T]`: weight * dense + (1 - weight) * final; weight is beta_c, in [0, 1]."""
    return weight * dense + (1 - weight) * final


def penalised(
    reward: Array, log_density: Array, reference: Array, response: Array, weight: float | Array
) -> Array:
    """Eq. 8 `[B, T]`: reward - weight * (log_density - reference), the sampled log-ratio, signed.

    log_density, reference: `[B, T]`, nats, of the sampled tokens under policy and reference.
    """
    return reward - weight * jnp.where(response, log_density - reference, 0)


def missing_stop(response: Array, stopped: Array, penalty: float | Array) -> Array:
    """`[B, T]`: -penalty at the last token of each row that was cut off. stopped: `[B] bool`."""
    return jnp.where(last_token(response) & ~stopped[:, None], -penalty, 0.0)


def combined(reward: Array, cost: Array, alpha: float | Array) -> Array:
    """Two models' token rewards as one, (reward + alpha * cost) / 2; alpha is the paper's."""
    return 0.5 * (reward + alpha * cost)
