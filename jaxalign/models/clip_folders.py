"""Folders of CLIP: Hugging Face's, written by transformers' `CLIPModel`, and open_clip's own.

    Hugging Face    config.json, model.safetensors, preprocessor_config.json
    open_clip       open_clip_config.json, open_clip_model.safetensors

and a tokenizer in either. Where a folder has both, as LAION's do, Hugging Face's is read. The two
towers are read apart: a reward needs only the vision tower once the prompts are embedded.

open_clip's names differ, its projections are not turned, and its query, key and value are one
tensor. `weights` reads the tensors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxalign.core.types import Model, Params, PyTree, UserError
from jaxalign.models import clip, clip_text, hub, weights
from jaxalign.models.diffusers_folders import Tokenize, load_tokenizer, resolve
from jaxalign.models.hub import Tensor
from jaxalign.models.weights import Leaf, Rules, Shardings

STEMS, OPEN_CLIP_STEM = ("model", "model.fp16"), "open_clip_model"
OPEN_CLIP_CONFIG = "open_clip_config.json"
OPEN_CLIP_SIDE = 224  # where the file names none
# transformers writes only what differs from these.
TEXT = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
}
VISION = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
}
PROMPTS = 64  # embedded at once


class Description(NamedTuple):
    """What a folder's JSON files say. open_clip: whether the tensors have open_clip's names."""

    text: clip_text.Config
    vision: clip.Config
    normalisation: clip.Normalisation
    open_clip: bool


def describe(path: Path | str) -> Description:
    """The sizes of both towers and what the pictures are normalised by.

    path: a folder, or a Hub name (`diffusers_folders.resolve`).
    Raises: UserError for a folder of neither layout, missing sizes, and variants not computed.
    """
    folder = resolve(path)
    ours = (folder / OPEN_CLIP_CONFIG).exists()
    if ours and not (any(folder.glob("model*.safetensors*")) and (folder / "config.json").exists()):
        return _from_file(folder / OPEN_CLIP_CONFIG, _open_clip)
    found = _from_file(folder / "config.json", _transformers)
    normalisation = _from_file(_processor(folder), lambda v: _normalisation(v, found.vision.side))
    return found._replace(normalisation=normalisation)


def load_vision(
    path: Path | str,
    dtype: DTypeLike = jnp.float32,
    *,
    param_dtype: DTypeLike = jnp.float32,
    shardings: Shardings | None = None,
) -> tuple[clip.Vision, Params]:
    """The vision tower with its parameters and the folder's preprocessing.

    dtype: of the products. param_dtype: of the parameters. shardings: see
        `diffusers_folders.load_unet`.
    Raises: UserError for what `describe` refuses, pickle files, and one that lists every tensor
        that is missing, unknown or of another shape.
    """
    described = describe(path)
    tower = clip.vision(described.vision, described.normalisation, dtype)
    tensors = OPEN_CLIP_VISION_TENSORS if described.open_clip else VISION_TENSORS
    return tower, _read(path, tower.init, clip.RULES, param_dtype, shardings, tensors)


def load_text(
    path: Path | str,
    dtype: DTypeLike = jnp.float32,
    *,
    param_dtype: DTypeLike = jnp.float32,
    shardings: Shardings | None = None,
) -> tuple[Model, Params]:
    """The text tower, `clip_text.text_encoder`, whose `pooled` are the embeddings `[B, E]`.

    Arguments and errors as in `load_vision`.
    """
    described = describe(path)
    tower = clip_text.text_encoder(described.text, dtype)
    tensors = OPEN_CLIP_TEXT_TENSORS if described.open_clip else TEXT_TENSORS
    return tower, _read(path, tower.init, clip_text.RULES, param_dtype, shardings, tensors)


def embed_prompts(path: Path | str, prompts: Sequence[str]) -> np.ndarray:
    """Each prompt's embedding, of unit length, `[len(prompts), E] f32`: `clip_score`'s targets.

    The text tower is read for it and let go.
    Raises: UserError for what `load_text` and the folder's tokenizer refuse.
    """
    tokenize: Tokenize = load_tokenizer(path, "")
    model, params = load_text(path)
    apply = jax.jit(lambda params, ids: model.apply(params, ids).pooled)
    ids = tokenize(prompts)
    fill = np.repeat(ids[:1], -len(ids) % PROMPTS, axis=0)
    chunks = np.split(np.concatenate([ids, fill]), (len(ids) + len(fill)) // PROMPTS)
    rows = np.concatenate([apply(params, chunk) for chunk in chunks])[: len(ids)]
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


# --- configurations ------------------------------------------------------------------------------


def _from_file(file: Path, read: Callable[[dict[str, Any]], Any]) -> Any:
    """What `read` makes of a JSON file; its errors name the file."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(
            f"{file.parent}: no {file.name} can be read; give a folder of transformers' CLIPModel "
            "or of open_clip"
        ) from error
    try:
        return read(values)
    except UserError as error:
        raise UserError(f"{file}: {str(error).removeprefix('config.json: ')}") from None


