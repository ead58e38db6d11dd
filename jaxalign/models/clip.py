"""CLIP's vision tower (Radford et al. 2021, arXiv 2103.00020, section 2.4), as transformers'
`CLIPModel` has it, and what it sees of a picture: OpenAI's ViT-L/14, OpenCLIP's ViT-H/14.

The text tower is `models/clip_text`, with its projection. Both end in the same space of embeddings,
where the cosine says how well a picture and a prompt fit. Module names are the checkpoint's own,
so that its tensors are found by name.

`preprocess` rounds where the usual pipelines do: a picture becomes bytes, as in a PNG file, and
Pillow's bicubic resize gives bytes after the horizontal and after the vertical pass. So it has no
gradient.

Departures: none in what is computed. Where sides are unequal and an odd number of rows is cut, the
upper part loses the smaller half, as in transformers; torchvision's crop may lie one row lower.

Dimensions: B pictures, H W their sides, S side that the tower sees, N heads, T tokens (patches and
the class token), D width, E width of the embeddings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from jaxalign.core.types import Array, Params, UserError
from jaxalign.models import hub
from jaxalign.models.clip_text import Encoder, check_heads, norm
from jaxalign.models.dense import Dense

# Every matrix over `fsdp`, along an axis that any width divides; the patches' by its features.
RULES = (
    (r"patch_embedding/kernel$", P(None, None, None, "fsdp")),
    (r"(embedding|kernel)$", P(None, "fsdp")),
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes. side: S. patch: the side of a patch. projected: E.

    gelu: exact; else x * sigmoid(1.702 x).
    """

    width: int
    inner: int
    depth: int
    heads: int
    side: int
    patch: int
    projected: int
    gelu: bool
    eps: float = 1e-5

    def __post_init__(self):
        check_heads(self.width, self.heads)
        if self.side % self.patch:
            raise UserError(
                f"image_size {self.side}: must divide by patch_size {self.patch}; change one"
            )


@dataclasses.dataclass(frozen=True)
class Normalisation:
    """Mean and standard deviation of each colour, of values in [0, 1]; OpenAI's unless given."""

    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)


class Vision(NamedTuple):
    """The vision tower as pure functions.

    init: `key -> params`.
    preprocess: `pictures [B, H, W, 3] in [-1, 1] -> pixels [B, S, S, 3] f32`, normalised.
    encode: `(params, pixels [B, S, S, 3]) -> [B, E] f32`, not of unit length.
    embed: `(params, pictures [B, H, W, 3] in [-1, 1]) -> [B, E] f32`, both in turn.
    """

    init: Callable[[Array], Params]
    preprocess: Callable[[Array], Array]
    encode: Callable[[Params, Array], Array]
    embed: Callable[[Params, Array], Array]


class ClassToken(nn.Module):
    """The learned token whose last state is the picture's: `[1, 1, D]`."""

    width: int

    @nn.compact
    def __call__(self) -> Array:
        token = self.param("bias", nn.initializers.normal(0.02), (self.width,))
        return token[None, None]


class Patches(nn.Module):
    """Pixels `[B, S, S, 3]` to a token a patch, `[B, T - 1, D]`: one matrix product."""

    width: int
    patch: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        b, side, _, channels = x.shape
        p, count = self.patch, side // self.patch
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (p, p, channels, self.width))
        x = x.reshape(b, count, p, count, p, channels).swapaxes(2, 3)
        rows = x.reshape(b * count**2, p * p * channels).astype(self.dtype)
        out = rows @ kernel.reshape(-1, self.width).astype(self.dtype)
        return out.reshape(b, count**2, self.width)


class Embeddings(nn.Module):
    """The class token and the patches, each with its place: `[B, S, S, 3]` -> `[B, T, D]`."""

    config: Config
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        config, dtype = self.config, self.dtype
        patches = Patches(config.width, config.patch, dtype, name="patch_embedding")(x)
        token = ClassToken(config.width, name="class_embedding")().astype(dtype)
        token = jnp.broadcast_to(token, (len(x), 1, config.width))
        tokens = jnp.concatenate([token, patches], axis=1)
        count = tokens.shape[1]
        places = nn.Embed(count, config.width, dtype=dtype, name="position_embedding")
        return tokens + places(jnp.arange(count)[None])


