"""CLIP's vision tower and its folders: what torch computed, Pillow's resize, layouts, refusals."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from jaxalign.core import mesh
from jaxalign.core.types import UserError
from jaxalign.models import clip, clip_folders, hub

GOLDEN = Path(__file__).parent / "golden" / "clip"
VIT_H = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32}
VIT_H |= {"num_attention_heads": 16, "image_size": 224, "patch_size": 14, "hidden_act": "gelu"}


@functools.cache
def described(name: str) -> dict:
    return json.loads((GOLDEN / f"{name}.json").read_text())


def filled(shapes: dict) -> dict:
    """As in tests/parity/test_clip_score.py, which gave torch the same numbers."""
    random, tensors = np.random.RandomState(0), {}
    for name, shape in sorted(shapes.items()):
        scale = 0.3 if len(shape) < 2 else np.prod(shape[1:]) ** -0.5
        around = float(len(shape) == 1 and name.endswith(".weight"))
        tensors[name] = np.asarray(around + scale * random.standard_normal(shape), np.float32)
    return tensors


@pytest.fixture
def folder(tmp_path):
    """Writes a golden network as a folder of transformers; `change` may change its tensors."""

    def write(name: str, change=lambda tensors: tensors, processor=None, **config) -> Path:
        about = described(name)
        (tmp_path / "config.json").write_text(json.dumps(about["config"] | config))
        processor = about["processor"] | (processor or {})
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
        save_file(change(filled(about["tensors"])), tmp_path / "model.safetensors")
        return tmp_path

    return write


@pytest.fixture(autouse=True)
def _strict():
    with jax.default_matmul_precision("highest"):
        yield


def near(found, expected, tolerance=1e-5) -> None:
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


def same(a, b) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y, strict=True), a, b)


def refused(call, *args, **kwargs) -> str:
    """The one line that the user reads."""
    with pytest.raises(UserError) as error:
        call(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- what torch says -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["quick", "exact"])
def test_both_towers(name, folder):
    expected = np.load(GOLDEN / f"{name}.npz")
    path = folder(name)
    vision, params = clip_folders.load_vision(path)
    near(jax.jit(vision.encode)(params, expected["pixels"]), expected["image"])
    text, params = clip_folders.load_text(path)
    near(jax.jit(text.apply)(params, expected["ids"]).pooled, expected["text"])


def test_the_tower_over_devices(folder):
    """Parameters over `fsdp`, pictures over `data`; from bytes on, which Pillow resized there."""
    expected = np.load(GOLDEN / "quick.npz")
    devices = mesh.make_mesh({"data": 3, "fsdp": 2}, jax.devices()[:6])
    vision, params = clip_folders.load_vision(
        folder("quick"), shardings=lambda tree, rules: mesh.shardings(tree, devices, rules)
    )
    patches = params["vision_model"]["embeddings"]["patch_embedding"]["kernel"]
    assert patches.sharding.shard_shape(patches.shape) == (8, 8, 3, 5)
    pictures = jax.device_put(expected["pictures"], jax.NamedSharding(devices, jax.P("data")))
    found = jax.jit(lambda p, x: vision.embed(p, x.astype(jnp.float32) / 127.5 - 1))
    near(found(params, pictures), expected["picture"], 1e-3)


def test_half_precision_is_near(folder):
    expected = np.load(GOLDEN / "exact.npz")
    vision, params = clip_folders.load_vision(
        folder("exact"), jnp.bfloat16, param_dtype=jnp.bfloat16
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    found = jax.jit(vision.encode)(params, expected["pixels"])
    assert found.dtype == jnp.float32
    near(found, expected["image"], 0.05)


def test_the_released_size():
    """Parameters of ViT-H/14 and its projection, and they split over eight devices."""
    tower = clip.vision(clip.from_hub(VIT_H, 1024), clip.Normalisation())
    abstract = jax.eval_shape(tower.init, jax.random.key(0))
    whole = sum(leaf.size for leaf in jax.tree.leaves(abstract))
    assert whole == 632_076_800
    placed = mesh.shardings(abstract, mesh.make_mesh({"fsdp": 8}), clip.RULES)
    pairs = zip(jax.tree.leaves(placed), jax.tree.leaves(abstract), strict=True)
    assert sum(leaf.size for place, leaf in pairs if place.is_fully_replicated) < 0.01 * whole


# --- preprocessing -------------------------------------------------------------------------------


def wavy(high: int, wide: int) -> np.ndarray:
    """Bytes with edges, flat parts and noise, `[high, wide, 3]`."""
    random = np.random.default_rng(0)
    rows, columns = np.indices((high, wide))[..., None]
    wave = np.sign(np.sin(rows / 5 + [0, 1, 2]) + np.sin(columns / 7 + [3, 1, 5]))
    noise = random.standard_normal((high, wide, 3))
    return np.clip(127 + 90 * wave + 30 * noise, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("shape", [(512, 512, 224), (150, 101, 40), (40, 30, 56)])
def test_pictures_are_resized_as_by_pillow(shape):
    """At most one off of 255, in less than one value of a hundred; smaller, larger, not square."""
    high, wide, side = shape
    picture = wavy(high, wide)
    to = (side * wide // min(high, wide), side * high // min(high, wide))
    expected = np.asarray(Image.fromarray(picture).resize(to, Image.Resampling.BICUBIC), float)
    found = np.asarray(clip.resize(jnp.asarray(picture, jnp.float32)[None], *to[::-1]))[0]
    assert np.abs(found - expected).max() <= 1
    assert np.mean(found != expected) < 0.01
    loose = jax.image.resize(jnp.asarray(picture, jnp.float32), (*to[::-1], 3), "cubic")
    assert np.abs(np.clip(loose, 0, 255) - expected).max() > 2, "rounding between passes matters"


def test_the_middle_is_normalised():
    """A picture of the tower's own height loses its sides only."""
    picture = wavy(24, 31)
    given = jnp.asarray(picture, jnp.float32)[None] / 127.5 - 1
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.4, 0.25)
    found = clip.preprocess(given, 24, clip.Normalisation(mean, std))
    expected = (picture[:, 3:27] / 255 - mean) / std
    np.testing.assert_allclose(found[0], expected, atol=1e-5)


