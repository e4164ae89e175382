"""Images in .npz files: encoded one behind the other, or as pixels."""

from __future__ import annotations

import hashlib
import io
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import InputError
from ..messages import brief, some
from ..photos import Photo, check_sides, decode_photo
from .base import Content
from .columns import as_labels, whole_column
from .ids import given_ids, made_unique, numbered
from .masks import decode_mask
from .splits import choose_split, refuse_split

_NPZ_KEYS = ("jpeg", "offsets", "images", "labels", "mask_png", "mask_offsets", "ids", "names", "class_names")


@dataclass(frozen=True, eq=False)
class _Encoded:
    """Encoded images one behind the other: ``data`` (bytes,) uint8, ``offsets`` (n + 1,)."""

    data: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def stream(self, position: int) -> io.BytesIO:
        return io.BytesIO(self._bytes(position).tobytes())

    def part(self, positions: Sequence[int]) -> _Encoded:
        """These images alone."""
        pieces = [self._bytes(position) for position in positions]
        return _Encoded(np.concatenate(pieces), np.cumsum([0, *map(len, pieces)]))

    def _bytes(self, position: int) -> np.ndarray:
        return self.data[self.offsets[position] : self.offsets[position + 1]]


@dataclass(frozen=True, eq=False)
class _Archive:
    """An .npz file in memory: each access to its arrays would decompress them again."""

    path: Path
    photos: _Encoded | np.ndarray
    masks: _Encoded | None

    @property
    def has_masks(self) -> bool:
        return self.masks is not None

    def read(self, position: int, name: str, masks: bool) -> tuple[Photo, np.ndarray | None]:
        if isinstance(self.photos, _Encoded):
            photo = decode_photo(self.photos.stream(position), name)
        else:
            photo = Photo(Image.fromarray(self.photos[position]), None)
        return photo, decode_mask(self.masks.stream(position), name) if self.masks is not None and masks else None

    def path_of(self, position: int) -> None:  # noqa: ARG002
        return None

    def missing(self, positions: Iterable[int]) -> list[str]:  # noqa: ARG002
        return []

    def stamps(self, positions: Iterable[int]) -> Iterator[str]:  # noqa: ARG002
        yield self._digest

    def part(self, positions: Sequence[int]) -> _Archive:
        photos = self.photos
        return _Archive(self.path, photos.part(positions) if isinstance(photos, _Encoded) else photos[list(positions)], None)

    @cached_property
    def _digest(self) -> str:
        with open(self.path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def open_npz(path: Path, split: str | None) -> Content:
    """The images of an .npz file, or of one of its splits."""
    try:
        with zipfile.ZipFile(path):  # numpy would take another kind of file for a pickle
            pass
        with np.load(path, allow_pickle=False) as archive:
            prefix = _prefix(archive.files, split, path)
            arrays = {key: archive[prefix + key] for key in _NPZ_KEYS if prefix + key in archive.files}
            if "class_names" in archive.files:
                arrays.setdefault("class_names", archive["class_names"])
    except InputError:
        raise
    except Exception as error:  # a damaged file can raise anything inside a parser
        raise InputError(f"data: cannot read {str(path)!r}: {brief(error)}") from error
    photos = _npz_photos(arrays, path)
    masks = _npz_encoded(arrays, "mask_png", "mask_offsets", path) if "mask_png" in arrays else None
    count = len(photos)
    if masks is not None and len(masks) != count:
        raise InputError(f"data: expected {count} masks in {path.name!r}, one an image, received {len(masks)}")
    return Content(
        kind="npz",
        ids=_npz_ids(arrays, count, path),
        labels=_npz_labels(arrays, count, path),
        names=arrays["class_names"].tolist() if "class_names" in arrays else None,
        reader=_Archive(path, photos, masks),
        split=prefix.removesuffix("_") or None,
    )


def _prefix(keys: Sequence[str], split: str | None, path: Path) -> str:
    """What stands before the names of a split's arrays."""
    if "jpeg" in keys or "images" in keys:
        refuse_split(split, path)
        return ""
    splits = list(dict.fromkeys(key.rpartition("_")[0] for key in keys if re.fullmatch(r".+_(jpeg|images)", key)))
    if not splits:
        raise InputError(
            f"data: expected jpeg and offsets, SPLIT_jpeg and SPLIT_offsets, or images in {path.name!r}, "
            f"received {some(keys, 8) or 'nothing'}"
        )
    return f"{choose_split(split, splits, path)}_"


def _npz_photos(arrays: Mapping[str, np.ndarray], path: Path) -> _Encoded | np.ndarray:
    if "jpeg" in arrays:
        return _npz_encoded(arrays, "jpeg", "offsets", path)
    images = arrays["images"]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise InputError(
            f"data: expected images (n, h, w, 3) uint8 in {path.name!r}, received {tuple(images.shape)} {images.dtype}"
        )
    check_sides((images.shape[2], images.shape[1]), repr(path.name))
    return images


def _npz_encoded(arrays: Mapping[str, np.ndarray], key: str, offsets_key: str, path: Path) -> _Encoded:
    data, offsets = arrays[key], arrays.get(offsets_key)
    if offsets is None:
        raise InputError(f"data: expected {offsets_key} beside {key} in {path.name!r}, received {', '.join(arrays)}")
    if data.dtype != np.uint8 or data.ndim != 1:
        raise InputError(f"data: expected {key} (bytes,) uint8 in {path.name!r}, received {tuple(data.shape)} {data.dtype}")
    if offsets.dtype.kind not in "iu" or offsets.ndim != 1 or not len(offsets):
        raise InputError(
            f"data: expected {offsets_key} (n + 1,) of integers in {path.name!r}, received {tuple(offsets.shape)} {offsets.dtype}"
        )
    offsets = offsets.astype(np.int64)
    if offsets[0] < 0 or offsets[-1] > len(data) or (np.diff(offsets) < 0).any():
        raise InputError(
            f"data: expected {offsets_key} that rise from 0 to at most {len(data)} in {path.name!r}, received others, "
            f"from {offsets[0]} to {offsets[-1]}"
        )
    return _Encoded(data, offsets)


def _npz_ids(arrays: Mapping[str, np.ndarray], count: int, path: Path) -> tuple[str, ...]:
    """``ids`` are the images' own; ``names``, which may say what they show, are made unique."""
    if "ids" in arrays:
        return given_ids(_one_each(arrays["ids"], "ids", "iuU", count, path), path.name)
    names = arrays.get("names")
    if names is not None and names.dtype.kind == "U" and names.shape == (count,):
        return made_unique(names.tolist())
    return numbered(count)


def _npz_labels(arrays: Mapping[str, np.ndarray], count: int, path: Path) -> Sequence[int] | Sequence[str] | None:
    if "labels" not in arrays:
        return None
    values = _one_each(arrays["labels"], "labels", "iuU", count, path)
    return as_labels(whole_column(values, "label", path.name), path.name)


def _one_each(array: np.ndarray, key: str, kinds: str, count: int, path: Path) -> list[Any]:
    if array.dtype.kind not in kinds or array.shape != (count,):
        raise InputError(
            f"data: expected {key} ({count},) of integers or text in {path.name!r}, received {tuple(array.shape)} {array.dtype}"
        )
    return array.tolist()
