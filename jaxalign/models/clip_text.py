"""CLIP's text encoder (Radford et al. 2021, section 2.4), as transformers' `CLIPTextModel` and
`CLIPTextModelWithProjection` have it: OpenAI's in Stable Diffusion 1.x, OpenCLIP's in 2.x, both in
XL.

A causal transformer with norms before each half block. Module names are the checkpoint's own, so
that its tensors are found by name.

Departures: no padding mask, as in Stable Diffusion, whose networks see the padding's states too.

Dimensions: B prompts, T tokens, D width, N heads, P width of the projection.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from jaxalign.core.types import Array, Model, Params, UserError
from jaxalign.models import hub
from jaxalign.models.dense import Dense
from jaxalign.models.fused_attention import attend

# Every matrix over `fsdp`, along an axis that any width divides.
RULES = ((r"(embedding|kernel)$", P(None, "fsdp")),)


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes. context: the number of positions, T. projected: P, 0 without projection.

    gelu: exact; else x * sigmoid(1.702 x). end: the id that closes a prompt, whose state is the
    pooled one; None for files that hold a wrong one, where it is the largest id of the prompt.
    """

    vocabulary: int
    width: int
    inner: int
    depth: int
    heads: int
    context: int
    projected: int
    gelu: bool
    end: int | None
    eps: float = 1e-5

    def __post_init__(self):
        check_heads(self.width, self.heads)


def check_heads(width: int, heads: int) -> None:
    """Raises UserError where a transformer's width cannot be shared out among its heads."""
    if width % heads:
        raise UserError(
            f"hidden_size {width}: must divide by num_attention_heads {heads}; change one"
        )


class States(NamedTuple):
    """What the encoder says of prompts.

    last: `[B, T, D]`, after the last norm: what Stable Diffusion 1.x and 2.x read.
    penultimate: `[B, T, D]`, before the last block, not normed: what XL reads.
    pooled: `[B, D]`, `last` at the token that closes the prompt, or its projection `[B, P]`.
    """

    last: Array
    penultimate: Array
    pooled: Array


class Embeddings(nn.Module):
    """Tokens and places: ids `[B, T]` -> `[B, T, D]`."""

    config: Config
    dtype: DTypeLike

    @nn.compact
    def __call__(self, ids: Array) -> Array:
        def embed(rows: int, name: str, index: Array) -> Array:
            return nn.Embed(rows, self.config.width, dtype=self.dtype, name=name)(index)

        place = jnp.arange(ids.shape[1])[None]
        tokens = embed(self.config.vocabulary, "token_embedding", ids)
        return tokens + embed(self.config.context, "position_embedding", place)


class Sizes(Protocol):
    """What a CLIP transformer is made by, of text or of pictures."""

    @property
    def depth(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def inner(self) -> int: ...
    @property
    def gelu(self) -> bool: ...
    @property
    def eps(self) -> float: ...


class Attention(nn.Module):
    """Attention, `[B, T, D]` -> `[B, T, D]`; causal: of a token to those before it alone."""

    heads: int
    causal: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        def project(name: str) -> Array:
            out = Dense(x.shape[-1], dtype=self.dtype, name=name)(x)
            return out.reshape(*x.shape[:2], self.heads, -1)

        out = attend(project("q_proj"), project("k_proj"), project("v_proj"), causal=self.causal)
        return Dense(x.shape[-1], dtype=self.dtype, name="out_proj")(out.reshape(x.shape))


class FeedForward(nn.Module):
    """Two layers, `[B, T, D]` -> `[B, T, D]`."""

    inner: int
    gelu: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        h = Dense(self.inner, dtype=self.dtype, name="fc1")(x)
        h = nn.gelu(h, approximate=False) if self.gelu else h * nn.sigmoid(1.702 * h)
        return Dense(x.shape[-1], dtype=self.dtype, name="fc2")(h)


class Block(nn.Module):
    """Attention and feed-forward, each added to the stream `[B, T, D]`."""

    config: Sizes
    causal: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        config, dtype = self.config, self.dtype
        h = norm(config, dtype, "layer_norm1")(x)
        x = x + Attention(config.heads, self.causal, dtype, name="self_attn")(h)
        h = norm(config, dtype, "layer_norm2")(x)
        return x + FeedForward(config.inner, config.gelu, dtype, name="mlp")(h)


class Encoder(nn.Module):
    """All blocks: the states after the last and before it."""

    config: Sizes
    causal: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array]:
        before = x
        for i in range(self.config.depth):
            block = Block(self.config, self.causal, self.dtype, name=f"layers_{i}")
            before, x = x, block(x)
        return x, before


class TextEncoder(nn.Module):
    """Token ids `[B, T] i32` to `States`, f32."""

    config: Config
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, ids: Array) -> States:
        config, dtype = self.config, self.dtype
        x, penultimate = Encoder(config, True, dtype, name="encoder")(
            Embeddings(config, dtype, name="embeddings")(ids)
        )
        last = norm(config, dtype, "final_layer_norm")(x)
        closes = ids if config.end is None else ids == config.end
        pooled = last[jnp.arange(len(ids)), closes.argmax(-1)]
        if config.projected:
            project = Dense(config.projected, use_bias=False, dtype=dtype, name="text_projection")
            pooled = project(pooled)
        return jax.tree.map(lambda a: a.astype(jnp.float32), States(last, penultimate, pooled))


def norm(config: Sizes, dtype: DTypeLike, name: str) -> nn.LayerNorm:
    """A layer norm, its variance taken around the mean."""
    return nn.LayerNorm(epsilon=config.eps, dtype=dtype, use_fast_variance=False, name=name)


def text_encoder(config: Config, dtype: DTypeLike = jnp.float32) -> Model:
    """The encoder as pure functions: `apply(params, ids [B, T] i32) -> States`.

    Parameters are f32, products are in `dtype`.
    """
    module = TextEncoder(config, dtype)

    def init(key: Array) -> Params:
        return module.init(key, jnp.zeros((1, 1), jnp.int32))["params"]

    def apply(params: Params, ids: Array) -> States:
        if ids.shape[1] > config.context:
            raise UserError(
                f"{ids.shape[1]} tokens: the text encoder has {config.context} places; cut prompts "
                "to that"
            )
        states: Any = module.apply({"params": params}, ids)
        return states

    return Model(init, apply)


# --- Hugging Face ---------------------------------------------------------------------------------

SUPPORTED = {"hidden_act": ("quick_gelu", "gelu"), "quantization_config": (None,)}
WRONG_END = 2  # of files written before transformers mended it
PROJECTING = "CLIPTextModelWithProjection"


def from_hub(values: Mapping[str, Any]) -> Config:
    """The sizes in the config.json of a CLIP text model.

    Raises: UserError for a missing size, or a variant that this module does not compute.
    """
    hub.check_supported(values, SUPPORTED)
    projects = PROJECTING in (values.get("architectures") or ())
    end = values.get("eos_token_id", 49407)
    return Config(
        vocabulary=hub.size(values, "vocab_size"),
        width=hub.size(values, "hidden_size"),
        inner=hub.size(values, "intermediate_size"),
        depth=hub.size(values, "num_hidden_layers"),
        heads=hub.size(values, "num_attention_heads"),
        context=hub.size(values, "max_position_embeddings"),
        projected=hub.size(values, "projection_dim") if projects else 0,
        gelu=values.get("hidden_act") == "gelu",
        end=None if end == WRONG_END else end,
        eps=values.get("layer_norm_eps", 1e-5),
    )
