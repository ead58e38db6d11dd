"""Runs on a pipeline of random weights: from a folder to adapters, and what stops before that."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments import (
    b2_diffurl,
    cli,
    comparison,
    dry_run,
    evaluate_images,
    random_pipeline,
    report,
    stable_diffusion,
)
from experiments.image_rewards import Rewards
from jaxalign.core.types import UserError
from jaxalign.models import diffusers_folders

LORA = "official/lora/pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module", autouse=True)
def two_devices():
    """A run takes all devices; on eight the compiler works several times as long."""
    devices = jax.devices()[:2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: devices)
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline in `model` and a CLIP model in `clip`."""
    path = tmp_path_factory.mktemp("folders")
    random_pipeline.write_pipeline(path / "model", 1)
    random_pipeline.write_clip(path / "clip", 1)
    return path


def config_of(folders: Path, **changes) -> stable_diffusion.Experiment:
    config = dataclasses.replace(b2_diffurl.sd_tiny(), mesh="data=2")
    model = str(folders / "model")
    config = dataclasses.replace(config, model=model, **changes)
    if "rewards" in changes:
        return config
    return dataclasses.replace(config, rewards=Rewards(clip=str(folders / "clip")))


def run_of(config, workdir: Path, resume: bool = False) -> cli.Run:
    return cli.Run("b2_diffurl", "sd-tiny", config, workdir, resume, [config.seed], "command")


@pytest.fixture(scope="module")
def finished(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("runs") / "run"
    stable_diffusion.run_all(run_of(config_of(folders), workdir))
    return workdir


def test_a_run_leaves_numbers_pictures_and_adapters(finished: Path):
    result = json.loads((finished / "result.json").read_text())
    assert result["official/reward_evaluations"] == 3 * 8 * 2
    assert -1 <= result["official/heldout/reward"] <= 1
    for name in ("reward", "samples-train", "samples-heldout", "stages"):
        assert (finished / f"{name}.png").stat().st_size > 1000, name
    page = (finished / "report.html").read_text()
    assert "a cat washing dishes" not in page  # captions are in the pictures
    assert "clip_score" in page
    with np.load(finished / "official" / "samples-after.npz") as arrays:
        assert arrays["train/images"].shape == (3, 3, 16, 16, 3)
        assert arrays["train/latents"].shape == (9, 8, 8, 4)
        assert not np.array_equal(
            arrays["train/latents"],
            np.load(finished / "official" / "samples-before.npz")["train/latents"],
        )
    tensors = load_file(finished / LORA)
    assert sum(np.abs(array).max() > 0 for name, array in tensors.items() if "lora_B" in name) > 0
    run = comparison.read(finished)
    assert "official" in report.table(finished)
    assert run.of("official")[0].rows[0]["step"] == 0


def test_resume_is_bit_equal(finished: Path, folders: Path, tmp_path: Path):
    """As after a kill during the last stage."""
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    shutil.rmtree(workdir / "official" / "ckpt" / "3")
    shutil.rmtree(workdir / "official" / "lora")
    (workdir / "official" / "result.json").unlink()
    config = config_of(folders)
    lab = stable_diffusion.make_lab(config)
    stable_diffusion.train_arm(lab, config, "official", workdir / "official", resume=True)
    before, after = load_file(finished / LORA), load_file(workdir / LORA)
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_array_equal(before[name], after[name], strict=True)


def test_rewards_on_host_and_device_in_one_sum(folders: Path, tmp_path: Path):
    """The whole pipeline is left, with all weights trained."""
    rewards = Rewards(
        ("clip_score", "compressibility"), weights=(1.0, 0.5), clip=str(folders / "clip")
    )
    config = config_of(folders, rewards=rewards, export="folder", arms=("ddpo",))
    b2 = dataclasses.replace(config.b2, stages=1, lora_rank=0)
    stable_diffusion.run_all(run_of(dataclasses.replace(config, b2=b2), tmp_path / "run"))
    left = tmp_path / "run" / "ddpo" / "model"
    _, base = diffusers_folders.load_unet(folders / "model")
    _, trained = diffusers_folders.load_unet(left)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), base, trained)
    assert np.mean(jax.tree.leaves(moved)) > 0.9
    assert (left / "vae" / "config.json").exists()
    row = json.loads((tmp_path / "run" / "ddpo" / "metrics.jsonl").read_text().splitlines()[1])
    assert row["ratio_error"] < 1e-5


