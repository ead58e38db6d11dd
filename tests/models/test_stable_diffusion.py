"""Stable Diffusion's networks: what torch computed, dtypes, recomputation, devices, sizes."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.core import mesh
from jaxalign.core.types import UserError
from jaxalign.models import clip_text, diffusers_folders, hub, unet, vae

GOLDEN = Path(__file__).parent / "golden" / "stable_diffusion"
UNET_1 = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
    "norm_num_groups": 32,
}
VAE = {
    "in_channels": 3,
    "latent_channels": 4,
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
}
CLIP = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "eos_token_id": 2,
}


def golden(name: str) -> dict:
    return json.loads((GOLDEN / f"{name}.json").read_text())


@pytest.fixture(autouse=True)
def _strict():
    with jax.default_matmul_precision("highest"):
        yield


def near(found, expected, tolerance=1e-5) -> None:
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


# --- what torch says -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["unet_1", "unet_2"])
def test_unet(name, pipeline):
    expected = np.load(GOLDEN / f"{name}.npz")
    model, params = diffusers_folders.load_unet(pipeline(name))
    inputs = (expected["x"], expected["timestep"], expected["tokens"])
    near(jax.jit(model.apply)(params, *inputs), expected["out"])


def test_unet_of_xl_over_devices(pipeline):
    """Parameters over `fsdp`, pictures over `data`."""
    expected = np.load(GOLDEN / "unet_xl.npz")
    devices = mesh.make_mesh({"data": 2, "fsdp": 2}, jax.devices()[:4])
    model, params = diffusers_folders.load_unet(
        pipeline("unet_xl"), shardings=lambda tree, rules: mesh.shardings(tree, devices, rules)
    )
    conv = params["down_blocks_0"]["resnets_0"]["conv1"]["kernel"]
    assert conv.sharding.shard_shape(conv.shape) == (3, 3, 8, 4)
    rows = jax.NamedSharding(devices, jax.P("data"))
    context = unet.Conditions(expected["tokens"], expected["pooled"], expected["sizes"])
    x, timestep, context = jax.device_put((expected["x"], expected["timestep"], context), rows)
    near(jax.jit(model.apply)(params, x, timestep, context), expected["out"])


def test_autoencoder(pipeline):
    expected = np.load(GOLDEN / "vae.npz")
    model, params = diffusers_folders.load_vae(pipeline("vae"))
    latents = jax.jit(model.encode)(params, expected["pictures"])
    near(latents.mean, expected["mean"])
    near(latents.std, expected["std"])
    near(jax.jit(model.decode)(params, expected["latents"]), expected["decoded"])
    assert model.shrink == 2


@pytest.mark.parametrize("name", ["clip_1", "clip_2"])
def test_text_encoder(name, pipeline):
    expected = np.load(GOLDEN / f"{name}.npz")
    model, params = diffusers_folders.load_text_encoder(pipeline(name))
    states = jax.jit(model.apply)(params, expected["ids"])
    for field, value in states._asdict().items():
        near(value, expected[field])


def test_text_encoder_in_bf16(pipeline):
    expected, path = np.load(GOLDEN / "clip_2.npz"), pipeline("clip_2")
    model, params = diffusers_folders.load_text_encoder(path, jnp.bfloat16)
    states = jax.jit(model.apply)(params, expected["ids"])
    for field, value in states._asdict().items():
        assert value.dtype == jnp.float32
        near(value, expected[field], 0.05)
        assert np.abs(value - expected[field]).max() > 1e-4


# --- what is traced ------------------------------------------------------------------------------


def inner(jaxpr):
    """Every equation, those inside others too."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for sub in value if isinstance(value, tuple | list) else [value]:
                sub = getattr(sub, "jaxpr", sub)
                if hasattr(sub, "eqns"):
                    yield from inner(sub)


@functools.cache
def small() -> tuple:
    """A small U-Net's sizes, its abstract parameters and its inputs."""
    expected, config = np.load(GOLDEN / "unet_2.npz"), unet.from_hub(golden("unet_2")["config"])
    params = jax.eval_shape(unet.unet(config).init, jax.random.key(0))
    return config, params, [expected[name] for name in ("x", "timestep", "tokens")]


def traced(dtype, *, remat: bool) -> list:
    """All equations of the small U-Net."""
    config, params, inputs = small()
    model = unet.unet(config, dtype, remat=remat)
    jaxpr = jax.make_jaxpr(model.apply)(params, *inputs)
    assert [a.dtype for a in jaxpr.out_avals] == [jnp.float32]
    return list(inner(jaxpr.jaxpr))


