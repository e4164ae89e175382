"""Labelled images from what users have: folders, tables, Hugging Face datasets and .npz files, read in one way."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import timm.data
from PIL import Image

from .errors import InputError
from .loading import LoadedModel, _brief, _quiet, _some, check_file, decode_image, decode_photo, load_photo

if TYPE_CHECKING:
    import datasets

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm")
TABLE_COLUMNS = ("path", "label", "mask", "id")
EXPECTED = "a folder of images, a .csv, .parquet or .npz file, or the folder of a Hugging Face dataset"

_SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}
_IMAGE_COLUMN = "image"
_MASK_COLUMNS = ("mask", "annotation")
_LABEL_COLUMNS = ("label", "labels", "fine_label")
_NPZ_KEYS = ("jpeg", "offsets", "images", "labels", "mask_png", "mask_offsets", "ids", "names", "class_names")
_SHARD = re.compile(r"-\d+-of-\d+(-\w+)?$")


@dataclass(frozen=True)
class Sample:
    """One image of a source.

    Attributes:
        id: unique in its source.
        photo: RGB, upright.
        label: the class's index in the model, or None.
        mask: bool (h, w) of the photo's size, true in the foreground, or None.
    """

    id: str
    photo: Image.Image
    label: int | None
    mask: np.ndarray | None


class _Reader(Protocol):
    """Where the images are; it holds no open file, so that worker processes can have a copy."""

    @property
    def has_masks(self) -> bool: ...

    def read(self, position: int, name: str, masks: bool) -> tuple[Image.Image, np.ndarray | None]:
        """A photo and, where asked for, its mask; ``name`` stands for it in messages where it has no file of its own."""
        ...

    def missing(self, positions: Iterable[int]) -> list[str]:
        """Files that are not there."""
        ...

    def stamps(self, positions: Iterable[int]) -> Iterator[str]:
        """What changes when the data do, without reading images one by one."""
        ...


@dataclass(frozen=True, eq=False)
class Source:
    """Images in a fixed order, with labels and masks where there are any; made by ``open_source``.

    Attributes:
        name: of the file or folder, without its directory.
        kind: ``"imagefolder"``, ``"folder"``, ``"csv"``, ``"parquet"``, ``"huggingface"`` or ``"npz"``.
        split: which part of the data this is, or None where they have no parts.
        ids: one an image, unique.
        labels: class indices, one an image, known without decoding; None where there are none.
    """

    name: str
    kind: str
    split: str | None
    ids: tuple[str, ...] = field(repr=False)
    labels: tuple[int, ...] | None = field(repr=False)
    _reader: _Reader = field(repr=False)
    _positions: tuple[int, ...] = field(repr=False)

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
        if mask is not None and mask.shape != (photo.height, photo.width):
            raise InputError(
                f"mask: expected the size of the upright photo, {photo.width} × {photo.height}, "
                f"received {mask.shape[1]} × {mask.shape[0]} for {identity!r} in {self.name!r}"
            )
        return Sample(identity, photo, None if self.labels is None else self.labels[index], mask)

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

    def fingerprint(self) -> str:
        """A sha256 in hexadecimal that tells whether the data are still the same ones.

        It changes with ids, labels, and the sizes and times of the files, or the bytes of an .npz file; images are not decoded.
        """
        digest = hashlib.sha256()
        for part in (self.kind, self.split, self.ids, self.labels, *self._reader.stamps(self._positions)):
            digest.update(json.dumps(part).encode() + b"\n")
        return digest.hexdigest()


def open_source(
    path: str | Path, *, split: str | None = None, images: str | None = None, classes: LoadedModel | None = None
) -> Source:
    """The images in a file or folder; nothing is decoded yet.

    Args:
        path: one of

            - a folder of class folders, or a folder of images without labels;
            - a .csv or .parquet table with the columns ``path`` (absolute, or from the table's own folder) and, if wanted,
              ``label``, ``mask`` (a path, too) and ``id``;
            - the folder of a Hugging Face dataset: as ``save_to_disk`` writes it, or with parquet files as on the hub;
            - an .npz file with ``jpeg`` and ``offsets``, or ``images`` (n, h, w, 3) uint8, and if wanted ``labels``, ``mask_png``
              and ``mask_offsets``, ``ids``, ``class_names``; of several splits, all but the last with the split and ``_`` before.
        split: which part of the data, where they have several.
        images: which images, as a slice: ``"0:64"``, ``"::2"``.
        classes: the model whose class indices labels become: names and WordNet ids are looked up among its classes. Without one,
            names count in their given order, or sorted.

    Ids are relative paths, row numbers, or what the data give; given ones must be unique, others are made so by `` #2``, `` #3``.

    Raises:
        InputError: the data cannot be read, do not have what was asked for, or have labels that the model does not have.
    """
    chosen = None if images is None else parse_slice(images)
    path = Path(path)
    content = _open(path, split)
    name = Path(os.path.abspath(path)).name
    if not content.ids:
        raise InputError(f"data: expected images in {str(path)!r}, received none")
    source = Source(
        name, content.kind, content.split, content.ids, _class_indices(content, classes, name),
        content.reader, tuple(range(len(content.ids))),
    )  # fmt: skip
    if chosen is not None:
        source = source.select(chosen)
    _check_present(source)
    return source


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
class _Content:
    """What was found: images, and their labels as written.

    ``labels`` are indices or names. ``names`` are, for indices, the names that belong to them, and for names all that there
    are, in the order that numbers them.
    """

    kind: str
    ids: tuple[str, ...]
    labels: Sequence[int] | Sequence[str] | None
    names: Sequence[str] | None
    reader: _Reader
    split: str | None = None


def _open(path: Path, split: str | None) -> _Content:
    if os.path.isdir(path):
        return _open_folder(path, split)
    readers = {".csv": _open_csv, ".parquet": _open_parquet, ".npz": _open_npz}
    if not os.path.exists(path):
        raise InputError(f"data: there is no file or folder {str(path)!r}")
    if path.suffix.lower() not in readers:
        raise InputError(f"data: expected {EXPECTED}, received {path.name!r}")
    check_file(path, "data")
    return readers[path.suffix.lower()](path, split)


def _check_present(source: Source) -> None:
    missing = source._reader.missing(source._positions)
    if missing:
        raise InputError(f"data: files named in {source.name!r} do not exist: {_some(map(repr, missing))}")


# -- labels ------------------------------------------------------------------------------------------------------------


def _class_indices(content: _Content, classes: LoadedModel | None, name: str) -> tuple[int, ...] | None:
    """Labels as class indices, each within the model's range."""
    if content.labels is None:
        return None
    table = _meanings(content, classes, name)
    for identity, label in zip(content.ids, content.labels, strict=True):
        if label not in table:
            raise InputError(f"label: expected one of {_some(map(repr, table))}, received {label!r} for {identity!r} in {name!r}")
    indices = tuple(table[label] for label in content.labels)
    _check_range(indices, content.ids, classes, name)
    return indices


def _meanings(content: _Content, classes: LoadedModel | None, name: str) -> Mapping[Any, int]:
    """The class index that each label stands for."""
    used = sorted(set(content.labels or ()))  # type: ignore[type-var]
    if isinstance(used[0], str):
        return _of_names(used, used if content.names is None else content.names, classes, name)  # type: ignore[arg-type]
    if content.names is None:
        return {index: index for index in used}  # type: ignore[misc]
    return _of_named_indices(content.names, classes, name)


def _check_range(indices: Sequence[int], ids: Sequence[str], classes: LoadedModel | None, name: str) -> None:
    count = None if classes is None else classes.num_classes
    for index, identity in zip(indices, ids, strict=True):
        if index < 0 or (count is not None and index >= count):
            expected = "0 or more" if count is None else f"from 0 to {count - 1}"
            raise InputError(f"label: expected a class index {expected}, received {index} for {identity!r} in {name!r}")


def _of_names(used: Sequence[str], names: Sequence[str], classes: LoadedModel | None, name: str) -> Mapping[str, int]:
    """What each name that labels an image stands for; ``names`` are all that there are, in their order."""
    if all(map(_is_integer, used)):
        return {text: int(text) for text in used}
    if classes is None:
        return {text: index for index, text in enumerate(names)}
    found = _found(used, classes)
    if len(found) == len(used):
        return found
    # Where some names are the model's own, the order of all cannot be trusted: ten folders for CIFAR-10, one of them "plane".
    complete = next((texts for texts in (names, used) if len(texts) == classes.num_classes), None)
    if not found and complete is not None:
        return {text: index for index, text in enumerate(complete)}
    raise _unresolved(used, found, classes, name)


def _of_named_indices(names: Sequence[str], classes: LoadedModel | None, name: str) -> Mapping[int, int]:
    """What each index stands for that has a name beside it."""
    as_they_are = {index: index for index in range(len(names))}
    if classes is None:
        return as_they_are
    if all(map(_is_integer, names)):
        return {index: int(text) for index, text in enumerate(names)}
    found = _found(names, classes)
    one_each = len(set(found.values())) == len(names)
    if one_each or (len(found) == len(set(names)) and len(names) != classes.num_classes):
        return {index: found[text] for index, text in enumerate(names)}
    # ImageNet's own names hold some of several classes ("crane"); but most of those known must be in the model's order.
    in_place = sum(found.get(text) == index for index, text in enumerate(names))
    if not found or (len(names) == classes.num_classes and 2 * in_place > len(found)):
        return as_they_are
    raise _unresolved(names, found, classes, name)


def _found(names: Sequence[str], classes: LoadedModel) -> dict[str, int]:
    """The names that mean one class of the model, by its names or, for ImageNet's classes, by WordNet id."""
    wnids = _wnids(classes)
    known = {text: meant[0] for text, meant in classes.classes_named(names).items() if len(meant) == 1}
    return known | {text: wnids[text.strip().casefold()] for text in names if text.strip().casefold() in wnids}


def _wnids(classes: LoadedModel) -> dict[str, int]:
    subset = timm.data.infer_imagenet_subset(classes.model)
    if subset is None or classes.class_names is None:
        return {}
    return {wnid: index for index, wnid in enumerate(timm.data.ImageNetInfo(subset).label_names())}


def _unresolved(names: Sequence[str], found: Mapping[str, int], classes: LoadedModel, name: str) -> InputError:
    count = classes.num_classes
    if classes.class_names is None:
        expected = f"indices from 0 to {count - 1}, or names of exactly {count} classes, as the model's own names are not known"
        return InputError(f"labels: expected {expected}; received {len(names)} names in {name!r}: {_some(map(repr, names))}")
    lost = [text for text in names if text not in found]
    several = [text for text, meant in classes.classes_named(lost).items() if len(meant) > 1]
    unknown = [text for text in lost if text not in several]
    parts = [("not among them", unknown), ("names of several", several)]
    received = "; ".join(f"{what} are {_some(map(repr, texts))}" for what, texts in parts if texts)
    expected = f"names (such as {classes.class_names[0]!r}) or indices of the model's {count} classes"
    return InputError(f"labels: expected {expected}; of the {len(names)} in {name!r}, {received}")


def _is_integer(text: str) -> bool:
    return re.fullmatch(r"[+-]?[0-9]+", text) is not None


def _whole_column(values: Sequence[Any], column: str, name: str) -> Sequence[Any] | None:
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
    return f"row{'s' if len(numbers) > 1 else ''} {_some(map(str, numbers))}"


def _as_labels(values: Sequence[Any] | None, name: str) -> Sequence[int] | Sequence[str] | None:
    """Labels that are all indices or all names."""
    if values is None or all(type(value) is int for value in values):
        return values
    if all(isinstance(value, str) for value in values):
        return [value.strip() for value in values]
    odd = next(value for value in values if isinstance(value, bool) or not isinstance(value, int | str))
    raise InputError(f"label: expected class indices or names in {name!r}, received {odd!r} ({type(odd).__name__})")


# -- ids ---------------------------------------------------------------------------------------------------------------


def _made_unique(ids: Iterable[str]) -> tuple[str, ...]:
    unique: dict[str, None] = {}
    for text in ids:
        candidate, number = text, 1
        while candidate in unique:
            number += 1
            candidate = f"{text} #{number}"
        unique[candidate] = None
    return tuple(unique)


def _given_ids(values: Iterable[Any], name: str) -> tuple[str, ...]:
    ids = tuple(map(str, values))
    twice = [text for text, count in Counter(ids).items() if count > 1]
    if twice:
        raise InputError(f"id: expected each once in {name!r}, received several times {_some(map(repr, twice))}")
    return ids


def _numbers(count: int) -> tuple[str, ...]:
    return tuple(f"{index:06d}" for index in range(count))


# -- splits ------------------------------------------------------------------------------------------------------------


def _choose(split: str | None, splits: Sequence[str], path: Path) -> str:
    """The split that was asked for, or the only one."""
    if split is None and len(splits) == 1:
        return splits[0]
    if split is None or split not in splits:
        received = "none" if split is None else repr(split)
        raise InputError(f"split: expected one of {', '.join(splits)}, which {path.name!r} has; received {received}")
    return split


def _refuse_split(split: str | None, path: Path) -> None:
    if split is None:
        return
    hint = f"; its subfolder can be named itself, as {str(path / split)!r}" if os.path.isdir(path / split) else ""
    raise InputError(f"split: expected none, as {path.name!r} has no splits, received {split!r}{hint}")


# -- files -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Files:
    """Photos and masks in files of their own."""

    photos: tuple[Path, ...]
    masks: tuple[Path, ...] | None
    listed: bool = False

    @property
    def has_masks(self) -> bool:
        return self.masks is not None

    def read(self, position: int, name: str, masks: bool) -> tuple[Image.Image, np.ndarray | None]:  # noqa: ARG002
        photo = load_photo(self.photos[position])
        if self.masks is None or not masks:
            return photo, None
        return photo, _decode_mask(self.masks[position], repr(str(self.masks[position])))

    def missing(self, positions: Iterable[int]) -> list[str]:
        if self.listed:  # found in their folder just now
            return []
        return [str(path) for path in self._paths(positions) if not os.path.isfile(path)]

    def stamps(self, positions: Iterable[int]) -> Iterator[str]:
        return map(_stamp, self._paths(positions))

    def _paths(self, positions: Iterable[int]) -> Iterator[Path]:
        for position in positions:
            yield self.photos[position]
            if self.masks is not None:
                yield self.masks[position]


def _stamp(path: Path) -> str:
    try:
        status = path.stat()
    except OSError:
        return "missing"
    return f"{status.st_size} {status.st_mtime_ns}"


def _decode_mask(file: Path | io.BytesIO, name: str) -> np.ndarray:
    return decode_image(file, "mask", name, foreground)


def foreground(image: Image.Image) -> np.ndarray:
    """Bool (h, w) of a mask of any mode: more than half of the full range, of the brightest channel where there are several.

    The full range is 0…1 where no value is larger, else 0…255, else 0…65535.
    """
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
    if image.mode not in ("1", "L", "F") and not image.mode.startswith("I"):
        image = image.convert("RGB")  # the colours of a palette, not their numbers
    values = np.nan_to_num(np.asarray(image).astype(np.float64))
    if values.ndim == 3:
        values = values.max(-1)
    full = next(limit for limit in (1.0, 255.0, np.inf) if values.max() <= limit)
    return values > (full if np.isfinite(full) else 65535.0) / 2


# -- folders of images -------------------------------------------------------------------------------------------------


def _open_folder(path: Path, split: str | None) -> _Content:
    if (path / "dataset_dict.json").is_file() or ((path / "state.json").is_file() and (path / "dataset_info.json").is_file()):
        return _open_saved(path, split)
    files = sorted(_visible_files(path), key=lambda file: file.split("/"))
    images = [file for file in files if _suffix(file) in IMAGE_SUFFIXES]
    tables = [file for file in files if _suffix(file) == ".parquet"]
    if images and tables:
        raise InputError(
            f"data: expected images or parquet files in {str(path)!r}, received both ({images[0]}, {tables[0]}); "
            "name the table, or a folder that holds one kind"
        )
    if tables:
        return _open_hub(path, tables, split)
    if not images:
        raise InputError(
            f"data: expected images ({', '.join(IMAGE_SUFFIXES)}) in {str(path)!r}, "
            f"received {_some(files) if files else 'an empty folder'}"
        )
    _refuse_split(split, path)
    return _open_images(path, images)


def _open_images(path: Path, images: list[str]) -> _Content:
    loose = [file for file in images if "/" not in file]
    reader = _Files(tuple(path / file for file in images), None, listed=True)
    if len(loose) == len(images):
        return _Content("folder", tuple(images), None, None, reader)
    if loose:
        inside = next(file for file in images if "/" in file)
        raise InputError(
            f"data: expected images in class folders only, or beside each other only, in {str(path)!r}; "
            f"received {loose[0]} and {inside}"
        )
    labels = [file.partition("/")[0] for file in images]
    if set(labels) <= _SPLIT_NAMES and all(file.count("/") > 1 for file in images):  # "train" is a vehicle, too
        raise InputError(
            f"data: expected class folders in {str(path)!r}, received splits ({_some(sorted(set(labels)))}); name one of them, "
            f"as {str(path / labels[0])!r}"
        )
    # A class folder with nothing in it still counts where folders are numbered in their order.
    names = sorted(entry.name for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith("."))
    return _Content("imagefolder", tuple(images), labels, names, reader)


def _visible_files(path: Path) -> Iterator[str]:
    """Relative paths, with ``/`` on every system, of files that are not hidden and in no hidden folder."""

    def refuse(error: OSError) -> None:
        raise InputError(f"data: cannot read {str(error.filename)!r}: {_brief(error)}") from error

    for root, folders, files in os.walk(path, followlinks=True, onerror=refuse):
        folders[:] = [folder for folder in folders if not folder.startswith(".")]
        relative = Path(root).relative_to(path)
        yield from ((relative / file).as_posix() for file in files if not file.startswith("."))


def _suffix(file: str) -> str:
    return os.path.splitext(file)[1].lower()


# -- tables ------------------------------------------------------------------------------------------------------------


def _open_csv(path: Path, split: str | None) -> _Content:
    _refuse_split(split, path)
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            header, *rows = [row for row in csv.reader(file, strict=True) if row] or [[]]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"data: cannot read {str(path)!r} as a table in UTF-8: {_brief(error)}") from error
    header = [column.strip() for column in header]
    _check_columns(header, path)
    for number, row in enumerate(rows, 1):
        if len(row) != len(header):
            raise InputError(f"data: expected {len(header)} values in row {number} of {path.name!r}, received {len(row)}")
    return _of_table("csv", path, {column: [row[place] for row in rows] for place, column in enumerate(header)})


