"""Adapters: the same network at first, the same maths merged or not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.core.types import UserError
from jaxalign.models import lora

RULE = r".*(up|out)/kernel"


def base():
    rng = np.random.default_rng(0)
    shapes = {"up": {"kernel": (6, 8), "bias": (8,)}, "block": {"out": {"kernel": (8, 4)}}}
    shapes["position"] = (1, 3, 6)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32),
        shapes,
        is_leaf=lambda leaf: isinstance(leaf, tuple),
    )


def make_params(rank=2, rule=RULE):
    return {"model": base(), "lora": lora.init_lora(jax.random.key(1), base(), rank, rule)}


def test_fresh_adapters_change_nothing():
    params = make_params()
    jax.tree.map(np.testing.assert_array_equal, lora.effective(params), params["model"])


def test_without_adapters_it_is_the_model():
    params = {"model": base()}
    jax.tree.map(np.testing.assert_array_equal, lora.effective(params), params["model"])


def test_only_matrices_that_match_are_adapted():
    params = make_params(rank=3)
    shapes = jax.tree.map(jnp.shape, params["lora"], is_leaf=lambda leaf: hasattr(leaf, "shape"))
    assert shapes == {
        "up/kernel": {"down": (6, 3), "up": (3, 8)},
        "block/out/kernel": {"down": (8, 3), "up": (3, 4)},
    }
    everything = make_params(rule=".*")["lora"]
    assert sorted(everything) == ["block/out/kernel", "up/kernel"]  # no bias, no position table


def test_merged_is_the_detour_through_the_adapter():
    params, x = make_params(), jax.random.normal(jax.random.key(2), (5, 6))
    for path, adapter in params["lora"].items():
        adapter["up"] = jax.random.normal(jax.random.key(len(path)), adapter["up"].shape)
    merged = lora.effective(params)
    adapter = params["lora"]["up/kernel"]
    detour = x @ params["model"]["up"]["kernel"] + (x @ adapter["down"]) @ adapter["up"]
    np.testing.assert_allclose(x @ merged["up"]["kernel"], detour, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(merged["up"]["bias"], params["model"]["up"]["bias"])
    change = merged["block"]["out"]["kernel"] - params["model"]["block"]["out"]["kernel"]
    assert np.linalg.matrix_rank(np.asarray(change), tol=1e-4) == 2


def test_adapters_start_apart_and_have_a_gradient():
    params = make_params()
    downs = [adapter["down"] for adapter in params["lora"].values()]
    assert float(jnp.abs(downs[0][:6] - downs[1][:6]).min()) > 0
    gradient = jax.grad(lambda p: lora.effective(p)["up"]["kernel"].sum())(params)["lora"]
    assert float(jnp.abs(gradient["up/kernel"]["up"]).max()) > 0


def test_a_rule_without_match_is_the_users_error():
    with pytest.raises(UserError, match=r"'nothing/\.\*' matches no matrix") as error:
        lora.init_lora(jax.random.key(0), base(), 2, "nothing/.*")
    assert "\n" not in str(error.value)
