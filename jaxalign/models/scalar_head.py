"""A scalar head on a language model's hidden states: reward models and critics.

Parameters are `{"model": the language model's, "head": {"kernel": [D, 1], "bias": [1]}}`, without
the language-model head where it is a matrix of its own ("lm_head"), as no score reads it.

Dimensions: B rows, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.core.types import Array, LanguageModel, Params


class ScalarModel(NamedTuple):
    """A network that says one number after each token.

    init: `key -> params`.
    scores: `(params, ids [B, T] i32, mask [B, T] bool) -> [B, T] f32`; the number at a position
        knows the tokens up to and including that one. Padding gets a number too, without meaning.
    """

    init: Callable[[Array], Params]
    scores: Callable[[Params, Array, Array], Array]


def with_scalar_head(model: LanguageModel) -> ScalarModel:
    """The language model with a scalar head in place of its own."""

    def init(key: Array) -> Params:
        body, head = jax.random.split(key)
        return attach_head(model.init(body), model.width, head)

    def scores(params: Params, ids: Array, mask: Array) -> Array:
        hidden = model.hidden(params["model"], ids, mask).astype(jnp.float32)
        head = params["head"]
        out = jnp.einsum("btd,d->bt", hidden, head["kernel"][:, 0], precision="highest")
        return out + jnp.broadcast_to(head["bias"], out.shape)

    return ScalarModel(init, scores)


def attach_head(params: Params, width: int, key: Array | None = None) -> Params:
    """A scalar model's parameters from those of a language model of this width.

    key: draws the head with standard deviation 1 / sqrt(width + 1) (Stiennon et al. 2020); without
        key the head is zero, and so is every score.
    """
    shape = (width, 1)
    kernel = jnp.zeros(shape)
    if key is not None:
        kernel = jax.random.normal(key, shape) / (width + 1) ** 0.5
    body = {name: leaf for name, leaf in params.items() if name != "lm_head"}
    return {"model": body, "head": {"kernel": kernel, "bias": jnp.zeros(1)}}
