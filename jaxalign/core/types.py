"""The vocabulary shared by every layer: arrays, models, weighted means, errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

Array = jax.Array
PyTree = Any
Params = dict[str, Any]


class Model(NamedTuple):
    """A network as two pure functions; no caller needs to know which library made it.

    init: `key -> params`, a nested dict of arrays.
    apply: `(params, *inputs) -> outputs`.
    """

    init: Callable[[Array], Params]
    apply: Callable[..., Any]


class LanguageModel(NamedTuple):
    """A causal language model as pure functions. B rows, T tokens, D width, V vocabulary, L slots.

    init: `key -> params`.
    hidden: `(params, ids [B, T] i32, mask [B, T] bool) -> [B, T, D]`, states after the last norm.
        False in the mask is padding, anywhere in a row; positions count the tokens that are real.
    head: `params -> [V, D]`, the output table in the dtype of products. Where parameters lie in
        parts it is gathered, so it is taken once, outside of loops.
    logits: `(table, hidden [..., D]) -> [..., V] f32`.
    predictor: `params -> (hidden [B, D] -> [B, V] f32)`, logits of single tokens, without gathering
        the table. Taken once, outside of loops.
    empty_cache: `(rows, L) -> cache`, whose leaves have the rows as their leading axis.
    extend: `(params, cache, ids [B, S], position [B, S], visible [B, L] bool, index [] i32) ->
        (hidden [B, S, D], cache)`: S tokens more, kept in slots index .. index+S-1 of every row.
        Token s attends to slot j if `visible[b, j]` and j <= index + s.
    context: the longest sequence that its positions allow.
    rows: how B lies on a mesh, if the model was told.
    """

    init: Callable[[Array], Params]
    hidden: Callable[[Params, Array, Array], Array]
    head: Callable[[Params], Array]
    logits: Callable[[Array, Array], Array]
    predictor: Callable[[Params], Callable[[Array], Array]]
    empty_cache: Callable[[int, int], PyTree]
    extend: Callable[[Params, PyTree, Array, Array, Array, Array], tuple[Array, PyTree]]
    vocabulary: int
    width: int
    context: int
    rows: NamedSharding | None = None


class Mean(NamedTuple):
    """A mean kept as its two sums, so that masks, micro-batches and devices add up exactly.

    total: `[] f32`, the weighted sum of the items.
    weight: `[] f32`, the sum of their weights.
    """

    total: Array
    weight: Array

    def __add__(self, other: Mean) -> Mean:  # ty: ignore[incompatible-method-override]
        return Mean(self.total + other.total, self.weight + other.weight)

    def value(self) -> Array:
        """total / weight, and zero (with a zero gradient) where nothing carries weight."""
        safe = jnp.where(self.weight == 0, 1.0, self.weight)
        return jnp.where(self.weight == 0, 0.0, self.total / safe)


class Max(NamedTuple):
    """A metric whose parts combine by their maximum.

    top: `[] f32`, not negative, as the maximum of no parts is 0.
    """

    top: Array

    def __add__(self, other: Max) -> Max:  # ty: ignore[incompatible-method-override]
        return Max(jnp.maximum(self.top, other.top))

    def value(self) -> Array:
        return self.top


# An objective returns the weighted sum of its items; only the train step divides.
# Its metrics are parts too (Mean or Max), which add up over micro-batches.
Objective = Callable[[Params, PyTree, Array], tuple[Mean, dict[str, Mean | Max]]]


class UserError(Exception):
    """The user can mend it. One line: the value, the rule, the fix; shown without traceback."""


class NonFinite(UserError):
    """A loss, metric or reward stopped being finite."""
