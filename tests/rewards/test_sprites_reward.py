"""The sprites oracle: exact reading, normalised posteriors, and what each reward sees."""

import itertools

import jax
import numpy as np
import pytest

from jaxalign.data import sprites
from jaxalign.rewards import sprites as oracle

PARAMS = sprites.reward_params()
REWARDS = {name: jax.jit(getattr(oracle, name)) for name in ("early", "late", "mixed", "success")}
posterior, read, factors = map(jax.jit, (oracle.posterior, oracle.read, oracle.factors))
# Pictures are put together in NumPy, and all calls to a reward or a reading have one batch size:
# few programs to compile.
BATCH = 512
STRIPED = "a striped disc at the top left"


def draw(*things, background=0, jitter=sprites.MIDDLE):
    """One picture, `[1, 16, 16, 3]`, of things (cell, shape, colour, texture)."""
    looks = np.zeros((3, 1, 4), int)
    looks[0] = -1
    for cell, *look in things:
        looks[:, 0, cell] = look
    scene = sprites.Scenes(*looks, np.full((1, 4), jitter), np.array([background]))
    return sprites.render(scene)


def in_batches(function, images, params=PARAMS):
    """A reading of any number of pictures, as NumPy arrays."""
    size = len(images)
    images = np.resize(images, (-(-size // BATCH) * BATCH, *images.shape[1:]))
    parts = [function(part, params) for part in np.split(images, len(images) // BATCH)]
    return jax.tree.map(lambda *values: np.concatenate(values)[:size], *parts)


def score(name, images, *captions, params=PARAMS):
    """The reward of each caption on one picture, or on as many pictures."""
    target = sprites.read_prompts(captions).target
    images = np.broadcast_to(images, (len(captions), *images.shape[1:]))
    return score_targets(name, images, target, params)


def score_targets(name, images, target, params=PARAMS):
    rows = np.arange(BATCH) % len(target)
    batch = {"target": np.asarray(target)[rows]}
    return np.asarray(REWARDS[name](images[rows], batch, params))[: len(target)]


def noise(seed):
    """One picture of standard normal pixels."""
    return np.random.default_rng(seed).normal(size=(1, 16, 16, 3)).astype(np.float32)


def uniform(seed, size):
    """Pictures of pixels between -1 and 1."""
    rng = np.random.default_rng(seed)
    return rng.uniform(-1, 1, size=(size, 16, 16, 3)).astype(np.float32)


def random_scenes(size, seed=0):
    """Scenes with every filling, look, jitter and shade, all independent."""
    rng = np.random.default_rng(seed)
    shape = np.where(rng.random((size, 4)) < 0.5, rng.integers(4, size=(size, 4)), -1)
    sizes = ((4,), (3,), (9,))
    rest = [rng.integers(*values, size=(size, 4)) for values in sizes]
    return sprites.Scenes(shape, *rest, rng.integers(2, size=size))


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.3])
def test_reading_gives_back_every_factor(noise):
    scenes = random_scenes(2 * BATCH)
    images = sprites.render(scenes)
    images += noise * np.random.default_rng(1).normal(size=images.shape).astype(np.float32)
    reading = in_batches(read, images)
    filled = scenes.shape >= 0
    np.testing.assert_array_equal(reading.filled, filled)
    np.testing.assert_array_equal(reading.background, scenes.background)
    look = np.stack([scenes.shape, scenes.colour, scenes.texture], axis=-1)
    np.testing.assert_array_equal(reading.look[filled], look[filled])


def test_reading_is_exact_on_every_single_cell():
    """All 864 sprites at all jitters and shades, alone."""
    grid = np.array(list(itertools.product(range(2), range(4), range(4), range(3), range(9))))
    shape = np.full((len(grid), 4), -1)
    cell = np.arange(len(grid)) % 4
    shape[np.arange(len(grid)), cell] = grid[:, 1]
    columns = [np.repeat(grid[:, column, None], 4, axis=1) for column in (2, 3, 4)]
    scenes = sprites.Scenes(shape, *columns, grid[:, 0])
    found = in_batches(factors, sprites.render(scenes))
    np.testing.assert_array_equal(found[:, 0], 1 << cell)
    np.testing.assert_array_equal(found[:, 1:4], grid[:, 1:4] + 1)
    assert not found[:, 4:7].any()
    np.testing.assert_array_equal(found[:, 7], grid[:, 0])


def test_factors_take_things_in_the_order_of_the_cells():
    images = draw((1, 3, 2, 1), (3, 0, 1, 2), background=1)
    expected = [0b1010, 4, 3, 2, 1, 2, 3, 1]
    assert in_batches(factors, images).tolist() == [expected]
    assert oracle.factor_sizes(PARAMS) == (16, 5, 5, 4, 5, 5, 4, 2)
    assert len(oracle.FACTORS) == len(oracle.factor_sizes(PARAMS))


def test_distances_are_squared_pixel_differences():
    """The matmul form against plain differences, at full precision."""
    images = uniform(0, 3)
    sprite, empty = oracle._distances(images, PARAMS)
    flat = np.asarray(PARAMS.sprite, np.float64).reshape(2, 48, 9, 192)
    for q, (row, column) in enumerate(itertools.product((0, 8), (0, 8))):
        cell = np.asarray(images[:, row : row + 8, column : column + 8], np.float64)
        cell = cell.reshape(3, 1, 1, 1, 192)
        np.testing.assert_allclose(sprite[:, q], ((cell - flat) ** 2).sum(-1), rtol=1e-5)
        blank = np.asarray(PARAMS.empty, np.float64)[None]
        np.testing.assert_allclose(empty[:, q], ((cell[:, 0, 0] - blank) ** 2).sum(-1), rtol=1e-5)


def test_posteriors_sum_to_one():
    images = np.concatenate([uniform(1, 5), draw((0, 1, 2, 1)), np.zeros((1, 16, 16, 3))])
    for part in in_batches(posterior, images.astype(np.float32)):
        np.testing.assert_allclose(np.exp(part).reshape(7, -1).sum(1), 1.0, rtol=1e-4)
    assert oracle.PRIOR.sum() == pytest.approx(1)


def test_early_sums_to_the_chance_of_so_many_things():
    """All places share out the mass of one thing; all relations that of two things that touch."""
    noisy = draw((0, 1, 2, 1)) + 0.8 * noise(2)
    soft = sprites.reward_params(tau_where=300.0, tau_what=300.0)
    where = np.exp(in_batches(posterior, noisy, soft).where[0])
    places = [f"a striped disc at the {place}" for place in sprites.PLACES]
    relations = [f"a disc {relation} a cross" for relation in sprites.RELATIONS]
    for captions, fillings in ((places, oracle.ONE), (relations, oracle.TWO)):
        total = score("early", noisy, *captions, params=soft).sum()
        assert total == pytest.approx(where[fillings].sum(), rel=1e-3)
        assert 0.01 < total < 0.99
    anywhere = score("early", noisy, "a red disc", params=soft)[0]
    assert anywhere == pytest.approx(where[oracle.ONE].sum(), rel=1e-3)


@pytest.mark.parametrize("grammar", sprites.GRAMMARS)
def test_mixed_is_the_mean_of_where_late_look_and_shapes(grammar):
    noisy = draw((0, 1, 2, 1)) + 0.8 * noise(2)
    soft = sprites.reward_params(tau_where=300.0, tau_what=300.0)
    target = sprites._targets(grammar)
    shapes = target.copy()
    shapes[:, 1:4] = -1  # late then asks the shape
    images = np.broadcast_to(noisy, (len(target), *noisy.shape[1:]))
    parts = [
        score_targets(name, images, asked, soft)
        for name, asked in (("early", target), ("late", target), ("late", shapes))
    ]
    mixed = score_targets("mixed", images, target, soft)
    np.testing.assert_allclose(mixed, np.mean(parts, axis=0), atol=1e-6)
    assert np.ptp(mixed) > 1e-3


def test_late_sums_to_one_over_textures_colours_and_shapes():
    images = uniform(3, 1)
    soft = sprites.reward_params(tau_what=300.0)
    for captions in (
        [f"a {texture} disc at the top left" for texture in sprites.TEXTURES],
        [f"a {colour} disc" for colour in sprites.COLOURS],
        [f"a {a} above a {b}" for a in sprites.SHAPES for b in sprites.SHAPES],
    ):
        shares = score("late", images, *captions, params=soft)
        assert shares.sum() == pytest.approx(1, rel=1e-3)
        assert shares.max() < 0.95


def test_late_equals_a_sum_over_all_scenes():
    """The texture posterior of one picture by the plainest enumeration, in float64."""
    images = draw((1, 2, 1, 1)) + 0.5 * noise(4)
    grid = np.array(list(itertools.product(range(2), range(4), range(48), range(9))))
    shape = np.full((len(grid), 4), -1)
    shape[np.arange(len(grid)), grid[:, 1]] = grid[:, 2] // 12
    wide = [np.repeat(column[:, None], 4, axis=1) for column in (grid[:, 2], grid[:, 3])]
    scenes = sprites.Scenes(shape, wide[0] // 3 % 4, wide[0] % 3, wide[1], grid[:, 0])
    gap = (sprites.render(scenes).astype(np.float64) - np.asarray(images, np.float64)) ** 2
    weight = np.exp(-gap.sum((1, 2, 3)) / (2 * float(PARAMS.tau_what)))
    expected = [weight[grid[:, 2] % 3 == t].sum() / weight.sum() for t in range(3)]
    captions = [f"a {texture} disc at the top left" for texture in sprites.TEXTURES]
    np.testing.assert_allclose(score("late", images, *captions), expected, rtol=1e-3)


def test_right_captions_score_near_one():
    scenes, target = sprites.draw_scenes(np.random.default_rng(0), BATCH)
    images, batch = sprites.render(scenes), {"target": target}
    for name, least, mean in (("early", 0.7, 0.8), ("late", 0.5, 0.9), ("mixed", 0.6, 0.85)):
        rewards = np.asarray(REWARDS[name](images, batch, PARAMS))
        assert rewards.max() <= 1 + 1e-5
        assert rewards.min() > least
        assert rewards.mean() > mean


WRONG = {
    # factor: number of values, the rewards that must fall, the rewards that must not move.
    "shape": (4, ("mixed",), ("early",)),
    "colour": (4, ("mixed", "late"), ("early",)),
    "texture": (3, ("mixed", "late"), ("early",)),
    "place": (4, ("mixed", "early"), ("late",)),
    "relation": (2, ("mixed", "early"), ("late",)),
    "second shape": (4, ("mixed", "late"), ("early",)),
}


@pytest.mark.parametrize("factor", WRONG)
def test_one_wrong_factor_costs_all_of_its_part(factor):
    """That is nearly everything of early or late, and of mixed a third for each part that asks."""
    count, falling, still = WRONG[factor]
    column = oracle.TARGETS.index(factor)
    scenes, target = sprites.draw_scenes(np.random.default_rng(1), 6 * BATCH)
    asked = np.flatnonzero(target[:, column] >= 0)[:BATCH]
    images, target = sprites.render(scenes)[asked], target[asked]
    other = target.copy()
    other[:, column] = (other[:, column] + 1) % count
    right, wrong = {"target": target}, {"target": other}
    for name in falling:
        loss = REWARDS[name](images, right, PARAMS) - REWARDS[name](images, wrong, PARAMS)
        part = 1.0
        if name == "mixed":  # for two things the shapes count twice, as late look and as shapes
            part = (1 + (target[:, 4] >= 0) * factor.endswith("shape")) / 3
        share = np.asarray(loss) / part
        assert share.min() > 0.4, name
        assert 0.8 < np.median(share) < 1.0, name
    for name in still:
        same = REWARDS[name](images, right, PARAMS) - REWARDS[name](images, wrong, PARAMS)
        np.testing.assert_allclose(same, 0.0, atol=1e-5)
    assert not REWARDS["success"](images, wrong, PARAMS).any()


def test_early_ignores_the_look_and_late_ignores_the_place():
    here = [draw((0, *look)) for look in ((1, 0, 1), (1, 0, 0), (3, 2, 2), (0, 3, 1))]
    early = score("early", np.concatenate(here), *[STRIPED] * 4)
    assert early.min() > 0.6
    there = [draw((cell, 1, 0, 1), jitter=cell) for cell in range(4)]
    late = score("late", np.concatenate(there), *[STRIPED] * 4)
    assert late.min() > 0.8
    assert score("late", draw((0, 1, 0, 0)), STRIPED)[0] < 0.1
    assert score("early", draw((3, 1, 0, 1)), STRIPED)[0] < 0.05


def test_relations_know_who_stands_where():
    images = draw((0, 1, 0, 0), (1, 3, 2, 1))
    captions = (
        "a disc left of a cross",
        "a cross left of a disc",
        "a disc above a cross",
        "a square left of a cross",
    )
    assert score("success", images, *captions).tolist() == [1, 0, 0, 0]
    mixed = score("mixed", images, *captions)
    assert mixed[0] > 0.85 and mixed[1:].max() < 0.7
    early = score("early", images, *captions)
    assert early[[0, 1, 3]].min() > 0.75 and early[2] < 0.05
    late = score("late", images, *captions)
    assert late[[0, 2]].min() > 0.75 and late[[1, 3]].max() < 0.1


@pytest.mark.parametrize(
    "things",
    [
        (),
        ((0, 1, 0, 1), (1, 3, 2, 1)),
        ((0, 1, 0, 1), (3, 0, 2, 1)),
        ((0, 1, 0, 1), (1, 1, 0, 1), (2, 1, 0, 1), (3, 1, 0, 1)),
    ],
    ids=["nothing", "two", "diagonal", "four"],
)
def test_another_number_of_things_is_no_success(things):
    images = draw(*things)
    captions = (STRIPED, "a red disc")
    assert not score("success", images, *captions).any()
    assert score("early", images, *captions).max() < 0.5
    loss = score("mixed", draw((0, 1, 0, 1)), *captions) - score("mixed", images, *captions)
    assert loss.min() > 0.25


# Captions, each with a picture that is right and some that are wrong in one thing.
HALF_RIGHT = {
    STRIPED: ([(0, 1, 0, 1)], [(3, 1, 0, 1)], [(0, 1, 0, 0)], [(0, 3, 0, 1)]),
    "a red disc": ([(0, 1, 0, 0)], [(0, 1, 2, 0)], [(0, 0, 0, 0)]),
    "a disc above a cross": (
        [(0, 1, 0, 0), (2, 3, 2, 1)],
        [(0, 1, 0, 0), (1, 3, 2, 1)],
        [(0, 1, 0, 0), (2, 0, 2, 1)],
    ),
}


@pytest.mark.parametrize("caption", HALF_RIGHT)
def test_pictures_of_nothing_score_below_half_right_ones(caption):
    """Noise, flat pictures and averages of scenes: a policy must not gain by them."""
    static = np.clip(0.7 * noise(5), -1, 1)
    flat = [np.full_like(static, level) for level in (-0.95, -0.7, 0.0, 1.0)]
    corpus = sprites.draw_scenes(np.random.default_rng(3), BATCH)[0]
    mush = [sprites.render(s).mean(0, keepdims=True) for s in (random_scenes(BATCH), corpus)]
    nothing = np.concatenate([static, *flat, *mush])
    captions = [caption] * len(nothing)
    pictures = np.concatenate([draw(*things) for things in HALF_RIGHT[caption]])
    for name, margin in (("early", 0.2), ("late", 0.4), ("mixed", 0.4)):
        right = score(name, pictures[:1], caption)[0]
        assert score(name, nothing, *captions).max() < right - margin, name
    half = score("mixed", pictures[1:], *captions[: len(pictures) - 1])
    assert score("mixed", nothing, *captions).max() < half.mean()
    assert not score("success", nothing, *captions).any()


@pytest.mark.parametrize(
    "name, start", [("early", (3, 1, 0, 1)), ("late", (0, 1, 0, 0)), ("mixed", (3, 1, 0, 0))]
)
def test_rewards_grow_all_the_way_from_wrong_to_right(name, start):
    """Half-mended pictures get graded values, so there is something to climb."""
    wrong, right = draw(start), draw((0, 1, 0, 1))
    share = np.linspace(0, 1, 9, dtype=np.float32).reshape(-1, 1, 1, 1)
    rewards = score(name, wrong + share * (right - wrong), *[STRIPED] * 9)
    assert np.all(np.diff(rewards) > -1e-3)
    assert np.sum(np.diff(rewards) > 0.01) >= 5


@pytest.mark.parametrize("name", ["early", "late", "mixed"])
def test_gradients_are_finite_and_useful(name):
    batch = {"target": sprites.read_prompts([STRIPED] * 4).target}
    grey = np.zeros((1, 16, 16, 3), np.float32)
    images = np.concatenate([draw((0, 1, 0, 1)), draw((0, 1, 0, 0)), grey, noise(6)])
    total = jax.jit(jax.grad(lambda x: REWARDS[name](x, batch, PARAMS).sum()))
    slope = np.asarray(total(images))
    assert np.isfinite(slope).all()
    step = 0.1 * slope / np.maximum(np.sqrt((slope**2).sum((1, 2, 3), keepdims=True)), 1e-9)
    before = score(name, images, *[STRIPED] * 4)
    after = score(name, images + step, *[STRIPED] * 4)
    assert np.all(after >= before - 1e-5)
    assert np.any(after > before + 1e-4)


def test_not_a_number_is_passed_on():
    """A broken picture must reach the check for finite rewards, not pass for a bad one."""
    for name in ("early", "late", "mixed"):
        assert np.isnan(score(name, np.full((1, 16, 16, 3), np.nan, np.float32), "a red disc")[0])
