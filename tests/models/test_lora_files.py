"""LoRA files of Stable Diffusion: there and back, names in every dialect, scales, refusals."""

import functools
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxalign.core.types import UserError
from jaxalign.models import hub, lora, lora_files, unet
from tests.models.test_stable_diffusion import UNET_1

GOLDEN = Path(__file__).parent / "golden" / "stable_diffusion"
QUERY = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
PATH = QUERY.replace("s.0", "s_0").replace(".", "/") + "/kernel"
# With two blocks where the released one has ten.
UNET_XL = UNET_1 | {
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 2],
    "up_block_types": [*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"],
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "transformer_layers_per_block": [1, 2, 2],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


RELEASED = {"1.x": UNET_1, "XL": UNET_XL}


@functools.cache
def shapes(name: str) -> dict:
    """The abstract parameters of a U-Net, released or golden."""
    values = RELEASED.get(name) or json.loads((GOLDEN / f"{name}.json").read_text())["config"]
    return jax.eval_shape(unet.unet(unet.from_hub(values)).init, jax.random.key(0))


def trained(params, rule: str = lora_files.RULE, rank: int = 3) -> dict:
    """Adapters of random numbers, both matrices."""
    random = np.random.RandomState(0)

    def draw(shape) -> jax.Array:
        return jnp.asarray(random.standard_normal(shape), jnp.float32)

    abstract = jax.eval_shape(
        lambda key, params: lora.init_lora(key, params, rank, rule), jax.random.key(0), params
    )
    return jax.tree.map(lambda leaf: draw(leaf.shape), abstract)


def same(a, b) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y, strict=True), a, b)


def refused(call, *args, **kwargs) -> str:
    """The one line that the user reads."""
    with pytest.raises(UserError) as error:
        call(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- there and back ------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", ["peft", "processor"])
@pytest.mark.parametrize("name", ["unet_1", "unet_2", "unet_xl"])
def test_what_is_written_is_read(name, dialect, tmp_path):
    adapters = trained(shapes(name))
    lora_files.save(tmp_path / "new" / "folder", adapters, dialect=dialect)
    assert [file.name for file in (tmp_path / "new" / "folder").iterdir()] == [lora_files.FILE]
    same(lora_files.load(tmp_path / "new" / "folder", shapes(name)), adapters)
    same(lora_files.load(tmp_path / "new" / "folder" / lora_files.FILE, shapes(name)), adapters)


def test_other_matrices_too(tmp_path):
    """All of them, feed-forward, time and linear projections too; no convolution."""
    adapters = trained(shapes("unet_2"), ".*")
    assert any("proj_in" in path for path in adapters) and any("/ff/" in path for path in adapters)
    lora_files.save(tmp_path / "all", adapters)
    same(lora_files.load(tmp_path / "all", shapes("unet_2")), adapters)
    line = refused(lora_files.save, tmp_path / "other", adapters, dialect="processor")
    assert "names projections of attention only" in line and not (tmp_path / "other").exists()


def test_files_of_16_bits_become_f32(tmp_path):
    adapters = trained(shapes("unet_1"))
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), adapters)
    lora_files.save(tmp_path, half)
    assert {a.dtype for a in load_file(tmp_path / lora_files.FILE).values()} == {
        jnp.dtype(jnp.bfloat16)
    }
    found = lora_files.load(tmp_path, shapes("unet_1"))
    same(found, jax.tree.map(lambda a: a.astype(jnp.float32), half))


# --- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "count", "example"),
    [
        ("1.x", 128, "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"),
        ("XL", 176, "down_blocks.2.attentions.1.transformer_blocks.1.attn2.to_out.0"),
    ],
)
def test_the_released_networks(name, count, example):
    """Every projection of attention once: eight in each of 16 blocks, of XL's 22."""
    params = shapes(name)
    table = [t for t in hub.mirrored(params) if re.fullmatch(lora_files.RULE, t.path)]
    names = {tensor.name for tensor in table}
    assert len(names) == len(table) == count and f"{example}.weight" in names
    assert all(tensor.transposed for tensor in table)


