"""Networks that learn one after the other: each has a loss and an optimizer state of its own.

The parameters are `{name: parameters of a network, or a number}`, and the optimizer states have the
same names. A method makes its step from such descents, so it reads in the order in which they
happen, and a later loss sees what the earlier ones changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from jaxalign.core.state import TrainState
from jaxalign.core.types import Array, Params, PyTree

Optimizers = Mapping[str, optax.GradientTransformation]


def create(
    params: Params, optimizers: Optimizers, *, slow: PyTree = None, extra: PyTree = None
) -> TrainState:
    """A state at step 0 with an optimizer state for each part of the parameters."""
    memory = {name: optimizers[name].init(part) for name, part in params.items()}
    return TrainState(jnp.zeros((), jnp.int32), params, memory, slow, extra)


def descend(
    optimizers: Optimizers,
    state: TrainState,
    name: str,
    loss: Callable[[PyTree], tuple[Array, PyTree]],
) -> tuple[TrainState, Array, PyTree]:
    """One step of the part `name` down its loss; `state.step` is left to the caller.

    loss: `part -> (value [], anything else)`; the rest of the parameters is held by the caller.
    Returns: the state, the value before the step, and what else the loss gave.
    """
    part = state.params[name]
    (value, other), gradient = jax.value_and_grad(loss, has_aux=True)(part)
    change, memory = optimizers[name].update(gradient, state.opt_state[name], part)
    state = state._replace(
        params={**state.params, name: optax.apply_updates(part, change)},
        opt_state={**state.opt_state, name: memory},
    )
    return state, value, other
