"""Folders: of images, of class folders, and which other kind of data a folder is."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import InputError
from ..messages import some
from .base import Content
from .files import IMAGE_SUFFIXES, Files, suffix, visible_files
from .huggingface import open_hub, open_saved
from .ids import made_unique
from .splits import SPLIT_NAMES, refuse_split
from .webdataset import open_shards, refuse_compressed


def open_folder(path: Path, split: str | None) -> Content:
    """Whatever a folder holds.

    Raises:
        InputError: it holds no images, or several kinds of data, or has no such split.
    """
    if (path / "dataset_dict.json").is_file() or ((path / "state.json").is_file() and (path / "dataset_info.json").is_file()):
        return open_saved(path, split)
    files = sorted(visible_files(path), key=lambda file: file.replace("/", "\0"))  # folder by folder
    images = [file for file in files if suffix(file) in IMAGE_SUFFIXES]
    tables = [file for file in files if suffix(file) == ".parquet"]
    shards = [file for file in files if suffix(file) == ".tar"]
    if {_stem(table) for table in tables} <= {_stem(shard) for shard in shards}:  # what img2dataset says of each shard
        tables = []
    kinds = [found[0] for found in (images, tables, shards) if found]
    if len(kinds) > 1:
        raise InputError(
            f"data: expected images, parquet files or .tar shards in {str(path)!r}, received both ({kinds[0]}, {kinds[1]}); "
            "name the file, or a folder that holds one kind"
        )
    if tables:
        return open_hub(path, tables, split)
    if not images:
        for file in files:
            refuse_compressed(file)
    if shards:
        refuse_split(split, path)
        return open_shards([path / file for file in shards], path.name)
    if not images:
        raise InputError(
            f"data: expected images ({', '.join(IMAGE_SUFFIXES)}) in {str(path)!r}, "
            f"received {some(files) if files else 'an empty folder'}"
        )
    refuse_split(split, path)
    return _open_images(path, images)


def _open_images(path: Path, images: list[str]) -> Content:
    loose = [file for file in images if "/" not in file]
    reader = Files(str(path), tuple(images), None, listed=True)
    ids = made_unique(images)
    if len(loose) == len(images):
        return Content("folder", ids, None, None, reader)
    if loose:
        inside = next(file for file in images if "/" in file)
        raise InputError(
            f"data: expected images in class folders only, or beside each other only, in {str(path)!r}; "
            f"received {loose[0]} and {inside}"
        )
    labels = [file.partition("/")[0] for file in images]
    if set(labels) <= SPLIT_NAMES and all(file.count("/") > 1 for file in images):  # "train" is a vehicle, too
        raise InputError(
            f"data: expected class folders in {str(path)!r}, received splits ({some(sorted(set(labels)))}); name one of them, "
            f"as {str(path / labels[0])!r}"
        )
    # A class folder with nothing in it still counts where folders are numbered in their order.
    names = sorted(entry.name for entry in os.scandir(path) if _is_class(entry, path))
    return Content("imagefolder", ids, labels, names, reader)


def _is_class(entry: os.DirEntry[str], path: Path) -> bool:
    """Whether an entry of a folder is a folder of a class: not hidden, and no link back to where it lies."""
    return entry.is_dir() and not entry.name.startswith(".") and not os.path.samefile(entry, path)


def _stem(file: str) -> str:
    return os.path.splitext(file)[0]
