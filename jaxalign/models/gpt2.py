"""GPT-2 (Radford et al. 2019): learned positions, LayerNorm before each half block, tied head.

Departures: no dropout. Query, key and value are three matrices, which adapters can name; the
checkpoints' one matrix is cut on reading and joined on writing (`checkpoint`).

Dimensions: B rows, S tokens, L tokens or slots attended to, D width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from jaxalign.core.types import Array, LanguageModel, UserError
from jaxalign.models import attention, hub
from jaxalign.models.attention import Cache, KeyValue
from jaxalign.models.dense import Dense

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

    def __post_init__(self):
        if self.width % self.heads:
            raise UserError(
                f"width {self.width}, heads {self.heads}: heads must divide the width; change one"
            )


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
            Dense(width, dtype=self.dtype, kernel_init=init, name=name)(x).reshape(
                *x.shape[:2], heads, -1
            )
            for name in ("query", "key", "value")
        )
        out, cache = attention.attend(q, k, v, visible, cache, index)
        small = nn.initializers.normal(0.02 / (2 * self.config.depth) ** 0.5)
        out = Dense(width, dtype=self.dtype, kernel_init=small, name="out")(out.reshape(x.shape))
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
        h = Dense(config.inner, dtype=dtype, kernel_init=init, name="up")(h)
        h = nn.gelu(h, approximate=True)
        small = nn.initializers.normal(0.02 / (2 * config.depth) ** 0.5)
        return x + Dense(config.width, dtype=dtype, kernel_init=small, name="down")(h), cache


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
            self.lm_head = attention.Head(config.width, config.vocabulary)

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

    def table(self) -> Array:
        """The output table `[V, D] f32`."""
        return self.token.embedding if self.config.tied else self.lm_head().T


def gpt2(
    config: Config,
    dtype: DTypeLike = jnp.float32,
    *,
    remat: bool = False,
    rows: NamedSharding | None = None,
) -> LanguageModel:
    """The model as pure functions; parameters are f32, products are in `dtype`.

    remat: the backward pass computes each block again instead of keeping what is inside it.
    rows: how B lies on a mesh.
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
        rows=rows,
    )


# --- Hugging Face ---------------------------------------------------------------------------------

PREFIX = "transformer."
SUPPORTED = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "quantization_config": (None,),
}


def from_hub(values: Mapping[str, Any]) -> Config:
    """The sizes in a config.json.

    Raises: UserError for a missing size, or a variant that this module does not compute.
    """
    hub.check_supported(values, SUPPORTED)
    width = hub.size(values, "n_embd")
    return Config(
        vocabulary=hub.size(values, "vocab_size"),
        width=width,
        depth=hub.size(values, "n_layer"),
        heads=hub.size(values, "n_head"),
        inner=values.get("n_inner") or 4 * width,
        context=hub.size(values, "n_positions"),
        eps=values.get("layer_norm_epsilon", 1e-5),
        tied=values.get("tie_word_embeddings", True),
    )


def to_hub(config: Config) -> dict[str, Any]:
    """The inverse of `from_hub`."""
    return {
        "model_type": "gpt2",
        "vocab_size": config.vocabulary,
        "n_embd": config.width,
        "n_layer": config.depth,
        "n_head": config.heads,
        "n_inner": config.inner,
        "n_positions": config.context,
        "layer_norm_epsilon": config.eps,
        "tie_word_embeddings": config.tied,
        "activation_function": "gelu_new",
    }


def checkpoint(config: Config) -> list[hub.Tensor]:
    """Every parameter's place; their matrices are `[in, out]` like ours, but for the head."""
    found = [
        hub.Tensor("token/embedding", f"{PREFIX}wte.weight"),
        hub.Tensor("position/embedding", f"{PREFIX}wpe.weight"),
        *_both("norm", f"{PREFIX}ln_f", "scale"),
    ]
    for i in range(config.depth):
        ours, theirs = f"block_{i}", f"{PREFIX}h.{i}"
        found += _both(f"{ours}/norm_attention", f"{theirs}.ln_1", "scale")
        for part, name in enumerate(("query", "key", "value")):
            found += _both(f"{ours}/attention/{name}", f"{theirs}.attn.c_attn", part=(part, 3))
        found += _both(f"{ours}/attention/out", f"{theirs}.attn.c_proj")
        found += _both(f"{ours}/norm_mlp", f"{theirs}.ln_2", "scale")
        found += _both(f"{ours}/up", f"{theirs}.mlp.c_fc")
        found += _both(f"{ours}/down", f"{theirs}.mlp.c_proj")
    if not config.tied:
        found.append(hub.Tensor("lm_head/kernel", "lm_head.weight", transposed=True))
    return found


def _both(
    ours: str, theirs: str, weight: str = "kernel", part: tuple[int, int] = (0, 1)
) -> list[hub.Tensor]:
    """A layer's weight and bias."""
    return [
        hub.Tensor(f"{ours}/{weight}", f"{theirs}.weight", part=part),
        hub.Tensor(f"{ours}/bias", f"{theirs}.bias", part=part),
    ]
