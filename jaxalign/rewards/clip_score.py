"""CLIPScore: how well a picture fits its prompt, by the cosine of their embeddings.

Hessel et al. 2021 (arXiv 2104.08718), section 3, equation for CLIP-S. The reward of B2-DiffuRL's
release, which takes OpenCLIP's ViT-H/14.

Departures: the plain cosine, as in that release. Hessel's is 2.5 * max(cos, 0), and others report
100 * max(cos, 0); estimators of credit that divide by a prompt's spread see no difference.

Prompts never change in a run, so they are embedded before it, and a stage runs the vision tower
alone, on a chunk of the pictures at a time, as its states for all would not fit:

    vision, params = clip_folders.load_vision(path, jnp.bfloat16)
    target = clip_folders.embed_prompts(path, prompts)  # Task.target; Task.reward is params
    reward = clip_score(vision.embed)

Dimensions: B pictures, H W C a picture, E width of the embeddings.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import jax.numpy as jnp

from jaxalign.core.types import Array, PyTree, UserError
from jaxalign.ops.chunks import map_chunks

# (params, pictures [B, H, W, 3] in [-1, 1]) -> [B, E], as `models.clip.Vision.embed`
Embed = Callable[[PyTree, Array], Array]
# (pictures [B, H, W, C], {"prompt": [B], "target": [B, ...]}, params) -> [B] f32
Reward = Callable[[Array, Mapping[str, Array], PyTree], Array]

CHUNK = 64


def clip_score(embed: Embed, chunk: int = CHUNK) -> Reward:
    """The cosine of each picture's embedding and its prompt's, in [-1, 1].

    The reward's params are the vision tower's, and its batch["target"] is `[B, E] f32`, rows of the
    embedded prompts.

    chunk: pictures embedded at once.
    """
    _check(chunk)

    def reward(pictures: Array, batch: Mapping[str, Array], params: PyTree) -> Array:
        found = unit(map_chunks(functools.partial(embed, params), pictures, chunk))
        return jnp.sum(found * unit(batch["target"]), axis=-1)

    return reward


def unit(rows: Array) -> Array:
    """Rows `[B, E]` with length one, f32."""
    rows = rows.astype(jnp.float32)
    return rows / jnp.linalg.norm(rows, axis=-1, keepdims=True)


def _check(chunk: int) -> None:
    if chunk < 1:
        raise UserError(f"chunk = {chunk}: must be at least 1; give the pictures to embed at once")
