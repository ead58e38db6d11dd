"""The aesthetic score: the folded head against its layers, and files that hold no head."""

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxalign.core.types import UserError
from jaxalign.rewards import aesthetic

NUMBERS = (0, 2, 4, 6, 7)  # between them lies dropout
WIDTHS = (12, 10, 9, 5, 3, 1)


def head(widths=WIDTHS) -> dict[str, np.ndarray]:
    random, tensors = np.random.default_rng(0), {}
    for number, wide, to in zip(NUMBERS, widths[:-1], widths[1:], strict=True):
        tensors[f"layers.{number}.weight"] = random.standard_normal((to, wide)).astype(np.float32)
        tensors[f"layers.{number}.bias"] = random.standard_normal(to).astype(np.float32)
    return tensors


def embed(params, pictures):
    return pictures.reshape(len(pictures), -1) @ params


def test_the_score_is_that_of_the_layers(tmp_path):
    """Of the embedding with length one."""
    tensors = head()
    save_file(tensors, tmp_path / "head.safetensors")
    random = np.random.default_rng(1)
    pictures = random.standard_normal((5, 2, 2, 3)).astype(np.float32)
    tower = random.standard_normal((12, 12)).astype(np.float32)
    x = pictures.reshape(5, 12) @ tower
    x = x / np.linalg.norm(x, axis=-1, keepdims=True)
    for number in NUMBERS:
        x = x @ tensors[f"layers.{number}.weight"].T + tensors[f"layers.{number}.bias"]
    params = aesthetic.Params(tower, aesthetic.read_head(tmp_path / "head.safetensors"))
    reward = jax.jit(aesthetic.aesthetic(embed, chunk=2))
    found = reward(pictures, {"prompt": np.arange(5)}, params)
    np.testing.assert_allclose(found, x[:, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop("layers.4.bias"),
        lambda tensors: tensors.pop("layers.6.weight"),
        lambda tensors: tensors.update({"more": np.zeros(2)}),
        lambda tensors: tensors.clear(),
        lambda tensors: tensors.update({"layers.0.weight": np.zeros(10)}),
        lambda tensors: tensors.update({"layers.0.bias": np.zeros(9)}),
    ],
)
def test_tensors_that_make_no_head(tmp_path, change):
    tensors = head()
    change(tensors)
    save_file(tensors, tmp_path / "head.safetensors")
    with pytest.raises(UserError, match="are no chain of") as caught:
        aesthetic.read_head(tmp_path / "head.safetensors")
    assert "\n" not in str(caught.value)


def test_files_that_are_not_read(tmp_path):
    with pytest.raises(UserError, match="pickle is never opened; write it as safetensors: python"):
        aesthetic.read_head(tmp_path / "sac+logos+ava1-l14-linearMSE.pth")
    with pytest.raises(UserError, match="cannot be read"):
        aesthetic.read_head(tmp_path / "head.safetensors")
    (tmp_path / "head.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match="cannot be read"):
        aesthetic.read_head(tmp_path / "head.safetensors")
