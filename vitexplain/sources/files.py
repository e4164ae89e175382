"""Photos and masks in files of their own."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import InputError
from ..loading import Photo, read_photo
from ..messages import brief
from .ids import printable
from .masks import decode_mask

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm")


@dataclass(frozen=True)
class Files:
    """Photos and masks in files of their own."""

    photos: tuple[Path, ...]
    masks: tuple[Path, ...] | None
    listed: bool = False  # found in their folder just now, so that each is there

    @property
    def has_masks(self) -> bool:
        return self.masks is not None

    def read(self, position: int, name: str, masks: bool) -> tuple[Photo, np.ndarray | None]:  # noqa: ARG002
        photo = read_photo(self.photos[position])
        if self.masks is None or not masks:
            return photo, None
        return photo, decode_mask(self.masks[position], repr(str(self.masks[position])))

    def path_of(self, position: int) -> str:
        return printable(str(self.photos[position]))

    def missing(self, positions: Iterable[int]) -> list[str]:
        if self.listed:
            return []
        return [str(path) for path in self._paths(positions) if not os.path.isfile(path)]

    def stamps(self, positions: Iterable[int]) -> Iterator[str]:
        return map(stamp, self._paths(positions))

    def part(self, positions: Sequence[int]) -> Files:
        return Files(tuple(self.photos[position] for position in positions), None, listed=self.listed)

    def _paths(self, positions: Iterable[int]) -> Iterator[Path]:
        for position in positions:
            yield self.photos[position]
            if self.masks is not None:
                yield self.masks[position]


def stamp(path: Path) -> str:
    """Size and time of a file as text."""
    try:
        status = path.stat()
    except OSError:
        return "missing"
    return f"{status.st_size} {status.st_mtime_ns}"


def visible_files(path: Path) -> Iterator[str]:
    """Relative paths, with ``/`` on every system, of files that are not hidden and in no hidden folder."""

    def refuse(error: OSError) -> None:
        raise InputError(f"data: cannot read {str(error.filename)!r}: {brief(error)}") from error

    for root, folders, files in os.walk(path, followlinks=True, onerror=refuse):
        folders[:] = [folder for folder in folders if not folder.startswith(".")]
        relative = Path(root).relative_to(path)
        yield from ((relative / file).as_posix() for file in files if not file.startswith("."))


def suffix(file: str) -> str:
    """The last suffix of a path, with its dot, in lower case."""
    return os.path.splitext(file)[1].lower()