def test_what_lies_beyond_white_and_black_is_cut_before_resizing():
    given = 2 * (jnp.asarray(wavy(40, 30), jnp.float32)[None] / 127.5 - 1)
    found, expected = (
        clip.preprocess(pictures, 24, clip.Normalisation())
        for pictures in (given, jnp.clip(given, -1, 1))
    )
    np.testing.assert_array_equal(found, expected)


def test_pixels_of_another_side_are_refused(folder):
    vision, params = clip_folders.load_vision(folder("quick"))
    assert "the tower sees (24, 24, 3)" in refused(vision.encode, params, jnp.zeros((1, 8, 8, 3)))


# --- open_clip's layout --------------------------------------------------------------------------

BLOCK = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def as_open_clip(tensors: dict) -> dict:
    """The same network under open_clip's names."""
    out = {"logit_scale": tensors["logit_scale"]}
    for tower, to, places in (
        ("vision_model", "visual.", "visual.positional_embedding"),
        ("text_model", "", "positional_embedding"),
    ):
        out[places] = tensors[f"{tower}.embeddings.position_embedding.weight"]
        depth = len({name for name in tensors if name.startswith(f"{tower}.encoder.layers.")}) // 16
        for i in range(depth):
            ours, theirs = f"{tower}.encoder.layers.{i}", f"{to}transformer.resblocks.{i}"
            for kind in ("weight", "bias"):
                parts = [tensors[f"{ours}.self_attn.{x}_proj.{kind}"] for x in "qkv"]
                out[f"{theirs}.attn.in_proj_{kind}"] = np.concatenate(parts)
                for a, b in BLOCK.items():
                    out[f"{theirs}.{b}.{kind}"] = tensors[f"{ours}.{a}.{kind}"]
    for kind in ("weight", "bias"):
        out[f"visual.ln_pre.{kind}"] = tensors[f"vision_model.pre_layrnorm.{kind}"]
        out[f"visual.ln_post.{kind}"] = tensors[f"vision_model.post_layernorm.{kind}"]
        out[f"ln_final.{kind}"] = tensors[f"text_model.final_layer_norm.{kind}"]
    out["visual.class_embedding"] = tensors["vision_model.embeddings.class_embedding"]
    out["visual.conv1.weight"] = tensors["vision_model.embeddings.patch_embedding.weight"]
    out["visual.proj"] = tensors["visual_projection.weight"].T.copy()
    out["token_embedding.weight"] = tensors["text_model.embeddings.token_embedding.weight"]
    out["text_projection"] = tensors["text_projection.weight"].T.copy()
    return out


