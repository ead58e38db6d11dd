"""The autoencoder of Stable Diffusion (Rombach et al. 2022, section 3.1), as diffusers'
`AutoencoderKL` has it: pictures to latents of an eighth of the sides, and back.

Module names are the checkpoint's own, so that its tensors are found by name.

Departures: `encode` and `decode` speak the diffusion model's latents, the network's own times
`scale`; the callers of diffusers multiply and divide themselves.

Dimensions: B pictures, H W their sides in pixels, h w the latents', C latent channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from jaxalign.core.types import Array, Params, UserError
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
from jaxalign.ops.diffusion import Gaussian

EPS = 1e-6
# Over `fsdp` along hidden channels; the projections of latents are too narrow for it.
RULES = (
    (r"quant_conv/", P()),
    (r"(^|/)conv_out/kernel$", P(None, None, "fsdp")),
    (r"(conv|conv1|conv2|conv_in|conv_shortcut)/kernel$", P(None, None, None, "fsdp")),
    (r"kernel$", P(None, "fsdp")),
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes. widths: channels of each level, finest first. layers: residual blocks a level of the
    encoder; the decoder has one more. scale: of the latents.
    """

    channels: int
    latent_channels: int
    widths: tuple[int, ...]
    layers: int
    groups: int
    scale: float

    @property
    def shrink(self) -> int:
        """Pixels along a latent's side."""
        return 2 ** (len(self.widths) - 1)

    def __post_init__(self):
        for width in self.widths:
            if width % self.groups:
                raise UserError(
                    f"block_out_channels {width}: must divide by norm_num_groups {self.groups}; "
                    "change one"
                )


class Autoencoder(NamedTuple):
    """The autoencoder as pure functions.

    init: `key -> params`.
    encode: `(params, pictures [B, H, W, 3] in [-1, 1]) -> Gaussian` of latents `[B, h, w, C] f32`.
    decode: `(params, latents [B, h, w, C]) -> [B, H, W, 3] f32`, about [-1, 1], not clipped.
    shrink: H / h.
    """

    init: Callable[[Array], Params]
    encode: Callable[[Params, Array], Gaussian]
    decode: Callable[[Params, Array], Array]
    shrink: int


class Attention(nn.Module):
    """Every pixel attends to every other with one head, `[B, H, W, D]` -> `[B, H, W, D]`."""

    groups: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        b, h, w, width = x.shape
        y = group_norm(self.groups, EPS, self.dtype, "group_norm")(x).reshape(b, h * w, width)

        def project(name: str) -> Array:
            return Dense(width, dtype=self.dtype, name=name)(y)[:, :, None]

        y = attend(project("to_q"), project("to_k"), project("to_v"))
        y = Dense(width, dtype=self.dtype, name="to_out_0")(y[:, :, 0])
        return x + y.reshape(x.shape)


class Level(nn.Module):
    """`layers` residual blocks to `width`; then half or twice the sides, or neither."""

    width: int
    layers: int
    groups: int
    resize: str
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for i in range(self.layers):
            x = Resnet(self.width, self.groups, EPS, self.dtype, name=f"resnets_{i}")(x)
        if self.resize == "down":
            return Downsample((0, 1), self.dtype, name="downsamplers_0")(x)
        if self.resize == "up":
            return Upsample(self.dtype, name="upsamplers_0")(x)
        return x


class Middle(nn.Module):
    """Residual block, attention, residual block at the coarsest level."""

    groups: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width = x.shape[-1]
        x = Resnet(width, self.groups, EPS, self.dtype, name="resnets_0")(x)
        x = Attention(self.groups, self.dtype, name="attentions_0")(x)
        return Resnet(width, self.groups, EPS, self.dtype, name="resnets_1")(x)


class Encoder(nn.Module):
    """Pictures `[B, H, W, 3]` to mean and log variance `[B, h, w, 2 C]`."""

    config: Config
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        config, dtype, levels = self.config, self.dtype, len(self.config.widths)
        x = Conv(config.widths[0], dtype=dtype, name="conv_in")(x)
        for i, width in enumerate(config.widths):
            resize = "down" if i < levels - 1 else "none"
            name = f"down_blocks_{i}"
            x = Level(width, config.layers, config.groups, resize, dtype, name=name)(x)
        x = Middle(config.groups, dtype, name="mid_block")(x)
        x = nn.silu(group_norm(config.groups, EPS, dtype, "conv_norm_out")(x))
        return Conv(2 * config.latent_channels, dtype=dtype, name="conv_out")(x)


