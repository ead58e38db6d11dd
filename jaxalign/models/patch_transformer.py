"""A small text-conditional denoiser made of matrix products: fast on a CPU, also inside loops.

The picture is cut into patches; every patch attends to all patches and to the prompt's tokens in
one attention, and the noise level with the prompt's mean token scales and shifts each block
(adaLN-zero, Peebles & Xie 2023, DiT, section 3.2). There is no convolution, because XLA:CPU runs
convolution gradients in loops slowly.

The interface is that of Stable Diffusion's networks: latents of any shape in and out, a noise level
in [0, 1000), and a context of token embeddings made once per prompt by a text encoder of its own.

Dimensions: B pictures, H W C the picture, N patches, L prompt tokens, D width.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.core.types import Array, Model
from jaxalign.models.dense import Dense


def timestep_embedding(timestep: Array, width: int) -> Array:
    """Features `[B, width]` of noise levels `[B]`; cosines first, as in Stable Diffusion."""
    frequency = np.exp(-np.log(10_000.0) * np.arange(width // 2) / (width // 2)).astype(np.float32)
    angle = timestep.astype(jnp.float32)[:, None] * frequency[None]
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def patchify(x: Array, patch: int) -> Array:
    """`[B, H, W, C]` to `[B, N, patch * patch * C]`."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // patch, patch, w // patch, patch, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, (h // patch) * (w // patch), patch * patch * c)


def unpatchify(x: Array, patch: int, shape: tuple[int, int, int]) -> Array:
    """The inverse of `patchify` for pictures of `shape` = (H, W, C)."""
    h, w, c = shape
    x = x.reshape(-1, h // patch, w // patch, patch, patch, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(-1, h, w, c)


class Attention(nn.Module):
    """Patches attend to patches and prompt tokens: `[B, N, D]`, `[B, L, D]` -> `[B, N, D]`."""

    heads: int

    @nn.compact
    def __call__(self, x: Array, context: Array) -> Array:
        width = x.shape[-1]
        q, k, v = jnp.split(Dense(3 * width, use_bias=False, name="qkv")(x), 3, axis=-1)
        k_text, v_text = jnp.split(
            Dense(2 * width, use_bias=False, name="kv_context")(context), 2, axis=-1
        )
        k, v = jnp.concatenate([k, k_text], axis=1), jnp.concatenate([v, v_text], axis=1)
        q, k, v = (a.reshape(*a.shape[:2], self.heads, -1) for a in (q, k, v))
        # With so few patches this is a tenth faster on a CPU than jax.nn.dot_product_attention.
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) * (self.heads / width) ** 0.5
        out = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits, axis=-1), v)
        return Dense(width, name="out")(out.reshape(x.shape))


class Block(nn.Module):
    """One transformer block; condition `[B, D]` shifts, scales and gates both halves."""

    heads: int

    @nn.compact
    def __call__(self, x: Array, context: Array, condition: Array) -> Array:
        width = x.shape[-1]
        adapt = Dense(6 * width, kernel_init=nn.initializers.zeros, name="adapt")
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(
            adapt(nn.silu(condition))[:, None], 6, axis=-1
        )
        norm = nn.LayerNorm(use_bias=False, use_scale=False, epsilon=1e-6)
        h = norm(x) * (1 + scale1) + shift1
        x = x + gate1 * Attention(self.heads, name="attention")(h, context)
        h = norm(x) * (1 + scale2) + shift2
        h = Dense(4 * width, name="up")(h)
        h = Dense(width, name="down")(nn.gelu(h))
        return x + gate2 * h


class PatchTransformer(nn.Module):
    """Prediction `[B, H, W, C]` for pictures `x` of that shape at noise level `timestep` [B]."""

    shape: tuple[int, int, int]
    patch: int
    width: int
    depth: int
    heads: int

    @nn.compact
    def __call__(self, x: Array, timestep: Array, context: Array) -> Array:
        tokens = patchify(x, self.patch)
        position = self.param(
            "position", nn.initializers.normal(0.02), (1, *tokens.shape[1:2], self.width)
        )
        h = Dense(self.width, name="patch_in")(tokens) + position
        condition = Dense(self.width, name="time_in")(timestep_embedding(timestep, self.width))
        condition = Dense(self.width, name="time_out")(nn.silu(condition))
        condition = condition + Dense(self.width, name="context_in")(context.mean(1))
        for i in range(self.depth):
            h = Block(self.heads, name=f"block_{i}")(h, context, condition)
        h = nn.LayerNorm(epsilon=1e-6, name="norm_out")(h)
        out = Dense(tokens.shape[-1], kernel_init=nn.initializers.zeros, name="patch_out")(h)
        # A share of the input, by noise level, so that the patches need not carry it themselves.
        skip = Dense(1, kernel_init=nn.initializers.zeros, name="skip")(nn.silu(condition))
        return unpatchify(out, self.patch, self.shape) + skip[:, :, None, None] * x


class TokenEmbedding(nn.Module):
    """A world's text encoder: token ids `[B, L]` to `[B, L, D]`, a learned table and positions."""

    vocabulary: int
    width: int

    @nn.compact
    def __call__(self, tokens: Array) -> Array:
        position = self.param(
            "position", nn.initializers.normal(0.02), (1, tokens.shape[1], self.width)
        )
        return nn.Embed(self.vocabulary, self.width, name="words")(tokens) + position


def patch_transformer(
    shape: tuple[int, int, int], patch: int, *, width: int, depth: int, heads: int, length: int
) -> Model:
    """The denoiser: `apply(params, x [B,H,W,C], timestep [B], context [B,length,width])`."""
    module = PatchTransformer(shape, patch, width, depth, heads)

    def init(key: Array) -> dict:
        x, t, context = jnp.zeros((1, *shape)), jnp.zeros(1), jnp.zeros((1, length, width))
        return module.init(key, x, t, context)["params"]

    return Model(
        init, lambda params, x, t, context: module.apply({"params": params}, x, t, context)
    )


def token_embedding(vocabulary: int, length: int, width: int) -> Model:
    """The text encoder as a `Model`: `apply(params, tokens [B,length] i32) -> [B,length,width]`."""
    module = TokenEmbedding(vocabulary, width)

    def init(key: Array) -> dict:
        return module.init(key, jnp.zeros((1, length), jnp.int32))["params"]

    return Model(init, lambda params, tokens: module.apply({"params": params}, tokens))
