"""A data set's maps on disk: Zarr arrays and a Parquet index, written shard by shard, each file whole or not at all.

A shard is done when its part of the index stands, which is written last and names the shard's files. Every file is renamed into
place, and a store as a whole too, so that a run can be killed anywhere and the next one goes on.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from ..files import folder_size, partial_path, remove_partials, sync_folder, write_whole, writing
from ..messages import differences, in_bytes, some

ATTRIBUTE = "vitexplain"  # of the root group, and of the metadata of the index's parts
FILES = "vitexplain_files"  # attribute of the root group: size and SHA-256 of the other zarr.json
FORMAT = 1  # of what stands on disk, in the settings
SUFFIX = ".zarr"
RUNS = "_runs.jsonl"

_LOCK = "_lock"
_PART = re.compile(r"part-([0-9]{6,})\.parquet")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
_LABEL_BYTES = 200  # of a folder's name; most file systems take 255
_NOT_IN_NAMES = set('/\\<>:"|?*' if os.name == "nt" else "/\\")
_INNER_BYTES = 128 * 1024
_COMPRESSED = 0.8  # of the size of noise; maps are smaller
_HELD: set[tuple[int, str]] = set()  # process and folder of the locks that are held
_GUARD = threading.Lock()


class NotWhole(InputError):
    """A file of a store is absent, or not what was written."""


# -- what is written ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """Shapes of a store's arrays.

    Attributes:
        num_images: of the source.
        shard: images a shard; the last one may hold fewer.
        maps: by label, shape of one image's map: (gh, gw), or (K, gh, gw) for K targets.
        num_targets: K, or None where there is no axis of targets.
    """

    num_images: int
    shard: int
    maps: Mapping[str, tuple[int, ...]]
    num_targets: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_images", "shard"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: expected at least 1, received {getattr(self, name)}")
        for label in self.maps:
            if not _can_name_a_folder(label):
                raise InputError(f"method: expected labels that can name a folder, received {label!r}; give another one")
        folded: dict[str, str] = {}
        for label in self.maps:
            other = folded.setdefault(label.casefold(), label)
            if other != label:
                raise InputError(
                    f"method: expected labels that differ in more than upper and lower case, received {other!r} and {label!r}"
                )

    @property
    def num_shards(self) -> int:
        """How many shards there are."""
        return -(-self.num_images // self.shard)

    def rows(self, number: int) -> range:
        """The images of a shard, by their index in the source."""
        return range(number * self.shard, min((number + 1) * self.shard, self.num_images))

    @property
    def arrays(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Element type and shape of one image's entry, by the array's path in the store."""
        factors = () if self.num_targets is None else (self.num_targets,)
        found: dict[str, tuple[str, tuple[int, ...]]] = {}
        for label, shape in self.maps.items():
            found |= {f"{label}/maps": ("float16", tuple(shape)), f"{label}/scale": ("float32", factors)}
        return found

    def file(self, name: str, number: int) -> str:
        """Path in the store of the file that an array has for a shard."""
        return f"{name}/c.{number}" + ".0" * len(self.arrays[name][1])

    @property
    def image_bytes(self) -> int:
        """Of one image's entries in all arrays, before compression."""
        return sum(_entry_bytes(*entry) for entry in self.arrays.values())


def _can_name_a_folder(label: str) -> bool:
    """Also on other systems, and beside the folder's own ``zarr.json``."""
    is_plain = label.isprintable() and not set(label) & _NOT_IN_NAMES
    is_free = bool(label) and not label.startswith((".", "__")) and label.casefold() != "zarr.json"
    return is_plain and is_free and len(label.encode("utf-8", "surrogatepass")) <= _LABEL_BYTES


@dataclass(frozen=True)
class Row:
    """One image in the index.

    Attributes:
        id: unique in the source.
        path: of its file; None where it has none.
        label: class index; None where it is not known.
        prediction, score: the predicted class and its softmax probability; None where the image cannot be read.
        target, target_score: the explained class or classes, likewise.
        row: index in the source, and first index of the arrays.
        status: ``"ok"``, or why there are no maps: ``"unreadable"``, ``"not_finite"``.
        reason: more of it; None where there is nothing to say.
    """

    id: str
    path: str | None
    label: int | None
    prediction: int | None
    score: float | None
    target: int | tuple[int, ...] | None
    target_score: float | tuple[float, ...] | None
    row: int
    status: str
    reason: str | None


