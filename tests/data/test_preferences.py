"""The synthetic preference world: its score against slow loops, its prompts, writers and labels."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.core.types import UserError
from jaxalign.data import preferences
from jaxalign.data.preferences import COVER, FIRST, LAST, LENGTH, LOCAL, PAD, REPEAT, STOP

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def world():
    return preferences.synthetic()


def rule_of(world):
    return world.gold.args[0]


@functools.cache
def written(response=16):
    """A world and 2,000 of its writer's responses, compiled once for all tests."""
    world = preferences.synthetic(response=response)
    return world, world.demonstrations(KEY, 2000)


def row(world, prompt, response):
    """One row of (ids, mask) from ring places; "stop" ends a response."""
    prompt = [place + FIRST for place in prompt]
    said = [STOP if place == "stop" else place + FIRST for place in response]
    before, after = world.prompt_length - len(prompt), world.response_length - len(said)
    ids = [PAD] * before + prompt + said + [PAD] * after
    mask = [False] * before + [True] * (len(prompt) + len(said)) + [False] * after
    return jnp.array([ids], jnp.int32), jnp.array([mask])


def slow_gold(rule, ids, mask):
    """The score of one row, by loops."""
    asked = [t for t, real in zip(ids[: rule.prompt], mask[: rule.prompt], strict=True) if real]
    said = [t for t, real in zip(ids[rule.prompt :], mask[rule.prompt :], strict=True) if real]
    good = repeats = 0
    for before, after in itertools.pairwise(said):
        if before >= FIRST and after >= FIRST:
            step = (after - before) % rule.content
            good += 1 <= step <= rule.reach
            repeats += step == 0
    quota = rule.target - 1
    covered = sum(min(said.count(token), rule.laps) for token in asked)
    ends_well = STOP in said and said.index(STOP) > 0 and said[said.index(STOP) - 1] == asked[0]
    return (
        LOCAL * min(good, quota) / quota
        - REPEAT * repeats / quota
        + COVER * covered / (rule.laps * len(asked))
        + LAST * ends_well
        - LENGTH * len(said) / (rule.target + 1)
    )


@pytest.mark.parametrize("response", [16, 64])
def test_gold_is_what_loops_find(response):
    """Of the writer's responses, of noise that is truncated, and of noise with stops in it."""
    world, (ids, mask) = written(response)
    ids, mask = np.array(ids), np.array(mask)
    noise = np.random.default_rng(0).integers(0, 32, (100, response))
    ids[:100, 8:], mask[:50, 8:] = noise, True
    found = world.gold(jnp.asarray(ids), jnp.asarray(mask))
    rows = zip(ids[:200].tolist(), mask[:200].tolist(), strict=True)
    expected = [slow_gold(rule_of(world), *row) for row in rows]
    np.testing.assert_allclose(found[:200], expected, atol=1e-5)
    assert found.dtype == jnp.float32


def test_each_part_of_the_score_by_hand(world):
    """C = 30, reach 5, target 9 (quota 8), one lap."""
    assert rule_of(world) == (30, 8, 16, 5, 9, 1)
    prompt = [4, 20, 11]
    silent = world.gold(*row(world, prompt, ["stop"]))[0]
    assert silent == pytest.approx(-LENGTH / 10)
    one_step = world.gold(*row(world, prompt, [28, 3, "stop"]))[0]
    assert one_step == pytest.approx(LOCAL / 8 - 3 * LENGTH / 10)
    too_far = world.gold(*row(world, prompt, [28, 5, "stop"]))[0]
    assert too_far == pytest.approx(-3 * LENGTH / 10)
    repeat = world.gold(*row(world, prompt, [28, 28, "stop"]))[0]
    assert repeat == pytest.approx(-REPEAT / 8 - 3 * LENGTH / 10)
    counted_once = world.gold(*row(world, prompt, [20, 0, 20, 0, "stop"]))[0]
    assert counted_once == pytest.approx(COVER / 3 - 5 * LENGTH / 10)
    terminal = world.gold(*row(world, prompt, [4, "stop"]))[0]
    assert terminal == pytest.approx(LAST + COVER / 3 - 2 * LENGTH / 10)
    truncated = world.gold(*row(world, prompt, [4]))[0]
    assert truncated == pytest.approx(COVER / 3 - LENGTH / 10)


def test_what_is_under_the_padding_does_not_count():
    world, (ids, mask) = written()
    rubbish = jax.random.randint(jax.random.key(1), ids.shape, 0, world.vocabulary)
    np.testing.assert_array_equal(
        world.gold(jnp.where(mask, ids, rubbish), mask), world.gold(ids, mask)
    )


def test_prompts_are_left_padded_sets_and_the_splits_never_meet(world):
    seen = {}
    for name, draw in (("train", world.prompts), ("heldout", world.heldout)):
        ids, mask = (np.asarray(part) for part in draw(KEY, 20_000))
        assert ids.dtype == np.int32 and ids.shape == mask.shape == (20_000, 8)
        assert np.all(np.diff(mask.astype(int), axis=-1) >= 0)
        assert sorted(set(mask.sum(-1))) == [3, 4, 5, 6, 7, 8]
        assert np.all(ids[~mask] == PAD) and ids[mask].min() == FIRST and ids[mask].max() == 31
        rows = [tuple(i[m].tolist()) for i, m in zip(ids, mask, strict=True)]
        assert all(len(set(tokens)) == len(tokens) for tokens in rows)
        seen[name] = set(rows)
    assert len(seen["heldout"]) > 15_000
    assert not seen["train"] & seen["heldout"]
    assert not {tokens[:2] for tokens in seen["train"]} & {tokens[:2] for tokens in seen["heldout"]}


