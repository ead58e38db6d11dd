"""What a pipeline's folder gives training: networks, and prompts as its U-Net takes them."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from experiments import random_pipeline
from jaxalign.models import stable_diffusion
from jaxalign.models.diffusers_folders import load_text_encoder, load_tokenizer
from jaxalign.models.unet import Conditions

PROMPTS = ["a cat", "", "two dogs"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return random_pipeline.write_pipeline(tmp_path / "model", 3)


def as_xl(folder: Path, **index) -> Path:
    """With a second text encoder, which also projects."""
    for part in ("tokenizer", "text_encoder"):
        shutil.copytree(folder / part, folder / f"{part}_2")
    second = folder / "text_encoder_2"
    values = json.loads((second / "config.json").read_text())
    values |= {"architectures": ["CLIPTextModelWithProjection"], "projection_dim": 5}
    (second / "config.json").write_text(json.dumps(values))
    tensors = load_file(second / "model.safetensors")
    tensors["text_projection.weight"] = np.ones((5, values["hidden_size"]), np.float32)
    save_file(tensors, second / "model.safetensors", metadata={"format": "pt"})
    listed = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(listed | index))
    return folder


def test_networks_and_sizes(folder: Path):
    model = stable_diffusion.load(folder)
    assert (model.side, model.channels, model.vae.shrink) == (8, 4, 2)
    assert model.schedule.prediction == "epsilon"
    latents = jnp.ones((2, model.side, model.side, model.channels))
    prompts = stable_diffusion.embed_prompts(folder, PROMPTS[:2], 16)
    out = jax.jit(model.unet.apply)(model.params["unet"], latents, jnp.array([1.0, 5.0]), prompts)
    assert out.shape == latents.shape and bool(jnp.isfinite(out).all())


def test_prompts_are_the_encoders_last_states(folder: Path):
    """More of them than are encoded at once, each as alone."""
    many = [f"a cat {i}" for i in range(stable_diffusion.PROMPTS_AT_ONCE + 3)]
    found = stable_diffusion.embed_prompts(folder, many, 16)
    model, params = load_text_encoder(folder)
    alone = model.apply(params, jnp.asarray(load_tokenizer(folder)(many[-1:]))).last
    assert found.shape == (len(many), random_pipeline.CONTEXT, 16)
    np.testing.assert_allclose(found[-1:], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("zeros", [True, False])
def test_prompts_of_xl(folder: Path, zeros: bool):
    """Both encoders side by side; the empty prompt as the folder says."""
    as_xl(folder, force_zeros_for_empty_prompt=zeros)
    found = stable_diffusion.embed_prompts(folder, PROMPTS, 64)
    assert isinstance(found, Conditions)
    assert found.tokens.shape == (3, random_pipeline.CONTEXT, 32)
    assert found.pooled.shape == (3, 5)
    np.testing.assert_array_equal(found.sizes, [[64, 64, 0, 0, 64, 64]] * 3)
    model, params = load_text_encoder(folder)
    states = model.apply(params, jnp.asarray(load_tokenizer(folder)(PROMPTS)))
    np.testing.assert_allclose(found.tokens[0, :, :16], states.penultimate[0], rtol=1e-5, atol=1e-6)
    empty = jax.tree.map(lambda a: bool((a[1] == 0).all()), found)
    assert (empty.tokens, empty.pooled) == (zeros, zeros)
