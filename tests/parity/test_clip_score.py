"""Against transformers' CLIPModel and its image processor: both towers, and CLIPScore whole.

Run as a program, it writes tests/models/golden/clip/: each small network's config.json, the names
and shapes of its tensors, and what torch computes when `filled` fills them, for the tests that run
without torch.
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

from jaxalign.models import clip_folders as folders
from jaxalign.rewards.clip_score import clip_score

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity

GOLDEN = Path(__file__).parents[1] / "models" / "golden" / "clip"
TEXT = dict(vocab_size=31, max_position_embeddings=9, bos_token_id=29, pad_token_id=0)
END = 28  # the largest id of every prompt


def config(act: str, projected: int, text: dict, vision: dict):
    return transformers.CLIPConfig(
        text_config=TEXT | dict(hidden_act=act) | text,
        vision_config=dict(hidden_act=act) | vision,
        projection_dim=projected,
    )


# Odd widths and heads, so that a wrong transpose or split shows.
MODELS = {
    "quick": lambda: config(
        "quick_gelu",
        6,
        dict(
            hidden_size=15,
            intermediate_size=22,
            num_attention_heads=3,
            num_hidden_layers=2,
            eos_token_id=2,
        ),
        dict(
            hidden_size=10,
            intermediate_size=14,
            num_attention_heads=2,
            num_hidden_layers=3,
            image_size=24,
            patch_size=8,
        ),
    ),
    "exact": lambda: config(  # inner widths of whole ratios, which open_clip's file can hold
        "gelu",
        3,
        dict(
            hidden_size=6,
            intermediate_size=24,
            num_attention_heads=2,
            num_hidden_layers=1,
            eos_token_id=END,
        ),
        dict(
            hidden_size=9,
            intermediate_size=36,
            num_attention_heads=3,
            num_hidden_layers=2,
            image_size=20,
            patch_size=5,
        ),
    ),
}


@pytest.fixture(autouse=True)
def _strict():
    torch.set_num_threads(1)
    with jax.default_matmul_precision("highest"):
        yield


def filled(shapes: dict[str, list[int]]) -> dict[str, np.ndarray]:
    """A checkpoint of numbers that depend on names and shapes only; norms scale by about one."""
    random, tensors = np.random.RandomState(0), {}
    for name, shape in sorted(shapes.items()):
        scale = 0.3 if len(shape) < 2 else np.prod(shape[1:]) ** -0.5
        around = float(len(shape) == 1 and name.endswith(".weight"))
        tensors[name] = np.asarray(around + scale * random.standard_normal(shape), np.float32)
    return tensors


def shapes(net) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in net.state_dict().items()}


@functools.cache
def theirs(name: str):
    net = transformers.CLIPModel(MODELS[name]())
    net.load_state_dict({k: torch.tensor(v) for k, v in filled(shapes(net)).items()})
    return net.eval()


def processor(name: str):
    side = theirs(name).config.vision_config.image_size
    kind = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    return kind(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


@pytest.fixture(params=MODELS)
def saved(request, tmp_path):
    """A network's name and its folder."""
    theirs(request.param).save_pretrained(tmp_path)
    processor(request.param).save_pretrained(tmp_path)
    return request.param, tmp_path


def inputs(name: str) -> dict[str, np.ndarray]:
    random, side = np.random.RandomState(1), theirs(name).config.vision_config.image_size
    ids = random.randint(3, END, size=(3, 9))
    ids[np.arange(3), [8, 4, 6]] = END
    return {
        "ids": ids.astype(np.int32),
        "pixels": random.standard_normal((3, side, side, 3)).astype(np.float32),
        "pictures": pictures(random, 3, side + 3, 2 * side),
    }


