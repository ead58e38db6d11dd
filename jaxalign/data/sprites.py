"""The sprites world: small procedural pictures, captions by three grammars, an exact oracle.

A picture is 16x16, two by two cells of 8x8 on a dark or a dim ground. One sprite stands in one
cell, or two stand in neighbouring cells. A sprite is 6x6, of one shape, colour and texture, in the
middle of its cell. The oracle also reads the eight other offsets (the jitter), as a model may draw
a pixel off. Shade and jitter are never asked for. The captions mirror the three prompt templates of
B2-DiffuRL (thing and what it does; colour and thing; two things and their relation):

- place:    "a striped disc at the top left"
- colour:   "a red disc"
- relation: "a disc left of a cross", "a disc above a cross"

Place, and how many things there are, are settled early in the denoising; texture, a matter of
single pixels, late. The corpus is imbalanced on purpose: each shape has its usual texture, colour
and place, some combinations are rare or absent, and each word of a caption that names a factor is
wrong at a stated rate. A base model trained on it is misaligned but not hopeless.

Dimensions: N pictures, G shades, Q = 4 cells, S shapes, C colours, T textures, J jitters, P
prompts, L words.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxalign.core.types import UserError
from jaxalign.data.world import Prompts, Vocabulary, World
from jaxalign.rewards import sprites as oracle

SHAPES = {
    "square": ("######", "######", "######", "######", "######", "######"),
    "disc": ("..##..", ".####.", "######", "######", ".####.", "..##.."),
    "triangle": ("..##..", "..##..", ".####.", ".####.", "######", "######"),
    "cross": ("##..##", ".####.", "..##..", "..##..", ".####.", "##..##"),
}
COLOURS = {
    "red": (0.9, -0.4, -0.4),
    "green": (-0.4, 0.9, -0.4),
    "blue": (-0.4, -0.4, 0.9),
    "yellow": (0.75, 0.75, -0.4),
}
TEXTURES = ("solid", "striped", "dotted")
PLACES = ("top left", "top right", "bottom left", "bottom right")
RELATIONS = ("left of", "above")
GRAMMARS = ("place", "colour", "relation")
SHADES = (-0.95, -0.7)
MIDDLE = 4  # the jitter of the corpus
DIM = 0.2  # how much of its colour a sprite keeps between the stripes or dots
IMAGE_SHAPE = (16, 16, 3)
WORDS = ("a", "at", "the", "of", "top", "bottom", "left", "right", "above")
VOCABULARY = Vocabulary((*WORDS, *SHAPES, *COLOURS, *TEXTURES), length=8)
# Chances of the corpus: how usual a texture, colour, place, or second shape is for a (first) shape.
# Entry k is the chance of the value (shape + k) modulo the number of values.
USUAL_TEXTURE = (0.70, 0.25, 0.05)
USUAL_COLOUR = (0.60, 0.30, 0.10, 0.00)
USUAL_PLACE = (0.50, 0.25, 0.20, 0.05)
USUAL_SECOND = (0.00, 0.55, 0.35, 0.10)
USUAL_RELATION = 0.8  # "left of" for a square or triangle first, "above" for a disc or cross
WRONG = 0.25
# What the likelihood's temperatures are set for: see rewards/sprites.py.
TAU_WHERE = 7.0
TAU_WHAT = 3.0


class Scenes(NamedTuple):
    """What is in N pictures. A cell with shape -1 is empty; its other entries mean nothing.

    shape, colour, texture: `[N, Q] int`.
    jitter: `[N, Q] int`, in 0..8, rows of three: 0 is up and left, MIDDLE is 4.
    background: `[N] int`, shade.
    """

    shape: np.ndarray
    colour: np.ndarray
    texture: np.ndarray
    jitter: np.ndarray
    background: np.ndarray


def world(
    grammar: str = "all",
    *,
    size: int = 8192,
    wrong: float | Mapping[str, float] = WRONG,
    tau_where: float = TAU_WHERE,
    tau_what: float = TAU_WHAT,
) -> World:
    """The sprites world.

    grammar: "place", "colour" or "relation" keeps only those prompts; the corpus has
        all three always.
    size: pictures in the corpus.
    wrong: share of wrong words in the corpus's captions, one number, or by factor kind (shape,
        colour, texture, place, relation; those left out are never wrong).
    tau_where, tau_what: temperatures of the rewards, in squared pixel units.
    Raises: UserError for an unknown grammar or factor kind, or a number out of range.
    """
    if size < 1:
        raise UserError(f"corpus size {size}: it must be at least 1")
    if min(tau_where, tau_what) <= 0:
        raise UserError(f"temperatures {tau_where}, {tau_what}: they must be positive")
    rates = wrong_rates(wrong)
    params = reward_params(tau_where, tau_what)
    train, heldout = prompts(grammar)
    return World(
        name="sprites",
        image_shape=IMAGE_SHAPE,
        patch=8,
        vocabulary=VOCABULARY,
        train=train,
        heldout=heldout,
        corpus=partial(corpus, size=size, wrong=rates),
        rewards={"early": oracle.early, "late": oracle.late, "mixed": oracle.mixed},
        success=oracle.success,
        factors=oracle.factors,
        factor_names=oracle.FACTORS,
        factor_sizes=oracle.factor_sizes(params),
        target_names=oracle.TARGETS,
        reward_params=params,
        read_prompts=read_prompts,
    )


def reward_params(tau_where: float = TAU_WHERE, tau_what: float = TAU_WHAT) -> oracle.Params:
    """The oracle's templates: every cell that can be drawn."""
    sprite, empty = _tiles()
    return oracle.Params(
        jnp.asarray(sprite.reshape(*sprite.shape[:5], -1)),
        jnp.asarray(empty.reshape(empty.shape[0], -1)),
        jnp.asarray(tau_where, jnp.float32),
        jnp.asarray(tau_what, jnp.float32),
    )