def test_evaluation_of_adapters(finished: Path, folders: Path, tmp_path: Path):
    config = dataclasses.replace(
        evaluate_images.tiny(),
        model=str(folders / "model"),
        lora=str(finished / LORA),
        rewards=Rewards(clip=str(folders / "clip")),
        most_prompts=2,
        pictures_per_device=1,
    )
    run = cli.Run("evaluate_images", "tiny", config, tmp_path / "run", False, [0], "command")
    evaluate_images.run_all(run)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    for name in ("train", "heldout"):
        base, tuned = (evaluate_images.rewards_of(result, f"{name}/{m}") for m in ("base", "lora"))
        assert len(base) == 2
        assert result[f"{name}/gain"] == pytest.approx(np.mean(tuned) - np.mean(base), abs=1e-7)
        assert result[f"{name}/gain"] != 0
        assert (tmp_path / "run" / f"{name}-lora.png").stat().st_size > 1000


def test_a_dry_run_counts(folders: Path):
    text = dry_run.describe(config_of(folders))
    _, params = diffusers_folders.load_unet(folders / "model")
    weights = sum(leaf.size for leaf in jax.tree.leaves(params))
    counted = int(text.split(" parameters")[0].replace(",", ""))
    assert weights < counted < 1.1 * weights  # with the adapters
    assert "data=2" in text
    for word in ("optimizer", "trajectories", "XLA: arguments", "a stage:"):
        assert word in text


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"model": ""}, "no model: give --model DIR"),
        ({"model": "nowhere/at-all"}, "nowhere/at-all: neither a folder nor"),
        ({"prompts": "template9"}, "give template1, template2, template3"),
        ({"rewards": Rewards()}, "reward clip_score needs a CLIP model's folder; give it with"),
        ({"rewards": Rewards(("aesthetic",))}, "--rewards.aesthetic-clip"),
        ({"pixels": 15}, "pixels = 15: must be a multiple of 2"),
        ({"mesh": "data=3"}, "must multiply to the number of devices"),
    ],
)
def test_what_stops_a_run(folders: Path, changes, word: str):
    with pytest.raises(UserError) as error:
        config = dataclasses.replace(config_of(folders), **changes)
        stable_diffusion.check(config)
        stable_diffusion.make_lab(config)
    assert word in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: Rewards(("beauty",)), "'beauty' is not one of clip_score"),
        (lambda: Rewards(("clip_score", "clip_score")), "each once"),
        (lambda: Rewards(("clip_score",), weights=(1.0, 2.0)), "1 rewards need as many numbers"),
        (lambda: stable_diffusion.Experiment(arms=("best",)), "'best' is not one of ddpo"),
        (lambda: stable_diffusion.Experiment(pictures=0), "pictures = 0: must be at least 1"),
    ],
)
def test_bad_settings(make, word: str):
    with pytest.raises(UserError) as error:
        make()
    assert word in str(error.value)


def test_parameters_lie_by_their_rules(folders: Path):
    """Every kernel in halves, adapters and what the reward knows of prompts whole."""
    config = dataclasses.replace(config_of(folders), mesh="fsdp=2")
    lab = stable_diffusion.make_lab(config)
    b2 = stable_diffusion.method_of(config, "official", lab.mesh)
    state = stable_diffusion.init_state(lab, config, b2)
    kernel = state.params["model"]["conv_in"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 2
    for leaf in jax.tree.leaves((state.params["lora"], lab.rewards.target)):
        assert leaf.is_fully_replicated


def test_chunks_fit_the_devices(folders: Path):
    """The fewest parts of which a device holds its share, on any number of devices."""
    config = stable_diffusion.Experiment(groups_per_device=8)
    for devices, expected in ((1, 32), (2, 16)):
        mesh = stable_diffusion.meshes.make_mesh({"data": -1}, jax.devices()[:devices])
        b2 = stable_diffusion.method_of(config, "official", mesh)
        assert stable_diffusion.chunks_of(config, b2, mesh) == expected
        assert b2.micro_batch == config.pairs_per_device * devices
