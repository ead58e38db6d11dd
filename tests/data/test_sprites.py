"""The sprites world: captions and their reading, splits, rendering, the corpus and its flaws."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.core.types import UserError
from jaxalign.data import sprites
from jaxalign.data.world import Vocabulary, factor_code, load_prompt_file
from jaxalign.rewards import sprites as oracle

success = jax.jit(oracle.success)


@pytest.fixture(scope="module")
def world():
    return sprites.world()


def one_scene(cell, shape, colour=0, texture=0, jitter=sprites.MIDDLE, background=0):
    """A scene with one sprite."""
    shapes = np.full((1, 4), -1)
    shapes[0, cell] = shape
    full = np.full((1, 4), 0)
    return sprites.Scenes(
        shapes, full + colour, full + texture, full + jitter, np.array([background])
    )


def test_vocabulary_pads_and_leaves_the_empty_prompt_empty():
    vocabulary = Vocabulary(("a", "red", "disc"), length=4)
    tokens = vocabulary.encode(["a red disc", "", "Red"])
    assert tokens.dtype == np.int32
    assert tokens.tolist() == [[1, 2, 3, 0], [0, 0, 0, 0], [2, 0, 0, 0]]
    assert vocabulary.size == 4


def test_vocabulary_names_the_unknown_word_and_the_nearest():
    vocabulary = Vocabulary(("a", "red", "disc"), length=4)
    with pytest.raises(UserError, match="unknown word 'disk'; did you mean 'disc'"):
        vocabulary.encode(["a red disk"])
    with pytest.raises(UserError, match="unknown word 'xylophone'; known words: a, red, disc"):
        vocabulary.encode(["a xylophone"])


def test_vocabulary_rejects_a_long_caption():
    with pytest.raises(UserError, match="has 3 words: use at most 2"):
        Vocabulary(("a",), length=2).encode(["a a a"])


def test_factor_code_is_a_bijection():
    sizes = (2, 3, 4)
    values = jnp.asarray(list(np.ndindex(*sizes)), jnp.int32)
    assert factor_code(values, sizes).tolist() == list(range(24))


def test_splits_are_disjoint_and_share_their_words(world):
    train, heldout = set(world.train.text), set(world.heldout.text)
    assert not train & heldout
    assert len(train) == len(world.train.text) == 66
    assert len(heldout) == len(world.heldout.text) == 22
    words = {word for text in train for word in text.split()}
    assert words == set(world.vocabulary.words)
    assert {word for text in heldout for word in text.split()} <= words


@pytest.mark.parametrize("grammar, sizes", [("place", (36, 12)), ("colour", (12, 4))])
def test_each_pair_of_shape_and_word_is_trained(grammar, sizes):
    train, heldout = sprites.prompts(grammar)
    assert (len(train.text), len(heldout.text)) == sizes
    if grammar == "place":
        assert len(np.unique(train.target[:, [0, 2]], axis=0)) == 12
        assert len(np.unique(train.target[:, [0, 3]], axis=0)) == 16


def test_relations_train_each_shape_on_both_sides():
    train, heldout = sprites.prompts("relation")
    assert (len(train.text), len(heldout.text)) == (18, 6)
    assert len(np.unique(train.target[:, [0, 4]], axis=0)) == 8
    assert len(np.unique(train.target[:, [4, 5]], axis=0)) == 8
    assert not np.any(train.target[:, 0] == train.target[:, 5])


def test_grammar_selects_prompts():
    for grammar, word in (("place", "at"), ("relation", "a"), ("colour", "a")):
        chosen = sprites.world(grammar=grammar)
        assert all(word in text.split() for text in chosen.train.text + chosen.heldout.text)
    everything = sum(len(sprites.prompts(name)[0].text) for name in sprites.GRAMMARS)
    assert everything == len(sprites.prompts("all")[0].text)
    with pytest.raises(UserError, match="grammar 'shape' is unknown"):
        sprites.world(grammar="shape")


def test_captions_read_back_as_their_targets(world):
    for prompts in (world.train, world.heldout):
        again = world.read_prompts(prompts.text)
        np.testing.assert_array_equal(again.target, prompts.target)
        np.testing.assert_array_equal(again.tokens, prompts.tokens)
        assert again.text == prompts.text


def test_reading_asks_for_what_the_caption_says(world):
    prompts = world.read_prompts(
        ["A striped disc at the top right.", "a red  cross", "a disc above a square"]
    )
    assert world.target_names == (
        "shape",
        "colour",
        "texture",
        "place",
        "relation",
        "second shape",
    )
    assert prompts.target.tolist() == [
        [1, -1, 1, 1, -1, -1],
        [3, 0, -1, -1, -1, -1],
        [1, -1, -1, -1, 1, 0],
    ]
    assert prompts.text[0] == "a striped disc at the top right"


@pytest.mark.parametrize(
    "caption, message",
    [
        ("a red disk", "did you mean 'disc'"),
        ("a disc", "nearest: 'a"),
        ("", "is none of"),
        ("a red disc at the top left", "is none of"),
        ("a disc left of a cross above a disc", "has 9 words"),
    ],
)
def test_reading_refuses_what_it_cannot_understand(world, caption, message):
    with pytest.raises(UserError, match=message):
        world.read_prompts([caption])


def test_prompt_file_round_trip(world, tmp_path):
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps(["a red disc", "a blue cross"]))
    prompts = load_prompt_file(path, world)
    assert prompts.text == ("a red disc", "a blue cross")
    assert prompts.take([1]).text == ("a blue cross",)
    assert prompts.take([1, 0]).tokens.tolist() == prompts.tokens[::-1].tolist()


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "does not exist"),
        (b"", "line 1"),
        (b"[\n'a red disc']", "line 2"),
        (b"\xff\xfe", "not UTF-8"),
        (b'{"a red disc": 1}', "holds a dict"),
        (b"[]", "holds no prompt"),
        (b'["a red disc", 3]', "entry 2 is 3"),
        (b'["a red disc", "  "]', "entry 2"),
        (b'["a red disk"]', "did you mean 'disc'"),
    ],
)
def test_prompt_file_errors_name_the_file_and_the_fault(world, tmp_path, content, message):
    path = tmp_path / "prompts.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_prompt_file(path, world)
    assert "prompts.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_prompt_file_that_is_a_directory(world, tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        load_prompt_file(tmp_path, world)


def test_rendering_draws_the_sprite_where_it_belongs():
    picture = sprites.render(one_scene(cell=2, shape=0, colour=1, jitter=5))[0]
    expected = np.full((16, 16, 3), sprites.SHADES[0])
    expected[9:15, 2:8] = sprites.COLOURS["green"]  # bottom left, offset 1 down and 2 right
    np.testing.assert_allclose(picture, expected, atol=1e-6)


def test_textures_dim_what_lies_between():
    solid, striped, dotted = (
        sprites.render(one_scene(0, 0, texture=texture))[0, 1:7, 1:7, 0] for texture in range(3)
    )
    shade, red = sprites.SHADES[0], sprites.COLOURS["red"][0]
    dim = shade + sprites.DIM * (red - shade)
    np.testing.assert_allclose(solid, red, atol=1e-6)
    np.testing.assert_allclose(striped[:, 0], [red, dim] * 3, atol=1e-6)
    np.testing.assert_allclose(dotted[:2, :2], [[red, dim], [dim, red]], atol=1e-6)


def test_templates_are_all_different():
    params = sprites.reward_params()
    flat = np.asarray(params.sprite).reshape(-1, params.sprite.shape[-1])
    assert len(flat) == 2 * 4 * 4 * 3 * 9
    assert len(np.unique(flat, axis=0)) == len(flat)


def test_corpus_is_fixed_by_its_seed(world):
    images, tokens = world.corpus(3)
    again, tokens_again = world.corpus(3)
    other, _ = world.corpus(4)
    assert images.shape == (8192, *world.image_shape) and images.dtype == np.float32
    assert tokens.shape == (8192, world.vocabulary.length) and tokens.dtype == np.int32
    assert np.abs(images).max() <= 1
    np.testing.assert_array_equal(images, again)
    np.testing.assert_array_equal(tokens, tokens_again)
    assert not np.array_equal(images, other)


def test_corpus_draws_its_sprites_in_the_middle_of_their_cells(world):
    """A pixel of bare ground is left around each; patches are the cells."""
    cells = world.corpus(0)[0].reshape(-1, 2, world.patch, 2, world.patch, 3).swapaxes(2, 3)
    assert cells.shape[1:5] == (2, 2, 8, 8)
    ground = cells[:, :1, :1, :1, :1]
    inner = np.zeros((8, 8), bool)
    inner[1:7, 1:7] = True
    same = (cells == ground).all(-1)
    assert same[..., ~inner].all()
    assert not same[..., inner].all()
    assert set(np.unique(ground)) == set(np.float32(sprites.SHADES))


def holds(world, images, tokens):
    """The targets that a corpus's captions ask, and whether the oracle sees them."""
    words = ("", *world.vocabulary.words)
    text = [" ".join(words[token] for token in row if token) for row in tokens]
    target = world.read_prompts(text).target
    batch = {"target": jnp.asarray(target)}
    return target, np.asarray(success(jnp.asarray(images), batch, world.reward_params))


