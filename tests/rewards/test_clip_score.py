"""CLIPScore: cosines, chunks, devices; the tower is a linear map here."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.core import mesh
from jaxalign.core.types import UserError
from jaxalign.rewards.clip_score import clip_score

SIDE, WIDTH = 4, 5


def embed(params, pictures):
    return pictures.reshape(len(pictures), -1) @ params


def given(count: int):
    random = np.random.default_rng(0)
    pictures = random.standard_normal((count, SIDE, SIDE, 3)).astype(np.float32)
    target = random.standard_normal((count, WIDTH)).astype(np.float32)
    params = random.standard_normal((SIDE * SIDE * 3, WIDTH)).astype(np.float32)
    return pictures, {"prompt": np.arange(count), "target": target}, params


def cosines(pictures, batch, params) -> list[float]:
    rows = pictures.reshape(len(pictures), -1) @ params
    pairs = zip(rows, batch["target"], strict=True)
    return [a @ b / np.sqrt((a @ a) * (b @ b)) for a, b in pairs]


@pytest.mark.parametrize("count", [3, 4, 8, 10])
def test_the_score_is_the_cosine(count):
    """In one chunk, in whole ones, and with a last one that is not full."""
    found = jax.jit(clip_score(embed, chunk=4))(*given(count))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, cosines(*given(count)), atol=2e-6)


def test_pictures_stay_on_their_devices():
    """Each chunk has rows of every device: the compiled program sends nothing."""
    devices = mesh.make_mesh({"data": 4}, jax.devices()[:4])
    pictures, batch, params = given(16)
    rows, whole = jax.NamedSharding(devices, jax.P("data")), jax.NamedSharding(devices, jax.P())
    placed = *jax.device_put((pictures, batch), rows), jax.device_put(params, whole)
    compiled = jax.jit(clip_score(embed, chunk=8)).lower(*placed).compile()
    assert not re.search("all-gather|all-to-all|collective-permute|all-reduce", compiled.as_text())
    found = compiled(*placed)
    assert found.sharding.is_equivalent_to(rows, 1)
    np.testing.assert_allclose(found, cosines(pictures, batch, params), atol=2e-6)


def test_a_chunk_of_no_picture_is_refused():
    with pytest.raises(UserError, match="chunk = 0: must be at least 1"):
        clip_score(embed, chunk=0)