def test_the_keys_of_a_file(tmp_path):
    one: dict = {PATH: trained(shapes("unet_1"))[PATH]}
    lora_files.save(tmp_path / "peft", one)
    lora_files.save(tmp_path / "processor", one, dialect="processor")
    peft, processor = (load_file(tmp_path / d / lora_files.FILE) for d in ("peft", "processor"))
    down, up = f"unet.{QUERY}.lora_A.weight", f"unet.{QUERY}.lora_B.weight"
    assert {name: array.shape for name, array in peft.items()} == {down: (3, 6), up: (6, 3)}
    np.testing.assert_array_equal(peft[down], one[PATH]["down"].T)
    stem = f"unet.{QUERY.removesuffix('.to_q')}.processor.to_q_lora"
    assert sorted(processor) == [f"{stem}.down.weight", f"{stem}.up.weight"]
    np.testing.assert_array_equal(processor[f"{stem}.up.weight"], peft[up])


def write(path: Path, names: tuple, adapter, header=None, **more) -> Path:
    """A file with one pair under the given names, turned as files have it."""
    arrays = {names[0]: adapter["down"].T, names[1]: adapter["up"].T}
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()} | more
    save_file(arrays, path / lora_files.FILE, metadata={"format": "pt"} | (header or {}))
    return path


FLAT = "lora_unet_" + QUERY.replace(".", "_")
STEM = QUERY.replace(".to_q", ".processor.to_q_lora")


@pytest.mark.parametrize(
    "names",
    [
        (f"{QUERY}.lora_A.weight", f"{QUERY}.lora_B.weight"),
        (f"unet.{QUERY}.lora.down.weight", f"unet.{QUERY}.lora.up.weight"),
        (f"{STEM}.down.weight", f"{STEM}.up.weight"),
        (f"{FLAT}.lora_down.weight", f"{FLAT}.lora_up.weight"),
    ],
)
def test_names_that_others_write(names, tmp_path):
    adapter = trained(shapes("unet_1"))[PATH]
    same(lora_files.load(write(tmp_path, names, adapter), shapes("unet_1")), {PATH: adapter})


def test_blocks_counted_through_all_levels(tmp_path):
    """SDXL's in the dialect kohya: two residual blocks and a downsampler make three of a level."""
    params, rank = shapes("XL"), 2
    blocks = {
        "input_blocks_4_1": "down_blocks_1/attentions_0",
        "input_blocks_8_1": "down_blocks_2/attentions_1",
        "middle_block_1": "mid_block/attentions_0",
        "output_blocks_2_1": "up_blocks_0/attentions_2",
        "output_blocks_5_1": "up_blocks_1/attentions_2",
    }
    arrays, expected = {}, {}
    for i, (theirs, ours) in enumerate(blocks.items()):
        width = 640 if "s_1/" in ours else 1280
        stem = f"lora_unet_{theirs}_transformer_blocks_1_attn1_to_out_0"
        down, up = np.full((rank, width), i, np.float32), np.ones((width, rank), np.float32)
        arrays |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
        path = f"{ours}/transformer_blocks_1/attn1/to_out_0/kernel"
        expected[path] = {"down": jnp.asarray(down.T), "up": jnp.asarray(up.T)}
    save_file(arrays, tmp_path / lora_files.FILE)
    same(lora_files.load(tmp_path, params), expected)


# --- scales --------------------------------------------------------------------------------------

PAIR = (f"unet.{QUERY}.lora_A.weight", f"unet.{QUERY}.lora_B.weight")


def scale(path: Path) -> np.ndarray:
    """By how much `up` of the one pair was multiplied."""
    expected = trained(shapes("unet_1"))[PATH]
    found = lora_files.load(path, shapes("unet_1"))[PATH]
    np.testing.assert_array_equal(found["down"], expected["down"])
    ratio = np.asarray(found["up"] / expected["up"])
    np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-6)
    return ratio[0, 0]