class VisionTransformer(nn.Module):
    """Pixels `[B, S, S, 3]` to the class token's last state, normed, `[B, D]`."""

    config: Config
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        config, dtype = self.config, self.dtype
        x = Embeddings(config, dtype, name="embeddings")(x)
        x = norm(config, dtype, "pre_layrnorm")(x)  # the format's spelling
        x, _ = Encoder(config, False, dtype, name="encoder")(x)
        return norm(config, dtype, "post_layernorm")(x[:, 0])


class VisionTower(nn.Module):
    """Pixels `[B, S, S, 3]` to embeddings `[B, E] f32`."""

    config: Config
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        config, dtype = self.config, self.dtype
        state = VisionTransformer(config, dtype, name="vision_model")(x)
        project = Dense(config.projected, use_bias=False, dtype=dtype, name="visual_projection")
        return project(state).astype(jnp.float32)


def vision(config: Config, normalisation: Normalisation, dtype: DTypeLike = jnp.float32) -> Vision:
    """The vision tower. Parameters are f32, products are in `dtype`."""
    module = VisionTower(config, dtype)

    def init(key: Array) -> Params:
        return module.init(key, jnp.zeros((1, config.side, config.side, 3)))["params"]

    def encode(params: Params, pixels: Array) -> Array:
        if pixels.shape[1:] != (config.side, config.side, 3):
            raise UserError(
                f"pixels of {pixels.shape[1:]}: the tower sees {(config.side, config.side, 3)}; "
                "preprocess the pictures first"
            )
        embeddings: Any = module.apply({"params": params}, pixels)
        return embeddings

    def prepare(pictures: Array) -> Array:
        return preprocess(pictures, config.side, normalisation)

    def embed(params: Params, pictures: Array) -> Array:
        return encode(params, prepare(pictures))

    return Vision(init, prepare, encode, embed)


# --- preprocessing -------------------------------------------------------------------------------


def preprocess(pictures: Array, side: int, normalisation: Normalisation) -> Array:
    """What the tower sees: `[B, H, W, 3]` in [-1, 1] to `[B, side, side, 3] f32`, normalised.

    As bytes the shorter side becomes `side`, bicubic with antialiasing, and the middle is cut out.
    """
    x = jnp.clip(jnp.round(pictures.astype(jnp.float32) * 127.5 + 127.5), 0, 255)
    x = _middle(resize(x, *_fitting(x.shape[1], x.shape[2], side)), side)
    mean, std = (
        jnp.asarray(a, jnp.float32)[None, None, None]
        for a in (normalisation.mean, normalisation.std)
    )
    return (x / 255 - mean) / std


def resize(x: Array, high: int, wide: int) -> Array:
    """Pillow's bicubic resize of bytes, held as f32 in 0 .. 255, `[B, H, W, C]`.

    Of 512 x 512 to 224 x 224 one value in 3,000 is one off, as Pillow's coefficients have 22 bits;
    without rounding in between, values are up to five off, and 0.35 in quadratic mean.
    """
    b, h, _, c = x.shape
    for shape in ((b, h, wide, c), (b, high, wide, c)):
        x = jax.image.resize(x, shape, "cubic", antialias=True)
        x = jnp.clip(jnp.floor(x + 0.5), 0, 255)
    return x


def _fitting(high: int, wide: int, side: int) -> tuple[int, int]:
    """Sides with the shorter one `side`."""
    shorter = min(high, wide)
    return side * high // shorter, side * wide // shorter


def _middle(x: Array, side: int) -> Array:
    top, left = (x.shape[1] - side) // 2, (x.shape[2] - side) // 2
    return x[:, top : top + side, left : left + side]


# --- Hugging Face ---------------------------------------------------------------------------------

SUPPORTED = {
    "hidden_act": ("quick_gelu", "gelu"),
    "num_channels": (3,),
    "quantization_config": (None,),
}


def from_hub(values: Mapping[str, Any], projected: int) -> Config:
    """The sizes in the vision_config of a CLIP model's config.json.

    projected: E, which the file has beside it.
    Raises: UserError for a missing size, or a variant that this module does not compute.
    """
    hub.check_supported(values, SUPPORTED)
    return Config(
        width=hub.size(values, "hidden_size"),
        inner=hub.size(values, "intermediate_size"),
        depth=hub.size(values, "num_hidden_layers"),
        heads=hub.size(values, "num_attention_heads"),
        side=hub.size(values, "image_size"),
        patch=hub.size(values, "patch_size"),
        projected=projected,
        gelu=values.get("hidden_act") == "gelu",
        eps=values.get("layer_norm_eps", 1e-5),
    )