@dataclass(frozen=True)
class ShardContent:
    """Everything of one shard, of n images.

    Attributes:
        maps: float16 (n, gh, gw) or (n, K, gh, gw) by label; NaN where there is none.
        scales: float32 (n,) or (n, K) by label: a map's values are ``maps × scales``.
        rows: n of them, in the order of the source.
    """

    maps: Mapping[str, np.ndarray]
    scales: Mapping[str, np.ndarray]
    rows: Sequence[Row]

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """By the array's path in the store."""
        return {f"{label}/maps": values for label, values in self.maps.items()} | {
            f"{label}/scale": values for label, values in self.scales.items()
        }


class StoreWriter:
    """Writes the shards of a store that stands; one in each process that writes. It can be pickled.

    Args:
        output: the store, ``NAME.zarr``; its index ``NAME.parquet`` stands beside it.
        layout: of its arrays.

    Raises:
        InputError: the store does not stand, or has other arrays.
    """

    def __init__(self, output: Path, layout: Layout) -> None:
        self.output, self.layout = checked_output(output), layout
        self.index = index_path(self.output)
        settings = read_settings(self.output)
        if settings is None or not self.index.is_dir():
            raise InputError(
                f"output: expected the store {str(self.output)!r} and its index to stand; where several machines write, "
                "they need a folder that all of them share"
            )
        self._stamp = settings_stamp(settings)
        for name in layout.arrays:
            self._check_array(name)

    @classmethod
    def prepare(cls, output: Path, settings: Mapping[str, Any], layout: Layout, *, overwrite: bool = False) -> StoreWriter:
        """Make a store, or go on with the one that stands. The caller holds its lock.

        Args:
            output: the store, ``NAME.zarr``.
            settings: everything the maps depend on, as JSON; those of a store that stands there must be the same.
            layout: of its arrays.
            overwrite: throw away the store that stands there. What is not a store of this library is never touched.

        Raises:
            InputError: something else stands there, other settings do, the folder cannot be written, or the disk is too full.
        """
        output = checked_output(output)
        index = index_path(output)
        import_zarr()  # what is missing is to be known before the first shard is due
        import_parquet()
        settings = json.loads(json.dumps(settings))
        with writing(output):
            _check_index(index)
            standing = read_settings(output)
            if not overwrite:
                _check_settings(output, standing, settings)
            remove_leftovers(output, layout)
            index.mkdir(parents=True, exist_ok=True)
            if standing is not None and not overwrite:
                done = sum(len(layout.rows(number)) for number in parts(index))
                _check_space(output, (layout.num_images - done) * layout.image_bytes)
            else:
                _check_space(output, layout.num_images * layout.image_bytes, already=folder_size(output))
                _remove(output)
                _create(output, settings, layout)
        return cls(output, layout)

    def missing(self) -> list[int]:
        """Numbers of the shards to be written: without a part, with one that is not theirs, or without the files it names.

        Raises:
            InputError: whether a file stands cannot be told, as of a disk that does not answer.
        """
        standing = parts(self.index)
        return [number for number in range(self.layout.num_shards) if not self._is_done(number, standing.get(number))]

    def write(self, number: int, content: ShardContent) -> None:
        """Write a shard's files, and its part of the index when they stand.

        Raises:
            InputError: a file cannot be written (named, with what the system says), the content does not fit the layout, or the
                store has been removed or made anew with other settings.
        """
        self._check_content(number, content)
        part = part_path(self.index, number)
        self._check_own()
        with writing(part):
            if part.exists():  # damaged, or without its files: until it is written anew, the shard is not done
                part.unlink()
                sync_folder(self.index)
        files: dict[str, tuple[int, str]] = {}
        for name, values in content.arrays.items():
            key, data = self._encoded(name, number, values)
            write_whole(self.output / key, data)
            files[key] = _digest(data)
        self._check_own()
        write_whole(part, _encoded_part(content.rows, self._stamp, files, self.layout.num_targets))

    def log(self, entry: Mapping[str, Any]) -> None:
        """Keep a line about this run in ``NAME.parquet/_runs.jsonl``."""
        path = self.index / RUNS
        with writing(path):
            standing = path.read_bytes() if path.exists() else b""
        write_whole(path, standing + json.dumps(entry).encode() + b"\n")

    # -- inside ------------------------------------------------------------------------------------------------------

    def _check_own(self) -> None:
        """Refuse a store that is not the one that was opened."""
        standing = read_settings(self.output)
        if standing is None:
            root = self.output / "zarr.json"
            raise InputError(f"output: {str(root)!r} is gone: {os.strerror(errno.ENOENT)}; it was there when this run began")
        if settings_stamp(standing) != self._stamp:
            raise InputError(f"output: {str(self.output)!r} is another run's by now, with other settings")

    def _check_array(self, name: str) -> None:
        path = self.output / name / "zarr.json"
        standing = read_json(path)
        content: dict[str, Any] = {}
        _create_array(content, self.layout, name)
        different = differences(standing, json.loads(content["zarr.json"].to_bytes()))
        if different:
            raise InputError(
                f"output: {str(path)!r} describes another array ({some(different, separator='; ')}); use another output, "
                "or --overwrite"
            )

    def _is_done(self, number: int, part: Path | None) -> bool:
        if part is None:
            return False
        try:
            found = read_part_summary(part)
        except NotWhole:
            return False
        return found.problem(number, self.layout, self._stamp) is None and all(
            file_size(self.output / name) == size for name, (size, _) in found.files.items()
        )

    def _encoded(self, name: str, number: int, values: np.ndarray) -> tuple[str, bytes]:
        """A shard's file: path in the store and bytes, as zarr itself makes them."""
        content: dict[str, Any] = {}
        rows = self.layout.rows(number)
        array = _create_array(content, self.layout, name)
        array[rows.start : rows.stop] = values
        del content["zarr.json"]
        ((key, data),) = content.items()
        return f"{name}/{key}", data.to_bytes()

    def _check_content(self, number: int, content: ShardContent) -> None:
        rows = self.layout.rows(number)
        expected = {name: (dtype, (len(rows), *entry)) for name, (dtype, entry) in self.layout.arrays.items()}
        received = {name: (str(values.dtype), values.shape) for name, values in content.arrays.items()}
        if received != expected:
            raise InputError(f"content: expected arrays {expected}, received {received}")
        if [row.row for row in content.rows] != list(rows):
            raise InputError(f"content: expected the rows {rows.start} to {rows.stop - 1} in their order")


