"""CLIPScore: how well a picture fits its prompt, by the cosine of their embeddings.

Hessel et al. 2021 (arXiv 2104.08718), section 3, equation for CLIP-S. The reward of B2-DiffuRL's
release, which takes OpenCLIP's ViT-H/14.

Departures: the plain cosine, as in that release. Hessel's is 2.5 * max(cos, 0), and others report
100 * max(cos, 0); estimators of credit that divide by a prompt's spread see no difference.

Prompts never change in a run, so they are embedded before it (`clip_folders.embed_prompts`), and a
stage runs the vision tower alone, on a chunk of the pictures at a time: its states for all would
not fit.

Dimensions: B pictures, M chunks, H W C a picture, E width of the embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from jaxalign.core.types import Array, PyTree, UserError

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
        found = unit(embed_in_chunks(embed, params, pictures, chunk))
        return jnp.sum(found * unit(batch["target"]), axis=-1)

    return reward


def unit(rows: Array) -> Array:
    """Rows `[B, E]` with length one, f32."""
    rows = rows.astype(jnp.float32)
    return rows / jnp.linalg.norm(rows, axis=-1, keepdims=True)


def embed_in_chunks(embed: Embed, params: PyTree, pictures: Array, chunk: int) -> Array:
    """`embed(params, pictures)`, `[B, E]`, of at most `chunk` pictures at once.

    On a mesh every chunk has pictures of all devices, so none is sent, if `chunk` is a multiple of
    the devices that B lies over and divides B.
    """
    count = len(pictures)
    if count <= chunk:
        return embed(params, pictures)
    short = -count % chunk
    if short:
        pictures = jnp.concatenate([pictures, jnp.zeros((short, *pictures.shape[1:]))])
    apart = pictures.reshape(chunk, -1, *pictures.shape[1:]).swapaxes(0, 1)  # [M, chunk, H, W, C]
    rows = jax.lax.map(lambda some: embed(params, some), apart)
    return rows.swapaxes(0, 1).reshape(count + short, -1)[:count]


def _check(chunk: int) -> None:
    if chunk < 1:
        raise UserError(f"chunk = {chunk}: must be at least 1; give the pictures to embed at once")
