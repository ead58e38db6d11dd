"""Convolutions as matrix products, and when attention is cuDNN's."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.models import convolution, fused_attention


@pytest.mark.parametrize(
    ("window", "stride", "padding", "shape"),
    [
        (3, 1, (1, 1), (4, 6)),
        (3, 2, (1, 1), (4, 6)),
        (3, 2, (0, 1), (6, 4)),
        (1, 1, (0, 0), (3, 2)),
    ],
)
def test_a_convolution_is_the_same_sum_on_every_backend(
    window, stride, padding, shape, monkeypatch
):
    """Values and both gradients; the second time as on an accelerator."""
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(2, *shape, 3)), jnp.float32)
    kernel = jnp.asarray(random.normal(size=(window, window, 3, 5)), jnp.float32)

    def run(x, kernel):
        out = convolution.convolve(x, kernel, stride, padding)
        return (out * jnp.cos(jnp.arange(out.size)).reshape(out.shape)).sum(), out

    def both():
        return jax.value_and_grad(lambda *a: run(*a), (0, 1), has_aux=True)(x, kernel)

    with jax.default_matmul_precision("highest"):
        ours = both()
        monkeypatch.setattr(jax.lax, "platform_dependent", lambda *a, cpu, default: default(*a))
        theirs = both()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), ours, theirs)


def test_a_convolution_by_hand():
    """A kernel that is 1 at one place moves the picture by that much."""
    x = jnp.arange(12.0).reshape(1, 3, 4, 1)
    kernel = jnp.zeros((3, 3, 1, 1)).at[0, 2].set(1.0)  # from one row above, one column right
    out = convolution.convolve(x, kernel, 1, (1, 1))[0, :, :, 0]
    np.testing.assert_array_equal(out, [[0, 0, 0, 0], [1, 2, 3, 0], [5, 6, 7, 0]])


def test_a_convolution_on_a_cpu_is_no_convolution():
    """XLA:CPU's own is very slow inside loops; accelerators get theirs, also from a CPU."""
    x, kernel = jnp.zeros((1, 4, 4, 2)), jnp.zeros((3, 3, 2, 2))
    traced = jax.jit(jax.grad(lambda k: convolution.convolve(x, k, 1, (1, 1)).sum())).trace(kernel)
    for platform, native in (("cpu", False), ("tpu", True), ("cuda", True)):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert ("stablehlo.convolution" in text) == native, platform


@pytest.mark.parametrize(
    ("capability", "dtype", "width", "expected"),
    [
        ("9.0", jnp.bfloat16, 160, True),
        ("8.0", jnp.bfloat16, 160, False),  # the widest heads of Stable Diffusion 1 on Ampere
        ("8.6", jnp.float16, 40, True),
        ("10.0", jnp.bfloat16, 64, True),
        ("9.0", jnp.float32, 64, False),
        ("9.0", jnp.bfloat16, 512, False),  # the autoencoder's
        ("9.0", jnp.bfloat16, 12, False),
        ("7.5", jnp.float16, 64, False),
        ("gfx90a", jnp.bfloat16, 64, False),  # AMD's
        (None, jnp.bfloat16, 64, False),  # a TPU
    ],
)
def test_which_attention_is_cudnns(capability, dtype, width, expected):
    device = (
        SimpleNamespace() if capability is None else SimpleNamespace(compute_capability=capability)
    )
    assert fused_attention.fused(device, dtype, width) == expected
