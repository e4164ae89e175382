"""Which part of the data is read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ..errors import InputError

SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}


def choose_split(split: str | None, splits: Sequence[str], path: Path) -> str:
    """The split that was asked for, or the only one.

    Raises:
        InputError: there is no such split, or none was named of several.
    """
    if split is None and len(splits) == 1:
        return splits[0]
    if split is None or split not in splits:
        received = "none" if split is None else repr(split)
        raise InputError(f"split: expected one of {', '.join(splits)}, which {path.name!r} has; received {received}")
    return split


def refuse_split(split: str | None, path: Path) -> None:
    """Raise ``InputError`` where a split is asked for of data that have none."""
    if split is None:
        return
    hint = f"; its subfolder can be named itself, as {str(path / split)!r}" if os.path.isdir(path / split) else ""
    raise InputError(f"split: expected none, as {path.name!r} has no splits, received {split!r}{hint}")