def _open_parquet(path: Path, split: str | None) -> _Content:
    _refuse_split(split, path)
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise _not_installed(f"the table {path.name!r}", "pyarrow", "evaluate") from error
    try:
        with ParquetFile(path) as file:
            # pandas writes the numbers of its rows into a column of its own
            columns = [column for column in file.schema_arrow.names if not column.startswith("__index_level_")]
            _check_columns(columns, path)
            table = file.read(columns=columns).to_pydict()
    except InputError:
        raise
    except Exception as error:  # a damaged file can raise anything inside a parser
        raise InputError(f"data: cannot read {str(path)!r}: {_brief(error)}") from error
    return _of_table("parquet", path, table)


def _check_columns(columns: Sequence[str], path: Path) -> None:
    if "path" in columns and set(columns) <= set(TABLE_COLUMNS) and len(set(columns)) == len(columns):
        return
    hint = "; name the folder of a Hugging Face dataset, not a file in it" if _IMAGE_COLUMN in columns else ""
    raise InputError(
        f"data: expected the columns path and, if wanted, {', '.join(TABLE_COLUMNS[1:])} in {path.name!r}, "
        f"received {', '.join(columns) or 'none'}{hint}"
    )


def _of_table(kind: str, path: Path, table: Mapping[str, Sequence[Any]]) -> _Content:
    whole = {column: _whole_column(values, column, path.name) for column, values in table.items()}
    photos = _paths_in(whole["path"] or (), "path", path)
    masks = whole.get("mask")
    ids, labels = whole.get("id"), _as_labels(whole.get("label"), path.name)
    return _Content(
        kind=kind,
        ids=_made_unique(_relative(photo, path.parent) for photo in photos) if ids is None else _given_ids(ids, path.name),
        labels=labels,
        names=None,
        reader=_Files(photos, None if masks is None else _paths_in(masks, "mask", path)),
    )


