"""Folders of tiny networks with random weights, in the layouts that the real ones have.

They let everything around a checkpoint be tried without one: reading, prompts, rewards, export.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxalign.core.state import paths
from jaxalign.core.types import Params
from jaxalign.models import (
    clip,
    clip_folders,
    clip_text,
    diffusers_folders,
    hub,
    unet,
    vae,
    weights,
)
from jaxalign.models.hub import Tensor

CONTEXT = 16  # tokens of a prompt
BEGIN, END = "<|startoftext|>", "<|endoftext|>"

UNET = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [16, 32],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "cross_attention_dim": 16,
    "norm_num_groups": 4,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
}
VAE = {
    "_class_name": "AutoencoderKL",
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "scaling_factor": 0.18215,
}
SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
PROCESSOR = {
    "size": {"shortest_edge": 16},
    "crop_size": {"height": 16, "width": 16},
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


def write_pipeline(path: Path, seed: int) -> Path:
    """A pipeline of Stable Diffusion's kind: pictures of 16 x 16, latents of 8 x 8; returns `path`.

    seed: of the weights.
    """
    text = _text_config(_write_tokenizer(path / "tokenizer"))
    parts: Mapping[str, tuple[Mapping[str, Any], Callable[..., Params], str]] = {
        "unet": (UNET, unet.unet(unet.from_hub(UNET)).init, diffusers_folders.STEMS[0]),
        "vae": (VAE, vae.autoencoder(vae.from_hub(VAE)).init, diffusers_folders.STEMS[0]),
        "text_encoder": (
            text,
            clip_text.text_encoder(clip_text.from_hub(text)).init,
            diffusers_folders.TEXT_STEMS[0],
        ),
    }
    for i, (part, (config, init, stem)) in enumerate(parts.items()):
        write_json(path / part / "config.json", config)
        params = _random(init, (seed, i))
        write_tensors(path / part, stem, params, hub.mirrored(params))
    write_json(path / "scheduler" / "scheduler_config.json", SCHEDULER)
    index = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", UNET["_class_name"]],
        "vae": ["diffusers", VAE["_class_name"]],
        "scheduler": ["diffusers", SCHEDULER["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
    }
    write_json(path / "model_index.json", index)
    return path


def write_clip(path: Path, seed: int) -> Path:
    """A CLIP model for `clip_score`, which looks at pictures of 16 x 16; returns `path`."""
    text = _text_config(_write_tokenizer(path))
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
        "hidden_act": "quick_gelu",
    }
    config = {
        "model_type": "clip",
        "projection_dim": 16,
        "text_config": text,
        "vision_config": vision,
    }
    write_json(path / "config.json", config)
    write_json(path / "preprocessor_config.json", PROCESSOR)
    described = clip_folders.describe(path)
    seeing = _random(clip.vision(described.vision, described.normalisation).init, (seed, 0))
    reading = _random(clip_text.text_encoder(described.text).init, (seed, 1))
    table = clip_folders.table(seeing, clip_folders.VISION_TENSORS)
    table += clip_folders.table(reading, clip_folders.TEXT_TENSORS)
    write_tensors(path, "model", seeing | reading, table)
    return path


def _random(init: Callable[..., Params], seed: Sequence[int]) -> Params:
    """Parameters of a network's shapes, as wide as keeps its signals' size; nothing is compiled."""
    random = np.random.default_rng(seed)

    def draw(path: str, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if leaf.ndim < 2:
            return np.full(leaf.shape, path.endswith("scale"), np.float32)
        fan = 1 if path.endswith("embedding") else np.prod(leaf.shape[:-1])
        return (fan**-0.5 * random.standard_normal(leaf.shape)).astype(np.float32)

    abstract = jax.eval_shape(init, jax.random.key(0))
    return jax.tree.map(draw, paths(abstract), abstract)


def _text_config(vocabulary: int) -> dict[str, Any]:
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": vocabulary,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": CONTEXT,
        "hidden_act": "quick_gelu",
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
    }


def _write_tokenizer(path: Path) -> int:
    """CLIP's tokenizer with letters for words; returns how many ids it has."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789-,."
    words = [*letters, *(f"{letter}</w>" for letter in letters), BEGIN, END]
    write_json(path / "vocab.json", {word: i for i, word in enumerate(words)})
    (path / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    special = {"unk_token": END, "bos_token": BEGIN, "eos_token": END, "pad_token": END}
    about = {"tokenizer_class": "CLIPTokenizer", "model_max_length": CONTEXT, **special}
    write_json(path / "tokenizer_config.json", about)
    return len(words)


def write_tensors(path: Path, stem: str, params: Params, table: Sequence[Tensor]) -> None:
    """A part's parameters as one file."""
    weights.write(path, stem, table, weights.flat(params), 1 << 30)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """A configuration, with the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
