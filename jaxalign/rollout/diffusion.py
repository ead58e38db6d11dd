"""Compiled rollouts of a sampler: `denoise` along a line, `branch` along a tree of shared prefixes.

Shapes are static and branch points are traced numbers, so one compilation serves every branch
point. The record keeps every latent in float32: rounding them would move the on-policy density
ratio away from 1.

Dimensions: T steps, G groups (one prompt and one initial noise each), W rows a group, `...` latent
shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.core.types import Array, Params, PyTree
from jaxalign.ops import diffusion
from jaxalign.ops.diffusion import Sampler


class Context(NamedTuple):
    """What the network is conditioned on, as its model takes it: an array, or a pytree of some.

    prompt: `[B, ...]`, for example states of the tokens `[B, L, D]`. null: `[...]`, the empty
    prompt's.
    """

    prompt: PyTree
    null: PyTree

    def rows(self, index: Array) -> Context:
        return Context(jax.tree.map(lambda a: a[index], self.prompt), self.null)


# (params, x [B, ...], timestep [B], context of B rows) -> output [B, ...]
Predict = Callable[[Params, Array, Array, Context], Array]


def guided(apply: Callable[[Params, Array, Array, PyTree], Array], scale: float) -> Predict:
    """A network with classifier-free guidance, one call on a doubled batch; scale 1 needs none."""

    def plain(params: Params, x: Array, timestep: Array, context: Context) -> Array:
        return apply(params, x, timestep, context.prompt)

    def doubled(params: Params, x: Array, timestep: Array, context: Context) -> Array:
        both = jax.tree.map(_beside, context.prompt, context.null)
        out = apply(params, jnp.repeat(x, 2, axis=0), jnp.repeat(timestep, 2), both)
        out = out.reshape(-1, 2, *out.shape[1:])
        return diffusion.guide(out[:, 0], out[:, 1], scale)

    return plain if scale == 1 else doubled


def _beside(prompt: Array, null: Array) -> Array:
    """Pairs side by side `[2*B, ...]`: each device keeps its own rows when the batch is sharded."""
    null = jnp.broadcast_to(null, prompt.shape)
    return jnp.stack([prompt, null], axis=1).reshape(-1, *prompt.shape[1:])


class Rollout(NamedTuple):
    """A tree of trajectories. Column w of a group is one stretch between two branch points.

    Columns are ordered by level: 1 trunk, then K1 branches, then K1*K2 twigs, ...; siblings are
    neighbours.

    latents: `[T+1, G, W, ...] f32`; column w is valid at positions first[w] .. last[w].
    log_density: `[T, G, W] f32` of the step taken; valid at steps first[w] .. last[w]-1.
    first, last: `[W] i32`.
    """

    latents: Array
    log_density: Array
    first: Array
    last: Array


def step_out(
    predict: Predict, params: Params, sampler: Sampler, step: Array, x: Array, context: Context
) -> diffusion.Gaussian:
    """The distribution of the next latents of rows x `[B, ...]` at step `[]` or `[B]`."""
    step = jnp.broadcast_to(step, x.shape[:1])
    out = predict(params, x, sampler.timestep[step], context)
    return diffusion.transition(sampler, step, x, out)


def denoise(
    predict: Predict,
    params: Params,
    sampler: Sampler,
    x: Array,
    context: Context,
    key: Array,
    first: int | Array = 0,
    last: int | Array | None = None,
) -> tuple[Array, Array, Array]:
    """Runs steps first .. last-1 on rows x `[B, ...]`.

    Returns the last latents `[B, ...]`, the path `[T+1, B, ...]` (zero outside the range) and the
    log-densities `[T, B]`. The noise of a step depends on (key, step) only.
    """
    last = sampler.steps if last is None else last
    path = jnp.zeros((sampler.steps + 1, *x.shape), jnp.float32).at[first].set(x)

    def body(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        x, path, density = carry
        step = step_out(predict, params, sampler, i, x, context)
        noise = jax.random.normal(jax.random.fold_in(key, i), x.shape, jnp.float32)
        x = step.mean + step.std * noise
        return x, path.at[i + 1].set(x), density.at[i].set(diffusion.log_density(step, x))

    density = jnp.zeros((sampler.steps, x.shape[0]), jnp.float32)
    return jax.lax.fori_loop(first, last, body, (x, path, density))


def branch(
    predict: Predict,
    params: Params,
    sampler: Sampler,
    x: Array,
    context: Context,
    key: Array,
    splits: Array,
    factors: Sequence[int],
) -> tuple[Array, Rollout]:
    """Samples a tree from each initial noise: at step splits[l] rows continue in factors[l] ways.

    A shared stretch is computed once, and all branches of all groups advance in one batched call.
    x: `[G, ...]` initial noise. context: of G rows.
    splits: `[len(factors)] i32`, traced, not decreasing.
    Returns the leaves `[G, prod(factors), ...]` and the record.
    """
    groups, last_step = x.shape[0], jnp.full((1,), sampler.steps, jnp.int32)
    bounds = jnp.concatenate([jnp.zeros((1,), jnp.int32), splits.astype(jnp.int32), last_step])
    columns, densities, rows = [], [], 1
    for level, factor in enumerate((1, *factors)):
        rows *= factor
        x = jnp.repeat(x, factor, axis=0)
        level_context = context.rows(jnp.repeat(jnp.arange(groups), rows))
        x, path, density = denoise(
            predict, params, sampler, x, level_context, key, bounds[level], bounds[level + 1]
        )
        columns.append(path.reshape(-1, groups, rows, *x.shape[1:]))
        densities.append(density.reshape(-1, groups, rows))
    width = level_sizes(factors)
    first, last = (
        jnp.repeat(b, jnp.asarray(width), total_repeat_length=sum(width))
        for b in (bounds[:-1], bounds[1:])
    )
    record = Rollout(jnp.concatenate(columns, 2), jnp.concatenate(densities, 2), first, last)
    return x.reshape(groups, rows, *x.shape[1:]), record


def level_sizes(factors: Sequence[int]) -> tuple[int, ...]:
    """Columns of each level of the tree: (1, K1, K1*K2, ...)."""
    return tuple(math.prod(factors[:level]) for level in range(len(factors) + 1))


def path_divergence(
    predict: Predict,
    params: Params,
    reference: Params,
    sampler: Sampler,
    path: Array,
    context: Context,
) -> Array:
    """KL(policy || reference) `[T, B]`, in nats, of each step along a policy's own path.

    path: `[T+1, B, ...]`. Its sum over steps, averaged over paths, is the divergence of the two
    path distributions.
    """

    def one_step(i: Array) -> Array:
        ours, theirs = (
            step_out(predict, p, sampler, i, path[i], context) for p in (params, reference)
        )
        return diffusion.divergence(ours, theirs)

    return jax.lax.map(one_step, jnp.arange(sampler.steps))