def _paths_in(values: Sequence[Any], column: str, table: Path) -> tuple[Path, ...]:
    for value in values:
        if not isinstance(value, str):
            raise InputError(f"data: expected text in the column {column} of {table.name!r}, received {value!r}")
    return tuple(table.parent / value for value in values)


def _relative(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path, folder)).as_posix()


def _not_installed(what: str, package: str, extra: str) -> InputError:
    return InputError(f"data: {what} needs {package}, which is not installed: pip install 'vitexplain[{extra}]'")


# -- Hugging Face ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Rows:
    """Rows of a dataset in Arrow files that are mapped into memory.

    ``files`` are those that the user has: not the copies in a cache, whose times say nothing.
    """

    rows: datasets.Dataset
    photo: str
    mask: str | None
    files: tuple[Path, ...]

    @property
    def has_masks(self) -> bool:
        return self.mask is not None

    def read(self, position: int, name: str, masks: bool) -> tuple[Image.Image, np.ndarray | None]:
        row = self.rows[position]
        photo = decode_photo(_encoded(row[self.photo], "photo", name), name)
        return photo, _decode_mask(_encoded(row[self.mask], "mask", name), name) if self.mask and masks else None

    def missing(self, positions: Iterable[int]) -> list[str]:  # noqa: ARG002
        return []

    def stamps(self, positions: Iterable[int]) -> Iterator[str]:  # noqa: ARG002
        return (f"{path.name} {_stamp(path)}" for path in self.files)


