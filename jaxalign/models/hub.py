"""What a model family says about its Hugging Face checkpoints, and the checks of config.json."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from jaxalign.core.state import paths
from jaxalign.core.types import PyTree, UserError


class Tensor(NamedTuple):
    """Where one of our arrays lies in a checkpoint.

    path: ours, "block_0/attention/query/kernel". name: theirs.
    transposed: theirs is `[out, in]`; a convolution's is `[out, in, height, width]`, and ours
        `[height, width, in, out]`.
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


def sizes(
    values: Mapping[str, Any], name: str, count: int | None = None, *, default: int | None = None
) -> tuple[int, ...]:
    """The same for a list of `count` sizes; one number stands for that many."""
    value = values.get(name, default)
    found = (value,) * (count or 1) if isinstance(value, int) else tuple(value or ())
    if count not in (None, len(found)) or not found:
        raise UserError(
            f"config.json: {name} = {value!r}: must be {count or 'some'} positive whole numbers; "
            "mend it"
        )
    return tuple(size({name: each}, name) for each in found)


LISTED = re.compile(
    r"(\w*(?:blocks|resnets|attentions|downsamplers|upsamplers|to_out|net|layers))_(\d+)"
)
LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


def mirrored(abstract: PyTree) -> list[Tensor]:
    """The table for a module whose names are the checkpoint's own, with "blocks_0" for "blocks.0".

    abstract: its parameters, arrays or `ShapeDtypeStruct`s.
    """
    table = []
    for path in jax.tree.leaves(paths(abstract)):
        *outer, leaf = path.split("/")
        outer = [LISTED.sub(r"\1.\2", part) for part in outer]
        table.append(Tensor(path, ".".join([*outer, LEAVES[leaf]]), transposed=leaf == "kernel"))
    return table


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