def render(scenes: Scenes) -> np.ndarray:
    """The pictures, `[N, 16, 16, 3] f32` in [-1, 1]."""
    sprite, empty = _tiles()
    shade = scenes.background[:, None]
    tiles = sprite[shade, scenes.shape, scenes.colour, scenes.texture, scenes.jitter]
    tiles = np.where((scenes.shape < 0)[..., None, None, None], empty[shade], tiles)
    rows = tiles.reshape(-1, 2, 2, 8, 8, 3).swapaxes(2, 3)
    return rows.reshape(-1, *IMAGE_SHAPE)


def draw_scenes(rng: np.random.Generator, size: int) -> tuple[Scenes, np.ndarray]:
    """Scenes of the imbalanced corpus, and a true target for each, `[size, 6] int32`.

    A third of the scenes have two things (grammar "relation"); of the rest, half is captioned in
    each of the other two grammars.
    """
    shape = rng.integers(4, size=size)
    colour = _usual(rng, USUAL_COLOUR, shape)
    texture = _usual(rng, USUAL_TEXTURE, shape)
    place = _usual(rng, USUAL_PLACE, shape)
    second = _usual(rng, USUAL_SECOND, shape)
    relation = np.where(rng.random(size) < USUAL_RELATION, shape % 2, 1 - shape % 2)
    grammar = rng.integers(3, size=size)
    alone = grammar < 2
    pair = oracle.PAIRS[2 * relation + rng.integers(2, size=size)]
    row = np.arange(size)
    filled = [np.full((size, 4), -1), np.zeros((size, 4), int), np.zeros((size, 4), int)]
    first_cell = np.where(alone, place, pair[:, 0])
    looks = ((shape, colour, texture), _second_looks(rng, second))
    for cells, values in zip(filled, looks[0], strict=True):
        cells[row, first_cell] = values
    for cells, values in zip(filled, looks[1], strict=True):
        cells[row[~alone], pair[~alone, 1]] = values[~alone]
    jitter, background = np.full((size, 4), MIDDLE), rng.integers(len(SHADES), size=size)
    true = np.stack([shape, colour, texture, place, relation, second], axis=1)
    asked = np.stack([_ASKED[name] for name in GRAMMARS])[grammar]
    return Scenes(*filled, jitter, background), np.where(asked, true, -1).astype(np.int32)