def _encoded(cell: Any, what: str, name: str) -> io.BytesIO | Path:
    """What a cell holds: the bytes of a file, or the path of one."""
    content = cell if isinstance(cell, Mapping) else {"bytes": cell}
    if content.get("bytes") is not None:
        return io.BytesIO(content["bytes"])
    if content.get("path"):
        return Path(content["path"])
    raise InputError(f"{what}: expected an image, received none for {name}")


def _open_saved(path: Path, split: str | None) -> _Content:
    """What ``save_to_disk`` of a dataset, or of several by name, wrote."""
    with _loading(path) as library:
        found = library.load_from_disk(str(path))
    if isinstance(found, Mapping):
        split = _choose(split, list(found), path)
        return _of_rows(found[split], path, split, None)
    own = None if found.split is None else str(found.split)
    if own is None:
        _refuse_split(split, path)
    return _of_rows(found, path, None if own is None else _choose(split, [own], path), None)


def _open_hub(path: Path, tables: list[str], split: str | None) -> _Content:
    """A folder of parquet files as on the hub: their names, or those of their folders, say which split they belong to."""
    splits: dict[str, list[str]] = {}
    for table in tables:
        splits.setdefault(_split_of(table, path), []).append(table)
    split = _choose(split, list(splits), path)
    folders = sorted({os.path.dirname(table) for table in splits[split]})
    if len(folders) > 1:
        raise InputError(
            f"data: expected one dataset in {str(path)!r}, received several configurations ({_some(folders)}); "
            "name the folder of one"
        )
    files = tuple(path / table for table in splits[split])
    with _loading(path) as library:
        # By explicit files, so that neither a script nor a README that names other places is looked at.
        names = [escape(os.path.abspath(file)) for file in files]
        rows = library.load_dataset("parquet", data_files={"train": names}, split="train")
    return _of_rows(rows, path, split, files)


