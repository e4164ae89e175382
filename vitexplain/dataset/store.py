"""Writing a data set's maps: Zarr arrays and a Parquet index, shard by shard, each file whole or not at all.

A shard is done when its part of the index stands, which is written last and names the shard's files. Every file is renamed into
place, and a store as a whole too, so that a run can be killed anywhere and the next one goes on.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from ..files import folder_size, partial_path, remove_partials, sync_folder, write_whole, writing
from ..messages import differences, in_bytes, some
from .layout import (
    ATTRIBUTE,
    FILES,
    RUNS,
    Layout,
    Row,
    ShardContent,
    as_text,
    checked_output,
    import_parquet,
    import_zarr,
    index_path,
    index_schema,
    part_path,
)
from .standing import NotWhole, check_index, file_size, parts, read_json, read_part_summary, read_settings, settings_stamp

_INNER_BYTES = 128 * 1024
_COMPRESSED = 0.8  # of the size of noise; maps are smaller


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
            check_index(index)
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


# -- checks ------------------------------------------------------------------------------------------------------------


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
        chunks=(_inner(layout.shard, layout.entry_bytes(name)), *entry),
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
