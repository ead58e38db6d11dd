"""Folders of Stable Diffusion in diffusers' layout: one folder a part, each with its config.json.

    unet/ vae/ text_encoder/ tokenizer/ scheduler/, and for XL text_encoder_2/ tokenizer_2/

Parts may be of full or half precision (`diffusion_pytorch_model.fp16.safetensors`), in one file or
in many with an index; the full one is read where both are there. `weights` reads the tensors.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

from jaxalign.core.types import Model, Params, PyTree, UserError
from jaxalign.models import clip_text, hub, unet, vae, weights
from jaxalign.models.hub import Tensor
from jaxalign.models.weights import Rules, Shardings
from jaxalign.ops.diffusion import Prediction, scaled_linear_alphas

# Prompts `[B]` to token ids `[B, T] i32`.
Tokenize = Callable[[Sequence[str]], np.ndarray]

STEMS = ("diffusion_pytorch_model", "diffusion_pytorch_model.fp16")
TEXT_STEMS = ("model", "model.fp16")
CLASSES = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}
PREFIX = "text_model."
# A constant that older text encoders hold beside the parameters.
PLACES = "embeddings.position_ids"


class Schedule(NamedTuple):
    """alphas: cumulative signal shares `[1000] f64`. prediction: what the U-Net puts out."""

    alphas: np.ndarray
    prediction: Prediction


def resolve(name: Path | str) -> Path:
    """The folder of a pipeline: `name` itself, or the Hub's of that name in the local cache.

    Nothing is downloaded.
    Raises: UserError when it is neither.
    """
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(name), local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError) as error:
        raise UserError(
            f"{name}: neither a folder nor in the Hugging Face cache, and nothing is downloaded "
            "here; run `hf download` for it first, or give a folder"
        ) from error


def read_unet_config(path: Path | str) -> unet.Config:
    """The sizes in unet/config.json of a pipeline's folder."""
    return unet.from_hub(_values(resolve(path) / "unet"))


def read_vae_config(path: Path | str) -> vae.Config:
    """The sizes in vae/config.json of a pipeline's folder."""
    return vae.from_hub(_values(resolve(path) / "vae"))


def load_unet(
    path: Path | str,
    dtype: DTypeLike = jnp.float32,
    *,
    param_dtype: DTypeLike = jnp.float32,
    shardings: Shardings | None = None,
    remat: bool = False,
    rows: NamedSharding | None = None,
) -> tuple[Model, Params]:
    """The U-Net of a pipeline's folder, with its parameters.

    path: a folder, or a Hub name (`resolve`). dtype: of the products. param_dtype: of the
        parameters.
    shardings: places the parameters, for example
        `lambda params, rules: mesh.shardings(params, devices, rules)`; default: the first device.
    remat, rows: see `unet.unet`.
    Raises: UserError for sizes or variants that are not computed, pickle files, and one that lists
        every tensor that is missing, unknown or of another shape.
    """
    folder = resolve(path) / "unet"
    model = unet.unet(unet.from_hub(_values(folder)), dtype, remat=remat, rows=rows)
    return model, _read(folder, model.init, unet.RULES, param_dtype, shardings)


def load_vae(
    path: Path | str,
    dtype: DTypeLike = jnp.float32,
    *,
    param_dtype: DTypeLike = jnp.float32,
    shardings: Shardings | None = None,
) -> tuple[vae.Autoencoder, Params]:
    """The same for the autoencoder."""
    folder = resolve(path) / "vae"
    model = vae.autoencoder(vae.from_hub(_values(folder)), dtype)

    def table(ours: list[Tensor], stored: Mapping[str, Any]) -> list[Tensor]:
        older = any(".query." in name for name in stored)
        return [t._replace(name=vae.stored_name(t.name, older)) for t in ours]

    return model, _read(folder, model.init, vae.RULES, param_dtype, shardings, table=table)


