"""What a source is, whatever the data are in."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from PIL import Image

from ..errors import InputError
from ..photos import Photo


@dataclass(frozen=True)
class Sample:
    """One image of a source.

    Attributes:
        id: unique in its source.
        photo: RGB, upright.
        label: the class's index in the model, or None.
        mask: bool (h, w) of the photo's size, true in the foreground, or None.
        note: what was done to the image to read it, such as ``"converted from CMYK to RGB"``, or None.
    """

    id: str
    photo: Image.Image
    label: int | None
    mask: np.ndarray | None
    note: str | None = None


class Reader(Protocol):
    """Where the images are; it holds no open file, so that worker processes can have a copy."""

    @property
    def has_masks(self) -> bool: ...

    def read(self, position: int, name: str, masks: bool) -> tuple[Photo, np.ndarray | None]:
        """A photo and, where asked for, its mask; ``name`` stands for it in messages where it has no file of its own."""
        ...

    def path_of(self, position: int) -> str | None:
        """The photo's own file, absolute, or None where it has none."""
        ...

    def missing(self, positions: Iterable[int]) -> list[str]:
        """Files that are not there."""
        ...

    def stamps(self, positions: Iterable[int]) -> Iterator[str]:
        """What changes when the data do, without reading images one by one."""
        ...

    def part(self, positions: Sequence[int]) -> Reader | None:
        """A reader of these photos alone, in this order; None where the whole one is as small."""
        ...


@dataclass(frozen=True, eq=False)
class Source:
    """Images in a fixed order, with labels and masks where there are any; made by ``open_source``.

    Attributes:
        name: of the file or folder, without its directory.
        kind: ``"imagefolder"``, ``"folder"``, ``"csv"``, ``"parquet"``, ``"huggingface"``, ``"npz"`` or ``"webdataset"``.
        location: the path that was opened, absolute; for a pattern of shards, the pattern.
        images: the slice that it was opened with, as text, or None for all images.
        split: which part of the data this is, or None where they have no parts.
        ids: one an image, unique.
        labels: class indices, one an image, known without decoding; None where there are none.
    """

    name: str
    kind: str
    location: str
    split: str | None
    images: str | None
    ids: tuple[str, ...] = field(repr=False)
    labels: tuple[int, ...] | None = field(repr=False)
    _reader: Reader = field(repr=False)
    _positions: Sequence[int] = field(repr=False)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def has_labels(self) -> bool:
        """Whether each image has a label."""
        return self.labels is not None

    @property
    def has_masks(self) -> bool:
        """Whether each image has a mask."""
        return self._reader.has_masks

    def sample(self, index: int, *, masks: bool = True) -> Sample:
        """The image at an index of ``ids``, decoded; its mask is not looked at where ``masks`` is false.

        Raises:
            InputError: the photo or its mask cannot be read, or the mask is of another size; the message names the image.
        """
        identity = self.ids[index]
        photo, mask = self._reader.read(self._positions[index], f"{identity!r} in {self.name!r}", masks)
        width, height = photo.image.size
        if mask is not None and mask.shape != (height, width):
            raise InputError(
                f"mask: expected the size of the upright photo, {width} × {height}, "
                f"received {mask.shape[1]} × {mask.shape[0]} for {identity!r} in {self.name!r}"
            )
        return Sample(identity, photo.image, None if self.labels is None else self.labels[index], mask, photo.note)

    def path(self, index: int) -> str | None:
        """The file of the image at an index of ``ids``, absolute: ``"/data/cat/a.jpg"``, or ``"/data/shard.tar::a.jpg"``.

        None where an image has no file of its own, as in an .npz file or a Hugging Face dataset.
        """
        return self._reader.path_of(self._positions[index])

    def check_labels(self, num_classes: int) -> None:
        """Refuse labels that are no classes of a model with so many.

        Raises:
            InputError: the first of them, with its image.
        """
        for name, label in zip(self.ids, self.labels or (), strict=False):
            if not 0 <= label < num_classes:
                raise InputError(f"label: expected a class from 0 to {num_classes - 1}, received {label} for image {name!r}")

    def missing(self) -> list[str]:
        """Files of these images that are named but are not there."""
        return self._reader.missing(self._positions)

    def select(self, indices: slice) -> Source:
        """The images that a slice takes, as a view.

        Raises:
            InputError: nothing is left.
        """
        chosen = replace(
            self,
            ids=self.ids[indices],
            labels=None if self.labels is None else self.labels[indices],
            _positions=self._positions[indices],
        )
        if not chosen.ids:
            raise InputError(f"images: expected a slice that leaves some of the {len(self)} in {self.name!r}, received {indices}")
        return chosen

    def part(self, rows: range) -> Source | None:
        """The photos of these rows alone, small enough to be sent to another process with each task; without masks.

        None where the whole source is small itself, as its images stay in files that are mapped into memory.
        """
        reader = self._reader.part([self._positions[row] for row in rows])
        if reader is None:
            return None
        chosen = slice(rows.start, rows.stop, rows.step)
        labels = None if self.labels is None else self.labels[chosen]
        return replace(self, ids=self.ids[chosen], labels=labels, _reader=reader, _positions=range(len(rows)))

    def fingerprint(self) -> str:
        """A sha256 in hexadecimal that tells whether the data are still the same ones.

        It changes with ids, labels, and the sizes and times of the files, or the bytes of an .npz file; images are not decoded.
        """
        digest = hashlib.sha256()
        for part in (self.kind, self.split, self.ids, self.labels, *self._reader.stamps(self._positions)):
            digest.update(json.dumps(part).encode() + b"\n")
        return digest.hexdigest()


def parse_slice(text: str) -> slice:
    """A slice in Python's own notation, such as ``"0:64"``, ``"::2"`` or ``"100:"``.

    Raises:
        InputError: it is none.
    """
    parts = [part.strip() for part in text.split(":")]
    if len(parts) not in (2, 3) or not all(re.fullmatch(r"([+-]?[0-9]+)?", part) for part in parts):
        raise InputError(f"images: expected a slice START:STOP or START:STOP:STEP, such as 0:64 or ::2, received {text!r}")
    numbers = [int(part) if part else None for part in parts]
    if len(numbers) == 3 and numbers[2] == 0:
        raise InputError(f"images: expected a step other than 0, received {text!r}")
    return slice(*numbers)


@dataclass(frozen=True)
class Content:
    """What was found: images, and their labels as written.

    ``labels`` are indices or names. ``names`` are, for indices, the names that belong to them, and for names all that there
    are, in the order that numbers them.
    """

    kind: str
    ids: tuple[str, ...]
    labels: Sequence[int] | Sequence[str] | None
    names: Sequence[str] | None
    reader: Reader
    split: str | None = None


def not_installed(what: str, package: str, extra: str) -> InputError:
    """An error for data that need a package which is not here; ``extra`` installs it."""
    return InputError(f"data: {what} needs {package}, which is not installed: pip install 'vitexplain[{extra}]'")