def corpus(
    seed: int, size: int = 8192, wrong: float | Mapping[str, float] = WRONG
) -> tuple[np.ndarray, np.ndarray]:
    """Pictures `[size, 16, 16, 3] f32` and captions `[size, L] int32`, partly wrong.

    The same seed gives the same arrays.
    """
    rng = np.random.default_rng([seed, 16])
    scenes, target = draw_scenes(rng, size)
    return render(scenes), tokens_of(misname(rng, target, wrong_rates(wrong)))


def misname(rng: np.random.Generator, target: np.ndarray, rates: Mapping[str, float]) -> np.ndarray:
    """Targets with each asked factor replaced, at its kind's rate, by another of its values."""
    result = target.copy()
    for column, name in enumerate(oracle.TARGETS):
        count = _COUNTS[column]
        other = (target[:, column] + rng.integers(1, count, size=len(target))) % count
        change = rng.random(len(target)) < rates.get(name.removeprefix("second "), 0.0)
        result[:, column] = np.where(change & (target[:, column] >= 0), other, target[:, column])
    return result


def wrong_rates(wrong: float | Mapping[str, float]) -> dict[str, float]:
    """Rates by factor kind.

    Raises: UserError for an unknown kind, or a rate outside [0, 1].
    """
    rates = dict(wrong) if isinstance(wrong, Mapping) else dict.fromkeys(_KINDS, wrong)
    for kind, rate in rates.items():
        if kind not in _KINDS:
            raise UserError(f"factor kind {kind!r} is unknown: use one of {', '.join(_KINDS)}")
        if not 0 <= rate <= 1:
            raise UserError(f"rate {rate} of wrong {kind} words: it must lie in [0, 1]")
    return rates


def caption(target: Sequence[int] | np.ndarray) -> str:
    """The caption that asks for one row of targets."""
    shape, colour, texture, place, relation, second = (int(value) for value in target)
    shapes = tuple(SHAPES)
    if relation >= 0:
        return f"a {shapes[shape]} {RELATIONS[relation]} a {shapes[second]}"
    if place >= 0:
        return f"a {TEXTURES[texture]} {shapes[shape]} at the {PLACES[place]}"
    return f"a {tuple(COLOURS)[colour]} {shapes[shape]}"


def tokens_of(target: np.ndarray) -> np.ndarray:
    """Tokens of the captions of `[N, 6]` targets, `[N, L] int32`."""
    kinds, index = np.unique(target, axis=0, return_inverse=True)
    return VOCABULARY.encode([caption(row) for row in kinds])[index.reshape(-1)]


def prompts(grammar: str = "all") -> tuple[Prompts, Prompts]:
    """Training and held-out prompts of one grammar or of all.

    A quarter of the combinations is held out, spread so that each word, and each pair of shape and
    other word, also stands in training prompts.
    Raises: UserError for an unknown grammar.
    """
    if grammar not in (*GRAMMARS, "all"):
        raise UserError(f"grammar {grammar!r} is unknown: use one of {', '.join(GRAMMARS)}, all")
    chosen = GRAMMARS if grammar == "all" else (grammar,)
    target = np.concatenate([_targets(name) for name in chosen])
    target = target[target[:, 0] != target[:, 5]]  # a shape beside itself says little
    out = _is_heldout(target)
    return _prompts_of(target[~out]), _prompts_of(target[out])


