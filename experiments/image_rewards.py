"""The rewards of a text-to-image run by name, opened together as one.

Dimensions: P prompts, B pictures.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxalign.core import distributed, limits
from jaxalign.core.types import PyTree, UserError
from jaxalign.methods import b2_diffurl
from jaxalign.models import clip_folders
from jaxalign.models.weights import Shardings
from jaxalign.rewards import jpeg
from jaxalign.rewards.aesthetic import Params, aesthetic, read_head
from jaxalign.rewards.captions import caption_score
from jaxalign.rewards.clip_score import Reward, clip_score
from jaxalign.rewards.host import HostReward, Score
from jaxalign.rewards.weighted import Scale, on_host, weighted, weighted_scores

CAPTIONS = "captions"
NAMES = ("clip_score", "aesthetic", *jpeg.REWARDS, CAPTIONS)


@dataclasses.dataclass(frozen=True)
class Rewards:
    """Which rewards, and where their networks are; sums are of (reward - mean) / std, weighted."""

    names: tuple[str, ...] = ("clip_score",)  # clip_score aesthetic captions (in)compressibility
    weights: tuple[float, ...] = ()  # one each; all 1 where none are given
    means: tuple[float, ...] = ()  # of the base model's pictures; all 0
    stds: tuple[float, ...] = ()  # all 1
    clip: str = ""  # folder of the CLIP model for clip_score, as ViT-H/14
    aesthetic_clip: str = ""  # of OpenAI's ViT-L/14
    aesthetic_head: str = ""  # safetensors file of the head on it
    captions_url: str = ""  # of the caption server, the same or one beside each process
    timeout: float = 600.0  # seconds that the host's rewards of one chunk of pictures may take

    def __post_init__(self) -> None:
        limits.known("rewards.names", self.names, NAMES)
        if not self.names or len(set(self.names)) < len(self.names):
            raise UserError(f"rewards.names {self.names}: give at least one, and each once")
        for field in ("weights", "means", "stds"):
            given = getattr(self, field)
            if given and len(given) != len(self.names):
                raise UserError(
                    f"rewards.{field} {given}: {len(self.names)} rewards need as many numbers"
                )

    @property
    def scales(self) -> dict[str, Scale]:
        """How each reward counts in the sum."""
        count = len(self.names)
        weights, means = self.weights or (1.0,) * count, self.means or (0.0,) * count
        each = zip(weights, means, self.stds or (1.0,) * count, strict=True)
        return {name: Scale(*numbers) for name, numbers in zip(self.names, each, strict=True)}

    @property
    def on_host(self) -> bool:
        """Whether one of them, and so their sum, is computed on the host."""
        return any(name in jpeg.REWARDS or name == CAPTIONS for name in self.names)


class Opened(NamedTuple):
    """One reward made of all. device: None where the sum is the host's, which has `host` instead.

    params: what the device reward takes. target: pytree of `[P, ...]`, rows for each prompt.
    """

    device: b2_diffurl.Reward | None
    host: HostReward | None
    params: PyTree
    target: PyTree


def open_rewards(
    rewards: Rewards,
    prompts: Sequence[str],
    dtype: DTypeLike,
    shardings: Shardings | None,
    chunk: int,
) -> Opened:
    """Reads the networks of the rewards and embeds the prompts.

    prompts: P, to which the rows of "prompt" point. chunk: pictures that a network sees at once.
    Raises: UserError for what a reward lacks.
    """
    if rewards.on_host and distributed.count() > 1:
        # Each process scores its own pictures when it has them, so its networks are its own.
        shardings, chunk = None, -(-chunk // jax.device_count())
    targets: dict[str, PyTree] = {}
    devices: dict[str, Reward] = {}
    params: dict[str, PyTree] = {}
    if "clip_score" in rewards.names:
        folder = _needed(rewards.clip, "clip_score", "clip", "a CLIP model's folder")
        tower, params["clip_score"] = clip_folders.load_vision(folder, dtype, shardings=shardings)
        targets["clip_score"] = jnp.asarray(clip_folders.embed_prompts(folder, prompts))
        devices["clip_score"] = clip_score(tower.embed, chunk)
    if "aesthetic" in rewards.names:
        folder = _needed(rewards.aesthetic_clip, "aesthetic", "aesthetic_clip", "ViT-L/14's folder")
        head = _needed(rewards.aesthetic_head, "aesthetic", "aesthetic_head", "the head's file")
        tower, vision = clip_folders.load_vision(folder, dtype, shardings=shardings)
        params["aesthetic"] = Params(vision, read_head(head))
        devices["aesthetic"] = aesthetic(tower.embed, chunk)
    if not rewards.on_host:
        return Opened(weighted(devices, rewards.scales), None, params, targets)
    scores = {name: on_host(reward, params[name]) for name, reward in devices.items()}
    scores |= _host_scores(rewards, prompts)
    score = weighted_scores(scores, rewards.scales)
    host = HostReward(" + ".join(rewards.names), score, rewards.timeout)
    return Opened(None, host, (), targets)


def _host_scores(rewards: Rewards, prompts: Sequence[str]) -> Mapping[str, Score]:
    scores: dict[str, Any] = {n: jpeg.REWARDS[n] for n in rewards.names if n in jpeg.REWARDS}
    if CAPTIONS in rewards.names:
        url = _needed(rewards.captions_url, CAPTIONS, "captions_url", "the caption server's URL")
        scores[CAPTIONS] = caption_score(url, prompts)
    return scores


def _needed(value: str, reward: str, field: str, what: str) -> str:
    if not value:
        flag = field.replace("_", "-")
        raise UserError(f"reward {reward} needs {what}; give it with --rewards.{flag}")
    return value
