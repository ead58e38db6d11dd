"""MLPs against literal NumPy, their initial weights, ensembles and Gaussian actors."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.models import mlp

KEY = jax.random.key(0)


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def literal(params, x, activation, layer_norm):
    """The network row by row in float64."""
    x = np.asarray(x, np.float64)
    for i in range(sum(name.startswith("hidden") for name in params)):
        layer = params[f"hidden_{i}"]
        x = activation(x @ np.float64(layer["kernel"]) + np.float64(layer["bias"]))
        if layer_norm:
            norm = params[f"norm_{i}"]
            x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
            x = x * np.float64(norm["scale"]) + np.float64(norm["bias"])
    return x @ np.float64(params["out"]["kernel"]) + np.float64(params["out"]["bias"])


def shaken(params):
    """Biases and scales are moved, so that a missing one shows."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(9), len(leaves))
    moved = [a + 0.3 * jax.random.normal(k, a.shape) for a, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, moved)


@pytest.mark.parametrize(
    ("activation", "numpy", "layer_norm"),
    [
        (nn.gelu, gelu, True),
        (nn.relu, lambda x: np.maximum(x, 0), False),
        (nn.tanh, np.tanh, False),
    ],
)
def test_forward_is_layer_by_layer(activation, numpy, layer_norm):
    model = mlp.mlp(5, (7, 6), 3, activation=activation, layer_norm=layer_norm)
    params = shaken(jax.jit(model.init)(KEY))
    one, two = jax.random.normal(KEY, (4, 2)), jax.random.normal(jax.random.key(1), (4, 3))
    apply = jax.jit(model.apply)
    expected = literal(params, np.concatenate([one, two], -1), numpy, layer_norm)
    np.testing.assert_allclose(apply(params, one, two), expected, rtol=1e-5, atol=1e-5)
    # Rows side by side are rows.
    both = apply(params, jnp.stack([one, one], 1), jnp.stack([two, two], 1))
    np.testing.assert_allclose(both[:, 1], expected, rtol=1e-5, atol=1e-5)


def test_kernels_start_with_the_variance_of_glorot_and_biases_with_zero():
    wide, narrow = 300, 100
    params = jax.jit(mlp.mlp(narrow, (wide,), narrow, final_scale=0.01).init)(KEY)
    limit = np.sqrt(6 / (wide + narrow))
    first, last = params["hidden_0"]["kernel"], params["out"]["kernel"]
    for kernel, scale in ((first, 1), (last, 0.1)):
        assert abs(kernel).max() == pytest.approx(scale * limit, rel=1e-3)
        assert kernel.std() == pytest.approx(scale * limit / np.sqrt(3), rel=0.02)
    assert not params["hidden_0"]["bias"].any() and not params["out"]["bias"].any()
    normal = jax.jit(mlp.mlp(narrow, (wide,), 1, distribution="normal").init)(KEY)
    normal = normal["hidden_0"]["kernel"]
    assert normal.std() == pytest.approx(np.sqrt(2 / (wide + narrow)), rel=0.02)
    assert abs(normal).max() > 3 * normal.std()  # not truncated


def test_an_ensemble_is_its_networks():
    single = mlp.scalar(mlp.mlp(4, (8, 8), 1, layer_norm=True))
    twin = mlp.ensemble(single, 2)
    params, x = jax.jit(twin.init)(KEY), jax.random.normal(KEY, (5, 4))
    out = jax.jit(twin.apply)(params, x)
    assert out.shape == (2, 5)
    for i in range(2):
        alone = jax.jit(single.apply)(jax.tree.map(lambda a, i=i: a[i], params), x)
        np.testing.assert_allclose(out[i], alone, rtol=1e-5, atol=1e-6)
    assert abs(out[0] - out[1]).min() > 1e-3  # drawn apart
    assert jax.eval_shape(twin.apply, params, jnp.stack([x, x, x], 1)).shape == (2, 5, 3)


def test_actors_start_near_zero_and_learn_a_spread_within_its_range():
    x = jax.random.normal(KEY, (50, 4))
    fixed = mlp.gaussian_actor(4, (32,), 3)
    policy = fixed.apply(jax.jit(fixed.init)(KEY), x)
    assert policy.mean.shape == policy.log_std.shape == (50, 3)
    assert abs(policy.mean).max() < 0.5 and not policy.log_std.any()
    learned = mlp.gaussian_actor(4, (32,), 3, learned_std=True)
    params = jax.jit(learned.init)(KEY)
    assert not params["log_std"].any()
    params = {**params, "log_std": jnp.array([-9.0, 0.5, 9.0])}
    np.testing.assert_allclose(learned.apply(params, x).log_std[7], [-5, 0.5, 2])
    assert mlp.action_size(params) == 3


