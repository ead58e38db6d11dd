"""A pipeline and a LoRA of it, side by side over fixed prompts and noises.

    python -m experiments.evaluate_images [sd14 | tiny] --model DIR --lora FILE --rewards.clip DIR

Leaves a report, a grid of pictures a list and model, and `result.json`: for each list of prompts
and either model the mean reward and its interval over prompts, the pairwise distance of a prompt's
pictures, and the reward of each prompt. Without --lora the pipeline alone is evaluated.

Dimensions: P prompts, N pictures of each.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments import cli, pages, stable_diffusion
from experiments.comparison import LISTS
from experiments.image_rewards import Rewards
from experiments.stable_diffusion import Experiment, Lab
from experiments.statistics import Estimate, mean_interval, paired_difference
from jaxalign.core import distributed, limits
from jaxalign.core import mesh as meshes
from jaxalign.core import metrics as sinks
from jaxalign.core.types import Params
from jaxalign.methods import b2_diffurl
from jaxalign.models import lora, lora_files
from jaxalign.ops import diversity
from jaxalign.rewards.host import to_uint8

OF_PROMPT = "/reward of: "  # and the prompt, after LIST/MODEL


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What is drawn and how; every field is a flag of the command line."""

    model: str = ""  # folder in diffusers' layout, or a name in the local Hugging Face cache
    lora: str = ""  # file or folder of its adapters
    prompts: str = "template1"  # template1, template2, template3, or a JSON list of prompts
    most_prompts: int = 100  # of each list, evenly chosen
    pictures: int = 8  # of each prompt
    rewards: Rewards = Rewards()
    steps: int = 20
    eta: float = 1.0  # noise of DDIM's steps
    guidance: float = 5.0
    pixels: int = 0  # the pictures' side; 0 is that of the U-Net's training
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of the products
    pictures_per_device: int = 32  # sampled at once
    decode_per_device: int = 8  # latents decoded at once
    mesh: str = "data=-1"
    seed: int = 0

    def __post_init__(self) -> None:
        limits.counts(self, "most_prompts", "pictures", "pictures_per_device", "decode_per_device")


def sd14() -> Evaluation:
    """Stable Diffusion 1.4 on template 1, trained and held-out prompts; needs --model."""
    return Evaluation()


def tiny() -> Evaluation:
    """A pipeline of random weights, made on the spot."""
    return Evaluation(
        model=stable_diffusion.RANDOM,
        most_prompts=3,
        pictures=4,
        steps=4,
        dtype="float32",
        pictures_per_device=8,
    )


PRESETS = {"sd14": sd14, "tiny": tiny}


def sampling_of(config: Evaluation) -> Experiment:
    """The run whose evaluation this is."""
    b2 = b2_diffurl.Config(
        steps=config.steps, eta=config.eta, guidance=config.guidance, branches=(1,),
        estimator="prompt_z", suffix_start=config.steps, suffix_stop=config.steps, lora_rank=4,
    )  # fmt: skip
    return Experiment(
        model=config.model,
        prompts=config.prompts,
        rewards=config.rewards,
        pixels=config.pixels,
        dtype=config.dtype,
        groups_per_device=config.pictures_per_device,
        decode_per_device=config.decode_per_device,
        b2=b2,
        mesh=config.mesh,
        seed=config.seed,
    )


def models_of(config: Evaluation, lab: Lab) -> dict[str, Params]:
    """The U-Net's parameters as they are, and with the adapters where there are some."""
    base = lab.model.params["unet"]
    if not config.lora:
        return {"base": base}
    adapters = lora_files.load(config.lora, base)
    adapters = distributed.put(adapters, meshes.replicated(lab.mesh))
    merge = jax.jit(lambda base, adapters: lora.effective({"model": base, "lora": adapters}))
    return {"base": base, "lora": merge(base, adapters)}


