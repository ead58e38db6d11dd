"""Exact rewards of the sprites world: the posterior of what a caption asks, given the picture.

A scene is a background shade and, in each of four cells, nothing or one sprite: a look (shape,
colour, texture) at a jitter. That grid is finite, and given the shade the cells are independent,
so under a Gaussian pixel likelihood exp(-|x - t|^2 / 2 tau) every posterior below is exact.
Rewards are such posteriors, from 0 to 1:

- early: where things are, whatever they are: one thing in the asked place, or two in the asked
  direction.
- late: what the things look like, wherever they are: the asked texture, else the asked colour,
  or, for two things, their shapes. Given that there are as many things as the caption speaks of.
- mixed: the mean of early, late and the asked shapes. For two things late is the shapes, which so
  count twice.

A clean picture of what is asked scores about 0.9, and one wrong factor costs early or late nearly
all of that, and mixed about a third (a shape of two, two thirds). Means of probabilities, not sums
of logs: with those, a picture that leaves everything open can beat one that is right in all but one
thing.

Two questions, two likelihoods. Moving a sprite changes several times as many pixels as changing
its texture, so each question has its own temperature, `tau_where` and `tau_what`, set such that
one wrong factor costs about 3 to 7 nats of log-posterior: enough to decide, with a slope left to
climb. And a filling of the cells is as likely as the best sprites in it make it (a profile
likelihood): averaged over 432 looks and jitters at so high a temperature, a filled cell would lose
several nats to an empty one, and no clean picture could score near 1.

The prior of where: 0.4 on one thing (four places), 0.4 on two things side by side or one above
the other (four pairs), and 0.2 on the other eight ways to fill four cells. Those keep an empty or
a crowded picture from being read as the nearest thing that a caption can ask. The rest of the
prior is uniform.

Dimensions: B pictures, G shades, Q cells (top left, top right, bottom left, bottom right), S
shapes, C colours, T textures, K = S*C*T looks, J jitters, D pixels of a cell times channels, M =
2^Q fillings.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import logsumexp

from jaxalign.core.types import Array

TARGETS = ("shape", "colour", "texture", "place", "relation", "second shape")
FACTORS = (
    "filled cells",
    "first shape",
    "first colour",
    "first texture",
    "second shape",
    "second colour",
    "second texture",
    "background",
)

# Fillings as bits: cell q is filled in filling m if bit q of m is set.
FILLED = (np.arange(16)[:, None] >> np.arange(4)[None, :]) & 1 == 1
ONE = np.array([0b0001, 0b0010, 0b0100, 0b1000])
# Pairs of cells, first thing first: two "left of", then two "above".
PAIRS = np.array([[0, 1], [2, 3], [0, 2], [1, 3]])
PAIR_RELATION = np.array([0, 0, 1, 1])
TWO = (1 << PAIRS[:, 0]) + (1 << PAIRS[:, 1])
PRIOR = np.full(16, 0.2 / 8)
PRIOR[ONE] = PRIOR[TWO] = 0.1


class Params(NamedTuple):
    """Templates and temperatures.

    sprite: `[G, S, C, T, J, D] f32`, a cell with a sprite.
    empty: `[G, D] f32`, a cell without.
    tau_where, tau_what: `[] f32`, the likelihood's temperatures (squared pixel units).
    """

    sprite: Array
    empty: Array
    tau_where: Array
    tau_what: Array


class Posterior(NamedTuple):
    """Log-posteriors of a picture; each sums to one over its last axes.

    where: `[B, M] f32`, which cells are filled (at tau_where).
    one: `[B, Q, S, C, T] f32`, place and look, given that there is one thing (at tau_what).
    two: `[B, 4, S, S] f32`, pair of cells and the shapes in them, given that there are two things
        in neighbouring cells (at tau_what).
    """

    where: Array
    one: Array
    two: Array


class Reading(NamedTuple):
    """The scene whose rendering is nearest to the picture.

    background: `[B] int32`, shade.
    filled: `[B, Q] bool`.
    look: `[B, Q, 3] int32`, shape, colour, texture of the nearest sprite (means nothing in
        empty cells).
    """

    background: Array
    filled: Array
    look: Array


def posterior(images: Array, params: Params) -> Posterior:
    """Exact log-posteriors of where things are and of what they are.

    images: `[B, H, W, 3]`, values around [-1, 1].
    """
    sprite, empty = _distances(images, params)
    return Posterior(_where(sprite, empty, params.tau_where), *_what(sprite, empty, params))


def early(images: Array, batch: Mapping[str, Array], params: Params) -> Array:
    """Posterior of the asked places, whatever is there; `[B] f32` in [0, 1].

    A caption without place or relation asks for exactly one thing, anywhere.
    batch: "target", `[B, 6] int32`, columns TARGETS, -1 where nothing is asked.
    """
    return _chance(posterior(images, params).where, _asked_fillings(batch["target"]))


def late(images: Array, batch: Mapping[str, Array], params: Params) -> Array:
    """Posterior of the asked texture, else colour, else shapes; `[B] f32` in [0, 1]."""
    return _look(posterior(images, params), _late_target(batch["target"]))


def mixed(images: Array, batch: Mapping[str, Array], params: Params) -> Array:
    """Mean posterior of the asked places, the late look and the asked shapes; `[B] f32`, 0 to 1."""
    post, target = posterior(images, params), batch["target"]
    shapes = jnp.where(np.isin(np.arange(6), (0, 4, 5))[None, :], target, -1)
    where = _chance(post.where, _asked_fillings(target))
    late_look = _look(post, _late_target(target))
    return (where + late_look + _look(post, shapes)) / 3


def success(images: Array, batch: Mapping[str, Array], params: Params) -> Array:
    """1 where all that the caption asks is read off the picture, and no more things; `[B] f32`."""
    target, scene = batch["target"], read(images, params)
    asked = target[:, None, :3]
    fits = jnp.all((asked < 0) | (scene.look == asked), axis=-1)
    one = jnp.any(_asked_fillings(target) & _is_filling(scene), axis=-1)
    one &= jnp.all(fits | ~scene.filled, axis=-1)
    return jnp.where(_asks_one(target), one, _two_hold(scene, target)).astype(jnp.float32)


def read(images: Array, params: Params) -> Reading:
    """The nearest scene, cell by cell under the shade that fits the whole picture best."""
    sprite, empty = _distances(images, params)
    nearest = sprite.reshape(*sprite.shape[:3], -1)
    cost = jnp.minimum(nearest.min(-1), empty)
    background = jnp.argmin(cost.sum(1), axis=-1)
    chosen = background[:, None, None, None]
    nearest = jnp.take_along_axis(nearest, chosen, axis=2)[:, :, 0]
    empty = jnp.take_along_axis(empty, chosen[..., 0], axis=2)[:, :, 0]
    sizes = params.sprite.shape[1:5]
    look = jnp.stack(jnp.unravel_index(jnp.argmin(nearest, axis=-1), sizes)[:3], axis=-1)
    return Reading(background.astype(jnp.int32), nearest.min(-1) < empty, look.astype(jnp.int32))


def factors(images: Array, params: Params) -> Array:
    """Everything read off the picture, `[B, 8] int32`, columns FACTORS with `factor_sizes` values.

    "filled cells" is the filling m. Things are taken in the order of the cells; the looks of the
    first two count from 1, and 0 stands for no such thing.
    """
    scene = read(images, params)
    bits = jnp.asarray(1 << np.arange(4), jnp.int32)
    filling = jnp.sum(scene.filled * bits[None, :], axis=-1)
    rank = jnp.cumsum(scene.filled, axis=-1)
    columns = [filling[:, None]]
    for number in (1, 2):
        this = scene.filled & (rank == number)
        columns.append(jnp.sum(this[..., None] * (scene.look + 1), axis=1))
    columns.append(scene.background[:, None])
    return jnp.concatenate(columns, axis=-1).astype(jnp.int32)


def factor_sizes(params: Params) -> tuple[int, ...]:
    """The number of values of each column of `factors`."""
    shades, *look = params.sprite.shape[:4]
    one = tuple(size + 1 for size in look)
    return (16, *one, *one, shades)


def _distances(images: Array, params: Params) -> tuple[Array, Array]:
    """Squared distances of each cell to each template: `[B, Q, G, K, J]` and `[B, Q, G]`."""
    shades, *sizes, jitters, _ = params.sprite.shape
    cells = _cells(images.astype(jnp.float32))
    sprite = _squared_distance(cells, params.sprite.reshape(-1, params.sprite.shape[-1]))
    empty = _squared_distance(cells, params.empty)
    return sprite.reshape(*cells.shape[:2], shades, int(np.prod(sizes)), jitters), empty


def _cells(images: Array) -> Array:
    """The four quarters of each picture, `[B, H, W, C]` to `[B, Q, D]`."""
    batch, height, width, channels = images.shape
    split = images.reshape(batch, 2, height // 2, 2, width // 2, channels)
    return split.swapaxes(2, 3).reshape(batch, 4, -1)


def _squared_distance(cells: Array, templates: Array) -> Array:
    """`[B, Q, D]`, `[R, D]` to `[B, Q, R]`."""
    # Full precision: the difference of large terms would lose its digits in tf32 or bf16.
    cross = jnp.einsum("bqd,rd->bqr", cells, templates, precision=jax.lax.Precision.HIGHEST)
    own = jnp.sum(cells**2, axis=-1, keepdims=True)
    return own - 2 * cross + jnp.sum(templates**2, axis=-1)[None, None, :]


def _where(sprite: Array, empty: Array, tau: Array) -> Array:
    """Log-posterior of the filling, `[B, M]`: best looks and jitters, shade summed out."""
    gain = (empty - sprite.min((-2, -1))) / (2 * tau)
    filled = jnp.einsum("bqg,mq->bgm", gain, jnp.asarray(FILLED, jnp.float32))
    joint = logsumexp(filled - empty.sum(1)[:, :, None] / (2 * tau), axis=1)
    return jax.nn.log_softmax(joint + jnp.asarray(np.log(PRIOR), jnp.float32)[None, :], axis=-1)


def _what(sprite: Array, empty: Array, params: Params) -> tuple[Array, Array]:
    """Log-posteriors `one [B, Q, S, C, T]` and `two [B, 4, S, S]`, jitter and shade summed out."""
    shapes, colours, textures = params.sprite.shape[1:4]
    scale = -1 / (2 * params.tau_what)
    rest = scale * empty.sum(1, keepdims=True)[..., None]
    gain = logsumexp(scale * (sprite - empty[..., None, None]), axis=-1)
    one = logsumexp(rest + gain, axis=2).reshape(*gain.shape[:2], shapes, colours, textures)
    split = gain.reshape(*gain.shape[:3], shapes, colours * textures)
    shape = logsumexp(split, axis=-1)
    first, second = shape[:, PAIRS[:, 0]], shape[:, PAIRS[:, 1]]
    two = logsumexp(rest[..., None] + first[..., :, None] + second[..., None, :], axis=2)
    return _normalise(one), _normalise(two)


def _normalise(log_p: Array) -> Array:
    """Sums to one over all axes but the first."""
    axes = tuple(range(1, log_p.ndim))
    return log_p - logsumexp(log_p, axis=axes, keepdims=True)


def _look(post: Posterior, target: Array) -> Array:
    """Posterior of the asked looks, wherever they are, `[B]`."""
    asked = [
        (target[:, i, None] < 0) | (target[:, i, None] == np.arange(size)[None, :])
        for i, size in enumerate(post.one.shape[2:])
    ]
    look = asked[0][:, :, None, None] & asked[1][:, None, :, None] & asked[2][:, None, None, :]
    one = _chance(post.one, look[:, None])
    second = (target[:, 5:] < 0) | (target[:, 5:] == np.arange(post.two.shape[-1])[None, :])
    both = asked[0][:, :, None] & second[:, None, :]
    two = _chance(post.two, both[:, None])
    return jnp.where(_asks_one(target), one, two)


def _chance(log_p: Array, asked: Array) -> Array:
    """P(asked), `[B]`, from log-probabilities `[B, ...]` and a mask that broadcasts."""
    axes = tuple(range(1, log_p.ndim))
    return jnp.sum(jnp.exp(log_p), axis=axes, where=jnp.broadcast_to(asked, log_p.shape))


def _asked_fillings(target: Array) -> Array:
    """The fillings that put the things where the caption asks, `[B, M] bool`."""
    place, relation = target[:, 3, None], target[:, 4, None]
    cell = np.full(16, -1)
    cell[ONE] = np.arange(4)
    side = np.full(16, -1)
    side[TWO] = PAIR_RELATION
    one = (cell >= 0)[None, :] & ((place < 0) | (place == cell[None, :]))
    two = (side >= 0)[None, :] & (relation == side[None, :])
    return jnp.where(_asks_one(target)[:, None], one, two)


def _late_target(target: Array) -> Array:
    """The target with only the factor of the look that is decided last: texture, else colour."""
    asked = target[:, :3] >= 0
    later = jnp.cumsum(asked[:, ::-1], axis=-1)[:, ::-1] - asked
    look = jnp.where(later == 0, target[:, :3], -1)
    return jnp.concatenate([look, target[:, 3:]], axis=-1)


def _asks_one(target: Array) -> Array:
    """Whether the caption is about one thing (else two), `[B] bool`."""
    return target[:, 4] < 0


def _is_filling(scene: Reading) -> Array:
    """One-hot filling of a reading, `[B, M] bool`."""
    return jnp.all(scene.filled[:, None, :] == FILLED[None, :, :], axis=-1)


def _two_hold(scene: Reading, target: Array) -> Array:
    """Whether exactly two things stand in the asked direction with the asked shapes, `[B] bool`."""
    shape = scene.look[..., 0]
    first = (target[:, :1] < 0) | (shape[:, PAIRS[:, 0]] == target[:, :1])
    second = (target[:, 5:] < 0) | (shape[:, PAIRS[:, 1]] == target[:, 5:])
    there = _is_filling(scene)[:, TWO] & (target[:, 4, None] == PAIR_RELATION[None, :])
    return jnp.any(first & second & there, axis=-1)