def pictures(random, count: int, high: int, wide: int) -> np.ndarray:
    """Bytes that go up and down, with noise: edges and flat parts."""
    rows, columns = np.arange(high)[None, :, None, None], np.arange(wide)[None, None, :, None]
    phase = random.uniform(0, 6, size=(2, count, 1, 1, 3))
    wave = np.sign(np.sin(rows / 5 + phase[0]) + np.sin(columns / 7 + phase[1]))
    noise = random.standard_normal((count, high, wide, 3))
    return np.clip(127 + 90 * wave + 30 * noise, 0, 255).astype(np.uint8)


def first(x) -> torch.Tensor:
    """Channels first, for torch."""
    return torch.tensor(np.moveaxis(np.asarray(x), -1, 1).copy())


def tensor(found) -> np.ndarray:
    """transformers 5 wraps the projected embeddings."""
    return getattr(found, "pooler_output", found).numpy()


@torch.no_grad()
def torch_outputs(name: str, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    net = theirs(name)
    pixels = processor(name)(list(given["pictures"]), return_tensors="pt")["pixel_values"]
    text = net.get_text_features(input_ids=torch.tensor(given["ids"]).long())
    out = {
        "image": tensor(net.get_image_features(pixel_values=first(given["pixels"]))),
        "text": tensor(text),
        "seen": np.moveaxis(pixels.numpy(), 1, -1),
        "picture": tensor(net.get_image_features(pixel_values=pixels)),
    }
    for key, embedded in {"score": "image", "score_of_pictures": "picture"}.items():
        out[key] = torch.nn.functional.cosine_similarity(
            torch.tensor(out[embedded]), torch.tensor(out["text"])
        ).numpy()
    return out


def error(found, expected) -> float:
    """The greatest difference, in terms of the greatest number."""
    return np.abs(np.asarray(found) - expected).max() / np.abs(expected).max()


def test_embeddings_and_score(saved):
    name, path = saved
    given = inputs(name)
    expected = torch_outputs(name, given)
    vision, params = folders.load_vision(path)
    text, text_params = folders.load_text(path)
    rows = jax.jit(text.apply)(text_params, given["ids"]).pooled
    assert error(rows, expected["text"]) < 1e-5
    assert error(jax.jit(vision.encode)(params, given["pixels"]), expected["image"]) < 1e-5
    score = jax.jit(clip_score(vision.encode))(given["pixels"], {"target": rows}, params)
    assert error(score, expected["score"]) < 1e-5


def test_score_of_pictures(saved):
    """From bytes on: Pillow's own resize against ours, which may be one off in few values."""
    name, path = saved
    given = inputs(name)
    expected = torch_outputs(name, given)
    vision, params = folders.load_vision(path)
    scaled = jnp.asarray(given["pictures"], jnp.float32) / 127.5 - 1
    std = np.asarray(folders.describe(path).normalisation.std)
    levels = 255 * std * (np.asarray(jax.jit(vision.preprocess)(scaled)) - expected["seen"])
    assert np.abs(levels).max() < 1.001
    assert np.mean(np.abs(levels) > 0.001) < 0.01
    target = {"target": jnp.asarray(expected["text"])}
    score = jax.jit(clip_score(vision.embed))(scaled, target, params)
    assert error(score, expected["score_of_pictures"]) < 1e-3


def write_golden() -> None:
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for name in MODELS:
        net, given = theirs(name), inputs(name)
        with tempfile.TemporaryDirectory() as folder:
            net.save_pretrained(folder)
            described = {"config": json.loads((Path(folder) / "config.json").read_text())}
            processor(name).save_pretrained(folder)
            file = next(Path(folder).glob("*processor_config.json"))
            described["processor"] = json.loads(file.read_text())
        described["tensors"] = shapes(net)
        (GOLDEN / f"{name}.json").write_text(json.dumps(described) + "\n", encoding="utf-8")
        expected = torch_outputs(name, given)
        del expected["seen"]
        np.savez_compressed(GOLDEN / f"{name}.npz", **given, **expected)


if __name__ == "__main__":
    write_golden()
