"""Each part of the parameters has an optimizer of its own, and moves only when it is told to."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxalign.core import descent

OPTIMIZERS = {"a": optax.sgd(0.1), "b": optax.adam(0.5)}


def test_a_part_descends_and_the_rest_stays():
    params = {"a": {"w": jnp.array([1.0, 2.0])}, "b": jnp.array(3.0)}
    state = descent.create(params, OPTIMIZERS, slow="slow", extra="extra")
    assert (state.step, state.slow, state.extra) == (0, "slow", "extra")
    assert state.opt_state.keys() == {"a", "b"}

    def loss(a):
        return (a["w"] ** 2).sum() * state.params["b"], "seen"

    after, value, other = descent.descend(OPTIMIZERS, state, "a", loss)
    assert value == 15 and other == "seen" and after.step == 0
    np.testing.assert_allclose(after.params["a"]["w"], [1 - 0.6, 2 - 1.2], rtol=1e-6)
    assert after.params["b"] is params["b"] and after.opt_state["b"] is state.opt_state["b"]
    # The next loss sees what this one changed.
    last, value, _ = descent.descend(
        OPTIMIZERS, after, "b", lambda b: (b * after.params["a"]["w"].sum(), None)
    )
    np.testing.assert_allclose(value, 3 * 1.2, rtol=1e-6)
    np.testing.assert_allclose(last.params["b"], 2.5, rtol=1e-5)
    assert jax.tree.leaves(last.opt_state["b"])[0] == 1
