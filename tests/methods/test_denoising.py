"""The base model learns a world of two words and flat pictures."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.core.step import follow
from jaxalign.core.types import UserError
from jaxalign.methods import denoising
from jaxalign.models.patch_transformer import patch_transformer, token_embedding
from jaxalign.ops import diffusion

SHAPE, LENGTH, WIDTH = (4, 4, 1), 1, 16
TEXT = token_embedding(3, LENGTH, WIDTH)
NET = patch_transformer(SHAPE, 2, width=WIDTH, depth=1, heads=2, length=LENGTH)
CONFIG = denoising.Config(updates=150, batch=32, learning_rate=1e-2, ema=0.9)
STEP = denoising.make_step(TEXT, NET, CONFIG)
INIT = jax.jit(functools.partial(denoising.init, TEXT, NET, CONFIG))
ALPHAS = jnp.asarray(diffusion.scaled_linear_alphas(), jnp.float32)


def make_data():
    """Word 1 is a dark picture, word 2 a bright one."""
    rng = np.random.default_rng(0)
    word = rng.integers(1, 3, 64)
    pictures = (2.0 * word - 3)[:, None, None, None] * 0.8 + 0.05 * rng.normal(size=(64, *SHAPE))
    data = {"images": np.float32(pictures), "tokens": np.int32(word[:, None]), "alphas": ALPHAS}
    return jax.device_put(data)


@pytest.fixture(scope="module")
def trained(optimised):
    """The state after training, and the loss of each update."""
    state, data, losses = INIT(), make_data(), []
    for i in range(CONFIG.updates):
        state, metrics = STEP(state, data, jax.random.fold_in(jax.random.key(1), i))
        losses.append(float(metrics["loss"]))
    return state, losses


def test_loss_falls(trained):
    _, losses = trained
    untrained, end = losses[0], np.mean(losses[-30:])
    assert untrained == pytest.approx(0.8, abs=0.25)  # it predicts 0, so the loss is E v^2
    assert end < 0.4 * untrained


def test_average_denoises_to_the_picture_that_is_asked_for(trained):
    state, _ = trained
    params = state.slow
    noise = jax.random.normal(jax.random.key(2), (2, *SHAPE))
    context = TEXT.apply(params["text"], jnp.array([[1], [2]], jnp.int32))
    # At the highest noise level only the caption tells: picture = sqrt(a) x - sqrt(1 - a) v.
    v = NET.apply(params["net"], noise, jnp.full(2, 999.0), context)
    picture = jnp.sqrt(ALPHAS[-1]) * noise - jnp.sqrt(1 - ALPHAS[-1]) * v
    assert picture[0].mean() == pytest.approx(-0.8, abs=0.25)
    assert picture[1].mean() == pytest.approx(0.8, abs=0.25)


def test_average_follows_the_parameters():
    state, data = INIT(), make_data()
    jax.tree.map(np.testing.assert_array_equal, state.slow, state.params)
    for i in range(2):
        before, kept = state, jax.device_get(state.slow)
        state, _ = STEP(state, data, jax.random.key(i))
        expected = follow(kept, jax.device_get(state.params), (1 + i) / (10 + i))  # warming up
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
            state.slow,
            expected,
        )
        assert jax.tree.leaves(before.params)[0].is_deleted()  # donated
    moved = [
        jnp.abs(a - b).max()
        for a, b in zip(*map(jax.tree.leaves, (state.slow, state.params)), strict=True)
    ]
    assert max(map(float, moved)) > 1e-6
    assert STEP._cache_size() == 1


def test_dropped_captions_are_the_empty_prompt():
    """With every caption dropped the loss does not know the caption, without any it does."""
    params, data = INIT().params, make_data()
    params["net"]["skip"]["kernel"] = jnp.ones((WIDTH, 1))
    params["text"]["words"]["embedding"] = 3.0 * jnp.eye(3, WIDTH)
    batch = {name: data[name] for name in ("images", "tokens")}
    other = {**batch, "tokens": 3 - batch["tokens"]}

    def loss(batch, dropout):
        config = denoising.Config(caption_dropout=dropout)
        measure = functools.partial(denoising.loss, TEXT, NET, config)
        return float(jax.jit(measure)(ALPHAS, params, batch, jax.random.key(3))[0].value())

    assert loss(batch, 1 - 1e-9) == loss(other, 1 - 1e-9)
    assert loss(batch, 0.0) != loss(other, 0.0)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"updates": 0}, "updates = 0"),
        ({"batch": -1}, "batch = -1"),
        ({"caption_dropout": 1.0}, "caption_dropout = 1.0"),
        ({"ema": 1.0}, "ema = 1.0"),
        ({"learning_rate": 0.0}, "learning_rate = 0.0"),
    ],
)
def test_impossible_configs(change, says):
    with pytest.raises(UserError, match=says):
        denoising.Config(**change)
