"""Which kernel attends where, and that splash attention is attention."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.core import cost
from jaxalign.core import mesh as meshes
from jaxalign.models import fused_attention


def arrays(rows, queries, keys, heads=2, width=40, dtype=jnp.float32):
    shapes = [(rows, n, heads, width) for n in (queries, keys, keys, queries)]
    return [
        jax.random.normal(key, shape, dtype)
        for key, shape in zip(jax.random.split(jax.random.key(0), 4), shapes, strict=True)
    ]


def value_and_gradients(attend, query, key, value, cotangent):
    out, back = jax.vjp(attend, query, key, value)
    return out, back(cotangent)


@pytest.mark.parametrize(
    ("rows", "queries", "keys", "devices"),
    [(8, 256, 128, 8), (3, 128, 384, 8), (2, 256, 256, 0)],  # shared out, whole everywhere, alone
)
def test_splash_attention_is_attention(rows, queries, keys, devices):
    where = meshes.batch_sharding(meshes.make_mesh({"data": devices})) if devices else None

    def splash(*given):
        return fused_attention.splash(*given, where, interpret=True)

    given = arrays(rows, queries, keys)
    found = jax.jit(value_and_gradients, static_argnums=0)(splash, *given)
    expected = value_and_gradients(jax.nn.dot_product_attention, *given)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=3e-6)


def test_the_kernels_arithmetic_is_counted():
    """Two products forward and seven backward: one more each for queries, and for keys and values,
    to compute the weights again."""
    query, key, value, _ = arrays(8, 256, 128)
    where = meshes.batch_sharding(meshes.make_mesh({"data": 8}))

    def total(*given):
        return fused_attention.splash(*given, where, interpret=True).sum()

    product = 2 * 8 * 2 * 256 * 128 * 40
    assert cost.count(total, query, key, value).kernels == 2 * product
    backward = cost.count(jax.grad(total, argnums=(0, 1, 2)), query, key, value)
    assert backward.kernels == 9 * product
    assert product * 9 <= backward.flops < product * 9.1


@pytest.mark.parametrize(
    ("platform", "dtype", "queries", "keys", "expected"),
    [
        ("tpu", jnp.bfloat16, 4096, 4096, True),
        ("tpu", jnp.bfloat16, 1152, 1024, True),
        ("tpu", jnp.bfloat16, 4096, 77, False),  # the prompt's tokens
        ("tpu", jnp.bfloat16, 256, 256, False),
        ("tpu", jnp.bfloat16, 1088, 1088, False),  # no whole blocks
        ("tpu", jnp.float32, 4096, 4096, False),
        ("gpu", jnp.bfloat16, 4096, 4096, False),
        ("cpu", jnp.bfloat16, 4096, 4096, False),
    ],
)
def test_where_splash_attention_serves(platform, dtype, queries, keys, expected):
    query, key = (jax.ShapeDtypeStruct((2, n, 8, 40), dtype) for n in (queries, keys))
    device = SimpleNamespace(platform=platform)
    assert fused_attention.has_splash(device, query, key) == expected


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
    assert fused_attention.has_cudnn(device, dtype, width) == expected
