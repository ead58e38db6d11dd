"""What training carries from step to step: arrays only, so that a checkpoint holds all of it."""

from __future__ import annotations

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxalign.core.types import Array, Params, PyTree, UserError


class TrainState(NamedTuple):
    """All of a run that changes.

    step: `[] i32`, completed steps. params: nested dict.
    opt_state: optax state of the trainable part.
    slow: copies that follow or stay behind the parameters (EMA, target network, reference).
    extra: whatever else a method remembers (histories, duals, buffers, counters).
    """

    step: Array
    params: Params
    opt_state: PyTree
    slow: PyTree
    extra: PyTree


def paths(tree: PyTree) -> PyTree:
    """The tree with each leaf replaced by its path, "a/b/c"."""

    def name(path: tuple, _: object) -> str:
        return "/".join(
            str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path
        )

    return jax.tree_util.tree_map_with_path(name, tree)


def partition(params: Params, trainable: str) -> tuple[Params, Params]:
    """(trained, frozen): the same nesting twice, each leaf in one of the two and None in the other.

    trainable: a regular expression that a leaf's whole path must match.
    Raises UserError if nothing matches, because such a run would train nothing.
    """
    matches = jax.tree.map(lambda path: re.fullmatch(trainable, path) is not None, paths(params))
    if not any(jax.tree.leaves(matches)):
        example = jax.tree.leaves(paths(params))[0]
        raise UserError(
            f"trainable = {trainable!r} matches no parameter; paths look like {example!r}"
        )
    trained = jax.tree.map(lambda leaf, match: leaf if match else None, params, matches)
    frozen = jax.tree.map(lambda leaf, match: None if match else leaf, params, matches)
    return trained, frozen


def merge(trained: Params, frozen: Params) -> Params:
    """The inverse of `partition`."""
    return jax.tree.map(
        lambda a, b: b if a is None else a, trained, frozen, is_leaf=lambda leaf: leaf is None
    )


def create(
    params: Params,
    optimizer: optax.GradientTransformation,
    *,
    trainable: str = ".*",
    slow: PyTree = None,
    extra: PyTree = None,
) -> TrainState:
    """A state at step 0. Optimizer memory exists for the trainable leaves only."""
    trained, _ = partition(params, trainable)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(trained), slow, extra)
