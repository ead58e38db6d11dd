"""Sums of rewards on the device, on the host, and of both kinds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.core.types import UserError
from jaxalign.rewards.host import HostReward, to_uint8
from jaxalign.rewards.weighted import Scale, on_host, weighted, weighted_scores

PICTURES = np.linspace(-1, 1, 4 * 2 * 2 * 3, dtype=np.float32).reshape(4, 2, 2, 3)
MEANS = PICTURES.mean((1, 2, 3))
BATCH = {"prompt": np.arange(4), "target": {"near": np.array([0.1, 0.2, 0.3, 0.4], np.float32)}}
SCALES = {"near": Scale(2.0, mean=0.5, std=0.25), "bright": Scale(-1.0, mean=-0.1, std=0.5)}


def near(pictures, batch, params):
    """Minus the distance of the brightness from a target."""
    return -params * jnp.abs(pictures.mean((1, 2, 3)) - batch["target"])


def bright(pictures, batch, params):
    assert batch["target"] is None
    return pictures.mean((1, 2, 3)) + params["shift"]


DEVICE = {"near": near, "bright": bright}
PARAMS = {"near": jnp.float32(3.0), "bright": {"shift": jnp.float32(0.5)}}


def expected() -> np.ndarray:
    distance = -3 * np.abs(MEANS - BATCH["target"]["near"])
    return 2 * (distance - 0.5) / 0.25 - (MEANS + 0.5 + 0.1) / 0.5


def test_the_sum_of_device_rewards():
    found = jax.jit(weighted(DEVICE, SCALES))(PICTURES, BATCH, PARAMS)
    assert found.shape == (4,) and found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected(), atol=1e-5)


def test_the_sum_of_both_kinds_in_a_host_reward():
    """The one on the device sees the picture as bytes, half a level off at most."""

    def on_bytes(pictures, batch):
        assert batch["target"] is None
        value = pictures.mean((1, 2, 3)) / 127.5 - 1 + 0.5
        pictures[:] = 0  # its own copy
        return value

    scores = {"bright": on_bytes, "near": on_host(near, PARAMS["near"])}
    first = {name: SCALES[name] for name in ("bright", "near")}
    with HostReward("sum", weighted_scores(scores, first)) as reward:
        found = reward.result(
            reward.submit(to_uint8(jnp.asarray(PICTURES)), jax.tree.map(jnp.asarray, BATCH))
        )
    np.testing.assert_allclose(found, expected(), atol=0.2)
    alone = on_host(near, PARAMS["near"])(
        np.array([[[[0] * 3]], [[[255] * 3]]], np.uint8), {"target": np.zeros(2, np.float32)}
    )
    np.testing.assert_allclose(alone, [-3, -3], rtol=1e-6)


@pytest.mark.parametrize(
    ("scales", "said"),
    [
        ({"near": Scale()}, "must be the same"),
        (SCALES | {"more": Scale()}, "must be the same"),
        (SCALES | {"near": Scale(std=0.0)}, "reward near: .* std positive"),
        (SCALES | {"bright": Scale(mean=float("nan"))}, "reward bright: .* must be finite"),
    ],
)
@pytest.mark.parametrize("make", [weighted, weighted_scores])
def test_scales_that_do_not_fit(make, scales, said):
    with pytest.raises(UserError, match=said):
        make(DEVICE, scales)


def test_no_reward_at_all_is_refused():
    with pytest.raises(UserError, match="not empty"):
        weighted({}, {})
