"""JPEG size as a reward: right numbers, gray and RGB, and what DDPO's two rewards prefer."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from jaxalign.core.types import UserError
from jaxalign.rewards import jpeg
from jaxalign.rewards.host import HostReward

NOISE = np.random.default_rng(0).integers(0, 256, (2, 32, 24, 3), dtype=np.uint8)
PLAIN = np.full((2, 32, 24, 3), 90, np.uint8)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_the_size_is_that_of_the_file(mode: str):
    pictures = NOISE if mode == "RGB" else NOISE[..., :1]
    sizes = []
    for picture in pictures:
        file = io.BytesIO()
        Image.fromarray(picture.squeeze()).save(file, format="JPEG", quality=95)
        assert Image.open(file).mode == mode
        sizes.append(len(file.getvalue()) / 1000)
    np.testing.assert_array_equal(jpeg.kilobytes(pictures), sizes)


def test_quality_is_high_enough_to_see_detail():
    file = io.BytesIO()
    Image.fromarray(NOISE[0]).save(file, format="JPEG", quality=75)
    assert jpeg.kilobytes(NOISE[:1])[0] * 1000 > 1.3 * len(file.getvalue())


@pytest.mark.parametrize("channels", [1, 3])
def test_plain_pictures_are_compressible(channels: int):
    pictures = np.concatenate([PLAIN, NOISE])[..., :channels]
    rewards = jpeg.compressibility(pictures, {})
    assert rewards.shape == (4,)
    assert (rewards < 0).all()
    assert rewards[:2].min() > rewards[2:].max() + 0.3
    np.testing.assert_array_equal(jpeg.incompressibility(pictures, {}), -rewards)


def test_colour_costs():
    gray = np.repeat(NOISE[..., :1], 3, axis=-1)
    assert (jpeg.kilobytes(NOISE) > jpeg.kilobytes(gray)).all()


@pytest.mark.parametrize("channels", [2, 4])
def test_another_number_of_channels_is_refused(channels: int):
    with pytest.raises(UserError, match=f"1 or 3 channels, not {channels}"):
        jpeg.kilobytes(np.zeros((1, 8, 8, channels), np.uint8))


@pytest.mark.parametrize("name", jpeg.REWARDS)
def test_it_runs_as_a_host_reward(name: str):
    with HostReward(name, jpeg.REWARDS[name]) as reward:
        rewards = reward.result(reward.submit(NOISE, {}))
    sign = {"compressibility": -1, "incompressibility": 1}[name]
    np.testing.assert_allclose(rewards, sign * jpeg.kilobytes(NOISE), rtol=1e-6)
