"""Stable Diffusion 1.x, 2.x and XL from a folder: the parts that training and sampling need.

Text encoders speak once, before a run: their states of all prompts are kept and they are let go.

Dimensions: P prompts, L tokens, K their features.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

from jaxalign.core.types import Array, Model, Params, PyTree
from jaxalign.models import diffusers_folders as folders
from jaxalign.models.clip_text import States
from jaxalign.models.diffusers_folders import Schedule
from jaxalign.models.unet import Conditions
from jaxalign.models.vae import Autoencoder
from jaxalign.models.weights import Shardings

PROMPTS_AT_ONCE = 32


class StableDiffusion(NamedTuple):
    """unet, vae: the networks; `params` holds theirs, `{"unet", "vae"}`.

    side: of the latents that the U-Net was trained on. channels: of a latent.
    """

    unet: Model
    vae: Autoencoder
    params: Params
    schedule: Schedule
    side: int
    channels: int


def load(
    path: Path | str,
    dtype: DTypeLike = jnp.float32,
    *,
    shardings: Shardings | None = None,
    remat: bool = False,
    rows: NamedSharding | None = None,
) -> StableDiffusion:
    """The U-Net and the autoencoder of a pipeline's folder, or of a Hub name in the local cache.

    dtype: of the products; parameters are f32. shardings, remat, rows: see
    `diffusers_folders.load_unet`.
    Raises: UserError as the functions of `diffusers_folders` do.
    """
    config, schedule = folders.read_unet_config(path), folders.read_schedule(path)
    unet, unet_params = folders.load_unet(path, dtype, shardings=shardings, remat=remat, rows=rows)
    vae, vae_params = folders.load_vae(path, dtype, shardings=shardings)
    params = {"unet": unet_params, "vae": vae_params}
    return StableDiffusion(unet, vae, params, schedule, config.size, config.channels_in)


def embed_prompts(
    path: Path | str, prompts: Sequence[str], pixels: int, dtype: DTypeLike = jnp.float32
) -> PyTree:
    """What the U-Net takes for each prompt: states `[P, L, K] f32`, or for XL `Conditions` of P.

    pixels: the pictures' side, of which XL is told.
    Raises: UserError as the functions of `diffusers_folders` do.
    """
    folder = folders.resolve(path)
    first = _states(folder, prompts, "", dtype)
    if not (folder / "text_encoder_2").is_dir():
        return first.last
    second = _states(folder, prompts, "_2", dtype)
    tokens = jnp.concatenate([first.penultimate, second.penultimate], axis=-1)
    square = jnp.asarray([[pixels, pixels, 0, 0, pixels, pixels]], jnp.float32)
    sizes = jnp.broadcast_to(square, (len(prompts), 6))
    found = Conditions(tokens, second.pooled, sizes)
    if not _empty_is_zero(folder):
        return found
    asked = jnp.asarray([bool(prompt) for prompt in prompts], jnp.float32)
    return found._replace(
        tokens=tokens * asked[:, None, None], pooled=second.pooled * asked[:, None]
    )


def _states(folder: Path, prompts: Sequence[str], number: str, dtype: DTypeLike) -> States:
    """What one text encoder says of the prompts, f32."""
    tokenize = folders.load_tokenizer(folder, f"tokenizer{number}")
    model, params = folders.load_text_encoder(folder, dtype, part=f"text_encoder{number}")
    apply = jax.jit(model.apply)
    ids = tokenize(prompts)
    fill = np.repeat(ids[:1], -len(ids) % PROMPTS_AT_ONCE, axis=0)
    parts = np.split(np.concatenate([ids, fill]), (len(ids) + len(fill)) // PROMPTS_AT_ONCE)
    found = [apply(params, jnp.asarray(part)) for part in parts]

    def whole(*rows: Array) -> Array:
        return jnp.concatenate(rows).astype(jnp.float32)[: len(ids)]

    return jax.tree.map(whole, *found)


def _empty_is_zero(folder: Path) -> bool:
    """Whether the empty prompt is all zeros, as XL's base was trained."""
    index = folder / "model_index.json"
    values = json.loads(index.read_text(encoding="utf-8")) if index.exists() else {}
    return bool(values.get("force_zeros_for_empty_prompt", True))
