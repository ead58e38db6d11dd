"""Checks of the numbers in a method's config: the value, the rule and the fix in one line."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from jaxalign.core.types import UserError


def positive(config: object, *names: str) -> None:
    """Raises UserError unless each of these fields is greater than 0."""
    for name in names:
        if not getattr(config, name) > 0:
            raise UserError(f"{name} = {getattr(config, name)}: must be positive; try the default")


def fractions(config: object, *names: str) -> None:
    """Raises UserError unless each of these fields lies between 0 and 1, both excluded."""
    for name in names:
        if not 0 < getattr(config, name) < 1:
            raise UserError(
                f"{name} = {getattr(config, name)}: must lie between 0 and 1; try the default"
            )


def counts(config: object, *names: str) -> None:
    """Raises UserError unless each of these fields, or each of its entries, is at least 1."""
    for name in names:
        entries = getattr(config, name)
        entries = entries if isinstance(entries, Sequence) else (entries,)
        if any(entry < 1 for entry in entries):
            raise UserError(f"{name} = {getattr(config, name)}: must be at least 1; raise it")


def known(what: str, names: Iterable[str], choice: Iterable[str]) -> None:
    """Raises UserError unless each of the names is one of the choice. what: the user's field."""
    for name in names:
        if name not in choice:
            raise UserError(
                f"{what}: {name!r} is not one of {', '.join(choice)}; give some of these"
            )