def test_clean_captions_hold_in_their_pictures(world):
    """Nothing is asked that is not there: the oracle agrees with each true caption."""
    images, tokens = sprites.corpus(5, wrong=0.0)
    _, true = holds(world, images, tokens)
    assert true.min() == 1.0


def test_each_kind_of_word_is_wrong_at_its_rate():
    rng = np.random.default_rng(0)
    _, target = sprites.draw_scenes(rng, 30_000)
    rates = {"texture": 0.4, "place": 0.1, "relation": 0.25}
    noisy = sprites.misname(rng, target, rates)
    np.testing.assert_array_equal(noisy < 0, target < 0)
    for column, name in enumerate(oracle.TARGETS):
        asked = target[:, column] >= 0
        share = np.mean(noisy[asked, column] != target[asked, column])
        assert share == pytest.approx(rates.get(name, 0.0), abs=0.02)


def test_default_corpus_is_wrong_in_a_quarter_of_each_word(world):
    """End to end, with the oracle as the judge: about 0.75^3 of the place captions hold."""
    target, true = holds(world, *world.corpus(0))
    place, colour = target[:, 3] >= 0, target[:, 1] >= 0
    assert true[place].mean() == pytest.approx(0.75**3, abs=0.04)
    assert true[colour].mean() == pytest.approx(0.75**2, abs=0.04)
    assert true[~place & ~colour].mean() == pytest.approx(0.75**3, abs=0.04)


def test_corpus_is_imbalanced_as_stated():
    scenes, target = sprites.draw_scenes(np.random.default_rng(1), 30_000)
    place, colour = target[:, 3] >= 0, target[:, 1] >= 0
    usual = (target[place, 2] - target[place, 0]) % 3 == 0
    assert usual.mean() == pytest.approx(sprites.USUAL_TEXTURE[0], abs=0.02)
    absent = (target[colour, 1] - target[colour, 0]) % 4 == 3
    assert not absent.any()
    things = (scenes.shape >= 0).sum(axis=1)
    assert set(things) == {1, 2}
    assert np.mean(things == 2) == pytest.approx(1 / 3, abs=0.02)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"size": 0}, "corpus size 0"),
        ({"tau_what": 0.0}, "must be positive"),
        ({"wrong": 1.5}, "rate 1.5"),
        ({"wrong": {"size": 0.1}}, "factor kind 'size' is unknown"),
    ],
)
def test_impossible_arguments_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        sprites.world(**arguments)
