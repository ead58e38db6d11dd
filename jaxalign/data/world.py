"""What a text-to-image world offers to training: words, prompts, pictures and rewards.

A world is small enough to be exact: its captions come from a grammar, its corpus is two arrays
that fit on the device, and its rewards read off the picture what the caption asks for.

Dimensions: N pictures of the corpus, P prompts, B pictures of a batch, L words of a caption
(padded), A things a caption may ask, F factors that can be read off a picture, H, W, C height,
width, channels.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxalign.core.types import Array, PyTree, UserError

# A reward is `(images [B, H, W, C], batch, reward_params) -> [B] f32`, where `batch["target"]` is
# [B, A] int32 (rows of `Prompts.target`). It is traced, with the parameters as arguments.
Reward = Callable[[Array, Mapping[str, Array], PyTree], Array]


class Vocabulary(NamedTuple):
    """Words and their ids: `words[i]` has the id i + 1; 0 is padding, alone the empty prompt.

    words: the known words, lower case.
    length: L, the number of tokens of every encoded caption.
    """

    words: tuple[str, ...]
    length: int

    @property
    def size(self) -> int:
        """The number of ids, padding included."""
        return len(self.words) + 1

    def encode(self, captions: Sequence[str]) -> np.ndarray:
        """Token ids, `[len(captions), L] int32`, padded with 0 on the right; "" is all padding.

        Raises: UserError for a word outside the vocabulary, or a caption longer than L words.
        """
        ids = {word: index + 1 for index, word in enumerate(self.words)}
        tokens = np.zeros((len(captions), self.length), np.int32)
        for row, caption in zip(tokens, captions, strict=True):
            words = caption.lower().split()
            if len(words) > self.length:
                raise UserError(
                    f"caption {caption!r} has {len(words)} words: use at most {self.length}"
                )
            for position, word in enumerate(words):
                if word not in ids:
                    raise UserError(f"caption {caption!r}: {self._unknown(word)}")
                row[position] = ids[word]
        return tokens

    def _unknown(self, word: str) -> str:
        near = difflib.get_close_matches(word, self.words, n=1, cutoff=0.5)
        fix = f"did you mean {near[0]!r}?" if near else f"known words: {', '.join(self.words)}"
        return f"unknown word {word!r}; {fix}"


class Prompts(NamedTuple):
    """Captions to draw, and what each one asks.

    text: P captions.
    tokens: `[P, L] int32`.
    target: `[P, A] int32`, the value asked of each factor, -1 where the caption says nothing.
    """

    text: tuple[str, ...]
    tokens: np.ndarray
    target: np.ndarray

    def take(self, rows: Sequence[int] | np.ndarray) -> Prompts:
        """The prompts at these rows, in this order."""
        index = np.asarray(rows, np.int64).reshape(-1)
        return Prompts(tuple(self.text[i] for i in index), self.tokens[index], self.target[index])


def concatenate(first: Prompts, second: Prompts) -> Prompts:
    """Both lists as one, the first list's prompts first."""
    tokens = np.concatenate([first.tokens, second.tokens])
    return Prompts(first.text + second.text, tokens, np.concatenate([first.target, second.target]))


class World(NamedTuple):
    """A text-to-image problem, whole.

    name: short name, as in file names.
    image_shape: (H, W, C).
    patch: side of the square patches that suit a patch transformer here; divides H and W.
    vocabulary: words of the captions.
    train, heldout: prompts for training and for evaluation only; no caption is in both.
    corpus: `seed -> (images [N, H, W, C] f32 in [-1, 1], tokens [N, L] int32)` for the base model;
        the same seed gives the same arrays. Both fit on the device.
    rewards: dense rewards by name, probabilities from 0 to 1.
    success: `(images, batch, reward_params) -> [B] f32` in {0, 1}: all that the caption asks holds.
    factors: `(images, reward_params) -> [B, F] int32`, everything read off the picture, asked or
        not; column f takes values 0..factor_sizes[f]-1. `factor_code` packs a row into one number.
    factor_names, factor_sizes: F names, F numbers of values.
    target_names: A names, the columns of `Prompts.target`.
    reward_params: arrays (templates, a trained classifier) for rewards, success and factors.
    read_prompts: `captions -> Prompts`; UserError for a caption outside the world's grammar.
    accuracy: `reward_params -> {name: share}`, how often a learned reader is right on pictures that
        it was not trained on; empty where the reader is exact.
    """

    name: str
    image_shape: tuple[int, int, int]
    patch: int
    vocabulary: Vocabulary
    train: Prompts
    heldout: Prompts
    corpus: Callable[[int], tuple[np.ndarray, np.ndarray]]
    rewards: Mapping[str, Reward]
    success: Reward
    factors: Callable[[Array, PyTree], Array]
    factor_names: tuple[str, ...]
    factor_sizes: tuple[int, ...]
    target_names: tuple[str, ...]
    reward_params: PyTree
    read_prompts: Callable[[Sequence[str]], Prompts]
    accuracy: Callable[[PyTree], Mapping[str, float]] = lambda params: {}


def factor_code(values: Array, sizes: Sequence[int]) -> Array:
    """One number for each combination of factors, `[B] int32` in 0..prod(sizes)-1.

    values: `[B, F] int32`, column f in 0..sizes[f]-1.
    """
    assert np.prod(sizes, dtype=np.float64) < 2**31, "too many combinations for int32"
    strides = np.cumprod([1, *sizes[:0:-1]])[::-1]
    return jnp.sum(values * jnp.asarray(strides, jnp.int32)[None, :], axis=-1)


def load_prompt_file(path: str | Path, world: World) -> Prompts:
    """The prompts in a JSON file that holds a list of captions.

    Raises: UserError for what `read_prompt_file` refuses, or if a caption is outside the world's
        grammar.
    """
    captions = read_prompt_file(path)
    try:
        return world.read_prompts(captions)
    except UserError as error:
        raise UserError(f"prompt file {path}: {error}") from None


def read_prompt_file(path: str | Path) -> list[str]:
    """The strings in a JSON file that holds a list of captions.

    Raises: UserError if the file is missing, unreadable, not JSON, not a list of strings, or empty.
    """
    rule = 'give a JSON list of captions such as ["..."]'
    try:
        captions = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"prompt file {path} does not exist: {rule}") from None
    except OSError as error:
        raise UserError(f"prompt file {path} cannot be read ({error.strerror}): {rule}") from None
    except UnicodeDecodeError:
        raise UserError(f"prompt file {path} is not UTF-8 text: {rule}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"prompt file {path}, line {error.lineno}: {error.msg}; {rule}") from None
    if not isinstance(captions, list):
        raise UserError(f"prompt file {path} holds a {type(captions).__name__}: {rule}")
    if not captions:
        raise UserError(f"prompt file {path} holds no prompt: {rule}")
    for number, caption in enumerate(captions, 1):
        if not isinstance(caption, str) or not caption.strip():
            raise UserError(
                f"prompt file {path}: entry {number} is {caption!r}, not a caption; {rule}"
            )
    return captions