# -- one run at a time -------------------------------------------------------------------------------------------------


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Keep other runs away from a store; the system frees it when the process ends, however it ends.

    Raises:
        InputError: another run is writing there, the folder cannot be written, or something else stands there.
    """
    output = checked_output(output)
    index = index_path(output)
    held = (os.getpid(), os.path.realpath(index))
    taken = InputError(f"output: another run is writing into {str(output)!r}; wait until it has ended, or use another output")
    # The system's locks are a process's own: it would let a second run of this process in, and closing the file a second
    # time would free it for everyone. So a run of this process is refused before the file is opened.
    with _GUARD:
        if held in _HELD:
            raise taken
        _HELD.add(held)
    try:
        with writing(index / _LOCK):
            _check_index(index)
            read_settings(output)  # nothing is left in a place that is not ours
            index.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(index / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            with writing(index / _LOCK):
                try:
                    _take(descriptor)
                except (BlockingIOError, PermissionError) as error:
                    raise taken from error
            yield
        finally:
            os.close(descriptor)
    finally:
        with _GUARD:
            _HELD.discard(held)


def _take(descriptor: int) -> None:
    """Lock a file, or raise BlockingIOError or PermissionError at once where another process has it.

    A POSIX record lock is not inherited by forked processes, which may outlive this one, and holds across machines on NFS;
    ``flock``, which most libraries use, does neither. Windows has neither of them nor forks.
    """
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


# -- what stands -------------------------------------------------------------------------------------------------------


def index_path(output: Path) -> Path:
    """The index's folder of a store."""
    return output.with_suffix(".parquet")


def part_path(index: Path, number: int) -> Path:
    """A shard's part of the index."""
    return index / f"part-{number:06d}.parquet"


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


