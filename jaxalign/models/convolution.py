"""Convolution, group norm and residual blocks of Stable Diffusion's networks; channels come last.

XLA:CPU computes the gradient of a convolution inside a loop twenty times slower than outside, and
samplers and training steps are loops (jax issue 12868). There a convolution is one matrix product
on the pixels' neighbourhoods, side by side; on accelerators it is XLA's own.

Departures: none in what is computed. Group norms take mean and variance in f32 whatever the
dtype, the variance around the mean (the difference of squares loses digits where the mean is
large).

Dimensions: B pictures, H W their sides, C channels, E width of the time embedding.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxalign.core.types import Array
from jaxalign.models.dense import Dense

# Rows and columns of zeros before and after a side.
Padding = tuple[int, int]


def convolve(x: Array, kernel: Array, stride: int, padding: Padding) -> Array:
    """x `[B, H, W, C]` with a square kernel `[K, K, C, D]`: `[B, H', W', D]`."""
    if kernel.shape[0] == 1:
        return _by_rows(x, kernel)

    def as_product(x: Array, kernel: Array) -> Array:
        return _by_rows(_neighbourhoods(x, kernel.shape[0], stride, padding), kernel)

    def native(x: Array, kernel: Array) -> Array:
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (stride, stride),
            (padding, padding),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    # Chosen when it is lowered, so that a CPU can compile what an accelerator will run.
    return jax.lax.platform_dependent(x, kernel, cpu=as_product, default=native)


def _neighbourhoods(x: Array, window: int, stride: int, padding: Padding) -> Array:
    """Each output pixel's inputs side by side: `[B, H', W', K * K * C]`."""
    x = jnp.pad(x, ((0, 0), padding, padding, (0, 0)))
    high, wide = ((side - window) // stride * stride + 1 for side in x.shape[1:3])
    shifts = [
        x[:, i : i + high : stride, j : j + wide : stride]
        for i in range(window)
        for j in range(window)
    ]
    return jnp.concatenate(shifts, axis=-1)


def _by_rows(x: Array, kernel: Array) -> Array:
    """`[B, H, W, K * K * C]` times the kernel as a matrix."""
    features = kernel.shape[-1]
    out = x.reshape(-1, x.shape[-1]) @ kernel.reshape(-1, features)
    return out.reshape(*x.shape[:-1], features)


class Conv(nn.Module):
    """A convolution with bias; parameters kernel `[K, K, C, features]`, bias `[features]`, f32."""

    features: int
    window: int = 3
    stride: int = 1
    padding: Padding = (1, 1)
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (self.window, self.window, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x, kernel, bias = (a.astype(self.dtype) for a in (x, kernel, bias))
        return convolve(x, kernel, self.stride, self.padding) + bias[None, None, None]


def pointwise(features: int, dtype: DTypeLike, name: str | None = None) -> Conv:
    """A 1x1 convolution."""
    return Conv(features, window=1, padding=(0, 0), dtype=dtype, name=name)


def group_norm(groups: int, eps: float, dtype: DTypeLike, name: str) -> nn.GroupNorm:
    """The norm of `groups` equal parts of the channels, over pixels and channels."""
    return nn.GroupNorm(groups, epsilon=eps, dtype=dtype, use_fast_variance=False, name=name)


class Resnet(nn.Module):
    """Two convolutions around an identity (He et al. 2016), `[B, H, W, C]` to `width` channels."""

    width: int
    groups: int
    eps: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array, time: Array | None = None) -> Array:
        """time: the embedded noise level `[B, E]`; None in networks that have none."""
        dtype = self.dtype
        h = nn.silu(group_norm(self.groups, self.eps, dtype, "norm1")(x))
        h = Conv(self.width, dtype=dtype, name="conv1")(h)
        if time is not None:
            shift = Dense(self.width, dtype=dtype, name="time_emb_proj")(nn.silu(time))
            h = h + shift[:, None, None]
        h = nn.silu(group_norm(self.groups, self.eps, dtype, "norm2")(h))
        h = Conv(self.width, dtype=dtype, name="conv2")(h)
        if x.shape[-1] != self.width:
            x = pointwise(self.width, dtype, "conv_shortcut")(x)
        return x + h


class Downsample(nn.Module):
    """Half the sides by a strided convolution.

    padding: (1, 1) in the U-Net and (0, 1) in the VAE: torch's, which differs from "SAME".
    """

    padding: Padding
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        conv = Conv(x.shape[-1], stride=2, padding=self.padding, dtype=self.dtype, name="conv")
        return conv(x)


class Upsample(nn.Module):
    """Twice the sides: each pixel four times, then a convolution."""

    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        b, h, w, c = x.shape
        x = jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c))
        return Conv(c, dtype=self.dtype, name="conv")(x.reshape(b, 2 * h, 2 * w, c))
