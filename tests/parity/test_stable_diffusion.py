"""Against diffusers and transformers: U-Nets, autoencoder, text encoders and their folders.

Run as a program, it writes tests/models/golden/stable_diffusion/: each small network's config.json,
the names and shapes of its tensors, and what torch computes when `filled` fills them, for the tests
that run without torch.
"""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxalign.core import mesh
from jaxalign.models import clip_text, hub, unet, vae
from jaxalign.models import diffusers_folders as folders

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity

GOLDEN = Path(__file__).parents[1] / "models" / "golden" / "stable_diffusion"
KIND = {"unet": "unet", "vae": "vae", "clip": "text_encoder"}
DOWN, UP = ("DownBlock2D", "CrossAttnDownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
TEXT = dict(
    vocab_size=31, max_position_embeddings=9, num_hidden_layers=3, bos_token_id=29, pad_token_id=0
)


def theirs_unet(levels: str, **sizes):
    """levels: an "a" for each level with attention and "-" without, finest first."""
    kinds = [level == "a" for level in levels]
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        down_block_types=[DOWN[kind] for kind in kinds],
        up_block_types=[UP[kind] for kind in reversed(kinds)],
        **sizes,
    )


def theirs_clip(kind: str, **sizes):
    config = transformers.CLIPTextConfig(**TEXT, **sizes)
    return getattr(transformers, kind)(config)


# Odd widths and heads, so that a wrong transpose or split shows.
MODELS = {
    "unet_1": lambda: theirs_unet(
        "a-",
        block_out_channels=(6, 10),
        norm_num_groups=2,
        attention_head_dim=2,
        cross_attention_dim=7,
        layers_per_block=2,
    ),
    "unet_2": lambda: theirs_unet(
        "aa",
        block_out_channels=(6, 15),
        norm_num_groups=3,
        attention_head_dim=[3, 5],
        cross_attention_dim=9,
        layers_per_block=1,
        use_linear_projection=True,
        upcast_attention=True,
    ),
    "unet_xl": lambda: theirs_unet(
        "-a",
        block_out_channels=(8, 12),
        norm_num_groups=4,
        attention_head_dim=[2, 3],
        cross_attention_dim=5,
        layers_per_block=1,
        transformer_layers_per_block=[1, 2],
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=6,
        projection_class_embeddings_input_dim=5 + 6 * 6,
    ),
    "vae": lambda: diffusers.AutoencoderKL(
        sample_size=16,
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=(6, 10),
        norm_num_groups=2,
        layers_per_block=1,
        latent_channels=3,
        scaling_factor=0.7,
    ),
    "clip_1": lambda: theirs_clip(
        "CLIPTextModel",
        hidden_size=15,
        intermediate_size=22,
        num_attention_heads=3,
        hidden_act="quick_gelu",
        eos_token_id=2,
    ),
    "clip_2": lambda: theirs_clip(
        "CLIPTextModelWithProjection",
        hidden_size=10,
        intermediate_size=14,
        num_attention_heads=5,
        hidden_act="gelu",
        projection_dim=7,
        eos_token_id=28,
    ),
}
UNETS = [name for name in MODELS if name.startswith("unet")]


@pytest.fixture(autouse=True)
def _strict():
    torch.set_num_threads(1)
    with jax.default_matmul_precision("highest"):
        yield


def filled(shapes: dict[str, list[int]]) -> dict[str, np.ndarray]:
    """A checkpoint of numbers that depend on names and shapes only; norms scale by about one."""
    random, tensors = np.random.RandomState(0), {}
    for name, shape in sorted(shapes.items()):
        scale = 0.3 if len(shape) == 1 else np.prod(shape[1:]) ** -0.5
        around = float(len(shape) == 1 and name.endswith(".weight"))
        tensors[name] = (around + scale * random.standard_normal(shape)).astype(np.float32)
    return tensors


def shapes(net) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in net.state_dict().items()}


@functools.cache
def theirs(name: str):
    net = MODELS[name]()
    net.load_state_dict({k: torch.tensor(v) for k, v in filled(shapes(net)).items()})
    return net.eval()


def part(name: str) -> str:
    return KIND[name.split("_")[0]]


@pytest.fixture(params=MODELS)
def saved(request, tmp_path):
    """A network's name, and a pipeline's folder with it alone."""
    theirs(request.param).save_pretrained(tmp_path / part(request.param))
    return request.param, tmp_path


