"""Ids of images: unique, and text that can be written anywhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from ..errors import InputError
from ..messages import some


def made_unique(ids: Iterable[str]) -> tuple[str, ...]:
    """Ids of which a second gets `` #2`` behind it, a third `` #3``."""
    unique: dict[str, None] = {}
    last: dict[str, int] = {}  # the number of a text's latest repeat, so that the next one need not count from 2 again
    for text in map(printable, ids):
        candidate = text
        if text in unique:
            number = last.get(text, 1)
            while candidate in unique:
                number += 1
                candidate = f"{text} #{number}"
            last[text] = number
        unique[candidate] = None
    return tuple(unique)


def given_ids(values: Iterable[Any], name: str) -> tuple[str, ...]:
    """Ids as the data give them.

    Raises:
        InputError: one is there several times.
    """
    ids = tuple(map(str, values))
    twice = [text for text, count in Counter(ids).items() if count > 1]
    if twice:
        raise InputError(f"id: expected each once in {name!r}, received several times {some(map(repr, twice))}")
    return ids


def printable(text: str) -> str:
    """A path as text for any file; bytes in a file's name that are not UTF-8 are written as ``\\xff``."""
    if text.isascii():  # not a copy of it: an id and a path are then one object
        return text
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def numbered(count: int) -> tuple[str, ...]:
    """``"000000"``, ``"000001"``, …"""
    return tuple(f"{index:06d}" for index in range(count))
