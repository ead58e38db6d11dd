"""Folders in diffusers' layout: variants, refusals, the Hub's cache, schedule, tokenizer."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxalign.core.types import UserError
from jaxalign.models import diffusers_folders as folders

SINGLE = "diffusion_pytorch_model.safetensors"


def same(a, b) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y, strict=True), a, b)


def refused(call, *args, **kwargs) -> str:
    """The one line that the user reads."""
    with pytest.raises(UserError) as error:
        call(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- variants ------------------------------------------------------------------------------------


def test_old_names_of_the_autoencoders_attention(pipeline):
    """As the files of Stable Diffusion 1 have them."""
    _, expected = folders.load_vae(pipeline("vae"))
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(tensors):
        for new, name in old.items():
            tensors = {k.replace(f".{new}.", f".{name}."): v for k, v in tensors.items()}
        assert sum(".query." in key for key in tensors) == 4  # two ways, weight and bias
        return tensors

    same(folders.load_vae(pipeline("vae", rename))[1], expected)


def test_names_with_and_without_prefix(pipeline):
    """Those of the Hub have it, and a constant beside the parameters."""
    _, expected = folders.load_text_encoder(pipeline("clip_1"))

    def prefixed(tensors):
        assert not any(name.startswith("text_model.") for name in tensors)
        places = {"text_model.embeddings.position_ids": np.arange(9)[None]}
        return places | {f"text_model.{name}": tensor for name, tensor in tensors.items()}

    same(folders.load_text_encoder(pipeline("clip_1", prefixed))[1], expected)


def test_half_precision_in_several_files(pipeline):
    """The full one is read where both are there."""
    path = pipeline("vae")
    file = path / "vae" / SINGLE
    _, full = folders.load_vae(path)
    tensors = {name: tensor.astype(np.float16) for name, tensor in load_file(file).items()}
    names = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2]), start=1):
        cut = f"diffusion_pytorch_model.fp16-{i:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, path / "vae" / cut)
        weight_map |= dict.fromkeys(part, cut)
    index = path / "vae" / "diffusion_pytorch_model.safetensors.index.fp16.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    same(folders.load_vae(path)[1], full)
    file.unlink()
    _, half = folders.load_vae(path, param_dtype=jnp.float16)
    same(half, jax.tree.map(lambda a: a.astype(jnp.float16), full))
    index.unlink()
    save_file(tensors, path / "vae" / "diffusion_pytorch_model.fp16.safetensors")
    same(folders.load_vae(path, param_dtype=jnp.float16)[1], half)


def test_second_text_encoder(pipeline):
    path = pipeline("clip_2")
    (path / "text_encoder").rename(path / "text_encoder_2")
    _, params = folders.load_text_encoder(path, part="text_encoder_2")
    assert params["text_projection"]["kernel"].shape == (10, 7)
    assert "text_encoder: no config.json" in refused(folders.load_text_encoder, path)


# --- refusals ------------------------------------------------------------------------------------


def test_tensors_that_do_not_fit_are_all_named(pipeline):
    def broken(tensors):
        del tensors["decoder.conv_in.bias"]
        tensors["quant_conv.weight"] = np.zeros((6, 6), np.float32)
        return tensors | {"decoder.more": np.zeros(2, np.float32)}

    line = refused(folders.load_vae, pipeline("vae", broken))
    assert "decoder.conv_in.bias (10,) is missing" in line
    assert "decoder.more (2,) is unknown" in line
    assert "quant_conv.weight is (6, 6), must be (6, 6, 1, 1)" in line


def test_pickle_files_are_refused(pipeline):
    path = pipeline("vae")
    (path / "vae" / SINGLE).unlink()
    assert f"neither {SINGLE} nor" in refused(folders.load_vae, path)
    (path / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"anything")
    line = refused(folders.load_vae, path)
    assert "only pickle files" in line and "of diffusers" in line


def test_parts_of_other_kinds(pipeline):
    path = pipeline("vae", _class_name="AutoencoderTiny")
    assert "'AutoencoderTiny': only AutoencoderKL" in refused(folders.load_vae, path)
    path = pipeline("unet_1", _class_name="UNet2DModel")
    assert "'UNet2DModel': only UNet2DConditionModel" in refused(folders.read_unet_config, path)


# --- the Hub's cache -----------------------------------------------------------------------------


def test_names_of_the_hub_come_from_the_cache_alone(pipeline, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    line = refused(folders.resolve, "somebody/something")
    assert "neither a folder nor in the Hugging Face cache" in line
    assert "neither a folder" in refused(folders.resolve, "no/such/folder")
    repository = tmp_path / "cache" / "models--somebody--something"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir()
    pipeline("unet_2").rename(snapshot)
    assert folders.resolve("somebody/something") == snapshot
    assert folders.read_unet_config("somebody/something").heads == (3, 5)
    assert folders.read_unet_config(snapshot) == folders.read_unet_config(str(snapshot))


# --- schedule and tokenizer ----------------------------------------------------------------------

SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
}


def write_scheduler(path: Path, **changes) -> Path:
    (path / "scheduler").mkdir(exist_ok=True)
    file = path / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(SCHEDULER | changes))
    return path


def test_schedule(tmp_path):
    schedule = folders.read_schedule(write_scheduler(tmp_path))
    assert schedule.prediction == "epsilon"  # files of Stable Diffusion 1 do not say it
    # The shares at two of its 20 steps, and at the first level.
    found = schedule.alphas[[951, 51, 0]]
    np.testing.assert_allclose(found, [0.008155, 0.950524, 0.99915], atol=5e-7)
    two = folders.read_schedule(write_scheduler(tmp_path, prediction_type="v_prediction"))
    assert two.prediction == "v"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"beta_schedule": "linear"}, "beta_schedule = 'linear'"),
        ({"prediction_type": "sample"}, "prediction_type = 'sample'"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr = True"),
        ({"num_train_timesteps": 0}, "num_train_timesteps = 0"),
    ],
)
def test_schedules_that_are_not_computed(changes, said, tmp_path):
    assert said in refused(folders.read_schedule, write_scheduler(tmp_path, **changes))


def test_tokenizer(tmp_path):
    path = tmp_path / "tokenizer"
    path.mkdir()
    assert "no tokenizer" in refused(folders.load_tokenizer, tmp_path)
    words = ["a", "b", "a</w>", "b</w>", "ab</w>", "<|startoftext|>", "<|endoftext|>"]
    (path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (path / "merges.txt").write_text("#version: 0.2\na b</w>\n")
    values = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 6}
    special = {"unk_token": words[6], "bos_token": words[5], "eos_token": words[6]}
    values |= special | {"pad_token": words[6]}
    (path / "tokenizer_config.json").write_text(json.dumps(values))
    tokenize = folders.load_tokenizer(tmp_path)
    ids = tokenize(["AB a", "", "b b b b b b b b"])
    expected = [[5, 4, 2, 6, 6, 6], [5, 6, 6, 6, 6, 6], [5, 3, 3, 3, 3, 6]]
    np.testing.assert_array_equal(ids, np.asarray(expected, np.int32), strict=True)
