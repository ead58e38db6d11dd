"""The conditional U-Net of Stable Diffusion 1.x, 2.x and XL (Rombach et al. 2022; Podell et al.
2023), in the shapes that diffusers' `UNet2DConditionModel` has.

Levels of residual blocks at halved sides, down and up again; in most levels every residual block is
followed by a transformer whose pixels attend to each other and to the prompt. Module names are the
checkpoint's own, so that its tensors are found by name. Whether the output is epsilon or v is no
property of the network: the folder's scheduler says it.

Departures: no dropout. Attention logits are always f32 (`upcast_attention` changes nothing).

Dimensions: B pictures, H W latent sides, C latent channels, N pixels, L prompt tokens, D channels
inside, K width of the prompt's tokens, E width of the time embedding, P of the pooled prompt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from jaxalign.core.types import Array, Model, Params, UserError
from jaxalign.models import hub
from jaxalign.models.convolution import (
    Conv,
    Downsample,
    Resnet,
    Upsample,
    group_norm,
    pointwise,
)
from jaxalign.models.dense import Dense
from jaxalign.models.fused_attention import attend
from jaxalign.models.patch_transformer import timestep_embedding

# Every matrix over `fsdp` along an axis of hidden channels; rows of pictures are over `data`.
RULES = (
    (r"(^|/)conv_out/kernel$", P(None, None, "fsdp")),
    (r"(^|/)(conv|conv1|conv2|conv_in|conv_shortcut)/kernel$", P(None, None, None, "fsdp")),
    (r"proj_(in|out)/kernel$", P()),  # of either layout, and small
    (r"kernel$", P(None, "fsdp")),
)


class Conditions(NamedTuple):
    """What SDXL is conditioned on.

    tokens: `[B, L, K]`, the last but one states of both text encoders side by side.
    pooled: `[B, P]`, the second encoder's projected state.
    sizes: `[B, 6]`, in pixels: original height, width; crop's top, left; target height, width.
    """

    tokens: Array
    pooled: Array
    sizes: Array


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes; one entry a level in the tuples, finest first.

    size: the latents' side in training. channels_in, channels_out: of latents and output.
    depth: transformer blocks after each residual block, 0 for none; heads: of their attention.
    middle: transformer blocks between the two ways.
    layers: residual blocks a level on the way down; one more on the way up.
    linear: the transformers' projections are matrices (2.x, XL), not 1x1 convolutions (1.x).
    size_width: features of each of SDXL's six sizes, 0 without `Conditions`; pooled: width P.
    """

    size: int
    channels_in: int
    channels_out: int
    widths: tuple[int, ...]
    depth: tuple[int, ...]
    heads: tuple[int, ...]
    middle: int
    layers: int
    context: int
    groups: int
    eps: float
    linear: bool
    size_width: int = 0
    pooled: int = 0

    def __post_init__(self):
        for width, heads in zip(self.widths, self.heads, strict=True):
            if width % self.groups or width % heads:
                raise UserError(
                    f"block_out_channels {width}: must divide by norm_num_groups {self.groups} and "
                    f"by its number of heads {heads} (attention_head_dim); change one"
                )


class Attention(nn.Module):
    """Attention of x `[B, N, D]` to tokens `[B, L, K]`, or to itself."""

    heads: int
    dtype: DTypeLike
    rows: NamedSharding | None

    @nn.compact
    def __call__(self, x: Array, tokens: Array) -> Array:
        width = x.shape[-1]

        def project(name: str, source: Array) -> Array:
            out = Dense(width, use_bias=False, dtype=self.dtype, name=name)(source)
            return out.reshape(*out.shape[:2], self.heads, -1)

        query, key, value = project("to_q", x), project("to_k", tokens), project("to_v", tokens)
        out = attend(query, key, value, rows=self.rows)
        return Dense(width, dtype=self.dtype, name="to_out_0")(out.reshape(x.shape))