# --- actors with two heads, spectral normalisation ------------------------------------------------


def test_a_two_headed_actor_is_one_trunk_of_tanh_and_two_products():
    actor = mlp.two_headed_actor(4, (7, 6), 3)
    params = shaken(jax.jit(actor.init)(KEY))
    one, two = jax.random.normal(KEY, (5, 3)), jax.random.normal(jax.random.key(1), (5, 1))
    policy = jax.jit(actor.apply)(params, one, two)
    trunk = {name: layer for name, layer in params.items() if name.startswith("hidden")}
    for head, ours in (("mean", policy.mean), ("log_std", policy.log_std)):
        single = {**trunk, "out": params[head]}
        expected = literal(single, np.concatenate([one, two], -1), np.tanh, False)
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)
    assert mlp.action_size(params) == 3
    wide = {**params, "log_std": {**params["log_std"], "bias": jnp.array([-99.0, 0.0, 99.0])}}
    bounds = actor.apply(wide, one, two).log_std[0, jnp.array([0, 2])]
    np.testing.assert_allclose(bounds, [np.log(1e-6), 2], rtol=1e-6)


def test_the_first_weights_of_a_two_headed_actor():
    wide, heads = 300, 100
    params = jax.jit(mlp.two_headed_actor(100, (wide, wide), heads).init)(KEY)
    first, second = params["hidden_0"]["kernel"], params["hidden_1"]["kernel"]
    for kernel, fan in ((first, 100 + wide), (second, 2 * wide)):
        assert abs(kernel).max() == pytest.approx(np.sqrt(6 / fan), rel=1e-3)
        assert kernel.std() == pytest.approx(np.sqrt(2 / fan), rel=0.02)
    for head in ("mean", "log_std"):
        kernel = params[head]["kernel"]
        assert kernel.std() == pytest.approx(0.1 * np.sqrt(2 / (wide + heads)), rel=0.02)
        assert abs(kernel).max() > 3 * kernel.std()  # normal, not truncated
    assert not any(layer["bias"].any() for layer in params.values())


def test_spectral_normalisation_makes_the_largest_singular_values_one():
    params = shaken(jax.jit(mlp.mlp(5, (20, 9), 3).init)(KEY))
    vectors = jax.jit(mlp.singular_vectors, static_argnums=2)(params, KEY, 200)
    normalised = mlp.spectrally_normalised(params, vectors)
    for name, layer in normalised.items():
        values = np.linalg.svd(layer["kernel"], compute_uv=False)
        np.testing.assert_allclose(values[0], 1, rtol=1e-4)
        np.testing.assert_array_equal(layer["bias"], params[name]["bias"])
        np.testing.assert_allclose(np.linalg.norm(vectors[name]), 1, rtol=1e-5)
    # From few iterations the estimate is too small, and each one more makes it better.
    rough = mlp.singular_vectors(params, KEY, 0)
    lengths = []
    for _ in range(4):
        rough = mlp.power_iteration(params, rough)
        kernel = params["hidden_0"]["kernel"]
        lengths.append(float(jnp.linalg.norm(kernel @ rough["hidden_0"])))
    largest = np.linalg.svd(kernel, compute_uv=False)[0]
    assert lengths == sorted(lengths) and lengths[-1] <= largest * (1 + 1e-5)


def test_the_gradient_of_a_normalised_kernel_is_that_of_its_norm():
    params = jax.jit(mlp.mlp(4, (), 3).init)(KEY)
    vectors = mlp.singular_vectors(params, KEY, 300)
    weight = jax.random.normal(jax.random.key(1), (4, 3))

    def ours(kernel):
        layer = mlp.spectrally_normalised({"out": {**params["out"], "kernel": kernel}}, vectors)
        return (layer["out"]["kernel"] * weight).sum()

    def exact(kernel):
        return (kernel / jnp.linalg.norm(kernel, 2) * weight).sum()

    kernel = params["out"]["kernel"]
    np.testing.assert_allclose(
        jax.jit(jax.grad(ours))(kernel), jax.jit(jax.grad(exact))(kernel), rtol=1e-3, atol=1e-4
    )
    assert not jax.tree.leaves(
        jax.tree.map(
            lambda g: bool(g.any()) or None,
            jax.grad(lambda v: mlp.spectrally_normalised(params, v)["out"]["kernel"].sum())(
                vectors
            ),
        )
    )