def test_bf16_is_for_products_only():
    equations = traced(jnp.bfloat16, remat=False)
    assert {leaf.dtype for leaf in jax.tree.leaves(small()[1])} == {jnp.dtype(jnp.float32)}

    def dtypes(primitive: str, count: int) -> set[str]:
        found = [e.invars[0].aval.dtype for e in equations if e.primitive.name == primitive]
        assert len(found) >= count
        return {str(dtype) for dtype in found}

    assert dtypes("dot_general", 80) == {"bfloat16"}
    assert dtypes("rsqrt", 20) == {"float32"}  # norms
    assert dtypes("exp", 14) == {"float32"}  # attention
    assert not any("remat" in e.primitive.name for e in equations)


def test_recomputation_wraps_blocks():
    # Two levels down of one pair each, up of two, and the middle's three.
    wrapped = [e for e in traced(jnp.float32, remat=True) if "remat" in e.primitive.name]
    assert len(wrapped) == 2 * 2 + 4 * 2 + 3


# --- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "make", "values", "tensors", "parameters"),
    [
        (unet, unet.unet, UNET_1, 686, 859_520_964),
        (vae, vae.autoencoder, VAE, 248, 83_653_863),
        (clip_text, clip_text.text_encoder, CLIP, 196, 123_060_480),
    ],
)
def test_the_released_sizes(family, make, values, tensors, parameters):
    """Stable Diffusion 1's, and they split over devices; nothing is allocated."""
    abstract = jax.eval_shape(make(family.from_hub(values)).init, jax.random.key(0))
    leaves = jax.tree.leaves(abstract)
    assert len({tensor.name for tensor in hub.mirrored(abstract)}) == len(leaves) == tensors
    assert sum(leaf.size for leaf in leaves) == parameters
    placed = jax.tree.leaves(mesh.shardings(abstract, mesh.make_mesh({"fsdp": 8}), family.RULES))
    whole = sum(
        leaf.size for leaf, at in zip(leaves, placed, strict=True) if at.is_fully_replicated
    )
    assert whole < 0.03 * parameters


def refused(call, *args) -> str:
    with pytest.raises(UserError) as error:
        call(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"class_embed_type": "timestep"}, "class_embed_type = 'timestep'"),
        ({"attention_head_dim": [8, 8]}, "must be 4 positive whole numbers"),
        ({"attention_head_dim": 7}, "block_out_channels 320: must divide by"),
        ({"down_block_types": ["DownBlock2D"] * 4}, "must be 4 of"),
        ({"cross_attention_dim": None}, "cross_attention_dim = None"),
        ({"addition_embed_type": "text_time"}, "addition_time_embed_dim = None"),
        ({"transformer_layers_per_block": [[1], 1, 1, 1]}, "must be a positive whole number"),
    ],
)
def test_unets_that_are_not_computed(changes, said):
    assert said in refused(unet.from_hub, UNET_1 | changes)


def test_other_networks_that_are_not_computed():
    assert "shift_factor = 0.1" in refused(vae.from_hub, VAE | {"shift_factor": 0.1})
    assert "only 4 times" in refused(vae.from_hub, VAE | {"up_block_types": ["UpBlock2D"] * 4})
    assert "hidden_act = 'relu'" in refused(clip_text.from_hub, CLIP | {"hidden_act": "relu"})
    assert "must divide by" in refused(clip_text.from_hub, CLIP | {"num_attention_heads": 7})


def test_inputs_that_do_not_fit():
    model = unet.unet(unet.from_hub(golden("unet_1")["config"]))
    time, tokens = jnp.zeros(1), jnp.zeros((1, 3, 7))
    said = refused(model.apply, {}, jnp.zeros((1, 4, 5, 4)), time, tokens)
    assert "latents of 4 x 5" in said
    context = unet.Conditions(tokens, jnp.zeros((1, 5)), jnp.zeros((1, 6)))
    said = refused(model.apply, {}, jnp.zeros((1, 4, 4, 4)), time, context)
    assert "takes the prompt's states alone" in said
    coder = vae.autoencoder(vae.from_hub(golden("vae")["config"]))
    assert "pictures of 4 x 3" in refused(coder.encode, {}, jnp.zeros((1, 4, 3, 3)))
    encoder = clip_text.text_encoder(clip_text.from_hub(golden("clip_1")["config"]))
    assert "10 tokens" in refused(encoder.apply, {}, jnp.zeros((1, 10), jnp.int32))
