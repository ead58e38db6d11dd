"""Attention without a cache, by a fused kernel where there is one: cuDNN's on GPUs, Pallas's
splash attention on TPUs.

Such a kernel never writes the `[Q, L]` matrix of weights, which at 64 x 64 latents is most of what
a U-Net would write.

Dimensions: B rows, Q queries, L keys, N heads, H head width.
"""

from __future__ import annotations

import math
import re

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from jaxalign.core.types import Array
from jaxalign.ops.rows import on_own_rows

SPLASH_FROM = 1024  # queries and keys; fewer are served as well by plain products
SPLASH_BLOCKS = (1024, 512, 256, 128)


def attend(
    query: Array,
    key: Array,
    value: Array,
    *,
    causal: bool = False,
    rows: NamedSharding | None = None,
) -> Array:
    """Softmax attention of query `[B, Q, N, H]` to key and value `[B, L, N, H]`: `[B, Q, N, H]`.

    causal: query i sees the keys 0 .. i.
    rows: how B lies on a mesh. Without it there is no kernel on TPUs, which must be told.
    """
    if rows is not None and not causal and has_splash(rows.mesh.devices.flat[0], query, key):
        return splash(query, key, value, rows)
    fits = has_cudnn(jax.devices()[0], query.dtype, query.shape[-1])
    implementation = "cudnn" if fits else "xla"
    return jax.nn.dot_product_attention(
        query, key, value, is_causal=causal, implementation=implementation
    )


def has_cudnn(device: object, dtype: jnp.dtype, head_width: int) -> bool:
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


def has_splash(device: jax.Device, query: Array, key: Array) -> bool:
    """Whether splash attention serves these arrays on this device."""
    lengths = query.shape[1], key.shape[1]
    long = all(n >= SPLASH_FROM and n % SPLASH_BLOCKS[-1] == 0 for n in lengths)
    return device.platform == "tpu" and query.dtype == jnp.bfloat16 and long


def splash(
    query: Array,
    key: Array,
    value: Array,
    rows: NamedSharding | None,
    *,
    interpret: bool = False,
) -> Array:
    """`attend` by Pallas's splash attention, each device its own rows; lengths are multiples of
    128. interpret: on any machine, to test it.
    """
    # Pallas takes a while to import, and only TPUs need it.
    from jax.experimental.pallas.ops.tpu import splash_attention as pallas

    lengths, heads = (query.shape[1], key.shape[1]), query.shape[2]
    q, kv = (next(block for block in SPLASH_BLOCKS if n % block == 0) for n in lengths)
    inner = min(kv, 512)
    blocks = pallas.BlockSizes(
        block_q=q,
        block_kv=kv,
        block_kv_compute=inner,
        block_q_dkv=q,
        block_kv_dkv=kv,
        block_kv_dkv_compute=inner,
        block_q_dq=q,
        block_kv_dq=kv,
    )
    kernel = pallas.make_splash_mha(
        pallas.MultiHeadMask([pallas.FullMask(lengths)] * heads),
        block_sizes=blocks,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )

    def own(query: Array, key: Array, value: Array) -> Array:
        query = query / math.sqrt(query.shape[-1])
        out = jax.vmap(kernel)(*(a.swapaxes(1, 2) for a in (query, key, value)))
        return out.swapaxes(1, 2)

    return on_own_rows(own, rows)(query, key, value)
