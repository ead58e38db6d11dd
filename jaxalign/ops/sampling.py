"""From a language model's logits to the distribution that tokens are drawn from.

One function, `adjust`, makes that distribution for the rollout and for the trainer alike, so that a
density ratio compares like with like. A truncated distribution (top-k, top-p) is normalised over
the tokens that it keeps.

Sources: top-k, Fan et al. 2018, section 5.4; top-p (nucleus), Holtzman et al. 2020, section 3.1;
drawing by the Gumbel maximum, Maddison et al. 2014, section 2.

Dimensions: B rows, V vocabulary, `...` any leading shape.

Departures: of tokens with equal logits at the edge of top-k or top-p those with the smallest ids
are kept, so that top-k keeps k and top-p no more than it must. Large vocabularies are drawn from in
two stages, first a block of tokens and then one of the block: the same distribution from a few
hundred random numbers a row where one stage takes V.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from jaxalign.core.types import Array, UserError

# The logit of a token that cannot be drawn. Finite, so that 0 * log 0 and its gradient are zero.
DROPPED = -1e30
# Tokens to a block when drawing in two stages, and the vocabulary from which that pays.
BLOCK, TWO_STAGES = 128, 1024


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. Temperature is applied first, then top_k, then top_p."""

    temperature: float = 1.0  # 0: the likeliest token always
    top_k: int = 0  # 0: all tokens
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UserError(
                f"temperature = {self.temperature}: must be finite and not negative; "
                "1 samples from the model, 0 takes the likeliest token"
            )
        if self.top_k < 0:
            raise UserError(f"top_k = {self.top_k}: must not be negative; 0 keeps all tokens")
        if not 0 < self.top_p <= 1:
            raise UserError(
                f"top_p = {self.top_p}: must be above 0 and at most 1; 1 keeps all tokens"
            )


def adjust(logits: Array, sampling: Sampling, drawn: Array | None = None) -> Array:
    """Unnormalised log-probabilities `[..., V] f32` of the distribution that is sampled from.

    logits: `[..., V]`, any float type; `DROPPED` or -inf where a token is forbidden. At least one
        must be allowed.
    drawn: `[...] i32`, tokens known to have been drawn. They stay even where rounding, or newer
        parameters, would leave them just outside of top-k or top-p, so that their density remains
        finite; at temperature 0 they are the likeliest.
    Dropped tokens hold `DROPPED` and get no gradient.
    """
    logits = logits.astype(jnp.float32)
    if sampling.temperature == 0:
        best = jnp.argmax(logits, axis=-1) if drawn is None else drawn
        return jnp.where(_is_token(logits, best), 0.0, DROPPED)
    logits = jnp.maximum(logits / sampling.temperature, DROPPED)
    if 0 < sampling.top_k < logits.shape[-1]:
        keep = _largest(jax.lax.stop_gradient(logits), sampling.top_k)
        logits = _truncate(logits, keep, drawn)
    if sampling.top_p < 1:
        keep = _likeliest(jax.lax.stop_gradient(logits), sampling.top_p)
        logits = _truncate(logits, keep, drawn)
    return logits


def _truncate(logits: Array, keep: Array, drawn: Array | None) -> Array:
    if drawn is not None:
        keep |= _is_token(logits, drawn)
    return jnp.where(keep, logits, DROPPED)


def _is_token(logits: Array, token: Array) -> Array:
    return _ids(logits) == token[..., None]


def _ids(logits: Array) -> Array:
    return jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)


def _largest(logits: Array, count: int) -> Array:
    """The `count` largest logits, `[..., V] bool`."""
    # `top_k` orders 0, -0 and subnormal numbers, all equal in a comparison: make them one.
    logits = jnp.where(logits == 0, 0.0, logits)
    values, ids = jax.lax.top_k(logits, count)
    # Not values[..., -1:]: where only the last is read XLA:CPU no longer sees a top-k and sorts the
    # whole vocabulary, which takes a hundred times as long.
    edge = values.min(-1, keepdims=True)
    # Of equals `top_k` takes the smaller ids first, so the last one taken divides them.
    last = jnp.where(values == edge, ids, -1).max(-1, keepdims=True)
    return (logits > edge) | ((logits == edge) & (_ids(logits) <= last))


def _likeliest(logits: Array, mass: float) -> Array:
    """The fewest tokens, likeliest first, whose probabilities reach `mass`, `[..., V] bool`."""
    weight = jax.nn.softmax(logits)
    edge = _edge(logits, weight, mass)
    above, tied = logits > edge, logits == edge
    missing = mass - jnp.where(above, weight, 0.0).sum(-1, keepdims=True)
    # A tied token is taken while those before it, of the same weight, are too few.
    before = jnp.cumsum(tied, axis=-1) - tied
    return above | (tied & (before * weight < missing))


def _edge(logits: Array, weight: Array, target: float) -> Array:
    """The largest logit `[..., 1]` from which upwards the weights add up to `target`.

    Found bit by bit: 32 sums, where sorting takes many times as long.
    """
    order = _order(logits)

    def try_bit(i: Array, edge: Array) -> Array:
        higher = edge | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        enough = jnp.where(order >= higher, weight, 0.0).sum(-1, keepdims=True) >= target
        return jnp.where(enough, higher, edge)

    edge = jnp.zeros((*logits.shape[:-1], 1), jnp.uint32)
    edge = jax.lax.fori_loop(0, 32, try_bit, edge)
    # Rounding can leave the sum of all below the target: then all are kept.
    return jnp.where(order >= edge, logits, jnp.inf).min(-1, keepdims=True)


def _order(x: Array) -> Array:
    """Unsigned integers in the order of the floats x."""
    bits, sign = jax.lax.bitcast_convert_type(x, jnp.uint32), jnp.uint32(1 << 31)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def log_density(adjusted: Array, token: Array) -> Array:
    """Log-probability `[...] f32`, in nats, of tokens `[...] i32` under adjusted `[..., V]`."""
    chosen = jnp.take_along_axis(adjusted, token[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(adjusted, axis=-1)


def entropy(adjusted: Array) -> Array:
    """Entropy `[...] f32`, in nats, of the distributions adjusted `[..., V]`."""
    log_probability = jax.nn.log_softmax(adjusted)
    return -(jnp.exp(log_probability) * log_probability).sum(-1)


def draw(keys: Array, adjusted: Array) -> Array:
    """One token a row, `[B] i32`, from adjusted `[B, V]` with a key for each row `[B]`.

    What a row draws depends on its own key and logits only.
    """
    choose = jax.vmap(jax.random.categorical)
    rows, vocabulary = adjusted.shape
    if vocabulary < TWO_STAGES:
        return choose(keys, adjusted).astype(jnp.int32)
    padded = jnp.pad(adjusted, ((0, 0), (0, -vocabulary % BLOCK)), constant_values=DROPPED)
    blocks = padded.reshape(rows, -1, BLOCK)
    first, second = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
    block = choose(first, jax.nn.logsumexp(blocks, axis=-1))
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return (block * BLOCK + choose(second, inside)).astype(jnp.int32)