def inputs(name: str) -> dict[str, np.ndarray]:
    """What each kind of network takes, in our layout; no two sizes are alike."""
    random = np.random.RandomState(1)
    if part(name) == "text_encoder":
        ids = random.randint(3, 28, size=(3, 9))
        ids[np.arange(3), [8, 4, 6]] = 28
        return {"ids": ids.astype(np.int32)}
    if part(name) == "vae":
        draw = {"pictures": (2, 6, 8, 3), "latents": (2, 4, 2, 3)}
        return {key: random.standard_normal(s).astype(np.float32) for key, s in draw.items()}
    config = theirs(name).config
    found = {
        "x": random.standard_normal((2, 4, 6, 4)),
        "timestep": np.array([981.0, 3.0]),
        "tokens": random.standard_normal((2, 5, config.cross_attention_dim)),
    }
    if config.addition_embed_type:
        found["pooled"] = random.standard_normal((2, 5))
        found["sizes"] = np.array([[512, 384, 0, 9, 1024, 1000], [64, 99, 5, 0, 128, 77]])
    return {key: value.astype(np.float32) for key, value in found.items()}


def first(x) -> torch.Tensor:
    """Channels first, for torch."""
    return torch.tensor(np.moveaxis(np.asarray(x), -1, 1).copy())


def last(x: torch.Tensor) -> np.ndarray:
    return np.moveaxis(x.numpy(), 1, -1)


@torch.no_grad()
def torch_outputs(name: str, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    net = theirs(name)
    if part(name) == "unet":
        added = None
        if "pooled" in given:
            added = {
                "text_embeds": torch.tensor(given["pooled"]),
                "time_ids": torch.tensor(given["sizes"]),
            }
        timestep, tokens = torch.tensor(given["timestep"]), torch.tensor(given["tokens"])
        out = net(first(given["x"]), timestep, tokens, added_cond_kwargs=added).sample
        return {"out": last(out)}
    if part(name) == "vae":
        latents, scale = net.encode(first(given["pictures"])).latent_dist, net.config.scaling_factor
        return {
            "mean": last(latents.mean) * scale,
            "std": last(latents.std) * scale,
            "decoded": last(net.decode(first(given["latents"]) / scale).sample),
        }
    out = net(torch.tensor(given["ids"]).long(), output_hidden_states=True)
    pooled = out.text_embeds if hasattr(out, "text_embeds") else out.pooler_output
    states = {"last": out.last_hidden_state, "penultimate": out.hidden_states[-2], "pooled": pooled}
    return {key: value.numpy() for key, value in states.items()}


def our_outputs(name: str, path: Path, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    if part(name) == "unet":
        model, params = folders.load_unet(path)
        context = given["tokens"]
        if "pooled" in given:
            context = unet.Conditions(context, given["pooled"], given["sizes"])
        return {"out": jax.jit(model.apply)(params, given["x"], given["timestep"], context)}
    if part(name) == "vae":
        model, params = folders.load_vae(path)
        latents = jax.jit(model.encode)(params, given["pictures"])
        decoded = jax.jit(model.decode)(params, given["latents"])
        return {"mean": latents.mean, "std": latents.std, "decoded": decoded}
    model, params = folders.load_text_encoder(path)
    return jax.jit(model.apply)(params, given["ids"])._asdict()


def error(found, expected) -> float:
    """The greatest difference, in terms of the greatest number."""
    return np.abs(np.asarray(found) - expected).max() / np.abs(expected).max()


def test_outputs(saved):
    name, path = saved
    given = inputs(name)
    expected, found = torch_outputs(name, given), our_outputs(name, path, given)
    for key, value in expected.items():
        assert error(found[key], value) < 1e-5, key


RELEASED = {
    "unet of 1.x": lambda: diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768),
    "unet of 2.x": lambda: diffusers.UNet2DConditionModel(
        sample_size=96,
        cross_attention_dim=1024,
        attention_head_dim=[5, 10, 20, 20],
        use_linear_projection=True,
    ),
    "unet of XL": lambda: diffusers.UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=[DOWN[0], DOWN[1], DOWN[1]],
        up_block_types=[UP[1], UP[1], UP[0]],
        cross_attention_dim=2048,
        attention_head_dim=[5, 10, 20],
        transformer_layers_per_block=[1, 2, 10],
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    ),
    "vae": lambda: diffusers.AutoencoderKL(
        sample_size=512,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
    ),
    "second text encoder of XL": lambda: transformers.CLIPTextModelWithProjection(
        transformers.CLIPTextConfig(
            hidden_size=1280,
            intermediate_size=5120,
            num_hidden_layers=32,
            num_attention_heads=20,
            hidden_act="gelu",
            projection_dim=1280,
            architectures=["CLIPTextModelWithProjection"],
        )
    ),
}


