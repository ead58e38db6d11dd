"""Low-rank adapters by path rule (Hu et al. 2021): W + down @ up, down of std 1/rank, up = 0.

An adapted model's parameters are `{"model": frozen, "lora": {path: {"down", "up"}}}`; `effective`
turns them into parameters that the plain network takes, so no network knows of adapters.
"""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp

from jaxalign.core.state import paths
from jaxalign.core.types import Array, Params, UserError


def init_lora(key: Array, params: Params, rank: int, rule: str) -> Params:
    """Adapters for each matrix whose path matches `rule`: down `[in, rank]`, up `[rank, out]`."""
    leaves = zip(jax.tree.leaves(paths(params)), jax.tree.leaves(params), strict=True)
    chosen = [(path, w) for path, w in leaves if w.ndim == 2 and re.fullmatch(rule, path)]
    if not chosen:
        raise UserError(
            f"lora rule {rule!r} matches no matrix; paths look like 'block_0/attention/qkv/kernel'"
        )
    keys = jax.random.split(key, len(chosen))
    return {
        path: {
            "down": jax.random.normal(k, (w.shape[0], rank)) / rank,
            "up": jnp.zeros((rank, w.shape[1])),
        }
        for k, (path, w) in zip(keys, chosen, strict=True)
    }


def effective(params: Params) -> Params:
    """`{"model", "lora"}` merged into the network's own parameters; without "lora" just "model"."""
    adapters = params.get("lora", {})

    def adapt(path: str, w: Array) -> Array:
        if path not in adapters:
            return w
        return w + adapters[path]["down"] @ adapters[path]["up"]

    return jax.tree.map(adapt, paths(params["model"]), params["model"])
