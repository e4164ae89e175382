"""Photos and masks in files of their own."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import features

from ..errors import InputError
from ..messages import brief
from ..photos import Photo, read_photo
from .ids import printable
from .masks import decode_mask

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"),
    *(suffix for suffix, codec in ((".avif", "avif"), (".jp2", "jpg_2000")) if features.check(codec)),
)


@dataclass(frozen=True)
class Files:
    """Photos and masks in files of their own: paths from the folder ``root``, or absolute.

    They are text, which takes a fraction of the memory of ``Path``.
    """

    root: str
    photos: tuple[str, ...]
    masks: tuple[str, ...] | None
    listed: bool = False  # found in their folder just now, so that each is there

    @property
    def has_masks(self) -> bool:
        return self.masks is not None

    def read(self, position: int, name: str, masks: bool) -> tuple[Photo, np.ndarray | None]:  # noqa: ARG002
        photo = read_photo(Path(self.root, self.photos[position]))
        if self.masks is None or not masks:
            return photo, None
        mask = Path(self.root, self.masks[position])
        return photo, decode_mask(mask, repr(str(mask)))

    def path_of(self, position: int) -> str:
        return printable(str(Path(self.root, self.photos[position])))

    def missing(self, positions: Iterable[int]) -> list[str]:
        if self.listed:
            return []
        return [str(Path(path)) for path in self._paths(positions) if not os.path.isfile(path)]

    def stamps(self, positions: Iterable[int]) -> Iterator[str]:
        return map(stamp, self._paths(positions))

    def part(self, positions: Sequence[int]) -> Files:
        return Files(self.root, tuple(self.photos[position] for position in positions), None, listed=self.listed)

    def _paths(self, positions: Iterable[int]) -> Iterator[str]:
        for position in positions:
            yield os.path.join(self.root, self.photos[position])
            if self.masks is not None:
                yield os.path.join(self.root, self.masks[position])


def stamp(path: str | Path) -> str:
    """Size and time of a file as text."""
    try:
        status = os.stat(path)
    except OSError:
        return "missing"
    return f"{status.st_size} {status.st_mtime_ns}"


def visible_files(path: Path) -> Iterator[str]:
    """Relative paths, with ``/`` on every system, of files that are not hidden and in no hidden folder.

    Links to folders are followed, but not to a folder that the link itself lies in.
    """

    def refuse(error: OSError) -> None:
        raise InputError(f"data: cannot read {str(error.filename)!r}: {brief(error)}") from error

    # by folder that is still to be walked: itself and those that it lies in
    above: dict[str, tuple[tuple[int, int], ...]] = {os.fspath(path): (_identity(path),)}
    for root, folders, files in os.walk(path, followlinks=True, onerror=refuse):
        chain = above.pop(root)
        found = {folder: _identity(os.path.join(root, folder)) for folder in folders if not folder.startswith(".")}
        folders[:] = [folder for folder, identity in found.items() if identity not in chain]
        above |= {os.path.join(root, folder): (*chain, found[folder]) for folder in folders}
        relative = Path(root).relative_to(path).as_posix()
        before = "" if relative == "." else f"{relative}/"
        yield from (before + file for file in files if not file.startswith("."))


def _identity(folder: str | Path) -> tuple[int, int]:
    """What a folder and all links to it have in common."""
    try:
        status = os.stat(folder)
    except OSError as error:
        raise InputError(f"data: cannot read {str(folder)!r}: {brief(error)}") from error
    return status.st_dev, status.st_ino


def plain_path(path: Path) -> str:
    """An absolute path without ``..``, with links as they are unless a ``..`` behind one makes it lead elsewhere."""
    plain, real = os.path.abspath(path), os.path.realpath(path)
    if os.path.realpath(plain) == real:
        return plain
    return real if path.name == ".." else os.path.join(os.path.realpath(path.parent), path.name)


def suffix(file: str) -> str:
    """The last suffix of a path, with its dot, in lower case."""
    return os.path.splitext(file)[1].lower()
