"""Columns of values: all or nothing, and labels of one kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import InputError
from ..messages import some


def whole_column(values: Sequence[Any], column: str, name: str) -> Sequence[Any] | None:
    """A column's values; None where all of them are empty.

    Raises:
        InputError: only some are empty.
    """
    empty = [row for row, value in enumerate(values, 1) if value is None or value == ""]
    if len(empty) == len(values):
        return None
    if empty:
        raise InputError(f"data: expected a {column} in every row of {name!r} or in none, received none in {_rows(empty)}")
    return values


def _rows(numbers: Sequence[int]) -> str:
    return f"row{'s' if len(numbers) > 1 else ''} {some(map(str, numbers))}"


def as_labels(values: Sequence[Any] | None, name: str) -> Sequence[int] | Sequence[str] | None:
    """Labels that are all indices or all names.

    Raises:
        InputError: some are neither, or they are some of both.
    """
    if values is None or all(type(value) is int for value in values):
        return values
    if all(isinstance(value, str) for value in values):
        return [value.strip() for value in values]
    odd = next((value for value in values if type(value) is not int and not isinstance(value, str)), None)
    if odd is None:
        index, name_of_one = (next(value for value in values if isinstance(value, kind)) for kind in (int, str))
        raise InputError(
            f"label: expected class indices only or names only in {name!r}, received both ({index} and {name_of_one!r})"
        )
    raise InputError(f"label: expected class indices or names in {name!r}, received {odd!r} ({type(odd).__name__})")
