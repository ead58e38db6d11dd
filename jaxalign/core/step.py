"""From an objective to an update: gradients summed over micro-batches, divided once, applied."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jaxalign.core import state as states
from jaxalign.core.state import TrainState
from jaxalign.core.types import Array, Objective, Params, PyTree


def accumulate(
    objective: Objective,
    params: Params,
    take: Callable[[Array], PyTree],
    count: int | Array,
    key: Array,
    *,
    trainable: str = ".*",
) -> tuple[Params, dict[str, Array]]:
    """Gradient of the mean over `count` micro-batches, for trainable leaves, and the metrics.

    take: index of a micro-batch -> the micro-batch; called in the loop, so it must be traceable.
    count: may be a traced number: fewer items then cost less time, without a new compilation.
    Frozen leaves are constants of the differentiated function: no gradient of theirs is computed.
    """
    trained, frozen = states.partition(params, trainable)

    def total(trained: Params, batch: PyTree, key: Array) -> tuple[Array, tuple]:
        mean, metrics = objective(states.merge(trained, frozen), batch, key)
        return mean.total, (mean, metrics)

    def micro_step(i: Array, sums: tuple) -> tuple:
        gradient, parts = jax.grad(total, has_aux=True)(
            trained, take(i), jax.random.fold_in(key, i)
        )
        return jax.tree.map(jnp.add, sums[0], gradient), _combine(sums[1], parts)

    shapes = jax.eval_shape(lambda: total(trained, take(jnp.zeros((), jnp.int32)), key)[1])
    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    start = (jax.tree.map(jnp.zeros_like, trained), nothing)
    gradient, (loss, metrics) = jax.lax.fori_loop(0, count, micro_step, start)
    weight = jnp.where(loss.weight == 0, 1.0, loss.weight)
    gradient = jax.tree.map(lambda g: (g / weight).astype(g.dtype), gradient)
    values = {name: part.value() for name, part in metrics.items()}
    return gradient, {"loss": loss.value(), **values}


def _combine(sums: tuple, parts: tuple) -> tuple:
    """(Mean, {name: Mean | Max}) added part by part."""
    return sums[0] + parts[0], {name: sums[1][name] + part for name, part in parts[1].items()}


def apply_gradient(
    state: TrainState,
    gradient: Params,
    optimizer: optax.GradientTransformation,
    *,
    trainable: str = ".*",
) -> TrainState:
    """One optimizer step on the trainable leaves; `state.step` is left to the caller."""
    trained, frozen = states.partition(state.params, trainable)
    change, opt_state = optimizer.update(gradient, state.opt_state, trained)
    trained: Params = optax.apply_updates(trained, change)  # ty: ignore[invalid-assignment]
    return state._replace(params=states.merge(trained, frozen), opt_state=opt_state)


def gradient_step(
    loss: Callable[[Params], tuple[Array, dict[str, Array]]],
    optimizer: optax.GradientTransformation,
    state: TrainState,
) -> tuple[TrainState, dict[str, Array]]:
    """One optimizer step down `loss`, `params -> (value [], metrics)`, on a batch that it holds.

    For losses that are no mean over items, as where a divisor belongs to the whole batch.
    """
    gradient, metrics = jax.grad(loss, has_aux=True)(state.params)
    metrics["gradient_norm"] = optax.tree.norm(gradient)
    state = apply_gradient(state, gradient, optimizer)
    return state._replace(step=state.step + 1), metrics


def warmed_adam(
    learning_rate: float, updates: int, b2: float = 0.999
) -> optax.GradientTransformation:
    """Adam behind a gradient norm clipped at 1, its rate warmed up and then decayed to a tenth."""
    rate = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=learning_rate,
        warmup_steps=min(100, updates),
        decay_steps=updates + 1,
        end_value=0.1 * learning_rate,
    )
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, b2=b2))


def follow(slow: PyTree, fast: PyTree, decay: float | Array) -> PyTree:
    """Exponential moving average: decay * slow + (1 - decay) * fast."""
    return jax.tree.map(lambda s, f: decay * s + (1 - decay) * f, slow, fast)


def split_micro(batch: PyTree, count: int) -> PyTree:
    """`[B, ...]` to `[count, B/count, ...]`.

    A micro-batch takes every count-th row, so that a batch sharded over devices stays in place.
    """
    return jax.tree.map(
        lambda a: a.reshape(a.shape[0] // count, count, *a.shape[1:]).swapaxes(0, 1), batch
    )


def train_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    batch: PyTree,
    key: Array,
    *,
    trainable: str = ".*",
    micro_batches: int = 1,
    ema: float = 0.0,
) -> tuple[TrainState, dict[str, Array]]:
    """One supervised update; jit it with all but state, batch and key bound, and donate the state.

    ema: decay of the moving average of the parameters kept in `state.slow`; 0 keeps none.
    """
    split = split_micro(batch, micro_batches)
    gradient, metrics = accumulate(
        objective,
        state.params,
        lambda i: jax.tree.map(lambda a: a[i], split),
        micro_batches,
        key,
        trainable=trainable,
    )
    metrics["gradient_norm"] = optax.tree.norm(gradient)
    state = apply_gradient(state, gradient, optimizer, trainable=trainable)
    if ema:
        # Early on a long average would remember the initial weights: warm the decay up.
        decay = jnp.minimum(ema, (1.0 + state.step) / (10.0 + state.step))
        state = state._replace(slow=follow(state.slow, state.params, decay))
    return state._replace(step=state.step + 1), metrics
