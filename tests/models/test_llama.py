"""Llama, Qwen2 and Qwen3: what torch says, rotary positions, sharding of big models."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.core import mesh
from jaxalign.core.types import UserError
from jaxalign.models import llama
from jaxalign.models.llama import Config, RotaryScaling
from jaxalign.ops.sampling import Sampling
from jaxalign.rollout import decode

TINY = Config(
    vocabulary=24, width=16, inner=32, depth=2, heads=4, kv_heads=2, head_dim=6, context=64
)
VARIANTS = {
    "llama": TINY,
    "tied": dataclasses.replace(TINY, tied=True),
    "qwen2": dataclasses.replace(TINY, qkv_bias=True),
    "qwen3": dataclasses.replace(TINY, qk_norm=True),
}
LLAMA_8B = Config(
    vocabulary=128_256,
    width=4096,
    inner=14_336,
    depth=32,
    heads=32,
    kv_heads=8,
    head_dim=128,
    context=131_072,
    theta=500_000.0,
    scaling=RotaryScaling(8.0, 1.0, 4.0, 8192),
)


def count(params) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


# --- rotary positions ----------------------------------------------------------------------------


def test_rotation_turns_pairs_by_position():
    """Feature i and i + H/2 are the coordinates of a point that turns."""
    x = np.random.default_rng(0).normal(size=(1, 5, 2, 6)).astype(np.float32)
    position = np.array([[0, 1, 2, 7, 30]])
    frequency = llama.frequencies(TINY)
    out = np.asarray(llama.rotate(jnp.asarray(x), jnp.asarray(position), frequency))
    point = (x[..., :3] + 1j * x[..., 3:]) * np.exp(1j * position[..., None, None] * frequency)
    expected = np.concatenate([point.real, point.imag], -1)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


def test_products_depend_on_distance_only():
    rng = np.random.default_rng(1)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, 6)), jnp.float32) for _ in range(2))
    frequency = llama.frequencies(TINY)

    def product(i: int, j: int) -> float:
        turned = [llama.rotate(a, jnp.full((1, 1), at), frequency) for a, at in ((q, i), (k, j))]
        return float((turned[0] * turned[1]).sum())

    assert product(3, 1) == pytest.approx(product(43, 41), abs=1e-5)
    assert abs(product(3, 1) - product(3, 2)) > 1e-3


def test_scaled_frequencies():
    """Fast ones stay, slow ones are divided by the factor, those between lie between."""
    config = dataclasses.replace(LLAMA_8B, scaling=None)
    plain, scaled = llama.frequencies(config), llama.frequencies(LLAMA_8B)
    wavelength = 2 * np.pi / plain
    np.testing.assert_array_equal(scaled[wavelength < 2048], plain[wavelength < 2048])
    slow = wavelength > 8192
    np.testing.assert_allclose(scaled[slow], plain[slow] / 8, rtol=1e-6)
    between = ~slow & (wavelength > 2049)
    assert between.any() and slow.any()
    assert np.all((scaled < plain) & (scaled > plain / 8), where=between)


# --- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_parameters(name):
    params = jax.eval_shape(llama.llama(VARIANTS[name]).init, jax.random.key(0))
    attend = params["block_1"]["attention"]
    assert ("lm_head" in params) == (name != "tied")
    assert ("bias" in attend["query"]) == (name == "qwen2")
    assert ("norm_key" in attend) == (name == "qwen3")
    assert "bias" not in attend["out"]
    assert attend["key"]["kernel"].shape == (16, 12)


def test_an_8b_model_is_cut_evenly_in_eight():
    params = jax.eval_shape(llama.llama(LLAMA_8B).init, jax.random.key(0))
    assert count(params) == 8_030_261_248
    places = mesh.shardings(params, mesh.make_mesh({"fsdp": 4, "tensor": 2}), llama.RULES)
    whole = 0
    for leaf, place in zip(jax.tree.leaves(params), jax.tree.leaves(places), strict=True):
        share = math.prod(place.shard_shape(leaf.shape)) / math.prod(leaf.shape)
        assert share == 1 / 8 or leaf.ndim == 1
        whole += math.prod(leaf.shape) if share == 1 else 0
    assert whole == 65 * 4096  # the norms


AXES = [{"data": 2, "fsdp": 4}, {"fsdp": 2, "data": 2, "tensor": 2}]


def alone_and_in_parts(run, config, axes, slots):
    """`run(model, params, ids, mask)` of eight ragged rows, on one device and on a mesh."""
    devices = mesh.make_mesh(axes)
    rows = mesh.batch_sharding(devices)
    params = llama.llama(config).init(jax.random.key(0))
    ids = jax.random.randint(jax.random.key(1), (8, slots), 0, config.vocabulary)
    mask = jnp.arange(slots)[None] >= jnp.arange(8)[:, None] // 2
    alone = run(llama.llama(config), params, ids, mask)
    places = (mesh.shardings(params, devices, llama.RULES), rows, rows)
    model = llama.llama(config, remat=True, rows=rows)
    return alone, run(model, *jax.device_put((params, ids, mask), places))


# 23 ids cannot lie in parts.
@pytest.mark.parametrize(("axes", "vocabulary"), [(AXES[0], 24), (AXES[1], 24), (AXES[0], 23)])
def test_a_model_in_parts_draws_the_same(axes, vocabulary):
    def run(model, params, ids, mask):
        how = dict(length=9, sampling=Sampling(), stop=(3,), pad=0, halvings=1)
        draw = jax.jit(lambda *inputs: decode.decode(model, *inputs, jax.random.key(2), **how))
        return draw(params, ids, mask)

    config = dataclasses.replace(TINY, vocabulary=vocabulary)
    alone, found = alone_and_in_parts(run, config, axes, 5)
    np.testing.assert_array_equal(found.ids, alone.ids)
    np.testing.assert_allclose(found.log_density, alone.log_density, rtol=1e-5, atol=1e-5)
    assert len(set(np.asarray(found.length))) > 1


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("chunk", [3, None])
def test_gathered_parameters_give_the_same_scores_and_gradients(axes, tied, chunk):
    def run(model, params, ids, mask):
        def total(params):
            density, spread = decode.score(model, params, ids, mask, 7, Sampling(), chunk=chunk)
            return (density + spread).sum(), density

        return jax.jit(jax.value_and_grad(total, has_aux=True))(params)

    alone, found = alone_and_in_parts(run, dataclasses.replace(TINY, tied=tied), axes, 12)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    for gradient in jax.tree.leaves(found[1]):  # stays in parts
        share = gradient.addressable_shards[0].data.size / gradient.size
        assert share <= 1 / axes["fsdp"] or gradient.ndim == 1


def test_gradients_of_chunks_add_up_in_f32():
    """Added up in bfloat16, 48 of them would be wrong by 1.4 %."""
    model = llama.llama(TINY, jnp.bfloat16)
    params = model.init(jax.random.key(0))
    ids, mask = jax.random.randint(jax.random.key(1), (4, 50), 0, 24), jnp.ones((4, 50), bool)

    def gradient(chunk):
        def total(params):
            return decode.score(model, params, ids, mask, 48, Sampling(), chunk=chunk)[0].sum()

        return jax.grad(total)(params)["lm_head"]["kernel"]

    at_once = gradient(None)
    assert jnp.abs(gradient(1) - at_once).max() < 2**-7 * jnp.abs(at_once).max()


@pytest.mark.parametrize(
    ("change", "named"), [({"kv_heads": 3}, "kv_heads 3"), ({"head_dim": 5}, "head_dim 5")]
)
def test_sizes_that_do_not_fit(change, named):
    with pytest.raises(UserError, match=named) as error:
        dataclasses.replace(TINY, **change)
    assert "\n" not in str(error.value)
