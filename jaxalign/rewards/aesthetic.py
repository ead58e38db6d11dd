"""The LAION aesthetic score: how much people like a picture, from 1 to 10, by its CLIP embedding.

Schuhmann's improved aesthetic predictor (2022), a reward of Black et al. 2024 (DDPO, arXiv
2305.13301), section 5.1. Its head on OpenAI's ViT-L/14 embedding, of unit length, has layers
768-1024-128-64-16-1 with dropout between them and no non-linearity, so it is one affine map, and
is folded to that when it is read.

Departures: none in what is computed but for rounding; the fold is computed in f64.

Dimensions: B pictures, H W their sides, E width of the embeddings.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from jaxalign.core.types import Array, PyTree, UserError
from jaxalign.ops.chunks import map_chunks
from jaxalign.rewards.clip_score import CHUNK, Embed, Reward, unit

CONVERT = (
    'write it as safetensors: python -c "import torch; from safetensors.torch import save_file; '
    "save_file(torch.load('head.pth', weights_only=True), 'head.safetensors')\""
)
WEIGHT = re.compile(r"(layers\.(\d+))\.weight")


class Head(NamedTuple):
    """weight: `[E] f32`. bias: `[] f32`."""

    weight: Array
    bias: Array


class Params(NamedTuple):
    """What the reward takes: the vision tower's parameters and the head."""

    vision: PyTree
    head: Head


def aesthetic(embed: Embed, chunk: int = CHUNK) -> Reward:
    """The score of each picture, `[B] f32`; its params are `Params`, of its batch it reads nothing.

    embed: of OpenAI's ViT-L/14, on which the head was trained. chunk: as in `clip_score`.
    """

    def reward(pictures: Array, batch: Mapping[str, Array], params: Params) -> Array:
        del batch
        found = unit(map_chunks(functools.partial(embed, params.vision), pictures, chunk))
        return jnp.sum(found * params.head.weight[None], axis=-1) + params.head.bias

    return reward


def read_head(path: Path | str) -> Head:
    """The head in a safetensors file with tensors `layers.N.weight` and `layers.N.bias`, folded.

    Raises: UserError for a pickle file, one that cannot be read, and layers that make no chain to
        one number.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: not a safetensors file, and pickle is never opened; {CONVERT}")
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({error}); copy it again") from error
    names = [found for found in map(WEIGHT.fullmatch, tensors) if found]
    names = [found[1] for found in sorted(names, key=lambda found: int(found[2]))]
    _check(path, {name: array.shape for name, array in tensors.items()}, names)
    weight = np.eye(tensors[f"{names[0]}.weight"].shape[1])
    bias = np.zeros(len(weight))
    for name in names:
        turn = tensors[f"{name}.weight"].astype(np.float64)
        weight, bias = turn @ weight, turn @ bias + tensors[f"{name}.bias"]
    return Head(jnp.asarray(weight[0], jnp.float32), jnp.asarray(bias[0], jnp.float32))


def _check(path: Path, shapes: Mapping[str, tuple[int, ...]], names: Sequence[str]) -> None:
    """Raises UserError unless each layer has a bias and takes what the one before it gives."""
    chain = [shapes[f"{name}.weight"] for name in names]
    fits = bool(chain) and chain[-1][0] == 1
    fits &= all(len(shape) == 2 for shape in chain)
    fits &= all(after[-1] == before[0] for before, after in pairwise(chain))
    fits &= all(
        shapes.get(f"{name}.bias") == shape[:1] for name, shape in zip(names, chain, strict=True)
    )
    if not fits or len(shapes) != 2 * len(names):
        raise UserError(
            f"{path}: tensors {dict(shapes)} are no chain of layers.N.weight and layers.N.bias to "
            "one number; give LAION's improved aesthetic predictor"
        )