def read_prompts(captions: Sequence[str]) -> Prompts:
    """Prompts from a user's captions; case, spaces and a final full stop do not matter.

    Raises: UserError for a caption outside the three grammars.
    """
    plain = [" ".join(text.lower().strip().rstrip(".").split()) for text in captions]
    tokens = VOCABULARY.encode(plain)
    known = {caption(row): row for name in GRAMMARS for row in _targets(name)}
    for text in plain:
        if text not in known:
            near = difflib.get_close_matches(text, known, n=1, cutoff=0.0)
            raise UserError(
                f"caption {text!r} is none of 'a TEXTURE SHAPE at the PLACE', 'a COLOUR SHAPE', "
                f"'a SHAPE left of|above a SHAPE'; nearest: {near[0]!r}"
            )
    target = np.array([known[text] for text in plain], np.int32).reshape(-1, len(oracle.TARGETS))
    return Prompts(tuple(plain), tokens, target)


_KINDS = ("shape", "colour", "texture", "place", "relation")
# The columns (of oracle.TARGETS) that each grammar asks, and the number of their values.
_ASKED = {
    "place": np.array([True, False, True, True, False, False]),
    "colour": np.array([True, True, False, False, False, False]),
    "relation": np.array([True, False, False, False, True, True]),
}
_COUNTS = (len(SHAPES), len(COLOURS), len(TEXTURES), len(PLACES), len(RELATIONS), len(SHAPES))

# Digits: shape, relation, second shape. Each shape stands first, and second, at least once.
_HELDOUT_RELATIONS = (1, 203, 301, 112, 310, 12)


def _targets(grammar: str) -> np.ndarray:
    """All targets of a grammar, `[P, 6] int32`."""
    values = [
        range(n) if asked else (-1,) for n, asked in zip(_COUNTS, _ASKED[grammar], strict=True)
    ]
    return np.array(list(itertools.product(*values)), np.int32)


def _is_heldout(target: np.ndarray) -> np.ndarray:
    """A quarter of the combinations of each grammar, spread as in a Latin square."""
    shape, colour, texture, place, relation, second = target.T
    by_place = (shape + texture + place) % 4 == 3
    by_colour = (shape + colour) % 4 == 3
    by_relation = np.isin(100 * shape + 10 * relation + second, _HELDOUT_RELATIONS)
    return np.where(relation >= 0, by_relation, np.where(place >= 0, by_place, by_colour))


def _prompts_of(target: np.ndarray) -> Prompts:
    text = tuple(caption(row) for row in target)
    return Prompts(text, VOCABULARY.encode(text), target)


def _usual(rng: np.random.Generator, chances: Sequence[float], shape: np.ndarray) -> np.ndarray:
    """A factor's values, `[N]`, drawn by how usual they are for each shape."""
    return (shape + rng.choice(len(chances), p=chances, size=len(shape))) % len(chances)


def _second_looks(
    rng: np.random.Generator, shape: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Shape, colour, texture of the second things, `[N]` each."""
    return shape, _usual(rng, USUAL_COLOUR, shape), _usual(rng, USUAL_TEXTURE, shape)


def _tiles() -> tuple[np.ndarray, np.ndarray]:
    """Every cell with a sprite, `[G, S, C, T, J, 8, 8, 3] f32`, and without, `[G, 8, 8, 3] f32`."""
    mask = np.array([[[pixel == "#" for pixel in row] for row in rows] for rows in SHAPES.values()])
    down, along = np.indices((6, 6))
    full = np.stack([np.ones((6, 6), bool), down % 2 == 0, (down + along) % 2 == 0])
    cover = mask[:, None] * np.where(full, 1.0, DIM)[None]
    placed = np.zeros((*cover.shape[:2], 9, 8, 8))
    for jitter in range(9):
        top, left = divmod(jitter, 3)
        placed[:, :, jitter, top : top + 6, left : left + 6] = cover
    shade = np.array(SHADES).reshape(-1, 1, 1, 1, 1, 1, 1, 1)
    colour = np.array(list(COLOURS.values())).reshape(1, 1, -1, 1, 1, 1, 1, 3)
    cover = placed[None, :, None, :, :, :, :, None]
    empty = np.broadcast_to(shade.reshape(-1, 1, 1, 1), (len(SHADES), 8, 8, 3))
    return (shade + cover * (colour - shade)).astype(np.float32), empty.astype(np.float32)