def _split_of(table: str, path: Path) -> str:
    """``data/train-00000-of-00001.parquet``, ``train.parquet`` and ``train/0000.parquet`` all belong to ``train``."""
    stem = _SHARD.sub("", os.path.basename(table).rpartition(".")[0])
    return stem if not _is_integer(stem) else os.path.basename(os.path.dirname(os.path.abspath(path / table)))


@contextmanager
def _loading(path: Path) -> Iterator[Any]:
    """The ``datasets`` package, without its bars and log, and with errors of one line."""
    try:
        import datasets
    except ImportError as error:
        raise _not_installed(f"the Hugging Face dataset {path.name!r}", "datasets", "huggingface") from error
    had_bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with _quiet("datasets"):
            yield datasets
    except Exception as error:  # of the package, of Arrow, and of the file system, with no common base
        raise InputError(
            f"data: cannot read {str(path)!r} as a Hugging Face dataset: {_brief(error.__cause__ or error)}"
        ) from error
    finally:
        if had_bars:
            datasets.enable_progress_bars()


def _of_rows(rows: datasets.Dataset, path: Path, split: str | None, files: tuple[Path, ...] | None) -> _Content:
    photo, mask = _image_columns(rows.features, path)
    label = _label_column(rows.features)
    with _loading(path) as library:
        rows = rows.with_format(None)
        values = None if label is None else list(rows.select_columns([label])[:][label])
        images = rows.select_columns([column for column in (photo, mask) if column is not None])
        for column in images.column_names:
            if isinstance(images.features[column], library.Image):
                images = images.cast_column(column, library.Image(decode=False))
    if files is None:
        files = tuple(Path(entry["filename"]) for entry in rows.cache_files)
    if values is not None and set(values) == {-1}:  # how test splits say that they have none
        values = None
    labels = None if values is None else _as_labels(_whole_column(values, "label", path.name), path.name)
    names = None if label is None else getattr(rows.features[label], "names", None)
    return _Content("huggingface", _numbers(len(rows)), labels, names, _Rows(images, photo, mask, files), split)