def _transformers(values: Mapping[str, Any]) -> Description:
    kind = values.get("model_type")
    if kind != "clip":
        raise UserError(
            f"config.json: model_type {kind!r}: only 'clip' is computed; use such a one"
        )
    projected = hub.size({"projection_dim": 512, **values}, "projection_dim")
    text = TEXT | (values.get("text_config") or {})
    text |= {"architectures": [clip_text.PROJECTING], "projection_dim": projected}
    vision = VISION | (values.get("vision_config") or {})
    return Description(
        clip_text.from_hub(text), clip.from_hub(vision, projected), clip.Normalisation(), False
    )


def _processor(folder: Path) -> Path:
    """The file that tells how pictures are prepared; the processor's own from transformers 5 on."""
    newer = folder / "processor_config.json"
    older = folder / "preprocessor_config.json"
    return newer if newer.exists() and not older.exists() else older


PROCESSOR = {
    "resample": (3,),
    "do_resize": (True,),
    "do_center_crop": (True,),
    "do_rescale": (True,),
    "rescale_factor": (1 / 255,),
    "do_normalize": (True,),
}


def _normalisation(values: Mapping[str, Any], side: int) -> clip.Normalisation:
    """Checks that pictures are prepared as `clip.preprocess` does."""
    values = values.get("image_processor", values)
    hub.check_supported(values, PROCESSOR)
    for name, key in (("size", "shortest_edge"), ("crop_size", "height")):
        size = values.get(name, side)
        size = size.get(key) if isinstance(size, Mapping) else size
        if size != side:
            raise UserError(
                f"config.json: {name} = {values[name]!r}: only image_size = {side} of the vision "
                "tower is supported; mend one of the two"
            )
    return _statistics(values.get("image_mean"), values.get("image_std"))


def _statistics(mean: Any, std: Any) -> clip.Normalisation:
    default = clip.Normalisation()
    found = [tuple(mean or default.mean), tuple(std or default.std)]
    if any(len(numbers) != 3 for numbers in found) or min(found[1]) <= 0:
        raise UserError(
            f"mean {mean!r}, std {std!r}: must be three numbers each, std positive; mend them"
        )
    return clip.Normalisation(*found)


OPEN_CLIP_MODEL = {"custom_text": (False,)}
OPEN_CLIP_PICTURE = {"interpolation": ("bicubic",), "resize_mode": ("shortest",), "mode": ("RGB",)}
OPEN_CLIP_BOTH = {"ls_init_value": (None,), "norm_kwargs": (None, {}), "act_kwargs": (None, {})}
OPEN_CLIP_VISION = OPEN_CLIP_BOTH | {
    "timm_model_name": (None,),
    "attentional_pool": (False,),
    "no_ln_pre": (False,),
    "pos_embed_type": ("learnable",),
    "final_ln_after_pool": (False,),
    "pool_type": ("tok",),
}
OPEN_CLIP_TEXT = OPEN_CLIP_BOTH | {
    "hf_model_name": (None,),
    "embed_cls": (False,),
    "no_causal_mask": (False,),
    "final_ln_after_pool": (False,),
    "pool_type": ("argmax",),
    "proj_type": ("linear",),
    "proj_bias": (False,),
}


def _open_clip(values: Mapping[str, Any]) -> Description:
    model, picture = values.get("model_cfg") or {}, values.get("preprocess_cfg") or {}
    text, vision = model.get("text_cfg") or {}, model.get("vision_cfg") or {}
    checks = (OPEN_CLIP_MODEL, OPEN_CLIP_PICTURE, OPEN_CLIP_TEXT, OPEN_CLIP_VISION)
    for part, supported in zip((model, picture, text, vision), checks, strict=True):
        hub.check_supported(part, supported)
    projected, width = hub.size(model, "embed_dim"), hub.size(vision, "width")
    activation = "quick_gelu" if model.get("quick_gelu", False) else "gelu"
    shared = {"hidden_act": activation, "projection_dim": projected}
    text_tower = _open_clip_sizes(text, text.get("heads", 8)) | {
        "vocab_size": text.get("vocab_size", 49408),
        "max_position_embeddings": text.get("context_length", 77),
        "architectures": [clip_text.PROJECTING],
        "eos_token_id": clip_text.WRONG_END,  # pooled at the largest id
    }
    vision_tower = _open_clip_sizes(vision, width // vision.get("head_width", 64)) | {
        "image_size": vision.get("image_size", OPEN_CLIP_SIDE),
        "patch_size": vision.get("patch_size", 16),
    }
    return Description(
        clip_text.from_hub(text_tower | shared),
        clip.from_hub(vision_tower | shared, projected),
        _statistics(picture.get("mean"), picture.get("std")),
        True,
    )


def _open_clip_sizes(values: Mapping[str, Any], heads: int) -> dict[str, Any]:
    """What both towers have, under the names of transformers."""
    width = hub.size(values, "width")
    return {
        "hidden_size": width,
        "intermediate_size": int(width * values.get("mlp_ratio", 4.0)),
        "num_hidden_layers": hub.size(values, "layers"),
        "num_attention_heads": heads,
    }


# --- tensors -------------------------------------------------------------------------------------


