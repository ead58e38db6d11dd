"""Reading a picture of one handwritten digit: which digit it is, and how it is written.

Four factors are read off a picture. The digit comes from a small classifier with an eleventh class,
"no digit", trained on noise, flat greys, blurs, negatives, overlays and jumbled patches. The weight
(stroke width at standard size), the slant and the size are measured on the ink itself, by formulas
that stay finite and differentiable on any picture, blank ones included. From these come the dense
rewards, the sparse success and the codes for the entropy of what a policy draws.

Scale of the rewards: the mean probability, over the asked things, that each holds, from 0 to 1. So
one wrong thing of n costs at most 1/n. A mean of probabilities, not a sum of logs: with that, a
picture that leaves everything open can beat one that is right in all but one thing.

Dimensions: B pictures, H = W = 28 pixels, P = 64 patches of 49 pixels, K = 11 classes,
F = 4 factors (digit, weight, slant, size). A factor of style takes LOW, MIDDLE or HIGH.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxalign.core.types import Array, Params

SIDE = 28
FACTORS = ("digit", "weight", "slant", "size")
NO_DIGIT = 10
LOW, MIDDLE, HIGH = 0, 1, 2
FACTOR_SIZES = (11, 3, 3, 3)  # how many values `read_factors` may give for each factor
STANDARD_SIZE = 20.0  # pixels: the box that the original digits were scaled to
SMOOTHING = 0.1  # label smoothing: what is left to the classes that do not hold
STEEPNESS = 5.0  # logits between the low and the high threshold of a measurement

_WINDOW, _STRIDE, _CHANNELS, _HIDDEN = 7, 3, 32, 128


class Measures(NamedTuple):
    """How a digit is written.

    weight: `[B] f32`, stroke width in pixels of the digit brought to a size of 20 pixels.
    slant: `[B] f32`, pixels to the right per pixel upwards; positive leans to the right.
    size: `[B] f32`, the longer side of the box around the ink, in pixels.
    """

    weight: Array
    slant: Array
    size: Array


# ---------------------------------------------------------------- measurements


def ink(images: Array) -> Array:
    """Ink in [0, 1]: faint grey (below 25 %) is paper, and 75 % or more is full ink.

    Args:
        images: `[B, H, W, 1] f32` in [-1, 1].
    Returns:
        `[B, H, W] f32`.
    """
    return jnp.clip(((images[..., 0] + 1) / 2 - 0.25) / 0.5, 0.0, 1.0)


def stroke_width(images: Array) -> Array:
    """Mean stroke width in pixels, `[B] f32`: twice the ink over the length of its outline.

    The outline's length is the total variation of the ink. A ring of width w gives w; a straight
    bar of length L gives w L / (w + L), as its two ends count as outline. A blank picture gives 0.
    """
    black = ink(images)
    outline = _total_variation(black)
    return 2 * black.sum((1, 2)) / jnp.maximum(outline, 1.0)


def slant(images: Array) -> Array:
    """Shear of the ink, `[B] f32`: covariance of x and height over the variance of height.

    Positive leans to the right. A blank picture gives 0.
    """
    black = ink(images)
    mass = jnp.maximum(black.sum((1, 2)), 1e-3)
    place = jnp.arange(black.shape[1], dtype=black.dtype)
    rows, columns = black.sum(2), black.sum(1)
    down = place[None] - ((rows @ place) / mass)[:, None]
    right = place[None] - ((columns @ place) / mass)[:, None]
    covariance = jnp.einsum("bij,bi,bj->b", black, down, right) / mass
    return -covariance / ((rows * down**2).sum(1) / mass + 0.1)


def size(images: Array) -> Array:
    """The longer side of the box around the ink in pixels, `[B] f32`.

    Counts rows (columns) with ink, smoothly: a row with one full pixel counts 0.95, an empty one 0.
    """
    black = ink(images)
    height = (1 - jnp.exp(-3 * black.sum(2))).sum(1)
    width = (1 - jnp.exp(-3 * black.sum(1))).sum(1)
    return jnp.maximum(height, width)


def measure(images: Array) -> Measures:
    """All three measurements of `[B, H, W, 1]` pictures; see `Measures` for the units."""
    extent = size(images)
    weight = stroke_width(images) * STANDARD_SIZE / jnp.maximum(extent, 1.0)
    return Measures(weight, slant(images), extent)


def _total_variation(black: Array) -> Array:
    """Length of the outline, `[B]`: the gradient's length, a mean over the four pixel corners."""
    padded = jnp.pad(black, ((0, 0), (1, 1), (1, 1)))
    across, down = jnp.diff(padded, axis=2), jnp.diff(padded, axis=1)
    corners = jnp.stack(
        [
            jnp.sqrt(across[:, rows, :] ** 2 + down[:, :, columns] ** 2 + 1e-8) - 1e-4
            for rows in (slice(None, -1), slice(1, None))
            for columns in (slice(None, -1), slice(1, None))
        ]
    )
    return corners.sum((0, 2, 3)) / 4


