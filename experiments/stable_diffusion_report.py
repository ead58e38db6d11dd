"""The report of a run on Stable Diffusion: rewards, curves, pictures, and the decoder's check.

All numbers are those of the last checkpoint; the evaluations use the same noise each time.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from experiments import comparison, pages
from experiments.comparison import LISTS, REWARD, Comparison
from experiments.pages import Column
from experiments.statistics import Estimate, mean_interval

if TYPE_CHECKING:
    from experiments.plots import Figure

COLUMNS = (
    Column(REWARD, "train", "train/reward"),
    Column(REWARD, "held-out", "heldout/reward"),
    Column("distance", "train", "train/distance"),
    Column("distance", "held-out", "heldout/distance"),
    Column("reward", "evaluations", "reward_evaluations"),
    Column("network", "evaluations", "cost"),
    Column("time", "s", "seconds"),
)
CAPTIONS = {
    "reward": "Reward against what it cost. Above training prompts, below prompts never trained "
    "on. The thin lines are the pictures sampled in training. Time is that of the stages, with the "
    "compilation of the first, without evaluations.",
    "samples-train": "Training prompts: pictures of the base, and of each arm at its end, from the "
    "same noise.",
    "samples-heldout": "Held-out prompts: pictures of the base, and of each arm at its end, from "
    "the same noise.",
    "stages": "The steps that are trained, counted from the picture's end, and the share of the "
    "reward's variance that lies within branches (arms with branches only).",
    "decoders": "The same latents decoded here and by torch diffusers, and a hundred times the "
    "difference.",
}
NOTE = (
    "Distance: root mean square between the pictures of a prompt, of pixels in [-1, 1]. Network "
    "evaluations: those of sampling plus three for each trained pair."
)
DECODED = 4  # pictures beside torch's


def final_numbers(run: Comparison) -> dict[str, list[Estimate]]:
    """By "base" and arm: the number of each of COLUMNS over seeds."""
    base = [mean_interval(comparison.base(run, column.metric)) for column in COLUMNS]
    return {"base": base, **pages.final_numbers(run, COLUMNS)}


def table(run: Comparison) -> str:
    """The final numbers as plain text; with several seeds the intervals below the means."""
    return pages.numbers_table(run, COLUMNS, final_numbers(run), "stage")


def figures(run: Comparison) -> Iterator[tuple[str, Figure]]:
    """Name (also that of its file) and figure, for all that the run has data for."""
    from experiments import plots

    with plots.styled():
        yield "reward", plots.reward_figure(run)
        for prompts in LISTS:
            if comparison.base_samples(run, prompts):
                yield f"samples-{prompts}", plots.samples_figure(run, prompts)
        yield "stages", plots.stages_figure(run)
        decoded = both_decoders(run)
        if decoded is not None:
            yield "decoders", decoders_figure(*decoded)


def page(run: Comparison, pictures: Mapping[str, bytes]) -> str:
    """The whole report as HTML. pictures: PNG content by name."""
    title = pages.title_of(run)
    rewards = " + ".join(run.config["rewards"]["names"])
    about = f"model {run.config['model']}, prompts {run.config['prompts']}, reward {rewards}"
    parts = [f"<h1>{pages.safe(title)}</h1>", pages.facts(run, about, run.unfinished())]
    parts += ["<h2>Final numbers</h2>", pages.grouped_table(COLUMNS, final_numbers(run))]
    parts.append(pages.note(f"{pages.seeds_note(run)} All at the last checkpoint. {NOTE}"))
    heads = [f"{REWARD}, {prompts}" for prompts in LISTS.values()]
    parts += pages.difference_table(
        run.arms[0], heads, pages.differences(run, *(f"{name}/reward" for name in LISTS))
    )
    parts += [pages.figure(name, png, CAPTIONS[name]) for name, png in pictures.items()]
    if "decoders" not in pictures:
        parts.append(pages.note("Pictures are not compared with torch's: it is not installed."))
    return pages.document(title, parts)


# --- the decoder beside torch's -------------------------------------------------------------------


def both_decoders(run: Comparison) -> tuple[np.ndarray, np.ndarray] | None:
    """The first pictures of the first arm, ours and those of torch diffusers, `[n, H, W, 3]`.

    None where torch is not installed, or the run has no pictures yet.
    """
    files = sorted(run.directory.glob("**/samples-before.npz"))
    if not files or not all(map(importlib.util.find_spec, ("torch", "diffusers"))):
        return None
    with np.load(files[0]) as arrays:
        latents = arrays["train/latents"][:DECODED]
    model = run.config["model"]
    folder = files[0].parent.parent / "random-model" if model == "random" else Path(model)
    return _ours(folder, latents), _torchs(folder, latents)


def _ours(folder: Path, latents: np.ndarray) -> np.ndarray:
    import jax

    from jaxalign.models import diffusers_folders

    vae, params = diffusers_folders.load_vae(folder)
    return np.asarray(jax.jit(vae.decode)(params, latents))


def _torchs(folder: Path, latents: np.ndarray) -> np.ndarray:
    import torch
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae")
    x = torch.tensor(latents.transpose(0, 3, 1, 2)) / vae.config.scaling_factor
    with torch.no_grad():
        return vae.decode(x).sample.numpy().transpose(0, 2, 3, 1)


def decoders_figure(ours: np.ndarray, torchs: np.ndarray) -> Figure:
    """Three rows of pictures: ours, torch's, and the difference."""
    from experiments import plots

    gap = np.abs(ours - torchs)
    rows = {
        "ours": ours / 2 + 0.5,
        "torch diffusers": torchs / 2 + 0.5,
        "|difference| x 100": 100 * gap / 2,
    }
    figure = plots.new_figure(1.6 * ours.shape[0] + 1, 5.2)
    grid = figure.subplots(3, len(ours), squeeze=False)
    for row, (label, pictures) in zip(grid, rows.items(), strict=True):
        row[0].set_ylabel(label)
        for axes, picture in zip(row, pictures, strict=True):
            axes.imshow(np.clip(picture, 0, 1))
            axes.set(xticks=[], yticks=[])
            axes.grid(False)
    figure.suptitle(f"largest difference {gap.max():.1e}, of pixels in [-1, 1]", fontsize=9)
    return figure