def _image_columns(features: Mapping[str, Any], path: Path) -> tuple[str, str | None]:
    """The columns of photos and of masks."""
    candidates = [column for column, feature in features.items() if _holds_images(feature)]
    photos = [column for column in candidates if column not in _MASK_COLUMNS]
    mask = next((column for column in _MASK_COLUMNS if column in candidates), None)
    if len(photos) == 1:
        return photos[0], mask
    if _IMAGE_COLUMN in photos:
        return _IMAGE_COLUMN, mask
    received = ", ".join(f"{column} ({_kind(feature)})" for column, feature in features.items())
    raise InputError(f"data: expected one column of images in {path.name!r}, or one named image; received {received or 'none'}")


def _holds_images(feature: Any) -> bool:
    """Images, or what they are in plain parquet: their bytes, alone or with a path."""
    if isinstance(feature, Mapping):
        return "bytes" in feature
    return _kind(feature) in ("PIL.Image.Image", "binary", "large_binary")


def _label_column(features: Mapping[str, Any]) -> str | None:
    """A column that is named as labels are, else the only one of classes."""
    named = [column for column in _LABEL_COLUMNS if column in features and _is_label(features[column])]
    classes = [column for column, feature in features.items() if hasattr(feature, "int2str")]
    return named[0] if named else classes[0] if len(classes) == 1 else None


