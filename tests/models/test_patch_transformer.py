"""What the denoiser sees, what it must not see, and what it says before training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.models.patch_transformer import (
    patch_transformer,
    patchify,
    timestep_embedding,
    token_embedding,
    unpatchify,
)

SHAPE, LENGTH, WIDTH = (8, 12, 3), 5, 16
MODEL = patch_transformer(SHAPE, 4, width=WIDTH, depth=2, heads=2, length=LENGTH)
APPLY = jax.jit(MODEL.apply)


def untrained():
    return jax.jit(MODEL.init)(jax.random.key(0))


def random_params():
    """Every weight away from its initial value, also those that start at zero."""
    leaves, tree = jax.tree.flatten(untrained())
    rng = np.random.default_rng(1)
    return tree.unflatten(
        [jnp.asarray(0.2 * rng.normal(size=a.shape), jnp.float32) for a in leaves]
    )


def make_inputs(rows=3):
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.normal(size=(rows, *SHAPE)), jnp.float32)
    context = jnp.asarray(rng.normal(size=(rows, LENGTH, WIDTH)), jnp.float32)
    return x, jnp.linspace(900.0, 10.0, rows), context


@pytest.fixture(scope="module")
def params():
    return random_params()


def test_output_is_a_picture(params):
    for rows in (1, 3):
        out = APPLY(params, *make_inputs(rows))
        assert out.shape == (rows, *SHAPE)
        assert out.dtype == jnp.float32


def test_patchify_and_back():
    x = jnp.arange(2 * 8 * 12 * 3.0).reshape(2, *SHAPE)
    patches = patchify(x, 4)
    assert patches.shape == (2, 6, 48)
    np.testing.assert_array_equal(unpatchify(patches, 4, SHAPE), x)
    # The second patch lies to the right of the first.
    np.testing.assert_array_equal(patches[1, 1].reshape(4, 4, 3), x[1, :4, 4:8])
    np.testing.assert_array_equal(patches[0, 3].reshape(4, 4, 3), x[0, 4:, :4])


def test_before_training_it_predicts_a_share_of_its_input():
    params, (x, timestep, context) = untrained(), make_inputs()
    np.testing.assert_array_equal(APPLY(params, x, timestep, context), 0)
    params["skip"]["bias"] = jnp.array([0.75])
    np.testing.assert_array_equal(APPLY(params, x, timestep, context), 0.75 * x)
    params["skip"]["kernel"] = jnp.full((WIDTH, 1), 0.5)  # the share goes by noise level and prompt
    share = np.asarray(APPLY(params, x, timestep, context) / x)
    assert np.ptp(share, axis=(1, 2, 3)).max() < 1e-4
    assert np.ptp(share[:, 0, 0, 0]) > 1e-3


def test_blocks_start_as_the_identity():
    """adaLN-zero: with an output layer, but untouched blocks, context acts through no attention."""
    params, (x, timestep, context) = untrained(), make_inputs()
    params["patch_out"]["kernel"] = random_params()["patch_out"]["kernel"]
    out = APPLY(params, x, timestep, context)
    assert float(jnp.abs(out).max()) > 0.01
    np.testing.assert_array_equal(out, APPLY(params, x, timestep, context[::-1]))


def test_prompt_tokens_are_attended_to(params):
    """Not only their mean, which also conditions the blocks: it stays the same here."""
    x, timestep, context = make_inputs()
    change = jnp.zeros_like(context).at[:, 0].set(1.0).at[:, 1].set(-1.0)
    out, other = (APPLY(params, x, timestep, c) for c in (context, context + change))
    assert float(jnp.abs(out - other).max()) > 1e-3


def test_every_patch_sees_every_patch(params):
    x, timestep, context = make_inputs(1)
    moved = APPLY(params, x.at[0, 0, 0, 0].add(1.0), timestep, context)
    change = jnp.abs(moved - APPLY(params, x, timestep, context))
    assert float(patchify(change, 4).max(-1).min()) > 1e-6


def test_noise_level_matters(params):
    x, timestep, context = make_inputs()
    change = APPLY(params, x, timestep + 50, context) - APPLY(params, x, timestep, context)
    assert float(jnp.abs(change).max()) > 1e-3


def test_rows_do_not_see_each_other(params):
    x, timestep, context = make_inputs()
    out = APPLY(params, x, timestep, context)
    other = APPLY(params, x.at[1].add(1.0), timestep.at[1].add(9.0), context.at[1].add(1.0))
    np.testing.assert_allclose(other[::2], out[::2], rtol=1e-5, atol=1e-5)
    assert float(jnp.abs(other[1] - out[1]).max()) > 1e-3


def test_gradients_reach_every_weight(params):
    inputs = make_inputs()
    gradient = jax.jit(jax.grad(lambda p: (MODEL.apply(p, *inputs) ** 2).mean()))(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.all(np.isfinite(leaf)), path
        assert float(jnp.abs(leaf).max()) > 0, path


def test_timestep_embedding():
    seen = timestep_embedding(jnp.array([0, 951]), 320)
    assert seen.shape == (2, 320)
    np.testing.assert_array_equal(seen[0], [1.0] * 160 + [0.0] * 160)  # cosines first
    for i in (0, 7, 159):
        angle = 951 * 10_000.0 ** (-i / 160)
        np.testing.assert_allclose(seen[1, [i, 160 + i]], [np.cos(angle), np.sin(angle)], atol=1e-3)


def test_token_embedding_knows_words_and_their_places():
    model = token_embedding(7, LENGTH, WIDTH)
    params = model.init(jax.random.key(3))
    tokens = jnp.array([[1, 2, 0, 0, 0], [2, 1, 0, 0, 0]])
    out = model.apply(params, tokens)
    assert out.shape == (2, LENGTH, WIDTH)
    table, position = params["words"]["embedding"], params["position"][0]
    np.testing.assert_allclose(out[0, 1], table[2] + position[1], rtol=1e-6)
    assert float(jnp.abs(out.mean(1)[0] - out.mean(1)[1]).max()) < 1e-6  # the mean forgets order
    assert float(jnp.abs(out[0] - out[1]).max()) > 1e-3  # the tokens do not
