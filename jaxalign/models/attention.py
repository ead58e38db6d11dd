"""What the causal transformers share: positions, masks, attention with a cache, and their record.

The cache keeps keys and values as `[B, G, L, H]`: the products of a decode step then read it as it
lies, where `[B, L, G, H]` would be copied once a step.

Dimensions: B rows, S new tokens, L tokens or slots attended to, N query heads, G key-value heads
(a divisor of N), H head width, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

from jaxalign.core.types import Array, LanguageModel, Params
from jaxalign.models import fsdp


class KeyValue(NamedTuple):
    """One layer's cache: key, value `[B, G, L, H]`."""

    key: Array
    value: Array


# One entry a layer; None where nothing is kept.
Cache = tuple[KeyValue | None, ...]


def positions(mask: Array) -> Array:
    """The number of real tokens before each token: mask `[B, T] bool` -> `[B, T] i32`."""
    return jnp.maximum(jnp.cumsum(mask.astype(jnp.int32), axis=-1) - 1, 0)


def causal(mask: Array) -> Array:
    """Which tokens each token sees, itself and real ones before: `[B, T]` -> `[B, T, T] bool`."""
    slots = jnp.arange(mask.shape[1])
    earlier = slots[None, :] <= slots[:, None]
    return mask[:, None, :] & earlier[None]


def causal_slots(visible: Array, index: Array, length: int) -> Array:
    """The same for `length` tokens in slots from `index` on: visible `[B, L]` -> `[B, S, L]`."""
    slots, query = jnp.arange(visible.shape[1]), index + jnp.arange(length)
    return visible[:, None, :] & (slots[None, :] <= query[:, None])[None]


def write(cache: Array, new: Array, index: Array) -> Array:
    """The cache `[B, G, L, H]` with `new [B, S, G, H]` in slots index .. index + S - 1."""
    return jax.lax.dynamic_update_slice_in_dim(
        cache, new.swapaxes(1, 2).astype(cache.dtype), index, axis=2
    )


def attend(
    query: Array,
    key: Array,
    value: Array,
    visible: Array,
    cache: KeyValue | None = None,
    index: Array | None = None,
) -> tuple[Array, KeyValue | None]:
    """Attention of `query [B, S, N, H]` to keys and values `[B, S, G, H]`, softmax in f32.

    visible: `[B, S, L] bool`. A query that sees nothing gets the mean of all values, not NaN.
    cache, index: given, the keys and values go into the cache's slots from `index []` on, and
        attention is to all of its L slots; else L = S.
    Returns `[B, S, N, H]` and the new cache.
    """
    if cache is None or index is None:
        return jax.nn.dot_product_attention(query, key, value, mask=visible[:, None]), None
    cache = KeyValue(write(cache.key, key, index), write(cache.value, value, index))
    return _attend_slots(query, cache, visible), cache


def _attend_slots(query: Array, cache: KeyValue, visible: Array) -> Array:
    """The same sum over a cache; on a CPU this order of products is the faster one."""
    rows, new, heads, width = query.shape
    query = query.reshape(rows, new, cache.key.shape[1], -1, width)
    logits = jnp.einsum(
        "bsgmh,bglh->bgmsl", query, cache.key, preferred_element_type=jnp.float32
    ) / math.sqrt(width)
    logits = jnp.where(visible[:, None, None], logits, jnp.finfo(jnp.float32).min)
    weight = jax.nn.softmax(logits, axis=-1).astype(query.dtype)
    out = jnp.einsum("bgmsl,bglh->bsgmh", weight, cache.value)
    return out.reshape(rows, new, heads, width)


def logits(table: Array, hidden: Array) -> Array:
    """Logits `[..., V] f32` of hidden `[..., D]` by a table `[V, D]`, accumulated in f32."""
    table = table.astype(hidden.dtype)
    return jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)


class Head(nn.Module):
    """A language-model head of its own, not tied to the embedding: its kernel `[D, V]`."""

    width: int
    vocabulary: int

    @nn.compact
    def __call__(self) -> Array:
        shape = (self.width, self.vocabulary)
        return self.param("kernel", nn.initializers.normal(0.02), shape)


def language_model(
    module: nn.Module,
    *,
    depth: int,
    kv_heads: int,
    head_dim: int,
    dtype: DTypeLike,
    rows: NamedSharding | None,
    **sizes: int,
) -> LanguageModel:
    """A `LanguageModel` of a module with `__call__(ids, position, visible, cache, index)` and
    `table()`; rows: how B lies on a mesh. sizes: vocabulary, width and context.
    """
    nothing = (None,) * depth

    def apply(params: Params, *inputs: Any, method: str = "__call__") -> Any:
        return module.apply({"params": params}, *inputs, method=method)

    def init(key: Array) -> Params:
        ids, visible = jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1, 1), bool)
        variables: Any = module.init(key, ids, ids, visible, nothing, method=_everything)
        return variables["params"]

    def hidden(params: Params, ids: Array, mask: Array) -> Array:
        return apply(params, ids, positions(mask), causal(mask), nothing)[0]

    def table(params: Params) -> Array:
        return apply(params, method="table").astype(dtype)

    def head(params: Params) -> Array:
        return fsdp.whole_table(table(params), rows)

    def predictor(params: Params) -> Callable[[Array], Array]:
        parted = fsdp.parted_table(table(params), rows)
        return lambda hidden: fsdp.dealt_out(logits(parted, hidden), rows)

    def empty_cache(rows: int, length: int) -> Cache:
        shape = (rows, kv_heads, length, head_dim)
        return tuple(
            KeyValue(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(depth)
        )

    def extend(
        params: Params, cache: Cache, ids: Array, position: Array, visible: Array, index: Array
    ) -> tuple[Array, Cache]:
        seen = causal_slots(visible, index, ids.shape[1])
        return apply(params, ids, position, seen, cache, index)

    return LanguageModel(
        init, hidden, head, logits, predictor, empty_cache, extend, rows=rows, **sizes
    )


def _everything(module: Any, *inputs: Any) -> tuple[Array, Array]:
    """Touches every parameter."""
    return module(*inputs)[0], module.table()