class Decoder(nn.Module):
    """Latents `[B, h, w, C]` to pictures `[B, H, W, 3]`."""

    config: Config
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        config, dtype, levels = self.config, self.dtype, len(self.config.widths)
        x = Conv(config.widths[-1], dtype=dtype, name="conv_in")(x)
        x = Middle(config.groups, dtype, name="mid_block")(x)
        for i, width in enumerate(reversed(config.widths)):
            resize, name = "up" if i < levels - 1 else "none", f"up_blocks_{i}"
            x = Level(width, config.layers + 1, config.groups, resize, dtype, name=name)(x)
        x = nn.silu(group_norm(config.groups, EPS, dtype, "conv_norm_out")(x))
        return Conv(config.channels, dtype=dtype, name="conv_out")(x)


class Networks(nn.Module):
    """Both ways, with the projections between them and the latents."""

    config: Config
    dtype: DTypeLike

    def setup(self):
        self.encoder, self.decoder = (kind(self.config, self.dtype) for kind in (Encoder, Decoder))
        self.quant_conv = pointwise(2 * self.config.latent_channels, self.dtype)
        self.post_quant_conv = pointwise(self.config.latent_channels, self.dtype)

    def encode(self, x: Array) -> Array:
        return self.quant_conv(self.encoder(x)).astype(jnp.float32)

    def decode(self, z: Array) -> Array:
        return self.decoder(self.post_quant_conv(z)).astype(jnp.float32)

    def __call__(self, x: Array) -> Array:
        """Touches every parameter."""
        return self.decode(self.encode(x)[..., : self.config.latent_channels])


def autoencoder(config: Config, dtype: DTypeLike = jnp.float32) -> Autoencoder:
    """The networks as pure functions; parameters are f32, products are in `dtype`.

    dtype: f32 or bf16; f16 overflows in SDXL's.
    """
    module, scale = Networks(config, dtype), config.scale

    def run(params: Params, x: Array, method: str) -> Any:
        return module.apply({"params": params}, x, method=method)

    def init(key: Array) -> Params:
        return module.init(key, jnp.zeros((1, config.shrink, config.shrink, config.channels)))[
            "params"
        ]

    def encode(params: Params, pictures: Array) -> Gaussian:
        if pictures.shape[1] % config.shrink or pictures.shape[2] % config.shrink:
            raise UserError(
                f"pictures of {pictures.shape[1]} x {pictures.shape[2]}: the autoencoder halves "
                f"the sides {config.shrink}-fold; use multiples of {config.shrink}"
            )
        mean, log_variance = jnp.split(run(params, pictures, "encode"), 2, axis=-1)
        std = jnp.exp(0.5 * jnp.clip(log_variance, -30.0, 20.0))
        return Gaussian(scale * mean, scale * std)

    def decode(params: Params, latents: Array) -> Array:
        return run(params, latents / scale, "decode")

    return Autoencoder(init, encode, decode, config.shrink)


# --- Hugging Face ---------------------------------------------------------------------------------

SUPPORTED = {
    "act_fn": ("silu",),
    "shift_factor": (None, 0.0),
    "latents_mean": (None,),
    "latents_std": (None,),
    "use_quant_conv": (True,),
    "use_post_quant_conv": (True,),
    "mid_block_add_attention": (True,),
}


def from_hub(values: Mapping[str, Any]) -> Config:
    """The sizes in the config.json of an `AutoencoderKL`.

    Raises: UserError for a missing size, or a variant that this module does not compute.
    """
    hub.check_supported(values, SUPPORTED)
    widths = hub.sizes(values, "block_out_channels")
    blocks = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
    for name, kind in blocks.items():
        if list(values.get(name, ())) != [kind] * len(widths):
            raise UserError(
                f"config.json: {name} = {values.get(name)!r}: only {len(widths)} times {kind!r} is "
                "supported; use a checkpoint that has it so"
            )
    return Config(
        channels=hub.size(values, "in_channels"),
        latent_channels=hub.size(values, "latent_channels"),
        widths=widths,
        layers=hub.size(values, "layers_per_block"),
        groups=hub.size(values, "norm_num_groups"),
        scale=values.get("scaling_factor", 0.18215),  # files of Stable Diffusion 1 lack it
    )


OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def stored_name(name: str, older: bool) -> str:
    """The name of a tensor in a file; files of Stable Diffusion 1's time name attention otherwise.

    name: as in `hub.mirrored`. older: whether this file is one of those.
    """
    if not older:
        return name
    for old, new in OLD_NAMES.items():
        name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
    return name