def _is_label(feature: Any) -> bool:
    return hasattr(feature, "int2str") or re.fullmatch(r"u?int\d+|(large_)?string", _kind(feature)) is not None


def _kind(feature: Any) -> str:
    return str(getattr(feature, "dtype", None) or type(feature).__name__)


# -- .npz --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Encoded:
    """Encoded images one behind the other: ``data`` (bytes,) uint8, ``offsets`` (n + 1,)."""

    data: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def stream(self, position: int) -> io.BytesIO:
        return io.BytesIO(self.data[self.offsets[position] : self.offsets[position + 1]].tobytes())


@dataclass(frozen=True, eq=False)
class _Archive:
    """An .npz file in memory: each access to its arrays would decompress them again."""

    path: Path
    photos: _Encoded | np.ndarray
    masks: _Encoded | None

    @property
    def has_masks(self) -> bool:
        return self.masks is not None

    def read(self, position: int, name: str, masks: bool) -> tuple[Image.Image, np.ndarray | None]:
        if isinstance(self.photos, _Encoded):
            photo = decode_photo(self.photos.stream(position), name)
        else:
            photo = Image.fromarray(self.photos[position])
        return photo, _decode_mask(self.masks.stream(position), name) if self.masks is not None and masks else None

    def missing(self, positions: Iterable[int]) -> list[str]:  # noqa: ARG002
        return []

    def stamps(self, positions: Iterable[int]) -> Iterator[str]:  # noqa: ARG002
        yield self._digest

    @cached_property
    def _digest(self) -> str:
        with open(self.path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def _open_npz(path: Path, split: str | None) -> _Content:
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
        raise InputError(f"data: cannot read {str(path)!r}: {_brief(error)}") from error
    photos = _npz_photos(arrays, path)
    masks = _npz_encoded(arrays, "mask_png", "mask_offsets", path) if "mask_png" in arrays else None
    count = len(photos)
    if masks is not None and len(masks) != count:
        raise InputError(f"data: expected {count} masks in {path.name!r}, one an image, received {len(masks)}")
    return _Content(
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
        _refuse_split(split, path)
        return ""
    splits = list(dict.fromkeys(key.rpartition("_")[0] for key in keys if re.fullmatch(r".+_(jpeg|images)", key)))
    if not splits:
        raise InputError(
            f"data: expected jpeg and offsets, SPLIT_jpeg and SPLIT_offsets, or images in {path.name!r}, "
            f"received {_some(keys, 8) or 'nothing'}"
        )
    return f"{_choose(split, splits, path)}_"


def _npz_photos(arrays: Mapping[str, np.ndarray], path: Path) -> _Encoded | np.ndarray:
    if "jpeg" in arrays:
        return _npz_encoded(arrays, "jpeg", "offsets", path)
    images = arrays["images"]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise InputError(
            f"data: expected images (n, h, w, 3) uint8 in {path.name!r}, received {tuple(images.shape)} {images.dtype}"
        )
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
        return _given_ids(_one_each(arrays["ids"], "ids", "iuU", count, path), path.name)
    names = arrays.get("names")
    if names is not None and names.dtype.kind == "U" and names.shape == (count,):
        return _made_unique(names.tolist())
    return _numbers(count)


def _npz_labels(arrays: Mapping[str, np.ndarray], count: int, path: Path) -> Sequence[int] | Sequence[str] | None:
    if "labels" not in arrays:
        return None
    values = _one_each(arrays["labels"], "labels", "iuU", count, path)
    return _as_labels(_whole_column(values, "label", path.name), path.name)


def _one_each(array: np.ndarray, key: str, kinds: str, count: int, path: Path) -> list[Any]:
    if array.dtype.kind not in kinds or array.shape != (count,):
        raise InputError(
            f"data: expected {key} ({count},) of integers or text in {path.name!r}, received {tuple(array.shape)} {array.dtype}"
        )
    return array.tolist()
