"""Which kind of data a path is."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

from ..errors import InputError
from ..files import check_file
from ..loading import LoadedModel
from ..messages import some
from .base import Content, Source, parse_slice
from .files import plain_path
from .folders import open_folder
from .ids import printable
from .labels import class_indices
from .npz import open_npz
from .tables import open_csv, open_parquet
from .webdataset import is_pattern, open_pattern, open_tar, refuse_compressed

EXPECTED = (
    "a folder of images, a .csv, .parquet or .npz file, WebDataset's .tar shards (one, a folder of them, or a pattern such as "
    "shard-{000..009}.tar or 'shard-*.tar'), or the folder of a Hugging Face dataset"
)


def open_source(
    path: str | Path, *, split: str | None = None, images: str | None = None, classes: LoadedModel | None = None
) -> Source:
    """The images in a file or folder; none is decoded yet.

    Args:
        path: one of

            - a folder of class folders, or a folder of images without labels;
            - a .csv or .parquet table with the columns ``path`` (absolute, or from the table's own folder) and, if wanted,
              ``label``, ``mask`` (a path, too) and ``id``;
            - the folder of a Hugging Face dataset: as ``save_to_disk`` writes it, or with parquet files as on the hub;
            - an .npz file with ``jpeg`` and ``offsets``, or ``images`` (n, h, w, 3) uint8, and if wanted ``labels``, ``mask_png``
              and ``mask_offsets``, ``ids``, ``class_names``; of several splits, all but the last with the split and ``_`` before;
            - WebDataset's shards: a .tar file, a folder of them, or a pattern such as ``data/shard-{000000..000009}.tar`` or
              ``data/*.tar``. A sample is the files with one key, the path up to the first dot of its last part: an image, and if
              wanted its label in ``cls``, or in ``json`` as ``label`` or ``cls``, and a mask in ``mask.png``, ``mask`` or
              ``seg.png``.
        split: which part of the data, where they have several.
        images: which images, as a slice: ``"0:64"``, ``"::2"``.
        classes: the model whose class indices labels become: names and WordNet ids are looked up among its classes. Without one,
            names count in their given order, or sorted.

    Ids are relative paths, keys, row numbers, or what the data give; given ones must be unique, others are made so by `` #2``,
    `` #3``. A file that is there but cannot be read as an image is an error of its own ``sample``, not of the opening.

    Raises:
        InputError: the data cannot be read, do not have what was asked for, or have labels that the model does not have.
    """
    chosen = None if images is None else parse_slice(images)
    _refuse_address(str(path))
    path = Path(path).absolute()  # another process may have another current directory
    content = _open(path, split)
    location = printable(plain_path(path))
    name = Path(location).name
    if not content.ids:
        raise InputError(f"data: expected images in {str(path)!r}, received none")
    source = Source(
        name, content.kind, location, content.split, None, content.ids, class_indices(content, classes, name),
        content.reader, range(len(content.ids)),
    )  # fmt: skip
    if images is not None and chosen is not None:
        source = replace(source.select(chosen), images="".join(images.split()))
    missing = source.missing()
    if missing:
        raise InputError(f"data: files named in {name!r} do not exist: {some(map(repr, missing))}")
    return source


def as_source(source: Source | str | Path, model: LoadedModel) -> Source:
    """A source, or what is at a path, opened with the model's classes.

    Raises:
        InputError: the source is neither, the model is no ``LoadedModel``, or as ``open_source``.
    """
    if not isinstance(model, LoadedModel):
        raise InputError(
            f"model: expected a LoadedModel, as load_model or LoadedModel.of gives it, received {type(model).__name__}"
        )
    if isinstance(source, Source):
        return source
    if not isinstance(source, str | Path):
        raise InputError(f"source: expected a Source or a path, received {type(source).__name__}")
    return open_source(source, classes=model)


def _refuse_address(text: str) -> None:
    """Raise ``InputError`` for an address such as ``s3://bucket/x``, also as ``Path`` writes it, ``s3:/bucket/x``."""
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/+", text)
    if scheme is not None and not os.path.lexists(text):
        address = f"{scheme[1]}://{text[scheme.end() :]}"
        raise InputError(f"data: expected a path of a file system, received the address {address!r}; copy or mount it first")


def _open(path: Path, split: str | None) -> Content:
    if os.path.isdir(path):
        return open_folder(path, split)
    readers = {".csv": open_csv, ".parquet": open_parquet, ".npz": open_npz, ".tar": open_tar}
    if not os.path.exists(path):
        if is_pattern(path):
            return open_pattern(path, split)
        raise InputError(f"data: there is no file or folder {str(path)!r}")
    refuse_compressed(path.name)
    if path.suffix.lower() not in readers:
        raise InputError(f"data: expected {EXPECTED}, received {path.name!r}")
    check_file(path, "data")
    return readers[path.suffix.lower()](path, split)
