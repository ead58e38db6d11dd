"""Fine-tuning learns the responses it is shown, and nothing of the prompts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.core.types import UserError
from jaxalign.data.preferences import Responses
from jaxalign.methods import supervised
from jaxalign.models import gpt2

PROMPT, LENGTH, VOCABULARY = 3, 4, 10
MODEL = gpt2.gpt2(gpt2.Config(VOCABULARY, 16, 1, 2, 32, context=16))
CONFIG = supervised.Config(updates=120, batch=16, learning_rate=1e-2)
STEP = supervised.make_step(MODEL, CONFIG, LENGTH)


@functools.cache
def base():
    return jax.jit(MODEL.init)(jax.random.key(0))


def make_data():
    """The response to a prompt is its last token, counted up by one, until the stop token 1."""
    rng = np.random.default_rng(0)
    count, size = rng.integers(1, LENGTH, 64), rng.integers(1, PROMPT + 1, 64)
    ids = rng.integers(2, VOCABULARY, (64, PROMPT + LENGTH))
    ids[:, PROMPT - 1] = rng.integers(2, 5, 64)
    for row, n in enumerate(count):
        ids[row, PROMPT : PROMPT + n] = ids[row, PROMPT - 1] + 1 + np.arange(n)
        ids[row, PROMPT + n] = 1
    slot = np.arange(PROMPT + LENGTH)[None]
    mask = (slot >= PROMPT - size[:, None]) & (slot <= PROMPT + count[:, None])
    return Responses(jnp.asarray(ids, jnp.int32), jnp.asarray(mask))


@functools.cache
def measured():
    """Loss (value) and gradient of a batch, compiled once."""

    def total(params, batch):
        mean, metrics = supervised.loss(MODEL, LENGTH, params, batch, None)
        return mean.value(), (mean.weight, metrics["entropy"].value())

    return jax.jit(jax.value_and_grad(total, has_aux=True))


def test_loss_is_the_cross_entropy_of_the_response_tokens():
    data = make_data()
    (value, (weight, entropy)), _ = measured()(base(), data)
    ids, mask = np.asarray(data.ids), np.asarray(data.mask)

    @jax.jit
    def predict(params):
        return jax.nn.log_softmax(MODEL.logits(MODEL.head(params), MODEL.hidden(params, *data)))

    log_probability = np.asarray(predict(base()))
    total, tokens, spread = 0.0, 0, 0.0
    for row, slot in zip(*np.nonzero(mask), strict=True):
        if slot >= PROMPT:
            before = log_probability[row, slot - 1]
            total, tokens = total - before[ids[row, slot]], tokens + 1
            spread -= (np.exp(before) * before).sum()
    assert weight == tokens  # so parts of a batch add up, whatever the lengths in them
    assert value == pytest.approx(total / tokens, rel=1e-5)
    assert entropy == pytest.approx(spread / tokens, rel=1e-5)


def test_what_is_masked_does_not_matter():
    data = make_data()
    junk = data._replace(ids=jnp.where(data.mask, data.ids, 7))
    assert (junk.ids != data.ids).any()
    one, other = measured()(base(), data), measured()(base(), junk)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), one, other)


def test_responses_are_learned():
    state, data, losses = supervised.init(base(), CONFIG), make_data(), []
    first = jax.tree.leaves(state.params)[0]
    for i in range(CONFIG.updates):
        state, metrics = STEP(state, data, jax.random.fold_in(jax.random.key(1), i))
        losses.append(float(metrics["loss"]))
    assert first.is_deleted()  # donated, and the model that it came from is not
    assert not jax.tree.leaves(base())[0].is_deleted()
    assert losses[0] == pytest.approx(np.log(VOCABULARY), abs=0.3)
    # All but the length is known from the prompt: log 3 nats a response, shared by 3 tokens.
    assert np.mean(losses[-20:]) < 0.65
    assert STEP._cache_size() == 1
    assert int(state.step) == CONFIG.updates


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"updates": 0}, "updates = 0"),
        ({"batch": 0}, "batch = 0"),
        ({"learning_rate": 0.0}, "learning_rate = 0.0"),
        ({"micro_batches": 3}, "micro_batches = 3: must divide batch = 16"),
    ],
)
def test_impossible_configs(change, says):
    with pytest.raises(UserError, match=says):
        dataclasses.replace(CONFIG, **change)