@pytest.mark.parametrize("stem", [QUERY, f"unet.{QUERY}", FLAT])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_alpha_is_folded_in(stem, shape, tmp_path):
    alpha = {f"{stem}.alpha": np.full(shape, 1.5, np.float32)}
    path = write(tmp_path, PAIR, trained(shapes("unet_1"))[PATH], **alpha)
    assert scale(path) == 0.5


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"unet.r": 3, "unet.lora_alpha": 6}, 2),
        ({"r": 3, "lora_alpha": 6}, 2),  # of the U-Net alone
        ({"lora_alpha": 6, "use_rslora": True}, 6 / 3**0.5),
        ({"lora_alpha": 6, "alpha_pattern": {"attn1.to_k": 9, r"attn\d.to_q": 12}}, 4),
        ({"lora_alpha": 6, "alpha_pattern": {"1.to_q": 12, "to": 12}}, 2),  # no whole names
        ({"text_encoder.lora_alpha": 6}, 1),
    ],
)
def test_settings_of_peft_in_the_header(settings, expected, tmp_path):
    header = {lora_files.SETTINGS: json.dumps(settings)}
    path = write(tmp_path, PAIR, trained(shapes("unet_1"))[PATH], header)
    np.testing.assert_allclose(scale(path), expected, rtol=1e-6)


# --- refusals ------------------------------------------------------------------------------------


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({PAIR[0]: zeros(2, 6)}, [f"{QUERY}: up (6, rank) is missing"]),
        ({PAIR[1]: zeros(6, 2)}, [f"{QUERY}: down (rank, 6) is missing"]),
        ({f"{QUERY}.alpha": zeros()}, [f"{QUERY}: down (rank, 6) is missing", "up (6, rank) is"]),
        (
            {PAIR[0]: zeros(2, 5), PAIR[1]: zeros(7, 2)},
            [f"{PAIR[0]} is (2, 5), must be (rank, 6)", f"{PAIR[1]} is (7, 2), must be (6, rank)"],
        ),
        ({PAIR[0]: zeros(2, 6, 1, 1), PAIR[1]: zeros(6, 2)}, ["(2, 6, 1, 1), must be (rank, 6)"]),
        ({PAIR[0]: zeros(2, 6), PAIR[1]: zeros(6, 3)}, ["(2, 6) and", "(6, 3) differ in rank"]),
        (
            {PAIR[0]: zeros(2, 6), PAIR[1]: zeros(6, 2), f"{QUERY}.alpha": zeros(2)},
            [f"{QUERY}.alpha is (2,), must be ()"],
        ),
        (
            {PAIR[0]: zeros(2, 6), f"{STEM}.down.weight": zeros(2, 6), PAIR[1]: zeros(6, 2)},
            [f"{STEM}.down.weight", PAIR[0], "are the same matrix"],
        ),
        (
            {"text_encoder.q_proj.lora_A.weight": zeros(2, 6), f"{QUERY}.lora_C": zeros(1)},
            ["text_encoder.q_proj.lora_A.weight (2, 6) is unknown", "lora_C (1,) is unknown"],
        ),
        # A 1x1 convolution of 1.x.
        (
            {"unet.down_blocks.0.attentions.0.proj_in.lora_A.weight": zeros(2, 6)},
            ["proj_in.lora_A.weight (2, 6) is unknown"],
        ),
        ({}, ["empty"]),
    ],
)
def test_tensors_that_do_not_fit_are_all_named(arrays, said, tmp_path):
    save_file(arrays, tmp_path / lora_files.FILE)
    line = refused(lora_files.load, tmp_path, shapes("unet_1"))
    assert all(part in line for part in said), line


def test_files_that_cannot_be_read(tmp_path):
    assert "cannot be read" in refused(lora_files.load, tmp_path, shapes("unet_1"))
    pickle = tmp_path / "pytorch_lora_weights.bin"
    pickle.write_bytes(b"anything")
    for path in (tmp_path, pickle):
        line = refused(lora_files.load, path, shapes("unet_1"))
        assert f"{pickle}: pickle files are never opened" in line
    lora_files.save(tmp_path, trained(shapes("unet_1")))  # beside a pickle file
    assert lora_files.load(tmp_path, shapes("unet_1"))
    assert "cannot be read" in refused(lora_files.load, tmp_path / "nowhere", shapes("unet_1"))


def test_nothing_is_overwritten_or_half_written(tmp_path):
    adapters = trained(shapes("unet_1"))
    assert "no adapters" in refused(lora_files.save, tmp_path, {})
    wrong = {PATH: {"down": jnp.zeros((6, 2)), "up": jnp.zeros((3, 6))}}
    assert "down (6, 2), up (3, 6)" in refused(lora_files.save, tmp_path, wrong)
    assert not list(tmp_path.iterdir())
    lora_files.save(tmp_path, adapters)
    assert "not overwritten" in refused(lora_files.save, tmp_path, adapters)
