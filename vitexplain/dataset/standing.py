"""What stands of a data set's store: its settings and the parts of its index, and what is wrong with a file that is not whole."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from .layout import ATTRIBUTE, LOCK, Layout, import_parquet, part_path

_PART = re.compile(r"part-([0-9]{6,})\.parquet")


class NotWhole(InputError):
    """A file of a store is absent, or not what was written."""


def parts(index: Path) -> dict[int, Path]:
    """The parts that stand, by number, in order."""
    if not index.is_dir():
        return {}
    found = ((_PART.fullmatch(path.name), path) for path in index.iterdir())
    numbered = ((int(match[1]), path) for match, path in found if match)
    return dict(sorted((number, path) for number, path in numbered if path.name == part_path(index, number).name))


def read_settings(output: Path) -> dict[str, Any] | None:
    """The settings of the store that stands there, None where there is nothing.

    Raises:
        InputError: it is damaged, or not a store of this library.
    """
    output = Path(output)
    root = output / "zarr.json"
    try:
        received = None if root.is_file() else _what_stands(output) or ""
    except OSError as error:
        raise cannot_read(output, error) from error
    if received is not None:
        if not received:
            return None
        raise InputError(f"store: expected maps of a data set in {str(output)!r}, received {received}")
    document = read_json(root)
    attributes = document.get("attributes")
    settings = attributes.get(ATTRIBUTE) if isinstance(attributes, dict) else None
    if not isinstance(settings, dict):
        kind = document.get("node_type", "file")
        raise InputError(f"store: expected maps of a data set in {str(output)!r}, received a Zarr {kind} of something else")
    return settings


def settings_stamp(settings: Mapping[str, Any]) -> str:
    """A SHA-256 by which two settings (JSON) are known to be the same."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A ``zarr.json``.

    Raises:
        InputError: it is not there, or damaged.
    """
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise cannot_read(path, error) from error
    except ValueError as error:
        raise InputError(f"store: {str(path)!r} is damaged: expected JSON; use another folder, or delete the store") from error
    if not isinstance(document, dict):
        raise InputError(f"store: {str(path)!r} is damaged: expected a JSON object; use another folder, or delete the store")
    return document


@dataclass(frozen=True)
class PartSummary:
    """What a part of the index says of itself.

    Attributes:
        rows: how many it has, the first of them and the last, by their index in the source.
        settings: stamp of those that its maps were made with.
        files: of its shard: size and SHA-256 by path in the store.
    """

    rows: tuple[int, int | None, int | None]
    settings: str
    files: Mapping[str, tuple[int, str]]

    def problem(self, number: int, layout: Layout, stamp: str) -> str | None:
        """Why this is not the part of a shard in a store with settings of that stamp, in words; None where it is."""
        rows = layout.rows(number)
        if not rows:
            return f"belongs to no shard, as there are {layout.num_shards}"
        if self.settings != stamp:
            return "is of a run with other settings"
        if self.rows != (len(rows), rows[0], rows[-1]):
            return f"holds other rows than {rows[0]} to {rows[-1]}"
        if set(self.files) != {layout.file(name, number) for name in layout.arrays}:
            return "names other files than those of its shard"
        return None


def read_part_summary(part: Path) -> PartSummary:
    """What a part of the index says of itself, without its rows.

    Raises:
        NotWhole: it is absent, damaged, or not a part of this library.
        InputError: the system cannot read it.
    """
    parquet = import_parquet()
    with reading_part(part):
        footer = parquet.read_metadata(part)
        about = json.loads(footer.metadata[ATTRIBUTE.encode()])
        column = footer.schema.names.index("row")
        spans = [footer.row_group(group).column(column).statistics for group in range(footer.num_row_groups)]
        first, last = min((span.min for span in spans), default=None), max((span.max for span in spans), default=None)
        return PartSummary(
            rows=(footer.num_rows, first, last),
            settings=str(about["settings"]),
            files={path: (int(size), str(digest)) for path, (size, digest) in about["files"].items()},
        )


@contextmanager
def reading_part(part: Path) -> Iterator[None]:
    """What goes wrong while a part of the index is read, as an error that names it.

    Raises:
        NotWhole: it is absent or damaged.
        InputError: the system cannot read it.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise NotWhole(f"store: {str(part)!r} is absent") from error
    except Exception as error:  # a damaged file can raise anything inside a parser
        if is_of_the_system(error):
            raise cannot_read(part, error) from error
        raise refused_part(part, "is damaged") from error


def refused_part(part: Path, problem: str) -> NotWhole:
    """An error that names a part of the index and says what to do."""
    return NotWhole(
        f"store: {str(part)!r} {problem}: delete it and run the same command again, what is missing is then explained anew"
    )


def is_of_the_system(error: BaseException) -> bool:
    """Whether a file could not be read, which says nothing of what is in it. Parsers' own errors have no number."""
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None)


def cannot_read(path: Path, error: BaseException) -> InputError:
    """An error that names a file and what the system says."""
    reason = "out of memory" if isinstance(error, MemoryError) else getattr(error, "strerror", None) or error
    return InputError(f"store: cannot read {str(path)!r}: {reason}")


def file_size(path: Path) -> int | None:
    """Bytes of a file; None where there is none.

    Raises:
        InputError: the system does not tell.
    """
    try:
        return path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise cannot_read(path, error) from error


def check_index(index: Path) -> None:
    """Refuse a folder that is not an index of this library.

    Raises:
        InputError: something else stands there.
    """
    if not index.exists():
        return
    if not index.is_dir():
        raise InputError(f"output: expected no file at {str(index)!r}, where the index is to be; use another output")
    ours = (index / LOCK).exists() or not any(index.iterdir()) or any(map(_is_part, parts(index).values()))
    if not ours:
        raise InputError(f"output: {str(index)!r}, where the index is to be, holds other things; use another output")


def _is_part(path: Path) -> bool:
    try:
        read_part_summary(path)
    except NotWhole:
        return False
    return True


def _what_stands(output: Path) -> str | None:
    """In words; None where there is nothing, or an empty folder."""
    if not output.exists():
        return None
    if not output.is_dir():
        return "a file"
    names = sorted(path.name for path in output.iterdir())
    if {".zgroup", ".zarray"} & set(names):
        return "a Zarr store of version 2"
    return f"a folder that holds {names[0]!r}" if names else None