class Tensors(NamedTuple):
    """How a tower lies in a file.

    others: what the names of all other tensors that may be there match.
    prefix: before our names, but not before `projection`'s.
    names: parts of our names to open_clip's, in turn; None for transformers' layout, whose names
        are ours.
    """

    others: str
    prefix: str
    projection: str
    names: Mapping[str, str] | None


CONSTANTS = r"logit_scale$|.*\.position_ids$|"
BLOCKS = {
    "encoder.layers.": "transformer.resblocks.",
    "self_attn.q_proj.weight": "attn.in_proj_weight",
    "self_attn.q_proj.bias": "attn.in_proj_bias",
    "self_attn.": "attn.",
    "layer_norm1.": "ln_1.",
    "layer_norm2.": "ln_2.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
    "embeddings.position_embedding.weight": "positional_embedding",
}
VISION_NAMES = {
    "vision_model.": "visual.",
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding.": "conv1.",
    "pre_layrnorm.": "ln_pre.",
    "post_layernorm.": "ln_post.",
    "visual_projection.weight": "visual.proj",
}
TEXT_NAMES = {
    "embeddings.token_embedding.": "token_embedding.",
    "final_layer_norm.": "ln_final.",
    "text_projection.weight": "text_projection",
}
VISION_TENSORS = Tensors(r"text_model\.|text_projection\.", "", "visual_projection", None)
TEXT_TENSORS = Tensors(
    r"vision_model\.|visual_projection\.", "text_model.", "text_projection", None
)
OPEN_CLIP_VISION_TENSORS = VISION_TENSORS._replace(
    others=r"(?!visual\.)", names=BLOCKS | VISION_NAMES
)
OPEN_CLIP_TEXT_TENSORS = Tensors(r"visual\.", "", "text_projection", BLOCKS | TEXT_NAMES)


class Fused(Leaf):
    """Query's, key's and value's arrays, side by side in one of the file; their shape is of all."""

    def __call__(  # ty: ignore[incompatible-method-override]
        self, array: np.ndarray
    ) -> list[jax.Array]:
        place = super().__call__
        return [place(part) for part in np.split(array, 3, axis=-1)]


def _read(
    path: Path | str,
    init: Callable[[jax.Array], Params],
    rules: Rules,
    dtype: DTypeLike,
    shardings: Shardings | None,
    tensors: Tensors,
) -> Params:
    """The parameters of one tower."""
    folder = resolve(path)
    abstract: PyTree = jax.eval_shape(init, jax.random.key(0))
    place = weights.places(abstract, rules, dtype, shardings)
    stored = table(abstract, tensors)
    if tensors.names is not None:
        place |= {_fused(name): _wide(leaf) for name, leaf in place.items() if "/q_proj/" in name}
        stored = [
            tensor._replace(path=_fused(tensor.path))
            for tensor in stored
            if not re.search("/[kv]_proj/", tensor.path)
        ]
    others = re.compile(CONSTANTS + tensors.others)
    params = weights.read(
        folder,
        _sources(folder, tensors),
        lambda _: stored,
        place,
        lambda name: others.match(name) is not None,
    )
    return _apart(params)


def _sources(folder: Path, tensors: Tensors) -> dict[str, Path]:
    """Tensor name to the file that holds it."""
    if tensors.names is None:
        return weights.find(folder, STEMS, "transformers")
    file = folder / f"{OPEN_CLIP_STEM}.safetensors"
    if not file.exists():
        raise UserError(
            f"{folder}: no {file.name}, and pickle files are never opened; write it with "
            "open_clip's save_for_hf(..., safe_serialization=True)"
        )
    return weights.find(folder, [OPEN_CLIP_STEM], "open_clip")


def table(abstract: PyTree, tensors: Tensors) -> list[Tensor]:
    """Where a tower's parameters lie in a file; open_clip's has some of them side by side."""
    return [_named(tensor, tensors) for tensor in hub.mirrored(abstract)]


def _named(tensor: Tensor, tensors: Tensors) -> Tensor:
    """With the name that the file has; open_clip's projections to the embeddings are not turned."""
    name = tensor.name.replace("class_embedding.bias", "class_embedding")
    projects = name.startswith(tensors.projection)
    name = name if projects else tensors.prefix + name
    for ours, theirs in (tensors.names or {}).items():
        name = name.replace(ours, theirs)
    turned = tensor.transposed and not (projects and tensors.names is not None)
    return tensor._replace(name=name, transposed=turned)


def _fused(path: str) -> str:
    return path.replace("/q_proj/", "/in_proj/")


def _wide(leaf: Leaf) -> Fused:
    *outer, last = leaf.shape
    return Fused((*outer, 3 * last), leaf.dtype, leaf.sharding)


def _apart(params: Params) -> Params:
    """What was read fused under the three names that the towers know."""
    apart = {
        name: _apart(inner) if isinstance(inner, dict) else inner
        for name, inner in params.items()
        if name != "in_proj"
    }
    for i, name in enumerate(("q_proj", "k_proj", "v_proj")):
        if "in_proj" in params:
            apart[name] = {leaf: parts[i] for leaf, parts in params["in_proj"].items()}
    return apart