OPEN_CLIP = {
    "model_cfg": {
        "embed_dim": 3,
        "vision_cfg": {
            "image_size": 20,
            "layers": 2,
            "width": 9,
            "head_width": 3,
            "patch_size": 5,
        },
        "text_cfg": {"context_length": 9, "vocab_size": 31, "width": 6, "heads": 2, "layers": 1},
    },
    "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5]},
}


def write_open_clip(path: Path, change=lambda tensors: tensors, **model) -> Path:
    path.mkdir(exist_ok=True)
    about = OPEN_CLIP | {"model_cfg": OPEN_CLIP["model_cfg"] | model}
    (path / "open_clip_config.json").write_text(json.dumps(about))
    tensors = as_open_clip(filled(described("exact")["tensors"]))
    save_file(change(tensors), path / "open_clip_model.safetensors")
    return path


def test_open_clip_has_the_same_parameters(folder, tmp_path):
    theirs = folder("exact")
    path = write_open_clip(tmp_path / "open_clip")
    same(clip_folders.load_vision(path)[1], clip_folders.load_vision(theirs)[1])
    same(clip_folders.load_text(path)[1], clip_folders.load_text(theirs)[1])
    ours, described = clip_folders.describe(path), clip_folders.describe(theirs)
    assert (ours.vision, ours.text.projected) == (described.vision, described.text.projected)
    assert not ours.text.end  # pooled at the largest id
    assert ours.normalisation == clip.Normalisation((0.1, 0.2, 0.3), (0.5, 0.5, 0.5))
    assert described.normalisation == clip.Normalisation()
    assert ours.vision.gelu and ours.text.gelu
    quick = clip_folders.describe(write_open_clip(path, quick_gelu=True))
    assert not quick.vision.gelu and not quick.text.gelu