class GatedGelu(nn.Module):
    """`[B, N, D]` to `[B, N, features]`: value times gelu(gate) (Shazeer 2020), gelu exact."""

    features: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        both = Dense(2 * self.features, dtype=self.dtype, name="proj")(x)
        value, gate = jnp.split(both, 2, axis=-1)
        return value * nn.gelu(gate, approximate=False)


class FeedForward(nn.Module):
    """The gated layer and its way back, `[B, N, D]` -> `[B, N, D]`."""

    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width = x.shape[-1]
        h = GatedGelu(4 * width, self.dtype, name="net_0")(x)
        return Dense(width, dtype=self.dtype, name="net_2")(h)


class Block(nn.Module):
    """Self-attention, attention to the prompt, feed-forward; each adds to the stream."""

    heads: int
    dtype: DTypeLike
    rows: NamedSharding | None

    @nn.compact
    def __call__(self, x: Array, tokens: Array) -> Array:
        def norm(name: str, x: Array) -> Array:
            layer = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, use_fast_variance=False, name=name)
            return layer(x)

        def attention(name: str) -> Attention:
            return Attention(self.heads, self.dtype, self.rows, name=name)

        h = norm("norm1", x)
        x = x + attention("attn1")(h, h)
        x = x + attention("attn2")(norm("norm2", x), tokens)
        return x + FeedForward(self.dtype, name="ff")(norm("norm3", x))


class Transformer(nn.Module):
    """`depth` blocks on the pixels of `[B, H, W, D]`, added to them."""

    depth: int
    heads: int
    config: Config
    dtype: DTypeLike
    rows: NamedSharding | None

    @nn.compact
    def __call__(self, x: Array, tokens: Array) -> Array:
        b, h, w, width = x.shape
        y = group_norm(self.config.groups, 1e-6, self.dtype, "norm")(x)
        y = self._projection("proj_in", width)(y).reshape(b, h * w, width)
        for i in range(self.depth):
            block = Block(self.heads, self.dtype, self.rows, name=f"transformer_blocks_{i}")
            y = block(y, tokens)
        return x + self._projection("proj_out", width)(y.reshape(b, h, w, width))

    def _projection(self, name: str, width: int) -> nn.Module:
        if self.config.linear:
            return Dense(width, dtype=self.dtype, name=name)
        return pointwise(width, self.dtype, name)


class Level(nn.Module):
    """What the levels share: residual blocks to `width`, each followed by a transformer if any."""

    config: Config
    level: int
    depth: int
    dtype: DTypeLike
    remat: bool
    rows: NamedSharding | None

    def resnet(self, i: int, x: Array, time: Array) -> Array:
        config = self.config
        module = nn.remat(Resnet) if self.remat else Resnet
        width, name = config.widths[self.level], f"resnets_{i}"
        return module(width, config.groups, config.eps, self.dtype, name=name)(x, time)

    def pair(self, i: int, x: Array, time: Array, tokens: Array) -> Array:
        x = self.resnet(i, x, time)
        if not self.depth:
            return x
        module = nn.remat(Transformer) if self.remat else Transformer
        heads, name = self.config.heads[self.level], f"attentions_{i}"
        made = module(self.depth, heads, self.config, self.dtype, self.rows, name=name)
        return made(x, tokens)


class Down(Level):
    """A level on the way down: the states after each pair, and the last at half the sides."""

    @nn.compact
    def __call__(self, x: Array, time: Array, tokens: Array) -> list[Array]:
        states = []
        for i in range(self.config.layers):
            x = self.pair(i, x, time, tokens)
            states.append(x)
        if self.level < len(self.config.widths) - 1:
            states.append(Downsample((1, 1), self.dtype, name="downsamplers_0")(x))
        return states


class Middle(Level):
    """Residual block, transformer, residual block at the coarsest level."""

    @nn.compact
    def __call__(self, x: Array, time: Array, tokens: Array) -> Array:
        return self.resnet(1, self.pair(0, x, time, tokens), time)


class Up(Level):
    """A level on the way up; each pair also reads one of `skips`, states of the way down."""

    @nn.compact
    def __call__(self, x: Array, skips: list[Array], time: Array, tokens: Array) -> Array:
        for i, skip in enumerate(skips):
            x = self.pair(i, jnp.concatenate([x, skip], axis=-1), time, tokens)
        if self.level:
            x = Upsample(self.dtype, name="upsamplers_0")(x)
        return x


