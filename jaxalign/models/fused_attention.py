"""Attention without a cache, by cuDNN's fused kernel where there is one.

The kernel never writes the `[Q, L]` matrix of weights, which at 64 x 64 latents is most of what a
U-Net would write.

Dimensions: B rows, Q queries, L keys, N heads, H head width.
"""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp

from jaxalign.core.types import Array


def attend(query: Array, key: Array, value: Array, *, causal: bool = False) -> Array:
    """Softmax attention of query `[B, Q, N, H]` to key and value `[B, L, N, H]`: `[B, Q, N, H]`.

    causal: query i sees the keys 0 .. i.
    """
    fits = fused(jax.devices()[0], query.dtype, query.shape[-1])
    return jax.nn.dot_product_attention(
        query, key, value, is_causal=causal, implementation="cudnn" if fits else "xla"
    )


def fused(device: object, dtype: jnp.dtype, head_width: int) -> bool:
    """Whether cuDNN's kernel serves this device, dtype and head width.

    It is for 16 bits, on Ampere (8.0) and later; heads may be 128 wide, and 256 from Hopper (9.0).
    """
    # AMD's devices have a word here, and CPUs and TPUs nothing.
    capability = re.fullmatch(r"(\d+)\.\d+", str(getattr(device, "compute_capability", "")))
    if capability is None or dtype not in (jnp.bfloat16, jnp.float16):
        return False
    generation = int(capability[1])
    widest = 256 if generation >= 9 else 128
    return generation >= 8 and head_width % 8 == 0 and head_width <= widest
