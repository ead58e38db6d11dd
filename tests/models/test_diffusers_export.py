"""Exported pipelines: what is written is read, from several devices and in shards; kills."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.core import mesh
from jaxalign.core.types import UserError
from jaxalign.models import diffusers_export, diffusers_folders, unet

GOLDEN = Path(__file__).parent / "golden" / "stable_diffusion"
STEM = "diffusion_pytorch_model"


def same(a, b) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y, strict=True), a, b)


def refused(call, *args, **kwargs) -> str:
    """The one line that the user reads."""
    with pytest.raises(UserError) as error:
        call(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def source(pipeline):
    """A pipeline with other parts, files that are no part, and parts that are not there."""
    path = pipeline("unet_1")
    pipeline("vae")
    (path / "tokenizer").mkdir()
    (path / "tokenizer" / "vocab.json").write_text("{}")
    (path / "left.ckpt").write_bytes(b"a large file beside the parts")
    (path / "logs").mkdir()
    parts = {name: ["a", "b"] for name in ("unet", "vae", "tokenizer", "safety_checker")}
    (path / "model_index.json").write_text(json.dumps({"_class_name": "Any"} | parts))
    return path


@functools.cache
def small():
    """Parameters for the source's U-Net."""
    described = json.loads((GOLDEN / "unet_1.json").read_text())
    abstract = jax.eval_shape(unet.unet(unet.from_hub(described["config"])).init, jax.random.key(0))
    random = np.random.RandomState(4)
    return jax.tree.map(lambda a: jnp.asarray(random.standard_normal(a.shape), a.dtype), abstract)


def test_a_whole_pipeline(source, tmp_path):
    out = tmp_path / "deeper" / "out"
    diffusers_export.save_folder(source, out, small())
    names = ["model_index.json", "tokenizer", "unet", "vae"]
    assert sorted(file.name for file in out.iterdir()) == names
    assert [file.name for file in out.parent.iterdir()] == ["out"]
    same(diffusers_folders.load_unet(out)[1], small())
    same(diffusers_folders.load_vae(out)[1], diffusers_folders.load_vae(source)[1])
    for file in ("model_index.json", "tokenizer/vocab.json", "unet/config.json"):
        assert (out / file).read_text() == (source / file).read_text()


def test_from_several_devices_in_shards_of_half_precision(source, tmp_path):
    devices = mesh.make_mesh({"data": 2, "fsdp": 2}, jax.devices()[:4])
    _, params = diffusers_folders.load_unet(
        source, shardings=lambda tree, rules: mesh.shardings(tree, devices, rules)
    )
    kernel = params["mid_block"]["resnets_0"]["conv1"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (3, 3, 10, 5)
    out = tmp_path / "out"
    diffusers_export.save_unet(source, out, params, dtype=jnp.float16, shard_bytes=10_000)
    files = sorted(file.name for file in (out / "unet").glob("*.safetensors"))
    assert files[0] == f"{STEM}-00001-of-{len(files):05d}.safetensors" and len(files) > 2
    index = json.loads((out / "unet" / f"{STEM}.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in jax.tree.leaves(params)) // 2
    assert max((out / "unet" / file).stat().st_size for file in files) < 10_000 + 10_000
    _, found = diffusers_folders.load_unet(out, param_dtype=jnp.float16)
    expected = jax.tree.map(lambda a: a.astype(np.float16), jax.device_get(params))
    same(jax.device_get(found), expected)


def test_a_kill_leaves_no_half_folder(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    written = []

    def killed(_, file, **__):
        file.write_bytes(b"half")
        written.append(file)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("jaxalign.models.weights.save_file", killed)
        diffusers_export.save_folder(source, out, small())
    assert written[0].parent == tmp_path / "out.partial" / "unet" and not out.exists()
    diffusers_export.save_folder(source, out, small())
    assert not written[0].exists()
    assert (out / "unet" / f"{STEM}.safetensors").exists() and not list(tmp_path.glob("*.partial"))


def test_parameters_that_do_not_fit_are_all_named(source, tmp_path):
    wrong = {**small(), "conv_in": {"kernel": jnp.zeros((3, 3, 4, 5)), "more": jnp.zeros(2)}}
    line = refused(diffusers_export.save_unet, source, tmp_path / "out", wrong)
    assert "conv_in/bias (6,) is missing" in line and "conv_in/more (2,) is unknown" in line
    assert "conv_in/kernel is (3, 3, 4, 5), must be (3, 3, 4, 6)" in line
    assert not (tmp_path / "out").exists()


def test_folders_that_are_refused(source, tmp_path):
    line = refused(diffusers_export.save_folder, source, source, small())
    assert "is there already and is not overwritten" in line
    (tmp_path / "empty").mkdir()
    diffusers_export.save_unet(source, tmp_path / "empty", small())
    (source / "model_index.json").unlink()
    line = refused(diffusers_export.save_folder, source, tmp_path / "out", small())
    assert "no model_index.json can be read" in line
