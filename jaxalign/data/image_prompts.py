"""Prompts for text-to-image models: the three kinds of B2-DiffuRL's experiments, and a user's own.

1. animals: "a ANIMAL ACTIVITY" with DDPO's 45 animals (Black et al. 2024, arXiv 2305.13301) and
   three activities. Each animal is trained with one, by its place in the list: the first fifteen
   wash dishes, the next ride a bike, the last play chess; the other 90 are held out.
2. produce: "COLOUR PLANT": 20 fruits in two usual colours each are trained; held out are the same
   fruits in a colour that they do not have, and 20 vegetables in one that few have.
3. relations: "THING RELATION THING": 40 are trained and 30 held out, with the same six relations.

Departures: 1 is the released list, made by its rule (the article is always "a"). 2 and 3 are lists
of our own, of the same kinds and sizes; for the released ones give their files to
`world.read_prompt_file`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

ANIMALS = (
    "cat dog horse monkey rabbit zebra spider bird sheep deer cow goat lion tiger bear raccoon fox "
    "wolf lizard beetle ant butterfly fish shark whale dolphin squirrel mouse rat snake turtle "
    "frog chicken duck goose bee pig turkey fly llama camel bat gorilla hedgehog kangaroo"
)
ACTIVITIES = ("washing dishes", "riding a bike", "playing chess")

# A fruit's two usual colours, and one that it does not have.
FRUITS = {
    "apple": ("red", "green", "blue"),
    "banana": ("yellow", "green", "purple"),
    "orange": ("orange", "yellow", "black"),
    "strawberry": ("red", "pink", "blue"),
    "blueberry": ("blue", "purple", "yellow"),
    "grape": ("purple", "green", "white"),
    "pear": ("green", "yellow", "purple"),
    "peach": ("pink", "orange", "blue"),
    "plum": ("purple", "red", "white"),
    "cherry": ("red", "black", "green"),
    "lemon": ("yellow", "green", "red"),
    "lime": ("green", "yellow", "pink"),
    "watermelon": ("green", "red", "purple"),
    "pineapple": ("yellow", "brown", "blue"),
    "mango": ("orange", "yellow", "gray"),
    "kiwi": ("brown", "green", "red"),
    "coconut": ("brown", "white", "pink"),
    "raspberry": ("red", "black", "orange"),
    "fig": ("purple", "brown", "blue"),
    "apricot": ("orange", "yellow", "black"),
}
VEGETABLES = {
    "carrot": "purple",
    "potato": "blue",
    "tomato": "black",
    "cucumber": "white",
    "onion": "green",
    "broccoli": "orange",
    "cauliflower": "pink",
    "eggplant": "yellow",
    "pumpkin": "blue",
    "pepper": "purple",
    "lettuce": "red",
    "cabbage": "black",
    "spinach": "white",
    "celery": "brown",
    "radish": "gray",
    "garlic": "green",
    "asparagus": "pink",
    "zucchini": "orange",
    "beet": "blue",
    "corn": "red",
}

# Pairs of things, "first/second", for each relation: trained, and held out.
RELATIONS = {
    "on": (
        "cup/table cat/sofa book/shelf bird/branch hat/chair plate/counter laptop/desk",
        "dog/bed vase/shelf phone/table bottle/counter lamp/desk",
    ),
    "under": (
        "dog/table ball/chair cat/bed shoes/bench box/desk bag/sofa boat/bridge",
        "cat/umbrella bike/tree ball/table suitcase/bed bench/bridge",
    ),
    "behind": (
        "tree/house car/bus dog/fence bike/wall chair/desk mountain/lake boy/cow",
        "horse/fence bus/truck cat/vase tree/bench tower/house",
    ),
    "in front of": (
        "car/garage dog/house bench/wall truck/bus child/piano horse/barn bike/shop",
        "cat/mirror bus/house motorcycle/wall cow/barn chair/window",
    ),
    "left of": (
        "lamp/bed cup/laptop dog/cat tree/car fork/plate chair/table",
        "bottle/bowl horse/cow clock/vase bike/bench pillow/bear",
    ),
    "right of": (
        "knife/plate phone/keyboard bus/car cow/horse bowl/cup sofa/lamp",
        "spoon/bowl bear/tree truck/bike book/bottle box/chair",
    ),
}


class Split(NamedTuple):
    """Prompts to train on, and held-out ones for evaluation only; none is in both."""

    train: tuple[str, ...]
    heldout: tuple[str, ...]


def animals() -> Split:
    """45 and 90 animals that do what people do."""
    names = ANIMALS.split()
    each = len(names) // len(ACTIVITIES)
    train, heldout = [], []
    for i, animal in enumerate(names):
        for j, activity in enumerate(ACTIVITIES):
            (train if i // each == j else heldout).append(f"a {animal} {activity}")
    return Split(tuple(train), tuple(heldout))


def produce() -> Split:
    """40 and 40 fruits and vegetables in a colour."""
    train = [f"{colour} {fruit}" for fruit, usual in FRUITS.items() for colour in usual[:2]]
    heldout = [f"{colours[2]} {fruit}" for fruit, colours in FRUITS.items()]
    heldout += [f"{colour} {plant}" for plant, colour in VEGETABLES.items()]
    return Split(tuple(train), tuple(heldout))


def relations() -> Split:
    """40 and 30 pairs of things, one somewhere to the other."""
    return Split(_related(0), _related(1))


def _related(part: int) -> tuple[str, ...]:
    pairs = [
        (pair.split("/"), relation)
        for relation, parts in RELATIONS.items()
        for pair in parts[part].split()
    ]
    return tuple(f"{first} {relation} {second}" for (first, second), relation in pairs)


TEMPLATES: Mapping[str, Callable[[], Split]] = {
    "animals": animals,
    "produce": produce,
    "relations": relations,
}
