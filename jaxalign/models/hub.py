"""What a model family says about its Hugging Face checkpoints, and the checks of config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxalign.core.types import UserError


class Tensor(NamedTuple):
    """Where one of our arrays lies in a checkpoint.

    path: ours, "block_0/attention/query/kernel". name: theirs.
    transposed: theirs is `[out, in]`.
    part: (i, n) if ours is the i-th of n equal parts of theirs, along the last axis.
    """

    path: str
    name: str
    transposed: bool = False
    part: tuple[int, int] = (0, 1)


def size(values: Mapping[str, Any], name: str) -> int:
    """The positive whole number `name` of a config.json.

    Raises: UserError when it is missing or something else.
    """
    value = values.get(name)
    if not isinstance(value, int) or value < 1:
        raise UserError(f"config.json: {name} = {value!r}: must be a positive whole number; add it")
    return value


def check_supported(values: Mapping[str, Any], supported: Mapping[str, tuple]) -> None:
    """Raises UserError for a value of a config.json that the family's module cannot compute.

    supported: name to the values that it can; the first is the format's default.
    """
    for name, allowed in supported.items():
        value = values.get(name, allowed[0])
        if value not in allowed:
            raise UserError(
                f"config.json: {name} = {value!r}: only {' or '.join(map(repr, allowed))} is "
                "supported; use a checkpoint that has it so"
            )
