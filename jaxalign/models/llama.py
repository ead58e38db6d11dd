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
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from jaxalign.core.types import Array, LanguageModel, UserError
from jaxalign.models import attention, fsdp, hub
from jaxalign.models.attention import Cache, KeyValue
from jaxalign.models.dense import Dense
from jaxalign.ops.rows import pinned

# Matrices over `fsdp` and, by heads, hidden units and vocabulary, over `tensor`.
INWARD, OUTWARD = P("fsdp", "tensor"), P("tensor", "fsdp")
RULES = (
    (r"embedding$", OUTWARD),
    (r"(query|key|value|gate|up|lm_head)/kernel$", INWARD),
    (r"(query|key|value)/bias$", P("tensor")),
    (r"(out|down)/kernel$", OUTWARD),
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

    def __post_init__(self):
        if self.heads % self.kv_heads or self.head_dim % 2:
            raise UserError(
                f"heads {self.heads}, kv_heads {self.kv_heads}, head_dim {self.head_dim}: kv_heads "
                "must divide heads, and head_dim be even; change them"
            )


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


def _dense(
    features: int,
    dtype: DTypeLike,
    rows: NamedSharding | None,
    name: str,
    *,
    bias: bool = False,
) -> Dense:
    init = nn.initializers.normal(0.02)
    spec = OUTWARD if name in ("out", "down") else INWARD
    return Dense(
        features,
        use_bias=bias,
        dtype=dtype,
        kernel_init=init,
        dot_general=fsdp.product(spec, rows),
        name=name,
    )


class Attention(nn.Module):
    """Grouped-query attention `[B, S, D]` -> `[B, S, D]` and the layer's cache."""

    config: Config
    dtype: DTypeLike
    rows: NamedSharding | None

    @nn.compact
    def __call__(
        self,
        x: Array,
        position: Array,
        visible: Array,
        cache: KeyValue | None,
        index: Array | None,
    ) -> tuple[Array, KeyValue | None]:
        config, rows = self.config, fsdp.shared(x, self.rows)
        how = (self.dtype, rows)

        def project(name: str, heads: int) -> Array:
            dense = _dense(heads * config.head_dim, *how, name, bias=config.qkv_bias)
            return dense(x).reshape(*x.shape[:2], heads, config.head_dim)

        q = project("query", config.heads)
        k, v = project("key", config.kv_heads), project("value", config.kv_heads)
        if config.qk_norm:
            q = nn.RMSNorm(epsilon=config.eps, dtype=self.dtype, name="norm_query")(q)
            k = nn.RMSNorm(epsilon=config.eps, dtype=self.dtype, name="norm_key")(k)
        frequency = frequencies(config)
        q, k = rotate(q, position, frequency), rotate(k, position, frequency)
        out, cache = attention.attend(q, k, v, visible, cache, index)
        return _dense(config.width, *how, "out")(out.reshape(*x.shape[:2], -1)), cache


class Block(nn.Module):
    """Attention and SwiGLU, each added to the stream `[B, S, D]`."""

    config: Config
    dtype: DTypeLike
    rows: NamedSharding | None

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
        rows = fsdp.shared(x, self.rows)
        x = pinned(x, rows)
        h = nn.RMSNorm(epsilon=config.eps, dtype=dtype, name="norm_attention")(x)
        attention = Attention(config, dtype, self.rows, name="attention")
        h, cache = attention(h, position, visible, cache, index)
        x = x + h
        h = nn.RMSNorm(epsilon=config.eps, dtype=dtype, name="norm_mlp")(x)
        gate = nn.silu(_dense(config.inner, dtype, rows, "gate")(h))
        h = gate * _dense(config.inner, dtype, rows, "up")(h)
        return x + _dense(config.width, dtype, rows, "down")(h), cache


class Llama(nn.Module):
    """The full forward pass and, given a cache, that of the new tokens only."""

    config: Config
    dtype: DTypeLike = jnp.float32
    remat: bool = False
    rows: NamedSharding | None = None

    def setup(self):
        config = self.config
        self.token = nn.Embed(
            config.vocabulary,
            config.width,
            dtype=self.dtype,
            embedding_init=nn.initializers.normal(0.02),
        )
        block = nn.remat(Block) if self.remat else Block
        self.block = [block(config, self.dtype, self.rows) for _ in range(config.depth)]
        self.norm = nn.RMSNorm(epsilon=config.eps, dtype=self.dtype)
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
        rows = fsdp.shared(ids, self.rows)
        x = fsdp.dealt_out(self.token(ids), rows)
        layers = []
        for block, layer in zip(self.block, cache, strict=True):
            x, layer = block(x, position, visible, layer, index)
            layers.append(layer)
        return pinned(self.norm(x), rows), tuple(layers)

    def table(self) -> Array:
        """The output table `[V, D] f32`."""
        return self.token.embedding if self.config.tied else self.lm_head().T


def llama(
    config: Config,
    dtype: DTypeLike = jnp.float32,
    *,
    remat: bool = False,
    rows: NamedSharding | None = None,
) -> LanguageModel:
    """The model as pure functions; parameters are f32, products are in `dtype`.

    remat: the backward pass computes each block again instead of keeping what is inside it.
    rows: how B lies on a mesh. Given, matrices in parts over `fsdp` are gathered, unless there is a
        single token of each row: then what products of parts would send is less.
    """
    return attention.language_model(
        Llama(config, dtype, remat, rows),
        depth=config.depth,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        dtype=dtype,
        vocabulary=config.vocabulary,
        width=config.width,
        context=config.context,
        rows=rows,
    )


# --- Hugging Face ---------------------------------------------------------------------------------

PREFIX = "model."
SUPPORTED = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_sliding_window": (False,),
    "partial_rotary_factor": (1.0, None),
    "quantization_config": (None,),
}
ROTARY = {"rope_type": ("default", "llama3"), "partial_rotary_factor": (1.0, None)}


