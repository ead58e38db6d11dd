"""`flax.linen.Dense` on rows: all leading axes as one.

The gradient of a matrix on `[B, N, D]` contracts two axes, for which XLA:CPU transposes and copies
both operands; on `[B * N, D]` it is one plain product, a fifth faster.
"""

from __future__ import annotations

import flax.linen as nn

from jaxalign.core.types import Array


class Dense(nn.Dense):
    """The same layer with the same parameters, `[..., D]` -> `[..., features]`."""

    def __call__(self, inputs: Array) -> Array:
        rows = super().__call__(inputs.reshape(-1, inputs.shape[-1]))
        return rows.reshape(*inputs.shape[:-1], self.features)
