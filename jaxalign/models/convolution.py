"""Convolution, group norm and residual blocks of Stable Diffusion's networks; channels come last.

XLA:CPU computes the gradient of a convolution inside a loop twenty times slower than outside, and
samplers and training steps are loops (jax issue 12868); of pictures of a few pixels the convolution
itself takes up to twenty times as long as it must. There both are one matrix product on the pixels'
neighbourhoods, side by side. Of larger pictures going forward, and on accelerators throughout, a
convolution is XLA's own, which is up to twice as fast.

Departures: none in what is computed. Group norms take mean and variance in f32 whatever the
dtype, the variance around the mean (the difference of squares loses digits where the mean is
large).

Dimensions: B pictures, H W their sides, C channels, E width of the time embedding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.typing import DTypeLike

from jaxalign.core.types import Array
from jaxalign.models.dense import Dense

# Rows and columns of zeros before and after a side.
Padding = tuple[int, int]

FEW_PIXELS = 64  # of a picture; below, a CPU is faster with products


def convolve(x: Array, kernel: Array, stride: int, padding: Padding) -> Array:
    """x `[B, H, W, C]` with a square kernel `[K, K, C, D]`: `[B, H', W', D]`."""
    if kernel.shape[0] == 1:
        return _by_rows(x, kernel)

    def on_cpu(x: Array, kernel: Array) -> Array:
        return _with_products(x, kernel, _Form(stride, padding, x.shape, kernel.shape))

    def native(x: Array, kernel: Array) -> Array:
        return _native(x, kernel, stride, padding)

    # Chosen when it is lowered, so that a CPU can compile what an accelerator will run.
    return jax.lax.platform_dependent(x, kernel, cpu=on_cpu, default=native)


def _native(x: Array, kernel: Array, stride: int, padding: Padding) -> Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        (padding, padding),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


class _Form(NamedTuple):
    """shape, window: of picture and kernel."""

    stride: int
    padding: Padding
    shape: tuple[int, ...]
    window: tuple[int, ...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _with_products(x: Array, kernel: Array, form: _Form) -> Array:
    """The convolution, with gradients of the matrix product that it is."""
    if form.shape[1] * form.shape[2] < FEW_PIXELS:
        return _product(x, kernel, form)
    return _native(x, kernel, form.stride, form.padding)


def _forward(x: Any, kernel: Any, form: _Form) -> tuple[Array, tuple]:
    """Keeps each input only where the other's gradient is asked for."""
    saved = (x.value if kernel.perturbed else None, kernel.value if x.perturbed else None)
    return _with_products(x.value, kernel.value, form), saved


def _backward(form: _Form, saved: tuple, change: Any) -> tuple:
    x, kernel = saved
    if isinstance(change, SymbolicZero):
        return None, None

    def transposed(function: Callable[[Array], Array], shape: tuple[int, ...]) -> Array:
        like = jax.ShapeDtypeStruct(shape, change.dtype)
        return jax.linear_transpose(function, like)(change)[0]

    of_x = None if kernel is None else transposed(lambda x: _product(x, kernel, form), form.shape)
    of_kernel = None if x is None else transposed(lambda k: _product(x, k, form), form.window)
    return of_x, of_kernel


_with_products.defvjp(_forward, _backward, symbolic_zeros=True)


def _product(x: Array, kernel: Array, form: _Form) -> Array:
    return _by_rows(_neighbourhoods(x, kernel.shape[0], form.stride, form.padding), kernel)


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
