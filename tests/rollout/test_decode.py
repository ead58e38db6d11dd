"""Decoding against a loop of full forwards, and the trainer's densities against the rollout's."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxalign.core.mesh import batch_sharding, make_mesh
from jaxalign.core.types import LanguageModel, UserError
from jaxalign.ops.sampling import Sampling, adjust, log_density
from jaxalign.rollout.decode import Constraint, decode, mismatch, score

VOCABULARY, WIDTH, CONTEXT = 13, 8, 40
ROWS, PROMPT, LENGTH, PAD = 6, 4, 9, 0


def tiny_model(vocabulary: int = VOCABULARY, seen=lambda: None) -> LanguageModel:
    """One layer of attention with learned positions; `seen` is called at every `extend`."""

    def init(key):
        keys = jax.random.split(key, 4)
        shapes = {
            "embed": (vocabulary, WIDTH),
            "position": (CONTEXT, WIDTH),
            "mix": (WIDTH, 3 * WIDTH),
            "head": (WIDTH, vocabulary),
        }
        return {name: jax.random.normal(k, shape) for k, (name, shape) in zip(keys, shapes.items())}

    def attend(query, keys, values, seen):
        weight = jnp.einsum("bsd,bld->bsl", query, keys)
        weight = jax.nn.softmax(jnp.where(seen, weight, -1e9))
        return jnp.einsum("bsl,bld->bsd", weight, values)

    def project(params, ids, position):
        x = params["embed"][ids] + params["position"][position]
        return x, jnp.split(x @ params["mix"] / WIDTH**0.5, 3, axis=-1)

    def hidden(params, ids, mask):
        position = jnp.maximum(jnp.cumsum(mask, 1) - 1, 0)
        x, (query, keys, values) = project(params, ids, position)
        causal = jnp.tril(jnp.ones((ids.shape[1],) * 2, bool))
        return x + attend(query, keys, values, mask[:, None, :] & causal[None])

    def extend(params, cache, ids, position, visible, index):
        jax.debug.callback(seen)
        x, (query, *new) = project(params, ids, position)
        keys, values = (
            jax.lax.dynamic_update_slice_in_dim(old, n, index, 1)
            for old, n in zip(cache, new, strict=True)
        )
        upto = index + jnp.arange(ids.shape[1])
        reached = jnp.arange(visible.shape[1])[None, :] <= upto[:, None]
        return x + attend(query, keys, values, visible[:, None] & reached[None]), (keys, values)

    return LanguageModel(
        init=init,
        hidden=hidden,
        logits=lambda params, hidden: hidden @ params["head"] / WIDTH**0.5,
        empty_cache=lambda rows, slots: (jnp.zeros((rows, slots, WIDTH)),) * 2,
        extend=extend,
        vocabulary=vocabulary,
        width=WIDTH,
        context=CONTEXT,
    )


MODEL = tiny_model()


@functools.cache
def params():
    return MODEL.init(jax.random.key(0))


def prompts(rows: int = ROWS):
    chance = np.random.default_rng(1)
    ids = chance.integers(0, VOCABULARY, (rows, PROMPT)).astype(np.int32)
    padding = chance.integers(0, PROMPT, rows)
    mask = np.arange(PROMPT)[None] >= padding[:, None]
    return np.where(mask, ids, PAD), mask


@functools.cache
def compiled(model=MODEL, **how):
    how = dict(length=LENGTH, sampling=Sampling(), stop=(), pad=PAD) | how
    return jax.jit(functools.partial(decode, model, **how))


def run(ids, mask, seed=3, weights=None, **how):
    return compiled(**how)(weights or params(), ids, mask, jax.random.key(seed))


HOW = [
    Sampling(),
    Sampling(temperature=0.7),
    Sampling(top_k=4),
    Sampling(top_p=0.8),
    Sampling(temperature=1.3, top_k=7, top_p=0.6),
    Sampling(temperature=0),
]


@pytest.mark.parametrize("sampling", HOW, ids=str)
def test_rollout_and_trainer_are_the_same_policy(sampling):
    decoded = run(*prompts(), sampling=sampling, stop=(5,))
    density, _ = jax.jit(
        functools.partial(score, MODEL, length=LENGTH, sampling=sampling, chunk=4)
    )(params(), decoded.ids, decoded.mask)
    assert float(mismatch(decoded, density)) <= 1e-5
    assert decoded.response.sum() == decoded.length.sum()


@pytest.mark.parametrize("halvings", [0, 2])
def test_rows_do_not_depend_on_the_others(halvings):
    ids, mask = prompts()
    whole = run(ids, mask, stop=(5, 7))
    shrunk = run(ids, mask, stop=(5, 7), halvings=halvings)
    first = run(ids[:2], mask[:2], stop=(5, 7), halvings=halvings)
    np.testing.assert_array_equal(whole.ids, shrunk.ids)
    np.testing.assert_array_equal(whole.ids[:2], first.ids)
    np.testing.assert_allclose(whole.log_density, shrunk.log_density, atol=1e-5)
    assert 1 < len(np.unique(whole.length))