def evaluate(config: Evaluation, sampling: Experiment, directory: Path) -> dict[str, Any]:
    """Draws and scores everything; the numbers by "LIST/MODEL/NUMBER", grids in `directory`."""
    lab, result = stable_diffusion.make_lab(sampling), {}
    texts = [*lab.prompts.train, *lab.prompts.heldout]
    key = distributed.put(jax.random.key(config.seed), meshes.replicated(lab.mesh))
    lists = stable_diffusion.chosen_rows(lab, config.most_prompts)
    models = models_of(config, lab)
    draw = stable_diffusion.make_drawing(lab, sampling, sampling.b2, config.pictures)
    with lab.rewards.host or contextlib.nullcontext():
        for name, rows in lists.items():
            for model, params in models.items():
                seen = distributed.fetch(draw(params, rows, key))
                images = seen.images.reshape(len(rows), config.pictures, *seen.images.shape[1:])
                reward = seen.reward.reshape(len(rows), config.pictures).mean(1)
                prefix = f"{name}/{model}"
                result[f"{prefix}/distance"] = float(
                    diversity.pairwise_distance(jnp.asarray(images)).mean()
                )
                of_prompts = zip((texts[row] for row in rows), reward, strict=True)
                result |= {f"{prefix}{OF_PROMPT}{text}": float(x) for text, x in of_prompts}
                result |= named(f"{prefix}/reward", mean_interval(reward))
                save_grid(directory / f"{name}-{model}.png", images)
    for name in lists:
        if config.lora:
            after, before = (rewards_of(result, f"{name}/{model}") for model in ("lora", "base"))
            result |= named(f"{name}/gain", paired_difference(after, before))
    return result


def named(name: str, estimate: Estimate) -> dict[str, float]:
    """An estimate over prompts as three numbers."""
    return {
        name: float(estimate.mean),
        f"{name}/low": float(estimate.low),
        f"{name}/high": float(estimate.high),
    }


def rewards_of(result: Mapping[str, Any], prefix: str) -> np.ndarray:
    """`[P]`: each prompt's mean reward."""
    return np.array([x for name, x in result.items() if name.startswith(prefix + OF_PROMPT)])


def save_grid(path: Path, images: np.ndarray) -> None:
    """A PNG with a row for each prompt of pictures `[P, N, H, W, 3]` in [-1, 1]."""
    from PIL import Image

    if not distributed.is_main():
        return
    rows = [np.concatenate(list(row), axis=1) for row in np.asarray(to_uint8(jnp.asarray(images)))]
    with sinks.replacing(path) as temporary:
        Image.fromarray(np.concatenate(rows)).save(temporary, "PNG")


def table(result: Mapping[str, Any], models: list[str]) -> str:
    """The numbers as plain text."""
    lists = [name for name in LISTS if f"{name}/base/reward" in result]
    heads = [(what, name) for name in lists for what in ("reward", "distance")]
    rows = {
        model: [
            mean_interval(rewards_of(result, f"{name}/{model}"))
            if what == "reward"
            else mean_interval(np.array([result[f"{name}/{model}/distance"]]))
            for what, name in heads
        ]
        for model in models
    }
    lines = pages.text_table(heads, rows)
    lines.append("Rewards: means over prompts, below them 95 % intervals.")
    for name in lists:
        if f"{name}/gain" in result:
            gain, low, high = (result[f"{name}/gain{end}"] for end in ("", "/low", "/high"))
            lines.append(f"Gain on {LISTS[name]}: {pages.interval(gain, low, high)}, by prompt.")
    return "\n".join(lines)


def write_report(run: cli.Run, result: Mapping[str, Any]) -> Path:
    """`report.html`: the numbers, and a grid of pictures for each list and model."""
    models = ["base", "lora"] if run.config.lora else ["base"]
    title = f"{run.name} {run.preset}"
    parts = [f"<h1>{pages.safe(title)}</h1>", f"<p><code>{pages.safe(run.command)}</code></p>"]
    parts.append(f"<pre>{pages.safe(table(result, models))}</pre>")
    for name, words in LISTS.items():
        for model in models:
            picture = run.workdir / f"{name}-{model}.png"
            if picture.exists():
                caption = f"{words.capitalize()}, {model}: a row for each prompt."
                parts.append(pages.figure(picture.stem, picture.read_bytes(), caption))
    path = run.workdir / "report.html"
    if distributed.is_main():
        with sinks.replacing(path) as temporary:
            temporary.write_text(pages.document(title, parts), encoding="utf-8")
    return path


def run_all(run: cli.Run) -> None:
    """Every seed of the command line, one after the other."""
    stable_diffusion.check(sampling_of(run.config))
    for each in cli.open_seeds(run):
        sampling = stable_diffusion.with_model(sampling_of(each.config), each.workdir)
        result = evaluate(each.config, sampling, each.workdir)
        sinks.write_json(each.workdir / "result.json", result)
        print(table(result, ["base", "lora"] if each.config.lora else ["base"]))
        print(f"report: {write_report(each, result)}")


if __name__ == "__main__":
    cli.main(run_all, "evaluate_images", PRESETS, "sd14")