class Embedding(nn.Module):
    """Features to `[B, features]` by two layers."""

    features: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        h = nn.silu(Dense(self.features, dtype=self.dtype, name="linear_1")(x))
        return Dense(self.features, dtype=self.dtype, name="linear_2")(h)


class UNet(nn.Module):
    """The prediction `[B, H, W, C] f32` for latents x at noise level `timestep [B]`."""

    config: Config
    dtype: DTypeLike = jnp.float32
    remat: bool = False
    rows: NamedSharding | None = None

    @nn.compact
    def __call__(self, x: Array, timestep: Array, context: Array | Conditions) -> Array:
        config, dtype = self.config, self.dtype
        tokens = context.tokens if isinstance(context, Conditions) else context
        tokens, time = tokens.astype(dtype), self._time(timestep, context)
        x = Conv(config.widths[0], dtype=dtype, name="conv_in")(x)
        skips, levels = [x], len(config.widths)
        how = (dtype, self.remat, self.rows)
        for i in range(levels):
            down = Down(config, i, config.depth[i], *how, name=f"down_blocks_{i}")
            skips += down(skips[-1], time, tokens)
        middle = Middle(config, levels - 1, config.middle, *how, name="mid_block")
        x = middle(skips[-1], time, tokens)
        for i in range(levels):
            level = levels - 1 - i
            up = Up(config, level, config.depth[level], *how, name=f"up_blocks_{i}")
            taken = [skips.pop() for _ in range(config.layers + 1)]
            x = up(x, taken, time, tokens)
        x = nn.silu(group_norm(config.groups, config.eps, dtype, "conv_norm_out")(x))
        return Conv(config.channels_out, dtype=dtype, name="conv_out")(x).astype(jnp.float32)

    def _time(self, timestep: Array, context: Array | Conditions) -> Array:
        """The embedded noise level and, in SDXL, pooled prompt and sizes: `[B, E]`."""
        config, dtype, width = self.config, self.dtype, self.config.widths[0]
        embedding = Embedding(4 * width, dtype, name="time_embedding")
        time = embedding(timestep_embedding(timestep, width))
        if not isinstance(context, Conditions):
            return time
        sizes = timestep_embedding(context.sizes.reshape(-1), config.size_width)
        added = [context.pooled.astype(jnp.float32), sizes.reshape(len(time), -1)]
        embedding = Embedding(4 * width, dtype, name="add_embedding")
        return time + embedding(jnp.concatenate(added, axis=-1))


def unet(
    config: Config,
    dtype: DTypeLike = jnp.float32,
    *,
    remat: bool = False,
    rows: NamedSharding | None = None,
) -> Model:
    """The network as pure functions; parameters are f32, products are in `dtype`.

    `apply(params, x [B, H, W, C], timestep [B], context) -> [B, H, W, C] f32`, where context is
    the prompt's states `[B, L, K]` or, for SDXL, `Conditions`.
    remat: the backward pass computes residual blocks and transformers again instead of keeping
        what is inside them.
    rows: how B lies on a mesh, for `fused_attention.attend`.
    """
    module = UNet(config, dtype, remat, rows)

    def init(key: Array) -> Params:
        side = 2 ** (len(config.widths) - 1)
        context: Array | Conditions = jnp.zeros((1, 1, config.context))
        if config.size_width:
            context = Conditions(context, jnp.zeros((1, config.pooled)), jnp.zeros((1, 6)))
        x = jnp.zeros((1, side, side, config.channels_in))
        return module.init(key, x, jnp.zeros(1), context)["params"]

    def apply(params: Params, x: Array, timestep: Array, context: Array | Conditions) -> Array:
        _check_inputs(config, x, context)
        return module.apply({"params": params}, x, timestep, context)  # ty: ignore

    return Model(init, apply)