@pytest.mark.parametrize("response", [16, 64, 256])
def test_scores_mean_the_same_for_every_length(response):
    world, (ids, mask) = written(response)
    score = np.asarray(world.gold(ids, mask))
    assert 1.0 < score.mean() < 1.6
    assert 0.85 < score.std() < 1.3
    length = np.asarray(mask[:, 8:].sum(-1)) / response
    assert 0.48 < length.mean() < 0.62 and length.std() > 0.15
    stopped = np.any(np.asarray((ids[:, 8:] == STOP) & mask[:, 8:]), axis=-1)
    assert 0.97 < stopped.mean() <= 1
    assert np.all(length[~stopped] == 1)  # a few are truncated
    noise = np.random.default_rng(0).integers(FIRST, 32, (len(ids), response))
    noise = ids.at[:, 8:].set(jnp.where(ids[:, 8:] == STOP, STOP, noise))
    assert world.gold(noise, mask).mean() < score.mean() - 1


@pytest.mark.parametrize("response", [16, 64, 256])
def test_the_best_responses_are_nearly_at_the_ceiling(response):
    world, (ids, mask) = written(response)
    answer = world.best(preferences.Prompts(ids[:, :8], mask[:, :8]))
    score = np.asarray(world.gold(*answer))
    assert score.max() <= world.ceiling + 1e-5
    assert score.mean() > world.ceiling - 0.1 and score.min() > world.ceiling - 0.5
    length = np.asarray(answer.mask[:, 8:].sum(-1))
    assert 0.55 < length.mean() / response < 0.7 and length.max() <= response
    assert np.all(np.sum(np.asarray(answer.ids[:, 8:]) == STOP, axis=-1) == 1)


def test_nothing_scores_above_the_ceiling_in_a_search():
    """Hill climbing by single changes, a stop being one of them, from the writer's responses."""
    world, (ids, mask) = written()
    start = world.gold(ids, mask)

    def climb(step, state):
        ids, mask, score = state
        draw = jax.random.randint(jax.random.fold_in(KEY, step), (2, len(ids)), 0, 16 * 32)
        new = ids.at[jnp.arange(len(ids)), 8 + draw[0] % 16].set(draw[1] % 32)
        stops = new[:, 8:] == STOP
        real = mask.at[:, 8:].set(jnp.cumsum(stops, axis=-1) - stops == 0)
        found = world.gold(new, real)
        better = (found > score)[:, None]
        climbed = jnp.where(better, new, ids), jnp.where(better, real, mask)
        return *climbed, jnp.maximum(found, score)

    score = jax.jit(lambda *state: jax.lax.fori_loop(0, 400, climb, state))(ids, mask, start)[2]
    assert score.mean() > start.mean() + 1.5  # the score can be climbed token by token
    assert score.max() <= world.ceiling + 1e-5


def test_labels_follow_the_score_as_the_temperature_says():
    n = 20_000
    rows = [preferences.Responses(jnp.full((n, 1), k), jnp.ones((n, 1), bool)) for k in range(2)]
    for gap, temperature in ((1.0, 1.0), (1.0, 0.5), (-2.0, 4.0)):
        pairs = preferences.label(KEY, *rows, jnp.full((n,), gap), temperature)
        expected = 1 / (1 + np.exp(-gap / temperature))
        assert np.mean(np.asarray(pairs.chosen.ids) == 0) == pytest.approx(expected, abs=0.012)
        np.testing.assert_array_equal(pairs.chosen.ids + pairs.rejected.ids, 1)


def test_pairs_share_their_prompt_and_noise_grows_with_the_temperature():
    right = []
    for temperature in (0.01, 1.0, 100.0):
        world = preferences.synthetic(temperature=temperature)
        chosen, rejected = world.pairs(KEY, 2000)
        np.testing.assert_array_equal(chosen.ids[:, :8], rejected.ids[:, :8])
        assert not np.array_equal(chosen.ids, rejected.ids)
        right.append(np.mean(np.asarray(world.gold(*chosen) > world.gold(*rejected))))
    assert right[0] > 0.97 and 0.68 < right[1] < 0.82 and 0.45 < right[2] < 0.55


def test_the_world_can_be_traced_and_vmapped(world):
    keys = jax.random.split(KEY, 3)
    together = jax.jit(jax.vmap(lambda key: world.gold(*world.demonstrations(key, 2000))))(keys)
    apart = world.gold(*world.demonstrations(keys[1], 2000))
    np.testing.assert_allclose(together[1], apart, atol=1e-5)
    assert not np.array_equal(together[0], together[1])


def test_words_name_the_places(world):
    assert world.words(np.array([PAD, STOP, FIRST, FIRST + 29])) == "<pad> <stop> 0 29"


@pytest.mark.parametrize(
    "numbers, message",
    [
        (dict(prompt=2), "prompt 2: prompts have at least 3 tokens"),
        (dict(vocabulary=15), "vocabulary 15: .* needs at least 16 ids"),
        (dict(response=7), "response 7: the best responses do not fit"),
        (dict(temperature=0.0), "temperature 0.0: it must be positive"),
    ],
)
def test_numbers_out_of_range(numbers, message):
    with pytest.raises(UserError, match=message):
        preferences.synthetic(**numbers)


def test_the_smallest_world_is_whole():
    world = preferences.synthetic(vocabulary=11, prompt=3, response=8)
    score = world.gold(*world.best(world.heldout(KEY, 50)))
    assert 4 < score.min() < score.max() <= world.ceiling  # steps of one leave no room for more
    assert jnp.isfinite(world.gold(*world.demonstrations(KEY, 50))).all()
