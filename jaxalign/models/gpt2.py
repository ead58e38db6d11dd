"""GPT-2 (Radford et al. 2019): learned positions, LayerNorm before each half block, tied head.

Departures: no dropout. Query, key and value are three matrices, which adapters can name; the
checkpoints' one matrix is cut on reading and joined on writing (`checkpoint`).

Dimensions: B rows, S tokens, L tokens or slots attended to, D width, V vocabulary.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from jaxalign.core.types import Array, LanguageModel
from jaxalign.models import attention
from jaxalign.models.attention import Cache, KeyValue

# Matrices over `fsdp` and, by heads and by hidden units, over `tensor`. The vocabulary of the
# released models, 50,257, has no small divisor: the table is cut along its width.
RULES = (
    (r"embedding$", P(None, "fsdp")),
    (r"(query|key|value|up)/kernel$", P("fsdp", "tensor")),
    (r"(query|key|value|up)/bias$", P("tensor")),
    (r"(out|down)/kernel$", P("tensor", "fsdp")),
    (r"lm_head/kernel$", P("fsdp", None)),
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes. `inner` is the width inside the feed-forward half, 4 * width in the released models.

    tied: the head is the embedding table, transposed.
    """

    vocabulary: int
    width: int
    depth: int
    heads: int
    inner: int
    context: int = 1024
    eps: float = 1e-5
    tied: bool = True


class Attention(nn.Module):
    """Multi-head attention `[B, S, D]` -> `[B, S, D]` and the layer's cache."""

    config: Config
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, x: Array, visible: Array, cache: KeyValue | None, index: Array | None
    ) -> tuple[Array, KeyValue | None]:
        width, heads = self.config.width, self.config.heads
        init = nn.initializers.normal(0.02)
        q, k, v = (
            nn.Dense(width, dtype=self.dtype, kernel_init=init, name=name)(x).reshape(
                *x.shape[:2], heads, -1
            )
            for name in ("query", "key", "value")
        )
        out, cache = attention.attend(q, k, v, visible, cache, index)
        small = nn.initializers.normal(0.02 / (2 * self.config.depth) ** 0.5)
        out = nn.Dense(width, dtype=self.dtype, kernel_init=small, name="out")(out.reshape(x.shape))
        return out, cache


class Block(nn.Module):
    """Attention and feed-forward, each added to the stream `[B, S, D]`."""

    config: Config
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, x: Array, visible: Array, cache: KeyValue | None, index: Array | None
    ) -> tuple[Array, KeyValue | None]:
        config, dtype = self.config, self.dtype
        h = _norm(config, dtype, "norm_attention")(x)
        h, cache = Attention(config, dtype, name="attention")(h, visible, cache, index)
        x = x + h
        h = _norm(config, dtype, "norm_mlp")(x)
        init = nn.initializers.normal(0.02)
        h = nn.Dense(config.inner, dtype=dtype, kernel_init=init, name="up")(h)
        h = nn.gelu(h, approximate=True)
        small = nn.initializers.normal(0.02 / (2 * config.depth) ** 0.5)
        return x + nn.Dense(config.width, dtype=dtype, kernel_init=small, name="down")(h), cache


def _norm(config: Config, dtype: DTypeLike, name: str) -> nn.LayerNorm:
    """LayerNorm; its mean and variance are f32 whatever the dtype."""
    return nn.LayerNorm(epsilon=config.eps, dtype=dtype, use_fast_variance=False, name=name)


class Gpt2(nn.Module):
    """The full forward pass and, given a cache, that of the new tokens only."""

    config: Config
    dtype: DTypeLike = jnp.float32
    remat: bool = False

    def setup(self):
        config, init = self.config, nn.initializers.normal(0.02)
        self.token = nn.Embed(
            config.vocabulary, config.width, dtype=self.dtype, embedding_init=init
        )
        self.position = nn.Embed(
            config.context, config.width, dtype=self.dtype, embedding_init=init
        )
        block = nn.remat(Block) if self.remat else Block
        self.block = [block(config, self.dtype) for _ in range(config.depth)]
        self.norm = nn.LayerNorm(epsilon=config.eps, dtype=self.dtype, use_fast_variance=False)
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
        x = self.token(ids) + self.position(position)
        layers = []
        for block, layer in zip(self.block, cache, strict=True):
            x, layer = block(x, visible, layer, index)
            layers.append(layer)
        return self.norm(x), tuple(layers)

    def logits(self, hidden: Array) -> Array:
        """`[..., D]` -> `[..., V] f32`."""
        return (
            attention.head(hidden, self.token.embedding)
            if self.config.tied
            else self.lm_head(hidden)
        )


def gpt2(config: Config, dtype: DTypeLike = jnp.float32, *, remat: bool = False) -> LanguageModel:
    """The model as pure functions; parameters are f32, products are in `dtype`.

    remat: the backward pass computes each block again instead of keeping what is inside it.
    """
    return attention.language_model(
        Gpt2(config, dtype, remat),
        depth=config.depth,
        kv_heads=config.heads,
        head_dim=config.width // config.heads,
        dtype=dtype,
        vocabulary=config.vocabulary,
        width=config.width,
        context=config.context,
    )