def _check_inputs(config: Config, x: Array, context: Array | Conditions) -> None:
    """Raises UserError for what would otherwise fail far inside, or not at all."""
    parts = 2 ** (len(config.widths) - 1)
    if x.shape[1] % parts or x.shape[2] % parts:
        raise UserError(
            f"latents of {x.shape[1]} x {x.shape[2]}: the U-Net halves the sides {parts}-fold; "
            f"use multiples of {parts}, such as {config.size}"
        )
    if isinstance(context, Conditions) != bool(config.size_width):
        needed = "Conditions" if config.size_width else "the prompt's states alone"
        raise UserError(
            f"context {type(context).__name__}: this U-Net takes {needed}; use the text encoders "
            "of its own folder"
        )


# --- Hugging Face ---------------------------------------------------------------------------------

SUPPORTED = {
    "center_input_sample": (False,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "only_cross_attention": (False,),
    "mid_block_only_cross_attention": (None, False),
    "downsample_padding": (1,),
    "mid_block_scale_factor": (1,),
    "act_fn": ("silu",),
    "reverse_transformer_layers_per_block": (None,),
    "encoder_hid_dim_type": (None,),
    "encoder_hid_dim": (None,),
    "num_attention_heads": (None,),
    "dual_cross_attention": (False,),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "addition_embed_type": (None, "text_time"),
    "resnet_time_scale_shift": ("default",),
    "resnet_skip_time_act": (False,),
    "resnet_out_scale_factor": (1.0,),
    "time_embedding_type": ("positional",),
    "time_embedding_dim": (None,),
    "time_embedding_act_fn": (None,),
    "timestep_post_act": (None,),
    "time_cond_proj_dim": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "attention_type": ("default",),
    "cross_attention_norm": (None,),
}
WITH, WITHOUT = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), ("DownBlock2D", "UpBlock2D")


def from_hub(values: Mapping[str, Any]) -> Config:
    """The sizes in the config.json of a `UNet2DConditionModel`.

    `attention_head_dim` is the number of heads, despite its name, whether one number or a list.
    Raises: UserError for a missing size, or a variant that this module does not compute.
    """
    hub.check_supported(values, SUPPORTED)
    widths = hub.sizes(values, "block_out_channels")
    levels = len(widths)
    depth = hub.sizes(values, "transformer_layers_per_block", levels, default=1)
    attentive = _attentive(values, levels)
    size_width, pooled = _added(values)
    return Config(
        size=hub.size(values, "sample_size"),
        channels_in=hub.size(values, "in_channels"),
        channels_out=hub.size(values, "out_channels"),
        widths=widths,
        depth=tuple(d if has else 0 for d, has in zip(depth, attentive, strict=True)),
        heads=hub.sizes(values, "attention_head_dim", levels, default=8),
        middle=depth[-1],
        layers=hub.size(values, "layers_per_block"),
        context=hub.size(values, "cross_attention_dim"),
        groups=hub.size(values, "norm_num_groups"),
        eps=values.get("norm_eps", 1e-5),
        linear=values.get("use_linear_projection", False),
        size_width=size_width,
        pooled=pooled,
    )


def _attentive(values: Mapping[str, Any], levels: int) -> list[bool]:
    """Which levels have transformers; the way up must mirror the way down."""
    down, up = values.get("down_block_types", ()), values.get("up_block_types", ())
    known = {WITH[0]: WITH[1], WITHOUT[0]: WITHOUT[1]}
    if len(down) != levels or [known.get(kind) for kind in reversed(down)] != list(up):
        raise UserError(
            f"config.json: down_block_types {down}, up_block_types {up}: must be {levels} of "
            f"{' or '.join(known)}, mirrored; use a checkpoint that has it so"
        )
    return [kind == WITH[0] for kind in down]


def _added(values: Mapping[str, Any]) -> tuple[int, int]:
    """SDXL's features of each size, and the width of its pooled prompt; else zeros."""
    if values.get("addition_embed_type") is None:
        return 0, 0
    width = hub.size(values, "addition_time_embed_dim")
    return width, hub.size(values, "projection_class_embeddings_input_dim") - 6 * width