def test_open_clip_over_devices(tmp_path):
    """Query, key and value are cut apart before they are placed."""
    path = write_open_clip(tmp_path)
    devices = mesh.make_mesh({"fsdp": 3}, jax.devices()[:3])
    _, params = clip_folders.load_vision(
        path, shardings=lambda tree, rules: mesh.shardings(tree, devices, rules)
    )
    kernel = params["vision_model"]["encoder"]["layers_1"]["self_attn"]["k_proj"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (9, 3)
    same(jax.device_get(params), jax.device_get(clip_folders.load_vision(path)[1]))


def test_transformers_files_come_first(folder):
    """LAION's folders have both layouts."""
    path = write_open_clip(folder("exact"))
    assert not clip_folders.describe(path).open_clip
    (path / "model.safetensors").unlink()
    assert clip_folders.describe(path).open_clip


# --- refusals ------------------------------------------------------------------------------------


def test_tensors_that_do_not_fit_are_all_named(folder, tmp_path):
    def broken(tensors):
        del tensors["vision_model.pre_layrnorm.bias"]
        del tensors["text_model.final_layer_norm.bias"]
        tensors["visual_projection.weight"] = np.zeros((2, 2), np.float32)
        return tensors | {"vision_model.more": np.zeros(2, np.float32)}

    path = folder("quick", broken)
    line = refused(clip_folders.load_vision, path)
    assert "vision_model.pre_layrnorm.bias (10,) is missing" in line
    assert "vision_model.more (2,) is unknown" in line
    assert "visual_projection.weight is (2, 2), must be (6, 10)" in line
    assert "final_layer_norm" not in line
    line = refused(clip_folders.load_text, path)
    assert "text_model.final_layer_norm.bias (15,) is missing" in line

    def cut(tensors):
        name = "visual.transformer.resblocks.0.attn.in_proj_weight"
        return tensors | {name: tensors[name][:9], "bias": np.zeros(2, np.float32)}

    path = write_open_clip(tmp_path / "open_clip", cut)
    line = refused(clip_folders.load_vision, path)
    assert "in_proj_weight is (9, 9), must be (27, 9)" in line
    assert "bias (2,) is unknown" in refused(clip_folders.load_text, path)


def test_pickle_files_are_refused(folder, tmp_path):
    path = folder("quick")
    (path / "model.safetensors").unlink()
    (path / "pytorch_model.bin").write_bytes(b"anything")
    assert "only pickle files" in refused(clip_folders.load_vision, path)
    path = write_open_clip(tmp_path / "open_clip")
    (path / "open_clip_model.safetensors").rename(path / "open_clip_pytorch_model.bin")
    line = refused(clip_folders.load_text, path)
    assert "pickle files are never opened" in line and "safe_serialization=True" in line


@pytest.mark.parametrize(
    ("processor", "config", "said"),
    [
        ({"resample": 2}, {}, "resample = 2"),
        ({"crop_size": {"height": 20, "width": 20}}, {}, "image_size = 24"),
        ({"do_center_crop": False}, {}, "do_center_crop = False"),
        ({"image_std": [0.5, 0.0, 0.5]}, {}, "std [0.5, 0.0, 0.5]"),
        ({"image_mean": [0.5]}, {}, "must be three numbers"),
        ({}, {"model_type": "siglip"}, "model_type 'siglip'"),
        ({}, {"vision_config": {"hidden_act": "relu"}}, "hidden_act = 'relu'"),
        ({}, {"vision_config": {"patch_size": 9}}, "image_size 224"),
        ({}, {"projection_dim": 0}, "projection_dim = 0"),
    ],
)
def test_variants_that_are_not_computed(processor, config, said, folder):
    path = folder("quick", processor=processor, **config)
    line = refused(clip_folders.load_vision, path)
    assert said in line and str(path) in line


def test_open_clip_variants_that_are_not_computed(tmp_path):
    vision = OPEN_CLIP["model_cfg"]["vision_cfg"]
    path = write_open_clip(tmp_path, vision_cfg=vision | {"timm_model_name": "vit"})
    assert "timm_model_name = 'vit'" in refused(clip_folders.load_vision, path)
    path = write_open_clip(tmp_path, embed_dim=None)
    assert "embed_dim = None" in refused(clip_folders.load_text, path)
    (tmp_path / "open_clip_config.json").unlink()
    assert "no config.json" in refused(clip_folders.load_text, tmp_path)


# --- prompts -------------------------------------------------------------------------------------


def test_prompts_are_embedded(folder):
    """As the text tower embeds their ids, of unit length; more prompts than go at once."""
    path = folder("quick")
    words = ["a</w>", "b</w>", "c</w>", "a", "b", "c"]
    vocabulary = {word: i for i, word in enumerate(words)} | {"<s>": 29, "</s>": 30}
    (path / "vocab.json").write_text(json.dumps(vocabulary))
    (path / "merges.txt").write_text("#version: 0.2\n")
    special = {"unk_token": "</s>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    about = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 6} | special
    (path / "tokenizer_config.json").write_text(json.dumps(about))
    prompts = ["a b", "c", "c c a"] * 25
    found = clip_folders.embed_prompts(path, prompts)
    model, params = clip_folders.load_text(path)
    ids = np.array([[29, 0, 1, 30, 30, 30], [29, 2, 30, 30, 30, 30], [29, 2, 2, 0, 30, 30]])
    expected = jax.jit(model.apply)(params, ids.astype(np.int32)).pooled
    expected = expected / np.linalg.norm(expected, axis=-1, keepdims=True)
    np.testing.assert_allclose(found, np.tile(expected, (25, 1)), atol=1e-5)


def test_names_of_the_tower_are_the_checkpoints():
    about = described("quick")
    vision = clip.from_hub(about["config"]["vision_config"], 6)
    abstract = jax.eval_shape(clip.vision(vision, clip.Normalisation()).init, jax.random.key(0))
    names = {
        tensor.name.replace("embedding.bias", "embedding") for tensor in hub.mirrored(abstract)
    }
    assert names == {name for name in about["tensors"] if name.startswith("vis")}
