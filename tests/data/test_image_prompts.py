"""Prompts for text-to-image models: counts, the rule of the animals, disjoint splits."""

import json

import pytest

from jaxalign.core.types import UserError
from jaxalign.data import image_prompts
from jaxalign.data.world import read_prompt_file


@pytest.mark.parametrize(
    ("name", "train", "heldout"), [("animals", 45, 90), ("produce", 40, 40), ("relations", 40, 30)]
)
def test_sizes_and_no_prompt_twice(name, train, heldout):
    split = image_prompts.TEMPLATES[name]()
    assert (len(split.train), len(split.heldout)) == (train, heldout)
    assert len({*split.train, *split.heldout}) == train + heldout


def test_each_animal_is_trained_with_one_activity_by_its_place():
    split = image_prompts.animals()
    names = image_prompts.ANIMALS.split()
    assert len(set(names)) == 45
    assert split.train[:2] == ("a cat washing dishes", "a dog washing dishes")
    # The last of each fifteen and the first of the next; the article is "a" before a vowel, too.
    assert split.train[14:16] == ("a bear washing dishes", "a raccoon riding a bike")
    assert split.train[29:31] == ("a snake riding a bike", "a turtle playing chess")
    assert split.train[20] == "a ant riding a bike"
    assert {prompt.split()[1] for prompt in split.heldout} == set(names)
    every = {f"a {a} {b}" for a in names for b in image_prompts.ACTIVITIES}
    assert {*split.train, *split.heldout} == every


def test_fruits_are_held_out_in_a_colour_of_their_own():
    split = image_prompts.produce()
    trained = {prompt.split()[1] for prompt in split.train}
    assert len(trained) == 20
    assert trained == {prompt.split()[1] for prompt in split.heldout[:20]}
    assert len({prompt.split()[1] for prompt in split.heldout[20:]} - trained) == 20
    # A colour that is held out is not new to the model.
    colours = {prompt.split()[0] for prompt in split.heldout}
    assert len(colours - {prompt.split()[0] for prompt in split.train}) <= 2


def test_relations_are_shared_and_their_things_are_not_themselves():
    split = image_prompts.relations()
    for relation in image_prompts.RELATIONS:
        trained = [prompt for prompt in split.train if f" {relation} " in prompt]
        heldout = [prompt for prompt in split.heldout if f" {relation} " in prompt]
        assert len(trained) in (6, 7) and len(heldout) == 5
        for prompt in trained + heldout:
            first, second = prompt.split(f" {relation} ")
            assert first != second


def test_a_file_of_ones_own(tmp_path):
    """All that can be wrong with one is in tests/data/test_sprites.py, through a world."""
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps(image_prompts.animals().train))
    assert read_prompt_file(path) == list(image_prompts.animals().train)
    path.write_text('["a cat", 3]')
    with pytest.raises(UserError, match="entry 2 is 3, not a caption"):
        read_prompt_file(path)