@pytest.mark.parametrize("name", RELEASED)
def test_the_released_sizes_have_the_same_tensors(name):
    """Every name and shape, and they split over eight devices; nothing is allocated."""
    with torch.device("meta"):
        net = RELEASED[name]()
    expected = {key.removeprefix("text_model."): size for key, size in shapes(net).items()}
    values = net.config.to_dict() if "text" in name else dict(net.config)
    family = {"unet": unet, "vae": vae}.get(name.split()[0], clip_text)
    make = {unet: unet.unet, vae: vae.autoencoder, clip_text: clip_text.text_encoder}[family]
    abstract = jax.eval_shape(make(family.from_hub(values)).init, jax.random.key(0))
    sizes = {}
    for tensor, leaf in zip(hub.mirrored(abstract), jax.tree.leaves(abstract), strict=True):
        size = list(leaf.shape)
        sizes[tensor.name] = [*size[:-3:-1], *size[:-2]] if tensor.transposed else size
    assert sizes == expected
    placed = mesh.shardings(abstract, mesh.make_mesh({"fsdp": 8}), family.RULES)
    pairs = zip(jax.tree.leaves(placed), jax.tree.leaves(abstract), strict=True)
    whole = sum(leaf.size for place, leaf in pairs if place.is_fully_replicated)
    assert whole < 0.03 * sum(leaf.size for leaf in jax.tree.leaves(abstract))


# --- folders --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["unet_1", "vae", "clip_2"])
def test_shards_and_half_precision(name, tmp_path):
    """Files as save_pretrained cuts and names them: the same parameters, or rounded ones."""
    load = {
        "unet": folders.load_unet,
        "vae": folders.load_vae,
        "text_encoder": folders.load_text_encoder,
    }[part(name)]
    net = MODELS[name]()
    net.load_state_dict(theirs(name).state_dict())
    net.save_pretrained(tmp_path / "whole" / part(name))
    net.save_pretrained(tmp_path / "cut" / part(name), max_shard_size="5KB")
    assert len(list((tmp_path / "cut" / part(name)).glob("*.safetensors"))) > 1
    whole, cut = (load(tmp_path / kind)[1] for kind in ("whole", "cut"))
    jax.tree.map(np.testing.assert_array_equal, whole, cut)
    net.half().save_pretrained(tmp_path / "half" / part(name), variant="fp16")
    net.save_pretrained(tmp_path / "both" / part(name), variant="fp16", max_shard_size="5KB")
    for kind in ("half", "both"):
        names = [file.name for file in (tmp_path / kind / part(name)).glob("*.safetensors*")]
        assert names and all("fp16" in name for name in names)
        _, half = load(tmp_path / kind, param_dtype=jnp.float16)
        expected = jax.tree.map(lambda a: a.astype(jnp.float16), whole)
        jax.tree.map(np.testing.assert_array_equal, half, expected)


def test_gradient(tmp_path):
    """Of every tensor of a U-Net, recomputed or not."""
    net = theirs("unet_2")
    net.save_pretrained(tmp_path / "unet")
    given = inputs("unet_2")
    weight = np.random.RandomState(2).standard_normal((2, 4, 6, 4)).astype(np.float32)
    tokens, timestep = torch.tensor(given["tokens"]), torch.tensor(given["timestep"])
    net.zero_grad()
    (net(first(given["x"]), timestep, tokens).sample * first(weight)).sum().backward()
    expected = {name: p.grad.numpy() for name, p in net.named_parameters()}
    save_file(expected, tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    _, expected = folders.load_unet(tmp_path)  # in our layout
    net.save_pretrained(tmp_path / "unet")
    model, params = folders.load_unet(tmp_path, remat=True)

    def loss(params):
        return (model.apply(params, given["x"], given["timestep"], given["tokens"]) * weight).sum()

    found = jax.jit(jax.grad(loss))(params)
    largest = max(np.abs(a).max() for a in jax.tree.leaves(expected))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * largest),
        found,
        expected,
    )


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_the_unet_of_stable_diffusion_1_4_at_full_size(tmp_path):
    torch.manual_seed(0)
    net = diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768).eval()
    net.save_pretrained(tmp_path / "unet")
    random = np.random.RandomState(1)
    x = random.standard_normal((1, 16, 16, 4)).astype(np.float32)
    tokens = random.standard_normal((1, 77, 768)).astype(np.float32)
    timestep = np.array([951.0], np.float32)
    with torch.no_grad():
        expected = net(first(x), torch.tensor(timestep), torch.tensor(tokens)).sample
    del net
    model, params = folders.load_unet(tmp_path)
    found = jax.jit(model.apply)(params, x, timestep, tokens)
    assert error(found, last(expected)) < 1e-5


def write_golden() -> None:
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for name in MODELS:
        net, given = theirs(name), inputs(name)
        with tempfile.TemporaryDirectory() as folder:
            net.save_pretrained(folder)
            config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        described = {"config": config, "tensors": shapes(net)}
        (GOLDEN / f"{name}.json").write_text(json.dumps(described) + "\n", encoding="utf-8")
        np.savez_compressed(GOLDEN / f"{name}.npz", **given, **torch_outputs(name, given))


if __name__ == "__main__":
    write_golden()
