"""Datasets of the Hugging Face package ``datasets``, as it saves them and as parquet files on the hub."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError
from ..messages import brief, quiet, some
from ..photos import Photo, decode_photo
from .base import Content, not_installed
from .columns import as_labels, whole_column
from .files import plain_path, stamp
from .ids import numbered
from .labels import is_integer
from .masks import decode_mask
from .splits import choose_split, refuse_split

if TYPE_CHECKING:
    import datasets

IMAGE_COLUMN = "image"

_MASK_COLUMNS = ("mask", "annotation")
_LABEL_COLUMNS = ("label", "labels", "fine_label")
_SHARD = re.compile(r"-\d+-of-\d+(-\w+)?$")


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

    def read(self, position: int, name: str, masks: bool) -> tuple[Photo, np.ndarray | None]:
        try:
            row = self.rows[position]
        except MemoryError:  # the machine's trouble, not the file's
            raise
        except Exception as error:  # of Arrow, for files that are damaged or gone
            raise InputError(f"photo: cannot read {name}: {brief(error)}") from error
        photo = decode_photo(_encoded(row[self.photo], "photo", name), name)
        return photo, decode_mask(_encoded(row[self.mask], "mask", name), name) if self.mask and masks else None

    def path_of(self, position: int) -> None:  # noqa: ARG002
        return None

    def missing(self, positions: Iterable[int]) -> list[str]:  # noqa: ARG002
        return []

    def stamps(self, positions: Iterable[int]) -> Iterator[str]:  # noqa: ARG002
        return (f"{path.name} {stamp(path)}" for path in self.files)

    def part(self, positions: Sequence[int]) -> None:  # noqa: ARG002
        return None


def _encoded(cell: Any, what: str, name: str) -> io.BytesIO | Path:
    """What a cell holds: the bytes of a file, or the path of one."""
    content = cell if isinstance(cell, Mapping) else {"bytes": cell}
    if content.get("bytes") is not None:
        return io.BytesIO(content["bytes"])
    if content.get("path"):
        return Path(content["path"])
    raise InputError(f"{what}: expected an image, received none for {name}")


def open_saved(path: Path, split: str | None) -> Content:
    """What ``save_to_disk`` of a dataset, or of several by name, wrote."""
    with _loading(path) as library:
        found = library.load_from_disk(str(path))
    if isinstance(found, Mapping):
        split = choose_split(split, list(found), path)
        return _of_rows(found[split], path, split, None)
    own = None if found.split is None else str(found.split)
    if own is None:
        refuse_split(split, path)
    return _of_rows(found, path, None if own is None else choose_split(split, [own], path), None)


def open_hub(path: Path, tables: list[str], split: str | None) -> Content:
    """A folder of parquet files as on the hub: their names, or those of their folders, say which split they belong to."""
    splits: dict[str, list[str]] = {}
    for table in tables:
        splits.setdefault(_split_of(table, path), []).append(table)
    split = choose_split(split, list(splits), path)
    folders = sorted({os.path.dirname(table) for table in splits[split]})
    if len(folders) > 1:
        raise InputError(
            f"data: expected one dataset in {str(path)!r}, received several configurations ({some(folders)}); "
            "name the folder of one"
        )
    files = tuple(path / table for table in splits[split])
    with _loading(path) as library:
        # By explicit files, so that neither a script nor a README that names other places is looked at.
        names = [escape(plain_path(file)) for file in files]
        rows = library.load_dataset("parquet", data_files={"train": names}, split="train")
    return _of_rows(rows, path, split, files)


def _split_of(table: str, path: Path) -> str:
    """``data/train-00000-of-00001.parquet``, ``train.parquet`` and ``train/0000.parquet`` all belong to ``train``."""
    stem = _SHARD.sub("", os.path.basename(table).rpartition(".")[0])
    return stem if not is_integer(stem) else os.path.basename(os.path.dirname(plain_path(path / table)))


@contextmanager
def _loading(path: Path) -> Iterator[Any]:
    """The ``datasets`` package, without its bars and log, and with errors of one line."""
    try:
        import datasets
    except ImportError as error:
        raise not_installed(f"the Hugging Face dataset {path.name!r}", "datasets", "huggingface") from error
    had_bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with quiet("datasets"):
            yield datasets
    except Exception as error:  # of the package, of Arrow, and of the file system, with no common base
        raise InputError(
            f"data: cannot read {str(path)!r} as a Hugging Face dataset: {brief(error.__cause__ or error)}"
        ) from error
    finally:
        if had_bars:
            datasets.enable_progress_bars()


def _of_rows(rows: datasets.Dataset, path: Path, split: str | None, files: tuple[Path, ...] | None) -> Content:
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
    labels = None if values is None else as_labels(whole_column(values, "label", path.name), path.name)
    names = None if label is None else getattr(rows.features[label], "names", None)
    return Content("huggingface", numbered(len(rows)), labels, names, _Rows(images, photo, mask, files), split)


def _image_columns(features: Mapping[str, Any], path: Path) -> tuple[str, str | None]:
    """The columns of photos and of masks."""
    candidates = [column for column, feature in features.items() if _holds_images(feature)]
    photos = [column for column in candidates if column not in _MASK_COLUMNS]
    mask = next((column for column in _MASK_COLUMNS if column in candidates), None)
    if len(photos) == 1:
        return photos[0], mask
    if IMAGE_COLUMN in photos:
        return IMAGE_COLUMN, mask
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