def load_text_encoder(
    path: Path | str,
    dtype: DTypeLike = jnp.float32,
    *,
    part: str = "text_encoder",
    param_dtype: DTypeLike = jnp.float32,
    shardings: Shardings | None = None,
) -> tuple[Model, Params]:
    """The same for a text encoder; part: "text_encoder_2" for SDXL's second one."""
    folder = resolve(path) / part
    model = clip_text.text_encoder(clip_text.from_hub(_values(folder)), dtype)

    def table(ours: list[Tensor], stored: Mapping[str, Any]) -> list[Tensor]:
        if not any(name.startswith(PREFIX) for name in stored):
            return ours
        return [
            t if t.name.startswith("text_projection.") else t._replace(name=PREFIX + t.name)
            for t in ours
        ]

    params = _read(
        folder, model.init, clip_text.RULES, param_dtype, shardings, TEXT_STEMS, table=table
    )
    return model, params


def load_tokenizer(path: Path | str, part: str = "tokenizer") -> Tokenize:
    """Prompts to ids, each cut and padded to the tokenizer's length, 77.

    Raises: UserError when the folder has none.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that torch is absent
    from transformers import AutoTokenizer

    folder = resolve(path) / part
    if not any((folder / name).exists() for name in ("vocab.json", "tokenizer.json")):
        raise UserError(f"{folder}: no tokenizer (vocab.json or tokenizer.json); copy it there")
    found: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)

    def tokenize(prompts: Sequence[str]) -> np.ndarray:
        ids = found(list(prompts), padding="max_length", truncation=True)["input_ids"]
        return np.asarray(ids, np.int32)

    return tokenize


SCHEDULER = {
    "beta_schedule": ("scaled_linear",),
    "trained_betas": (None,),
    "rescale_betas_zero_snr": (False,),
    "prediction_type": ("epsilon", "v_prediction"),
}


def read_schedule(path: Path | str) -> Schedule:
    """What scheduler/scheduler_config.json says of the noise levels and the U-Net's output.

    Sampler, steps and spacing are the method's choice, and are not read.
    Raises: UserError for a schedule that is not Stable Diffusion's kind.
    """
    values = _values(resolve(path) / "scheduler", "scheduler_config.json")
    hub.check_supported({"beta_schedule": None, **values}, SCHEDULER)
    missing = [name for name in ("beta_start", "beta_end") if name not in values]
    if missing:
        raise UserError(f"scheduler_config.json lacks {', '.join(missing)}; add it")
    count = hub.size({"num_train_timesteps": 1000, **values}, "num_train_timesteps")
    alphas = scaled_linear_alphas(values["beta_start"], values["beta_end"], count)
    kind = "v" if values.get("prediction_type") == "v_prediction" else "epsilon"
    return Schedule(alphas, kind)


def _unchanged(ours: list[Tensor], _: Mapping[str, Any]) -> list[Tensor]:
    return ours


def _read(
    folder: Path,
    init: Callable[..., Params],
    rules: Rules,
    dtype: DTypeLike,
    shardings: Shardings | None,
    stems: Sequence[str] = STEMS,
    *,
    table: Callable[[list[Tensor], Mapping[str, Any]], list[Tensor]] = _unchanged,
) -> Params:
    """The parameters of one part; `table` gives its tensors the names that the files have."""
    abstract: PyTree = jax.eval_shape(init, jax.random.key(0))
    ours, writer = hub.mirrored(abstract), "transformers" if stems is TEXT_STEMS else "diffusers"
    return weights.read(
        folder,
        weights.find(folder, stems, f"{writer}, safe_serialization=True"),
        lambda stored: table(ours, stored),
        weights.places(abstract, rules, dtype, shardings),
        lambda name: name.removeprefix(PREFIX) == PLACES,
    )


def _values(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """A JSON file of a part; the class that it names must be the part's."""
    try:
        values = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(
            f"{folder}: no {name} can be read; give a folder in diffusers' layout"
        ) from error
    kind = CLASSES.get(folder.name)
    if kind not in (None, values.get("_class_name", kind)):
        raise UserError(
            f"{folder / name}: _class_name {values['_class_name']!r}: only {kind} is computed; use "
            "a pipeline of Stable Diffusion 1.x, 2.x or XL"
        )
    return values