# ---------------------------------------------------------------- classifier


def _patch_index() -> np.ndarray:
    """Flat pixel numbers of the overlapping windows, `[P, 49]`."""
    start = np.arange(0, SIDE - _WINDOW + 1, _STRIDE)
    inner = (np.arange(_WINDOW)[:, None] * SIDE + np.arange(_WINDOW)[None]).ravel()
    corner = (start[:, None] * SIDE + start[None]).ravel()
    return corner[:, None] + inner[None]


_PATCHES = _patch_index()


def init_classifier(key: Array) -> Params:
    """Fresh weights: one layer shared by all patches, one hidden layer, one read-out."""
    shapes = {
        "patch": (_WINDOW**2, _CHANNELS),
        "hidden": (len(_PATCHES) * _CHANNELS, _HIDDEN),
        "out": (_HIDDEN, NO_DIGIT + 1),
    }
    keys = jax.random.split(key, len(shapes))
    return {
        name: {
            "kernel": jax.random.normal(k, shape) * np.sqrt(2 / shape[0]),
            "bias": jnp.zeros(shape[1]),
        }
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def classify(params: Params, images: Array) -> Array:
    """Log-probabilities of the ten digits and of "no digit".

    Args:
        params: the classifier's weights.
        images: `[B, H, W, 1] f32` in [-1, 1]; values beyond are cut, so they win nothing.
    Returns:
        `[B, K] f32`.
    """
    pixels = jnp.clip(images, -1.0, 1.0).reshape(images.shape[0], SIDE * SIDE)
    hidden = jax.nn.relu(_dense(params["patch"], pixels[:, _PATCHES]))
    hidden = jax.nn.relu(_dense(params["hidden"], hidden.reshape(hidden.shape[0], -1)))
    return jax.nn.log_softmax(_dense(params["out"], hidden))


def _dense(layer: Params, inputs: Array) -> Array:
    bias = layer["bias"].reshape((1,) * (inputs.ndim - 1) + (-1,))
    return inputs @ layer["kernel"] + bias


def no_digits(images: Array, key: Array) -> Array:
    """Pictures that are no digit, made from `[B, H, W, 1]` digits, as many again, in [-1, 1].

    Six kinds by turns: pure noise, a flat grey, smooth blotches, a strong blur, the negative, and
    the picture's sixteen 7 x 7 blocks in a wrong order. (Two digits over one another were tried as
    well: the classifier then takes one true digit in forty for such a pair.)
    """
    count = images.shape[0]
    k_noise, k_level, k_spread, k_blocks = jax.random.split(key, 4)
    noise = jax.random.normal(k_noise, images.shape)
    level = jax.random.uniform(k_level, (count, 1, 1, 1), minval=-1.0)
    spread = jax.random.uniform(k_spread, (count, 1, 1, 1))
    kinds = jnp.stack(
        [
            level + spread * noise,
            level + 0.05 * noise,
            5 * _blurred(noise, 1.5) + level / 2 - 0.3,
            _blurred(images + 1, 3.0) - 1,
            -images,
            _jumbled(images, k_blocks),
        ]
    )
    kind = jnp.arange(count) % len(kinds)
    return jnp.clip(kinds[kind, jnp.arange(count)], -1.0, 1.0)


def _blurred(images: Array, width: float) -> Array:
    """A Gaussian blur of this width in pixels, as a matrix on each side."""
    place = np.arange(SIDE)
    kernel = np.exp(-0.5 * ((place[:, None] - place[None]) / width) ** 2)
    matrix = jnp.asarray(kernel / kernel.sum(1, keepdims=True), images.dtype)
    return jnp.einsum("ij,bjkc,lk->bilc", matrix, images, matrix)


def _jumbled(images: Array, key: Array) -> Array:
    """The sixteen 7 x 7 blocks of each picture in one shuffled order."""
    cells = SIDE // 7
    blocks = images.reshape(-1, cells, 7, cells, 7, 1).swapaxes(2, 3).reshape(-1, cells**2, 7, 7, 1)
    blocks = blocks[:, jax.random.permutation(key, cells**2)]
    return blocks.reshape(-1, cells, cells, 7, 7, 1).swapaxes(2, 3).reshape(images.shape)


@functools.partial(jax.jit, static_argnames=("steps", "batch"))
def train_classifier(
    images: Array, labels: Array, key: Array, *, steps: int = 1500, batch: int = 96
) -> Params:
    """A classifier trained as one compiled scan (about 15 s on two CPU cores).

    Batches get pixel noise of a random strength, so that a half-denoised digit is still read, and a
    quarter as many pictures that are no digit. AdamW, one-cycle schedule, label smoothing 0.1, so
    that the probabilities do not saturate: they lie near 0.91 and near 0.01, with slopes between.

    Args:
        images: `[N, H, W, 1] f32` in [-1, 1].
        labels: `[N] int32`, 0..9.
        key: PRNG key.
        steps: optimizer steps.
        batch: digits a step.
    """
    optimizer = optax.adamw(optax.cosine_onecycle_schedule(steps, 2e-3), weight_decay=0.01)

    def step(carry, step_key):
        params, state = carry
        grads = jax.grad(_loss)(params, *_training_batch(images, labels, step_key, batch))
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    k_init, k_steps = jax.random.split(key)
    params = init_classifier(k_init)
    start = (params, optimizer.init(params))
    return jax.lax.scan(step, start, jax.random.split(k_steps, steps))[0][0]


def _loss(params: Params, images: Array, targets: Array) -> Array:
    return -(targets * classify(params, images)).sum(-1).mean()


def _training_batch(images: Array, labels: Array, key: Array, batch: int) -> tuple[Array, Array]:
    """Noisy digits and, behind them, a quarter as many no-digits, with smoothed labels `[., K]`."""
    k_rows, k_noise, k_strength, k_none = jax.random.split(key, 4)
    rows = jax.random.randint(k_rows, (batch,), 0, images.shape[0])
    clean = images[rows]
    strength = jax.random.uniform(k_strength, (batch, 1, 1, 1), maxval=0.6)
    noisy = clean + strength * jax.random.normal(k_noise, clean.shape)
    none = no_digits(clean[: batch // 4], k_none)
    classes = jnp.concatenate([labels[rows], jnp.full(none.shape[0], NO_DIGIT, labels.dtype)])
    targets = optax.smooth_labels(jax.nn.one_hot(classes, NO_DIGIT + 1), SMOOTHING)
    return jnp.concatenate([noisy, none]), targets


# ---------------------------------------------------------------- rewards
#
# `params` is {"classifier": weights, "low": [3] f32, "high": [3] f32}, the thresholds of weight,
# slant and size. `batch["target"]` is [B, F] int32: the value asked of each factor, or -1.


def reward(images: Array, batch: Mapping[str, Array], params: Params) -> Array:
    """Mean probability of all asked things, the digit and the words of style; `[B] f32`, 0 to 1."""
    return _mean_asked(_holds(images, batch, params), batch["target"])


def digit_reward(images: Array, batch: Mapping[str, Array], params: Params) -> Array:
    """p(asked digit | picture), `[B] f32` in [0, 1]."""
    return _mean_asked(_holds(images, batch, params)[:, :1], batch["target"][:, :1])


def style_reward(images: Array, batch: Mapping[str, Array], params: Params) -> Array:
    """Mean probability of the asked words of style; `[B] f32` in [0, 1], 1 where none is asked."""
    return _mean_asked(_holds(images, batch, params)[:, 1:], batch["target"][:, 1:])


def read_factors(images: Array, params: Params) -> Array:
    """What the picture shows: the digit (10 = none), then weight, slant and size.

    Returns:
        `[B, F] int32` with values below `FACTOR_SIZES`.
    """
    digit = classify(params["classifier"], images).argmax(-1).astype(jnp.int32)
    return jnp.concatenate([digit[:, None], read_style(images, params)], axis=-1)


def read_style(images: Array, params: Params) -> Array:
    """Weight, slant and size as LOW, MIDDLE or HIGH, `[B, 3] int32`."""
    measured = jnp.stack(measure(images), axis=-1)
    above, below = measured >= params["high"][None], measured <= params["low"][None]
    return jnp.where(above, HIGH, jnp.where(below, LOW, MIDDLE)).astype(jnp.int32)


def success(images: Array, batch: Mapping[str, Array], params: Params) -> Array:
    """1 where every asked factor is read off the picture as asked, else 0, `[B] f32`."""
    target = batch["target"]
    held = (target < 0) | (read_factors(images, params) == target)
    return held.all(-1).astype(jnp.float32)


def _mean_asked(holds: Array, target: Array) -> Array:
    """Mean of holds `[B, F]` over the asked factors; 1 where nothing is asked."""
    asked = target >= 0
    missed = jnp.where(asked, 1 - holds, 0.0).sum(-1)
    return 1 - missed / jnp.maximum(asked.sum(-1), 1)


def _holds(images: Array, batch: Mapping[str, Array], params: Params) -> Array:
    """Probability `[B, F]` that each factor is as asked; meaningless where nothing is asked.

    For a word of style: a logistic in the measurement, centred on the word's own threshold and
    running over STEEPNESS logits between the two thresholds, times p(some digit), as style is a
    property of a digit.
    """
    target = batch["target"]
    classes = jnp.exp(classify(params["classifier"], images))
    digit = jnp.take_along_axis(classes, jnp.maximum(target[:, :1], 0), axis=-1)
    measured = jnp.stack(measure(images), axis=-1)
    low, high = params["low"][None], params["high"][None]
    beyond = jnp.where(target[:, 1:] == HIGH, measured - high, low - measured)
    words = jax.nn.sigmoid(STEEPNESS * beyond / (high - low))
    some_digit = 1 - classes[:, NO_DIGIT:]
    return jnp.concatenate([digit, words * some_digit], axis=-1)
