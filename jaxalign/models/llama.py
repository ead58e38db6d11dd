"""Llama 3 (Dubey et al. 2024), Qwen2 and 2.5 (Yang et al. 2024), Qwen3 (Yang et al. 2025).

One decoder: RMSNorm before each half block, rotary positions (Su et al. 2021), grouped key-value
heads, SwiGLU. Qwen2 adds biases to query, key and value, Qwen3 a norm of each query and key head.

Departures: no dropout, no sliding window.

Dimensions: B rows, S tokens, L tokens or slots attended to, D width, N query heads, G key-value
heads, H head width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from jaxalign.core.types import Array, LanguageModel
from jaxalign.models import attention
from jaxalign.models.attention import Cache, KeyValue

# Matrices over `fsdp` and, by heads, hidden units and vocabulary, over `tensor`.
RULES = (
    (r"embedding$", P("tensor", "fsdp")),
    (r"(query|key|value|gate|up|lm_head)/kernel$", P("fsdp", "tensor")),
    (r"(query|key|value)/bias$", P("tensor")),
    (r"(out|down)/kernel$", P("tensor", "fsdp")),
)


@dataclasses.dataclass(frozen=True)
class RotaryScaling:
    """Llama 3.1's stretching of the slow rotary frequencies to longer texts.

    Wavelengths above original_context / low_frequency are stretched by `factor`, those below
    original_context / high_frequency stay, and those between blend.
    """

    factor: float
    low_frequency: float
    high_frequency: float
    original_context: int


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes. `inner` is the width inside SwiGLU; head_dim need not be width / heads.

    tied: the head is the embedding table, transposed. qkv_bias: Qwen2. qk_norm: Qwen3.
    """

    vocabulary: int
    width: int
    inner: int
    depth: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    eps: float = 1e-6
    theta: float = 10_000.0
    scaling: RotaryScaling | None = None
    tied: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False


def frequencies(config: Config) -> np.ndarray:
    """Angles per position `[H / 2] f32`, in radians."""
    step = np.arange(0, config.head_dim, 2, dtype=np.float32) / config.head_dim
    frequency = 1.0 / np.float32(config.theta) ** step
    if config.scaling is None:
        return frequency
    scaling = config.scaling
    turns = scaling.original_context * frequency / (2 * math.pi)
    share = (turns - scaling.low_frequency) / (scaling.high_frequency - scaling.low_frequency)
    keep = np.clip(share, 0, 1)
    return ((1 - keep) * frequency / scaling.factor + keep * frequency).astype(np.float32)


def rotate(x: Array, position: Array, frequency: np.ndarray) -> Array:
    """`x [B, S, heads, H]` turned by its `position [B, S]`; feature i pairs with i + H/2."""
    angle = position.astype(jnp.float32)[:, :, None, None] * frequency[None, None, None]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def _dense(features: int, dtype: DTypeLike, name: str, *, bias: bool = False) -> nn.Dense:
    init = nn.initializers.normal(0.02)
    return nn.Dense(features, use_bias=bias, dtype=dtype, kernel_init=init, name=name)


class Attention(nn.Module):
    """Grouped-query attention `[B, S, D]` -> `[B, S, D]` and the layer's cache."""

    config: Config
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self,
        x: Array,
        position: Array,
        visible: Array,
        cache: KeyValue | None,
        index: Array | None,
    ) -> tuple[Array, KeyValue | None]:
        config = self.config

        def project(name: str, heads: int) -> Array:
            dense = _dense(heads * config.head_dim, self.dtype, name, bias=config.qkv_bias)
            return dense(x).reshape(*x.shape[:2], heads, config.head_dim)

        q = project("query", config.heads)
        k, v = project("key", config.kv_heads), project("value", config.kv_heads)
        if config.qk_norm:
            q = nn.RMSNorm(epsilon=config.eps, dtype=self.dtype, name="norm_query")(q)
            k = nn.RMSNorm(epsilon=config.eps, dtype=self.dtype, name="norm_key")(k)
        frequency = frequencies(config)
        q, k = rotate(q, position, frequency), rotate(k, position, frequency)
        out, cache = attention.attend(q, k, v, visible, cache, index)
        return _dense(config.width, self.dtype, "out")(out.reshape(*x.shape[:2], -1)), cache


class Block(nn.Module):
    """Attention and SwiGLU, each added to the stream `[B, S, D]`."""

    config: Config
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self,
        x: Array,
        position: Array,
        visible: Array,
        cache: KeyValue | None,
        index: Array | None,
    ) -> tuple[Array, KeyValue | None]:
        config, dtype = self.config, self.dtype
        h = nn.RMSNorm(epsilon=config.eps, dtype=dtype, name="norm_attention")(x)
        h, cache = Attention(config, dtype, name="attention")(h, position, visible, cache, index)
        x = x + h
        h = nn.RMSNorm(epsilon=config.eps, dtype=dtype, name="norm_mlp")(x)
        gate = nn.silu(_dense(config.inner, dtype, "gate")(h))
        h = gate * _dense(config.inner, dtype, "up")(h)
        return x + _dense(config.width, dtype, "down")(h), cache


class Llama(nn.Module):
    """The full forward pass and, given a cache, that of the new tokens only."""

    config: Config
    dtype: DTypeLike = jnp.float32
    remat: bool = False

    def setup(self):
        config = self.config
        self.token = nn.Embed(
            config.vocabulary,
            config.width,
            dtype=self.dtype,
            embedding_init=nn.initializers.normal(0.02),
        )
        block = nn.remat(Block) if self.remat else Block
        self.block = [block(config, self.dtype) for _ in range(config.depth)]
        self.norm = nn.RMSNorm(epsilon=config.eps, dtype=self.dtype)
        if not config.tied:
            self.lm_head = attention.Head(config.vocabulary)

    def __call__(
        self,
        ids: Array,
        position: Array,
        visible: Array,
        cache: Cache,
        index: Array | None = None,
    ) -> tuple[Array, Cache]:
        """Last hidden states `[B, S, D]` of `ids [B, S]` at `position [B, S]`, and the new cache.

        visible: `[B, S, L] bool`; cache: one entry a layer, all None (then L = S) or none.
        """
        x = self.token(ids)
        layers = []
        for block, layer in zip(self.block, cache, strict=True):
            x, layer = block(x, position, visible, layer, index)
            layers.append(layer)
        return self.norm(x), tuple(layers)

    def logits(self, hidden: Array) -> Array:
        """`[..., D]` -> `[..., V] f32`."""
        if self.config.tied:
            return attention.head(hidden, self.token.embedding)
        return self.lm_head(hidden)


def llama(config: Config, dtype: DTypeLike = jnp.float32, *, remat: bool = False) -> LanguageModel:
    """The model as pure functions; parameters are f32, products are in `dtype`.

    remat: the backward pass computes each block again instead of keeping what is inside it.
    """
    return attention.language_model(
        Llama(config, dtype, remat),
        depth=config.depth,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        dtype=dtype,
        vocabulary=config.vocabulary,
        width=config.width,
        context=config.context,
    )