def index_schema(num_targets: int | None, *, large: bool = False) -> Any:
    """The index's columns, a ``pyarrow.Schema``; lists where there is an axis of targets.

    Args:
        num_targets: K, or None.
        large: text of the kind that holds more than 2 GiB in a column.
    """
    import_parquet()
    import pyarrow as pa

    classes, scores, text = pa.int32(), pa.float32(), pa.large_string() if large else pa.string()
    if num_targets is not None:
        classes, scores = pa.list_(classes), pa.list_(scores)
    types = {
        "id": text,
        "path": text,
        "label": pa.int32(),
        "prediction": pa.int32(),
        "score": pa.float32(),
        "target": classes,
        "target_score": scores,
        "row": pa.int64(),
        "status": pa.string(),
        "reason": text,
    }
    return pa.schema([(field.name, types[field.name]) for field in fields(Row)])


def as_text(value: Any) -> Any:
    """A name as UTF-8 can hold it: names of files need not be text. What is not a text stays as it is."""
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


def import_zarr() -> Any:
    """The module ``zarr``.

    Raises:
        InputError: it is not installed.
    """
    try:
        import zarr
        import zarr.codecs
        import zarr.storage
    except ImportError as error:
        raise _not_installed("zarr") from error
    return zarr


def import_parquet() -> Any:
    """The module ``pyarrow.parquet``.

    Raises:
        InputError: it is not installed.
    """
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise _not_installed("pyarrow") from error
    return pyarrow.parquet


def _not_installed(package: str) -> InputError:
    return InputError(f"store: maps of a data set need {package}, which is not installed: pip install 'vitexplain[dataset]'")


# -- checks ------------------------------------------------------------------------------------------------------------


def checked_output(output: str | Path) -> Path:
    """A store's path, absolute.

    Raises:
        InputError: its name is no store's, or it is on no file system.
    """
    path = Path(output)
    if _URL.match(str(output)):
        raise InputError(f"output: expected a path of a file system, received {str(output)!r}; mount it, or copy the store there")
    if path.suffix != SUFFIX:
        raise InputError(f"output: expected a name that ends in {SUFFIX}, received {str(output)!r}")
    with writing(path):
        is_link = path.is_symlink()
    if is_link:
        raise InputError(f"output: expected a folder, received the link {str(output)!r}; name the folder it leads to")
    return path.absolute()


def _check_index(index: Path) -> None:
    """Refuse a folder that is not an index of this library."""
    if not index.exists():
        return
    if not index.is_dir():
        raise InputError(f"output: expected no file at {str(index)!r}, where the index is to be; use another output")
    ours = (index / _LOCK).exists() or not any(index.iterdir()) or any(map(_is_part, parts(index).values()))
    if not ours:
        raise InputError(f"output: {str(index)!r}, where the index is to be, holds other things; use another output")


def _is_part(path: Path) -> bool:
    try:
        read_part_summary(path)
    except NotWhole:
        return False
    return True


def _check_settings(output: Path, standing: Mapping[str, Any] | None, settings: Mapping[str, Any]) -> None:
    if standing is None:
        if parts(index_path(output)):
            raise InputError(
                f"output: {str(index_path(output))!r} is an index whose maps are gone: expected {str(output)!r} beside it; "
                "use another output, or --overwrite"
            )
        return
    different = differences(standing, settings)
    if different:
        raise InputError(
            f"output: {str(output)!r} holds maps with other settings ({some(different, separator='; ')}); "
            "expected the same ones to go on with it, another output, or --overwrite"
        )


def _check_space(output: Path, size: int, already: int = 0) -> None:
    """Refuse what would not fit on the disk; ``already`` bytes there will be freed."""
    folder = next(folder for folder in output.absolute().parents if folder.exists())
    disk = shutil.disk_usage(folder)
    needed = math.ceil(size * _COMPRESSED)
    if disk.total and needed > disk.free + already:
        raise InputError(
            f"output: expected about {in_bytes(needed)} free in {str(folder)!r} for the maps, received {in_bytes(disk.free)}"
        )


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


# -- making and removing -----------------------------------------------------------------------------------------------


