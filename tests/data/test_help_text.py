"""The world of Python's help pages: its text, its score by hand and by loops, its tokenizer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.core.types import UserError
from jaxalign.data import help_text as pages
from jaxalign.data.help_text import ENDING, LENGTH, REPEAT, TAKEN_UP, TARGET, UNKNOWN_WORD, VARIED
from jaxalign.data.preferences import PAD, STOP, Prompts

KEY = jax.random.key(0)
P = pages.LONGEST


@pytest.fixture(scope="module")
def world():
    return pages.help_text()


def encode(text):
    number = {word: index for index, word in enumerate(pages.read().words)}
    return [number[word] for word in text.split()]


def gold_of(world, prompt, response):
    """The score of one row, from words."""
    prompt, said = encode(prompt), encode(response)
    length = world.response_length
    ids = [PAD] * (P - len(prompt)) + prompt + said + [PAD] * (length - len(said))
    mask = [False] * (P - len(prompt)) + [True] * (len(prompt) + len(said))
    mask += [False] * (length - len(said))
    return float(world.gold(jnp.array([ids], jnp.int32), jnp.array([mask]))[0])


def test_the_text_is_english_and_mostly_known():
    text = pages.read()
    assert len(text.sentences) > 1000 and len(set(text.sentences)) > 0.98 * len(text.sentences)
    assert 1000 < len(text.words) <= pages.SIZE and len(set(text.words)) == len(text.words)
    tokens = np.concatenate(text.sentences)
    assert np.mean(tokens == pages.UNKNOWN) < 0.05
    assert np.mean(tokens == encode("the")[0]) > 0.04
    assert all(row[-1] == pages.FULL_STOP and row.count(pages.FULL_STOP) == 1 for row in text[2])
    content = text.words[text.content :]
    assert "object" in content and "function" in content and "the" not in content
    assert all(word[0].isalpha() for word in text.words[len(pages.MARKS) :])


def test_prompts_begin_sentences_and_the_splits_never_meet(world):
    starts = {}
    for name, heldout in (("train", False), ("heldout", True)):
        ids, mask = pages._table(32, heldout)
        assert ids.dtype == np.int32 and ids.shape == mask.shape == (len(ids), P + 32)
        assert np.all(np.diff(mask[:, :P].astype(int), axis=-1) >= 0)
        assert set(mask[:, :P].sum(-1)) == {4, 5, 6, 7, 8}
        assert np.all(ids[~mask] == PAD) and np.all(np.sum(ids == STOP, axis=-1) == 1)
        starts[name] = {tuple(row[real][:4].tolist()) for row, real in zip(ids, mask, strict=True)}
        drawn = (world.heldout if heldout else world.prompts)(KEY, 50)
        known = {row.tobytes() for row in ids[:, :P]}
        assert {row.tobytes() for row in drawn.ids} <= known
    assert not starts["train"] & starts["heldout"]
    assert 0.05 < len(starts["heldout"]) / len(starts["train"]) < 0.2


def test_demonstrations_continue_the_sentence(world):
    ids, mask = world.demonstrations(KEY, 20)
    sentences = set(pages.read().sentences)
    for row, real in zip(ids, mask, strict=True):
        *sentence, stop = row[real].tolist()
        assert stop == STOP and tuple(sentence) in sentences


def test_each_part_of_the_score_by_hand(world):
    prompt = "the function of a module is"

    def length(n):
        return LENGTH * abs(n - TARGET) / TARGET

    assert gold_of(world, prompt, "<stop>") == pytest.approx(-length(1))
    assert gold_of(world, prompt, "it is . <stop>") == pytest.approx(ENDING - length(4))
    assert gold_of(world, prompt, "it . is . <stop>") == pytest.approx(-length(5))
    assert gold_of(world, prompt, "it is .") == pytest.approx(-length(3))
    assert gold_of(world, prompt, "it . is <stop>") == pytest.approx(-length(4))
    varied = VARIED * 2 / pages.QUOTA - length(4)
    assert gold_of(world, prompt, "value and object <stop>") == pytest.approx(varied)
    taken = VARIED / pages.QUOTA + TAKEN_UP / 2 - length(2)
    assert gold_of(world, prompt, "module <stop>") == pytest.approx(taken)
    assert gold_of(world, "it is the function", "function <stop>") == pytest.approx(
        taken + TAKEN_UP / 2
    )
    again = VARIED / pages.QUOTA - REPEAT / pages.QUOTA - length(4)
    assert gold_of(world, prompt, "value of value <stop>") == pytest.approx(again)
    assert gold_of(world, prompt, "of of <stop>") == pytest.approx(
        -REPEAT / pages.QUOTA - length(3)
    )
    far = VARIED / pages.QUOTA - length(11)
    assert gold_of(world, prompt, "value " + "of the " * 4 + "value <stop>") == pytest.approx(far)
    unknown = -UNKNOWN_WORD / pages.QUOTA - length(2)
    assert gold_of(world, prompt, "<unk> <stop>") == pytest.approx(unknown)


def test_english_scores_above_noise_and_below_the_best(world):
    real = pages._table(32, False)
    score = np.asarray(world.gold(*real))
    assert 2.5 < score.mean() < 3.6 and 0.8 < score.std() < 1.2
    noise = np.random.default_rng(0).integers(2, world.vocabulary, real.ids[:, P:].shape)
    ids = real.ids.copy()
    ids[:, P:] = np.where(ids[:, P:] > STOP, noise, ids[:, P:])
    assert np.mean(np.asarray(world.gold(ids, real.mask))) < score.mean() - 1
    answer = world.best(Prompts(real.ids[:200, :P], real.mask[:200, :P]))
    np.testing.assert_allclose(world.gold(*answer), world.ceiling, rtol=1e-6)
    assert score.max() <= world.ceiling + 1e-5


def test_the_writer_makes_varied_responses(world):
    prompts = world.prompts(KEY, 500)
    ids, mask = pages.respond(32, KEY, prompts)
    np.testing.assert_array_equal(ids[:, :P], prompts.ids)
    said, real = ids[:, P:], mask[:, P:]
    assert np.all(np.diff(real.astype(int), axis=-1) <= 0) and np.all(real[:, 0])
    stops = (said == STOP) & real
    assert np.all(stops.sum(-1) <= 1) and 0.6 < stops.any(-1).mean() < 0.95
    np.testing.assert_array_equal(stops.any(-1), stops[np.arange(500), real.sum(-1) - 1])
    assert np.all(real.sum(-1)[~stops.any(-1)] == 32) and np.all(said[~real] == PAD)
    score = np.asarray(world.gold(ids, mask))
    assert score.std() > 0.8 and score.mean() < 3.2


def test_pairs_share_prompts_and_follow_the_score():
    chosen, rejected = pages.help_text(temperature=0.01).pairs(KEY, 300)
    np.testing.assert_array_equal(chosen.ids[:, :P], rejected.ids[:, :P])
    content = pages.read().content
    better = pages.gold(content, *chosen) >= pages.gold(content, *rejected)
    assert np.mean(np.asarray(better)) > 0.98


def test_the_tokenizer_reads_what_words_writes(world, tmp_path):
    from transformers import AutoTokenizer

    pages.write_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (PAD, STOP)
    ids, mask = world.demonstrations(KEY, 1)
    row = ids[0][mask[0]]
    assert tokenizer(world.words(row))["input_ids"] == row.tolist()
    assert tokenizer("xylophone")["input_ids"] == [pages.UNKNOWN]


@pytest.mark.parametrize(
    "numbers, message",
    [
        (dict(response=15), "response 15: the target is 14 tokens, so give 16 or more"),
        (dict(temperature=-1.0), "temperature -1.0: it must be positive"),
    ],
)
def test_numbers_out_of_range(numbers, message):
    with pytest.raises(UserError, match=message):
        pages.help_text(**numbers)