def from_hub(values: Mapping[str, Any]) -> Config:
    """The sizes in a config.json of model_type llama, qwen2 or qwen3.

    Raises: UserError for a missing size, or a variant that this module does not compute.
    """
    hub.check_supported(values, SUPPORTED)
    width, heads = hub.size(values, "hidden_size"), hub.size(values, "num_attention_heads")
    family, context = values["model_type"], hub.size(values, "max_position_embeddings")
    rotary = values.get("rope_parameters") or values.get("rope_scaling") or {}
    return Config(
        vocabulary=hub.size(values, "vocab_size"),
        width=width,
        inner=hub.size(values, "intermediate_size"),
        depth=hub.size(values, "num_hidden_layers"),
        heads=heads,
        kv_heads=values.get("num_key_value_heads") or heads,
        head_dim=values.get("head_dim") or (128 if family == "qwen3" else width // heads),
        context=context,
        eps=values.get("rms_norm_eps", 1e-6),
        theta=rotary.get("rope_theta") or values.get("rope_theta") or 10_000.0,
        scaling=_scaling(rotary, context),
        tied=values.get("tie_word_embeddings", False),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
    )


def _scaling(rotary: Mapping[str, Any], context: int) -> RotaryScaling | None:
    kind = rotary.get("rope_type", rotary.get("type", "default"))
    hub.check_supported({**rotary, "rope_type": kind}, ROTARY)
    if kind == "default":
        return None
    names = ("factor", "low_freq_factor", "high_freq_factor")
    missing = [name for name in names if name not in rotary]
    if missing:
        raise UserError(f"config.json: rope_type 'llama3' lacks {', '.join(missing)}; add it")
    original = rotary.get("original_max_position_embeddings", context)
    return RotaryScaling(*(rotary[name] for name in names), original)


def to_hub(config: Config) -> dict[str, Any]:
    """The inverse of `from_hub`.

    Raises: UserError when no model_type has both biases and query and key norms.
    """
    if config.qkv_bias and config.qk_norm:
        raise UserError("qkv_bias and qk_norm: no Hugging Face family has both; choose one")
    scaling = config.scaling and {
        "rope_type": "llama3",
        "factor": config.scaling.factor,
        "low_freq_factor": config.scaling.low_frequency,
        "high_freq_factor": config.scaling.high_frequency,
        "original_max_position_embeddings": config.scaling.original_context,
    }
    return {
        "model_type": "qwen2" if config.qkv_bias else "qwen3" if config.qk_norm else "llama",
        "vocab_size": config.vocabulary,
        "hidden_size": config.width,
        "intermediate_size": config.inner,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.eps,
        "rope_theta": config.theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": config.tied,
        "hidden_act": "silu",
    }


def checkpoint(config: Config) -> list[hub.Tensor]:
    """Every parameter's place; their matrices are `[out, in]`."""

    def matrix(ours: str, theirs: str) -> hub.Tensor:
        return hub.Tensor(f"{ours}/kernel", f"{theirs}.weight", transposed=True)

    def scale(ours: str, theirs: str) -> hub.Tensor:
        return hub.Tensor(f"{ours}/scale", f"{theirs}.weight")

    found = [
        hub.Tensor("token/embedding", f"{PREFIX}embed_tokens.weight"),
        scale("norm", f"{PREFIX}norm"),
    ]
    for i in range(config.depth):
        ours, theirs = f"block_{i}", f"{PREFIX}layers.{i}"
        attend, self_attn = f"{ours}/attention", f"{theirs}.self_attn"
        found.append(scale(f"{ours}/norm_attention", f"{theirs}.input_layernorm"))
        found.append(scale(f"{ours}/norm_mlp", f"{theirs}.post_attention_layernorm"))
        found.append(matrix(f"{attend}/out", f"{self_attn}.o_proj"))
        for name, letter in (("query", "q"), ("key", "k"), ("value", "v")):
            found.append(matrix(f"{attend}/{name}", f"{self_attn}.{letter}_proj"))
            if config.qkv_bias:
                found.append(hub.Tensor(f"{attend}/{name}/bias", f"{self_attn}.{letter}_proj.bias"))
        if config.qk_norm:
            found.append(scale(f"{attend}/norm_query", f"{self_attn}.q_norm"))
            found.append(scale(f"{attend}/norm_key", f"{self_attn}.k_norm"))
        found += [matrix(f"{ours}/{n}", f"{theirs}.mlp.{n}_proj") for n in ("gate", "up", "down")]
    if not config.tied:
        found.append(matrix("lm_head", "lm_head"))
    return found