def _create(output: Path, settings: Mapping[str, Any], layout: Layout) -> None:
    """Make the store with all its metadata under another name, and rename it: it stands whole or not at all."""
    partial = partial_path(output)
    try:
        for key, data in _metadata(settings, layout):
            write_whole(partial / key, data, make_folder=True)
        os.replace(partial, output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync_folder(output.parent)


def _metadata(settings: Mapping[str, Any], layout: Layout) -> Iterable[tuple[str, bytes]]:
    """Every ``zarr.json`` of a new store, those of inner folders first."""
    zarr = import_zarr()
    content: dict[str, Any] = {}
    root = zarr.create_group(zarr.storage.MemoryStore(content), zarr_format=3)
    for label in layout.maps:
        root.create_group(label, attributes=settings["methods"][label])
    for name in layout.arrays:
        array: dict[str, Any] = {}
        _create_array(array, layout, name)
        content[f"{name}/zarr.json"] = array["zarr.json"]
    inner = {key: value.to_bytes() for key, value in content.items() if "/" in key}
    root.update_attributes({ATTRIBUTE: settings, FILES: {key: _digest(inner[key]) for key in sorted(inner)}})
    yield from sorted(inner.items(), key=lambda item: -item[0].count("/"))
    yield "zarr.json", content["zarr.json"].to_bytes()


def _create_array(content: dict[str, Any], layout: Layout, name: str) -> Any:
    """A Zarr array of the store's final shape whose files are in ``content``."""
    zarr = import_zarr()
    dtype, entry = layout.arrays[name]
    targets = () if layout.num_targets is None else ("target",)
    are_maps = name.endswith("/maps")
    return zarr.create_array(
        zarr.storage.MemoryStore(content),
        shape=(layout.num_images, *entry),
        shards=(layout.shard, *entry),
        chunks=(_inner(layout.shard, _entry_bytes(dtype, entry)), *entry),
        dtype=dtype,
        compressors=zarr.codecs.ZstdCodec(level=3, checksum=True),
        fill_value=math.nan,
        chunk_key_encoding={"name": "default", "separator": "."},  # all shards of an array in one folder
        dimension_names=("image", *targets, *(("row", "column") if are_maps else ())),
        attributes={"multiply_by": "scale"} if are_maps else {"multiplies": "maps"},
        zarr_format=3,
        config={"write_empty_chunks": True},  # a shard without any map is written too: its part names it
    )


def _digest(data: bytes) -> tuple[int, str]:
    """Size and SHA-256."""
    return len(data), hashlib.sha256(data).hexdigest()


def _inner(shard: int, entry_bytes: int) -> int:
    """Images an inner chunk: the divisor of the shard that comes nearest to 128 KiB."""
    small = [count for count in range(1, math.isqrt(shard) + 1) if shard % count == 0]
    return min(
        [*small, *(shard // count for count in small)], key=lambda count: abs(math.log(count * entry_bytes / _INNER_BYTES))
    )


def _entry_bytes(dtype: str, entry: tuple[int, ...]) -> int:
    return math.prod(entry) * np.dtype(dtype).itemsize


def _encoded_part(rows: Sequence[Row], stamp: str, files: Mapping[str, Any], num_targets: int | None) -> bytes:
    parquet = import_parquet()
    import pyarrow as pa

    schema = index_schema(num_targets).with_metadata({ATTRIBUTE: json.dumps({"settings": stamp, "files": files})})
    columns = [pa.array([as_text(getattr(row, field.name)) for row in rows], field.type) for field in schema]
    stream = BytesIO()
    parquet.write_table(pa.Table.from_arrays(columns, schema=schema), stream, compression="zstd", write_page_checksum=True)
    return stream.getvalue()


def remove_leftovers(output: Path, layout: Layout) -> None:
    """Take away what killed runs left half written or half removed."""
    remove_partials(output.parent, output.name)
    for folder in (index_path(output), *(output / name for name in layout.arrays)):
        remove_partials(folder)


def _remove(output: Path) -> None:
    """Take away a store: parts first, as without them nothing is done; then all the rest at once.

    The lock's file stays: the run holds it.
    """
    index = index_path(output)
    for path in (*parts(index).values(), index / RUNS):
        path.unlink(missing_ok=True)
    if index.is_dir():
        sync_folder(index)
    if output.is_dir():
        doomed = partial_path(output)
        os.replace(output, doomed)
        sync_folder(output.parent)
        shutil.rmtree(doomed)
