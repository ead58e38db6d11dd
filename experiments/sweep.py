"""Numbers of a method's settings trained side by side, as one program with all seeds.

A sweep is words such as "low_alpha=1,3,10" and "goals.discount=0.99,0.995"; every combination of
their values is a variant of each arm. Fields that shape a program (sizes, names) are no numbers.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxalign.core.types import Array, UserError

Numbers = Mapping[str, float]


def variants(words: Sequence[str], config: Any, arm: str) -> dict[str, Numbers]:
    """Each variant of an arm by its name; without words the arm itself.

    config: the arm's settings.
    Raises: UserError for words that are no numbers of the settings, and values out of range.
    """
    chosen = [_values(word, config, arm) for word in words]
    found = {}
    for values in itertools.product(*chosen):
        numbers = dict(values)
        checked(config, numbers)
        found[" ".join([arm, *(f"{name}={value:g}" for name, value in values)])] = numbers
    return found


def _values(word: str, config: Any, arm: str) -> list[tuple[str, float]]:
    """One word's (field, value) pairs."""
    name, _, values = word.partition("=")
    name, known = name.replace("-", "_"), _fields(config)
    if name not in known:
        raise UserError(
            f"sweep {word!r}: {name} is no number of {arm}; write NAME=VALUE,VALUE with one of "
            f"{', '.join(known)}"
        )
    try:
        return [(name, float(value)) for value in values.split(",")]
    except ValueError:
        raise UserError(f"sweep {word!r}: give numbers, as in {name}=1,3,10") from None


def _fields(config: Any, prefix: str = "") -> list[str]:
    """The fields that may vary within a program, those of nested settings as "goals.discount"."""
    names: list[str] = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            names += _fields(value, f"{prefix}{field.name}.")
        elif isinstance(value, float):
            names.append(prefix + field.name)
    return names


def checked(config: Any, numbers: Numbers) -> Any:
    """The settings with these numbers. Raises: UserError where they are out of range."""
    for name, value in numbers.items():
        outer, _, inner = name.partition(".")
        changed = checked(getattr(config, outer), {inner: value}) if inner else value
        config = dataclasses.replace(config, **{outer: changed})
    return config


def traced(config: Any, numbers: Mapping[str, Array]) -> Any:
    """The same with values that are traced, and so cannot be checked: they were before."""
    config = copy.copy(config)
    for name, value in numbers.items():
        outer, _, inner = name.partition(".")
        changed = traced(getattr(config, outer), {inner: value}) if inner else value
        object.__setattr__(config, outer, changed)
    return config


def stacked(numbers: Sequence[Numbers]) -> dict[str, np.ndarray]:
    """One array a field, `[S] f32`, for as many rows of a program."""
    return {name: np.array([row[name] for row in numbers], np.float32) for name in numbers[0]}
