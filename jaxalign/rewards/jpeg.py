"""How well pictures compress: the file size as JPEG, a reward that needs no labels and no network.

Black et al. 2024 (DDPO, arXiv 2305.13301), section 5.1: the size in kilobytes at quality 95, to be
lowered or raised. Both are scores for `jaxalign.rewards.host.HostReward`.

Dimensions: B pictures, H W C a picture.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxalign.core.types import UserError
from jaxalign.rewards.host import Score

QUALITY = 95


def kilobytes(pictures: np.ndarray) -> np.ndarray:
    """Size of each picture's JPEG file in units of 1,000 bytes, `[B] f64`.

    pictures: `[B, H, W, C] u8`, gray (C = 1) or RGB (C = 3).
    Raises: UserError for another number of channels.
    """
    if pictures.shape[-1] not in (1, 3):
        raise UserError(f"a JPEG has 1 or 3 channels, not {pictures.shape[-1]}; decode to RGB")
    return np.array([_size(picture) / 1000 for picture in pictures])


def _size(picture: np.ndarray) -> int:
    from PIL import Image

    file = io.BytesIO()
    gray = picture.shape[-1] == 1
    Image.fromarray(picture[..., 0] if gray else picture).save(file, "JPEG", quality=QUALITY)
    return file.tell()


def compressibility(pictures: np.ndarray, batch: Mapping[str, Any]) -> np.ndarray:
    """Minus the file size in kB, `[B]`: highest for plain pictures."""
    del batch
    return -kilobytes(pictures)


def incompressibility(pictures: np.ndarray, batch: Mapping[str, Any]) -> np.ndarray:
    """The file size in kB, `[B]`: highest for busy pictures."""
    del batch
    return kilobytes(pictures)


REWARDS: Mapping[str, Score] = {
    "compressibility": compressibility,
    "incompressibility": incompressibility,
}
