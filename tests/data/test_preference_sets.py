"""Preference sets from folders in the Hub's layout: pairs, tokens, what is left out, errors."""

import json
import sys
import warnings

import numpy as np
import pytest

from jaxalign.core.types import UserError
from jaxalign.data import preference_sets as sets

ROWS = {
    "nectar": [
        {
            "prompt": "\n\nHuman: name a colour \n\nAssistant: ",
            "answers": [
                {"answer": "the sea", "model": "m1", "rank": 3.0},
                {"answer": "red", "model": "m2", "rank": 1.0},
                {"answer": "blue sea", "model": "m3", "rank": 2.0},
            ],
        },
        {
            "prompt": "\n\nHuman: name a fish \n\nAssistant: ",
            "answers": [
                {"answer": "cod", "model": "m1", "rank": 1.0},
                {"answer": "red", "model": "m2", "rank": 2.0},
                {"answer": "blue", "model": "m3", "rank": 2.0},
            ],
        },
    ],
    "tldr": [
        {"prompt": "POST: the sea", "chosen": "TL;DR:  sea", "rejected": "TL;DR: red sea"},
        {"prompt": "POST: a fish\nTL;DR:", "chosen": "TL;DR: fish", "rejected": "cod"},
    ],
    "saferlhf": [
        {
            "prompt": f"name a {what}",
            "response_0": "red",
            "response_1": "blue sea",
            "better_response_id": better,
            "safer_response_id": safer,
        }
        for what, better, safer in (("colour", 0, 1), ("fish", 1, None))
    ],
}
ROWS["saferlhf_safety"] = ROWS["saferlhf"]
WORDS = [
    *("human", "assistant", "tl", "dr", "post", ":", ";", "name", "a", "the"),
    *("colour", "fish", "cod", "red", "blue", "sea"),
]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def make_tokenizer(**tokens):
    """Words and marks, lower case, as a tokenizer of transformers."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {word: index for index, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    model = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    model.normalizer = normalizers.Lowercase()
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens = {"eos_token": "<eos>", "pad_token": "<pad>", **tokens}
    return PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>", **tokens)


def write(folder, rows, split="train", nested=False):
    """A JSON-lines file of one split, as the repositories have them."""
    path = folder / "data" / "some-model" if nested else folder
    path.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (path / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return folder


def texts(tokenizer, responses, prompt_length=12):
    """Prompt and response of each row as text."""
    rows = zip(responses.ids, responses.mask, strict=True)
    cut = [np.split(row, [prompt_length]) + np.split(real, [prompt_length]) for row, real in rows]
    return [
        (tokenizer.decode(prompt[p]), tokenizer.decode(response[r]))
        for prompt, response, p, r in cut
    ]


def load(name, folder, tokenizer, **kwargs):
    lengths = {"prompt_length": 12, "response_length": 6, **kwargs}
    return sets.load(name, folder, tokenizer, **lengths)


def preferred(tokenizer, pairs):
    """(prompt, chosen, rejected) of each pair, as text."""
    rows = zip(texts(tokenizer, pairs.chosen), texts(tokenizer, pairs.rejected), strict=True)
    assert all(chosen[0] == rejected[0] for chosen, rejected in rows)
    rows = zip(texts(tokenizer, pairs.chosen), texts(tokenizer, pairs.rejected), strict=True)
    return [(chosen[0], chosen[1], rejected[1]) for chosen, rejected in rows]


def test_nectar_gives_a_pair_for_each_two_ranks(tokenizer, tmp_path):
    pairs = load("nectar", write(tmp_path, ROWS["nectar"]), tokenizer)
    first, second = "human : name a colour assistant :", "human : name a fish assistant :"
    assert preferred(tokenizer, pairs) == [
        (first, "red <eos>", "blue sea <eos>"),
        (first, "red <eos>", "the sea <eos>"),
        (first, "blue sea <eos>", "the sea <eos>"),
        (second, "cod <eos>", "red <eos>"),  # red and blue are equal
        (second, "cod <eos>", "blue <eos>"),
    ]


def test_the_arrays_are_left_padded_prompts_and_ended_responses(tokenizer, tmp_path):
    (ids, mask), _ = load("nectar", write(tmp_path, ROWS["nectar"]), tokenizer)
    assert ids.shape == mask.shape == (5, 18)
    assert ids.dtype == np.int32 and mask.dtype == bool
    for row, real in zip(ids, mask, strict=True):
        prompt, response = np.split(real.astype(int), [12])
        assert np.all(np.diff(prompt) >= 0) and np.all(np.diff(response) <= 0)
        assert row[real][-1] == tokenizer.eos_token_id
        assert np.all(row[~real] == tokenizer.pad_token_id)


def test_comparisons_of_summaries_agree_with_their_demonstrations(tokenizer, tmp_path):
    pairs = load("tldr", write(tmp_path / "a", ROWS["tldr"]), tokenizer)
    expected = [("post : the sea tl ; dr :", "sea <eos>", "red sea <eos>")]
    expected += [("post : a fish tl ; dr :", "fish <eos>", "cod <eos>")]
    assert preferred(tokenizer, pairs) == expected
    rows = [{"prompt": "POST: the sea\nTL;DR:", "label": " red sea"}]
    good = sets.load_demonstrations("tldr", write(tmp_path / "b", rows), tokenizer, 12, 6)
    assert texts(tokenizer, good) == [("post : the sea tl ; dr :", "red sea <eos>")]


def test_the_best_answers_of_nectar_are_demonstrations(tokenizer, tmp_path):
    folder = write(tmp_path, ROWS["nectar"])
    good = sets.load_demonstrations("nectar", folder, tokenizer, 12, 6)
    assert [response for _, response in texts(tokenizer, good)] == ["red <eos>", "cod <eos>"]


def test_safer_is_not_more_helpful(tokenizer, tmp_path):
    folder = write(tmp_path, ROWS["saferlhf"], nested=True)
    prompts = [f"human : name a {what} assistant :" for what in ("colour", "fish")]
    red, blue = "red <eos>", "blue sea <eos>"
    helpful = preferred(tokenizer, load("saferlhf", folder, tokenizer))
    assert helpful == [(prompts[0], red, blue), (prompts[1], blue, red)]
    with pytest.warns(UserWarning, match="0 of 1 pairs have .* 1 rows prefer nothing"):
        safe = load("saferlhf_safety", folder, tokenizer)
    assert preferred(tokenizer, safe) == [(prompts[0], blue, red)]


def test_parquet_and_splits_as_on_the_hub(tokenizer, tmp_path):
    import pyarrow
    from pyarrow import parquet

    (tmp_path / "data").mkdir()
    for split, rows in (("train", ROWS["nectar"][:1]), ("test", ROWS["nectar"][1:])):
        path = tmp_path / "data" / f"{split}-00000-of-00001.parquet"
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert len(load("nectar", tmp_path, tokenizer, split="train").chosen.ids) == 3
    assert len(load("nectar", tmp_path, tokenizer, split="test").chosen.ids) == 2


def test_what_is_too_long_is_left_out_whole_and_counted(tokenizer, tmp_path):
    folder = write(tmp_path, ROWS["nectar"])
    with pytest.warns(UserWarning, match="3 of 5 pairs .* more than 12 .* more than 2 tokens"):
        pairs = load("nectar", folder, tokenizer, response_length=2)
    # Of the first prompt nothing fits beside "red <eos>".
    assert {chosen for _, chosen, _ in preferred(tokenizer, pairs)} == {"cod <eos>"}


def test_the_limit_takes_the_first_pairs(tokenizer, tmp_path):
    folder = write(tmp_path, ROWS["nectar"])
    everything = preferred(tokenizer, load("nectar", folder, tokenizer))
    for limit in (1, 3, 4, 99):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # what the limit cuts off is not left out
            few = load("nectar", folder, tokenizer, limit=limit)
        assert preferred(tokenizer, few) == everything[:limit]


def test_a_start_token_stays_and_an_end_token_of_the_prompt_goes(tmp_path):
    from tokenizers import processors

    tokenizer = make_tokenizer(bos_token="<unk>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<unk> $A <eos>", special_tokens=[("<unk>", 2), ("<eos>", 1)]
    )
    pairs = load("tldr", write(tmp_path, ROWS["tldr"]), tokenizer)
    assert preferred(tokenizer, pairs)[0] == (
        "<unk> post : the sea tl ; dr :",
        "sea <eos>",
        "red sea <eos>",
    )


def test_padding_may_be_the_end_token(tmp_path):
    tokenizer = make_tokenizer(pad_token=None)
    ids, mask = load("tldr", write(tmp_path, ROWS["tldr"]), tokenizer).chosen
    assert np.all(ids[~mask] == tokenizer.eos_token_id)
    assert np.all(np.sum((ids == tokenizer.eos_token_id) & mask, axis=-1) == 1)


@pytest.mark.parametrize(
    "name, change, message",
    [
        (
            "tldr",
            {"rejected": "loser"},
            "row 0: no rejected among prompt, chosen, loser; give a co",
        ),
        ("nectar", {"answers": "replies"}, "no answers among .* columns are prompt, answers"),
        ("saferlhf", {"better_response_id": "better"}, "no better_response_id among .*SafeRLHF"),
    ],
)
def test_missing_columns_are_named(tokenizer, tmp_path, name, change, message):
    rows = [{change.get(key, key): value for key, value in row.items()} for row in ROWS[name]]
    with pytest.raises(UserError, match=message):
        load(name, write(tmp_path, rows), tokenizer)


def test_answers_without_a_rank(tokenizer, tmp_path):
    known = ROWS["nectar"][0]["answers"]
    rows = [{"prompt": "Human: a", "answers": [*known, {"answer": None, "rank": 4.0}]}]
    assert len(load("nectar", write(tmp_path / "a", rows), tokenizer).chosen.ids) == 3
    rows = [{"prompt": "Human: a", "answers": [{"answer": "red", "score": 1.0}]}]
    with pytest.raises(UserError, match="has the fields answer, score: it needs answer and rank"):
        load("nectar", write(tmp_path / "b", rows), tokenizer)


def test_folders_and_names_that_are_not_there(tokenizer, tmp_path):
    with pytest.raises(UserError, match="does not exist: get it with 'hf download berkeley-nest"):
        load("nectar", tmp_path / "missing", tokenizer)
    with pytest.raises(UserError, match="limit 0: give 1 or more pairs"):
        load("nectar", tmp_path, tokenizer, limit=0)
    with pytest.raises(UserError, match="data set 'hh' is unknown: use one of nectar, tldr"):
        load("hh", tmp_path, tokenizer)
    with pytest.raises(UserError, match="'saferlhf' has no demonstrations: use one of nectar"):
        sets.load_demonstrations("saferlhf", tmp_path, tokenizer, 12, 6)
    with pytest.raises(UserError, match=r"cannot be read .*data file.*: get a copy of berkeley"):
        load("nectar", tmp_path, tokenizer)
    with pytest.raises(UserError, match=r"split 'test' of the data set folder .* cannot be read"):
        load("nectar", write(tmp_path, ROWS["nectar"]), tokenizer, split="test")


def test_a_broken_file_is_one_line(tokenizer, tmp_path):
    (tmp_path / "train.jsonl").write_text('{"prompt": "a", "chos\n')
    with pytest.raises(UserError, match="cannot be read") as caught:
        load("tldr", tmp_path, tokenizer)
    assert "\n" not in str(caught.value)


def test_without_the_package_the_error_names_the_extra(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"not installed: pip install 'jaxalign\[hub\]'"):
        load("tldr", write(tmp_path, ROWS["tldr"]), tokenizer)


def test_nothing_left_is_an_error(tokenizer, tmp_path):
    folder = write(tmp_path / "a", ROWS["nectar"])
    with pytest.raises(UserError, match=r"leaves no pair \(5 of 5 pairs have .* longer lengths"):
        load("nectar", folder, tokenizer, prompt_length=3)
    silent = [{"prompt": "Human: a", "answers": []}, {"prompt": "Human: a", "answers": None}]
    with pytest.raises(UserError, match=r"leaves no pair \(0 of 0 pairs .* 2 rows prefer nothing"):
        load("nectar", write(tmp_path / "b", silent), tokenizer)


def test_tokenizers_that_do_not_serve(tmp_path):
    folder = write(tmp_path, ROWS["tldr"])
    with pytest.raises(UserError, match="has no end-of-sequence token"):
        load("tldr", folder, make_tokenizer(eos_token=None))
    with pytest.raises(UserError, match=r"prompt of 12 and response of 6 .* reads 16 in all"):
        load("tldr", folder, make_tokenizer(model_max_length=16))
    with pytest.raises(UserError, match="prompt of 12 and response of 0 tokens: give 1 or more"):
        load("tldr", folder, make_tokenizer(), response_length=0)
