"""Tables of paths: CSV and Parquet."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..messages import brief
from .base import Content, not_installed
from .columns import as_labels, whole_column
from .files import Files
from .huggingface import IMAGE_COLUMN
from .ids import given_ids, made_unique
from .splits import refuse_split

TABLE_COLUMNS = ("path", "label", "mask", "id")


def open_csv(path: Path, split: str | None) -> Content:
    """The images that a CSV table names."""
    refuse_split(split, path)
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            header, *rows = [row for row in csv.reader(file, strict=True) if row] or [[]]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"data: cannot read {str(path)!r} as a table in UTF-8: {brief(error)}") from error
    header = [column.strip() for column in header]
    _check_columns(header, path)
    for number, row in enumerate(rows, 1):
        if len(row) != len(header):
            raise InputError(f"data: expected {len(header)} values in row {number} of {path.name!r}, received {len(row)}")
    return _of_table("csv", path, {column: [row[place] for row in rows] for place, column in enumerate(header)})


def open_parquet(path: Path, split: str | None) -> Content:
    """The images that a Parquet table names."""
    refuse_split(split, path)
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise not_installed(f"the table {path.name!r}", "pyarrow", "evaluate") from error
    try:
        with ParquetFile(path) as file:
            # pandas writes the numbers of its rows into a column of its own
            columns = [column for column in file.schema_arrow.names if not column.startswith("__index_level_")]
            _check_columns(columns, path)
            table = file.read(columns=columns).to_pydict()
    except InputError:
        raise
    except Exception as error:  # a damaged file can raise anything inside a parser
        raise InputError(f"data: cannot read {str(path)!r}: {brief(error)}") from error
    return _of_table("parquet", path, table)


def _check_columns(columns: Sequence[str], path: Path) -> None:
    if "path" in columns and set(columns) <= set(TABLE_COLUMNS) and len(set(columns)) == len(columns):
        return
    hint = "; name the folder of a Hugging Face dataset, not a file in it" if IMAGE_COLUMN in columns else ""
    raise InputError(
        f"data: expected the columns path and, if wanted, {', '.join(TABLE_COLUMNS[1:])} in {path.name!r}, "
        f"received {', '.join(columns) or 'none'}{hint}"
    )


def _of_table(kind: str, path: Path, table: Mapping[str, Sequence[Any]]) -> Content:
    whole = {column: whole_column(values, column, path.name) for column, values in table.items()}
    photos = _texts(whole["path"] or (), "path", path)
    masks = whole.get("mask")
    ids, labels = whole.get("id"), as_labels(whole.get("label"), path.name)
    return Content(
        kind=kind,
        ids=made_unique(_relative(photo, str(path.parent)) for photo in photos) if ids is None else given_ids(ids, path.name),
        labels=labels,
        names=None,
        reader=Files(str(path.parent), photos, None if masks is None else _texts(masks, "mask", path)),
    )


def _texts(values: Sequence[Any], column: str, table: Path) -> tuple[str, ...]:
    for value in values:
        if not isinstance(value, str):
            raise InputError(f"data: expected text in the column {column} of {table.name!r}, received {value!r}")
    return tuple(values)


def _relative(photo: str, folder: str) -> str:
    """A path as an id: from the table's folder, with ``/`` on every system."""
    try:
        relative = os.path.relpath(os.path.join(folder, photo), folder).replace(os.sep, "/")
    except ValueError:  # on another drive of Windows
        return photo.replace(os.sep, "/")
    return photo if relative == photo else relative  # one object instead of two that are equal
