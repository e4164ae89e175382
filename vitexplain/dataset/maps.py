"""Reading a data set's maps: by image, by rows, as arrays, tensors or a torch data set."""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import ExplanationError, InputError, unknown_name
from .layout import FILES, FORMAT, RUNS, Layout, as_text, import_parquet, import_zarr, index_path, index_schema
from .standing import (
    cannot_read,
    file_size,
    is_of_the_system,
    parts,
    read_json,
    read_part_summary,
    read_settings,
    reading_part,
    refused_part,
    settings_stamp,
)

if TYPE_CHECKING:
    import pyarrow

NO_LABEL = -1

_AGAIN = "run the same command again, what is missing is then explained anew"
_DELETE = f"delete it and {_AGAIN}"
_ANEW = "take it from a copy of the store, or make the store anew with --overwrite"
_NEAR_AMONG = 20_000  # ids; among more, looking for near ones takes seconds
_PARTS_KEPT = 16  # of the index in memory, where images are read one by one


def open_maps(output: str | Path) -> MapStore:
    """Read the maps of a data set that ``vitexplain dataset`` wrote, also while it is being written.

    Args:
        output: the store, ``NAME.zarr``; its index ``NAME.parquet`` stands beside it.

    Raises:
        InputError: there is no such store, or it is damaged.
    """
    return MapStore(output)


Which = str | int | slice | Sequence[str | int] | np.ndarray | None


class MapStore:
    """Maps of a data set on disk, with their index. It can be pickled; what was read is not.

    Which shards are done is looked up once: to see those that a run has written since, open the store again.

    Attributes:
        path: of the store, ``NAME.zarr``, absolute.
        settings: everything the maps depend on.
        methods: labels of the methods.
    """

    def __init__(self, output: str | Path) -> None:
        self.path = Path(output).absolute()
        if self.path.is_symlink() and not self._index_folder.is_dir():
            self.path = self.path.resolve()  # the index is beside what the link leads to
        settings = read_settings(self.path)
        if settings is None:
            raise InputError(
                f"store: expected maps of a data set in {str(self.path)!r}, received nothing: there is no such folder"
            )
        if settings.get("format") != FORMAT:
            raise InputError(f"store: expected format {FORMAT} in {str(self.path)!r}, received {settings.get('format')!r}")
        self.settings = settings
        self.methods: tuple[str, ...] = tuple(settings["methods"])
        if not self._index_folder.is_dir():
            raise InputError(f"store: expected the index {str(self._index_folder)!r} beside {str(self.path)!r}, received nothing")

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("path", "settings", "methods")}

    def __len__(self) -> int:
        """Images of the source, whether their maps stand or not."""
        return self._array(self.methods[0], "scale").shape[0]

    def __repr__(self) -> str:
        return f"MapStore({str(self.path)!r}: {len(self)} images, methods {', '.join(self.methods)})"

    # -- the index ---------------------------------------------------------------------------------------------------

    @cached_property
    def index(self) -> pyarrow.Table:
        """A row an image whose shard is done, in the order of the source: all of it, as it is when this is first asked for.

        Raises:
            InputError: a part of it is damaged, or does not belong here.
        """
        return self._columns(index_schema(self.num_targets, large=True).names)

    @property
    def num_targets(self) -> int | None:
        """K where each image was explained for K targets, else None."""
        factors = self._array(self.methods[0], "scale").shape[1:]
        return factors[0] if factors else None

    @property
    def is_complete(self) -> bool:
        """Whether every image of the source is in the index."""
        return all(number in self._parts for number in range(self._layout.num_shards))

    @property
    def ids(self) -> list[str]:
        """Of the images in the index."""
        return self.index["id"].to_pylist()

    def row(self, which: str | int) -> dict[str, Any]:
        """An image's row of the index, by column.

        Args:
            which: its id, or its row in the source; negative ones count from the end.

        Raises:
            UnknownNameError: no such id.
            InputError: no such row, or its shard is not done.
        """
        return self._row(self._number(which))

    # -- maps --------------------------------------------------------------------------------------------------------

    @overload
    def maps(self, which: Which = None, method: str | None = None, *, as_torch: Literal[False] = False) -> np.ndarray: ...
    @overload
    def maps(self, which: Which = None, method: str | None = None, *, as_torch: Literal[True]) -> Tensor: ...
    @overload
    def maps(self, which: Which = None, method: str | None = None, *, as_torch: bool) -> np.ndarray | Tensor: ...
    def maps(self, which: Which = None, method: str | None = None, *, as_torch: bool = False) -> np.ndarray | Tensor:
        """Maps as the method made them, float32; NaN for images without (their ``status`` says why).

        Args:
            which: an id or a row of the source; several of them; a slice of rows; None for all. In a slice, images whose shard
                is not done have NaN too.
            method: its label; can be left out where there is only one.
            as_torch: a tensor instead of an array.

        Returns:
            (gh, gw) for one image, (n, gh, gw) for several; with an axis of K targets before gh where there are several.

        Raises:
            UnknownNameError: no such id or method.
            InputError: no such row, or its shard is not done; or a file is absent or damaged.
        """
        label = self._label(method)
        if isinstance(which, slice) or which is None:
            values = self._sliced(which or slice(None), label)
        elif _is_single(which):
            values = self._chosen(np.array([self._number(which)]), label)[0]
        else:
            values = self._chosen(self._numbers(which), label)
        return torch.from_numpy(values) if as_torch else values

    def torch_dataset(self, method: str | None = None) -> TorchMaps:
        """The images that have maps, as a data set for ``torch.utils.data.DataLoader``.

        Args:
            method: its label; None for all.

        Returns:
            Items are dicts: ``id``, ``row``, ``maps`` (a float32 tensor, or a dict of them by label where there are several
            methods and none was chosen), ``target`` (int, or int64 (K,)), ``prediction``, ``label`` (-1 where there is none).

        Raises:
            UnknownNameError: no such method.
        """
        return TorchMaps(
            self, self.methods if method is None else (self._label(method),), len(self.methods) > 1 and method is None
        )

    # -- the files ---------------------------------------------------------------------------------------------------

    def verify(self) -> list[str]:
        """Look at every byte of the shards that are done, and of what describes them: what is absent, damaged, or not what was
        written, in words; nothing where all is whole. Shards that are not done yet are no problem: see ``is_complete``.
        """
        problems = list(self._verify_metadata())
        if problems:  # what the parts must say cannot be told
            return problems
        return [problem for number, part in parts(self._index_folder).items() for problem in self._verify_part(number, part)]

    def runs(self) -> list[dict[str, Any]]:
        """What the runs that wrote this logged, the first one first."""
        path = self._index_folder / RUNS
        if file_size(path) is None:
            return []
        try:
            return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        except OSError as error:
            raise cannot_read(path, error) from error
        except ValueError as error:
            raise InputError(f"store: {str(path)!r} is damaged: expected a JSON object a line; delete it") from error

    # -- inside ------------------------------------------------------------------------------------------------------

    @property
    def _index_folder(self) -> Path:
        return index_path(self.path)

    @cached_property
    def _arrays(self) -> dict[str, Any]:
        return {}

    def _array(self, label: str, kind: str) -> Any:
        """A method's ``maps`` or ``scale``, opened once."""
        name = f"{label}/{kind}"
        if name not in self._arrays:
            zarr = import_zarr()
            try:
                self._arrays[name] = zarr.open_array(self.path / name, mode="r", zarr_format=3)
            except Exception as error:  # damaged metadata can raise anything
                if is_of_the_system(error) and not isinstance(error, FileNotFoundError):
                    raise cannot_read(self.path / name / "zarr.json", error) from error
                raise InputError(f"store: {str(self.path / name / 'zarr.json')!r} is absent or damaged: {error}") from error
        return self._arrays[name]

    @cached_property
    def _layout(self) -> Layout:
        first = self._array(self.methods[0], "scale")
        shapes = {label: self._array(label, "maps").shape[1:] for label in self.methods}
        return Layout(first.shape[0], first.shards[0], shapes, self.num_targets)

    @cached_property
    def _stamp(self) -> str:
        return settings_stamp(self.settings)

    @cached_property
    def _parts(self) -> dict[int, Path]:
        return parts(self._index_folder)

    @cached_property
    def _read_parts(self) -> dict[int, pyarrow.Table]:
        """The parts of the index that were read last, the latest at the end."""
        return {}

    def _part(self, number: int) -> pyarrow.Table:
        """A shard's rows of the index."""
        kept = self._read_parts
        table = kept.pop(number) if number in kept else self._checked_part(number, self._parts[number])
        kept[number] = table
        if len(kept) > _PARTS_KEPT:
            del kept[next(iter(kept))]
        return table

    def _checked_part(self, number: int, part: Path, columns: Sequence[str] | None = None) -> pyarrow.Table:
        """A part of the index, or some columns of it, every page checked.

        Raises:
            InputError: it is damaged, of other settings, or its rows are not its own.
        """
        parquet = import_parquet()
        problem = read_part_summary(part).problem(number, self._layout, self._stamp)
        if problem is None:
            schema = index_schema(self.num_targets, large=True)
            wanted = schema.names if columns is None else list(columns)
            with reading_part(part):
                table = parquet.ParquetFile(part, page_checksum_verification=True).read([*{**dict.fromkeys(wanted), "row": None}])
                if table["row"].to_pylist() == list(self._layout.rows(number)):
                    self._own.add(number)
                    return table.select(wanted).cast(_fields(schema, wanted))
            problem = "holds rows that are not its own"
        raise refused_part(part, problem)

    def _columns(self, names: Sequence[str]) -> pyarrow.Table:
        """Columns of the whole index."""
        import pyarrow as pa

        tables = [self._checked_part(number, part, names) for number, part in self._parts.items()]
        schema = _fields(index_schema(self.num_targets, large=True), names)
        return pa.concat_tables([schema.empty_table(), *tables]).combine_chunks()

    def _row(self, number: int) -> dict[str, Any]:
        """The index's row of a row of the source."""
        shard, place = divmod(number, self._layout.shard)
        if shard not in self._parts:
            raise _not_done(number)
        return self._part(shard).slice(place, 1).to_pylist()[0]

    def _rows_with_maps(self) -> np.ndarray:
        """int64 (n,): rows of the source with status ok."""
        import pyarrow.compute as pc

        about = self._columns(["row", "status"])
        return about.filter(pc.equal(about["status"], "ok"))["row"].to_numpy()

    @cached_property
    def _rows(self) -> np.ndarray:
        """Row in the source of each row of the index, rising."""
        return self.index["row"].to_numpy()

    def _found(self, ids: Sequence[str]) -> dict[str, int]:
        """Row in the source by id, of those ids that are in the index."""
        import pyarrow as pa
        import pyarrow.compute as pc

        wanted = list(dict.fromkeys(map(as_text, ids)))
        places = pc.index_in(self.index["id"], value_set=pa.array(wanted, pa.large_string()))
        rows = self._rows[places.is_valid().to_numpy()].tolist()
        return {wanted[place]: row for place, row in zip(places.drop_null().to_pylist(), rows, strict=True)}

    def _label(self, method: str | None) -> str:
        if method is None and len(self.methods) == 1:
            return self.methods[0]
        if method is None:
            raise InputError(f"method: expected one of {', '.join(self.methods)}, as there are several")
        if method not in self.methods:
            raise unknown_name("method", str(method), self.methods)
        return method

    def _number(self, which: Any, found: Mapping[str, int] | None = None) -> int:
        """Row in the source of an id or a row; ``found`` are the rows of ids that have been looked up."""
        if isinstance(which, str):
            number = (self._found([which]) if found is None else found).get(as_text(which))
            if number is None:
                raise self._unknown_id(which)
            return number
        try:
            number = None if isinstance(which, bool | np.bool_) else operator.index(which)
        except TypeError:
            number = None
        if number is None:
            raise InputError(f"which: expected an id or a row, received {type(which).__name__}")
        if not -len(self) <= number < len(self):
            raise InputError(f"which: expected a row from 0 to {len(self) - 1}, received {number}")
        return number % len(self)

    def _numbers(self, which: Any) -> np.ndarray:
        """int64 (n,): rows in the source of ids and rows."""
        which = np.asarray(which) if hasattr(which, "__array__") else which  # columns of tables, tensors
        try:
            asked = list(which)
        except TypeError as error:
            received = type(which).__name__
            raise InputError(f"which: expected ids, rows or a slice of rows, received {received}") from error
        ids = [one for one in asked if isinstance(one, str)]
        found = self._found(ids) if ids else {}
        return np.array([self._number(one, found) for one in asked], dtype=np.int64)

    def _unknown_id(self, which: str) -> ExplanationError:
        if len(self.index) <= _NEAR_AMONG:
            return unknown_name("id", which, self.ids)
        first = self.index["id"][0].as_py()
        return InputError(f"which: expected one of {len(self.index)} ids such as {first!r}, received {which!r}")

    def _check_done(self, numbers: np.ndarray) -> None:
        """Refuse rows of the source whose shard is not done, or has a part that is not its own."""
        done = self._is_done(numbers)
        if not done.all():
            raise _not_done(numbers[~done][0])

    def _is_done(self, numbers: np.ndarray) -> np.ndarray:
        """bool (n,): whether the shards of rows of the source are done."""
        shards, place_of = np.unique(numbers // self._layout.shard, return_inverse=True)
        return np.array([self._shard_is_done(shard) for shard in shards.tolist()], dtype=bool)[place_of]

    def _shard_is_done(self, shard: int) -> bool:
        if shard not in self._parts:
            return False
        if shard not in self._own:
            self._checked_part(shard, self._parts[shard], ["row"])
        return True

    @cached_property
    def _own(self) -> set[int]:
        """Shards whose part was found to be their own."""
        return set()

    def _sliced(self, which: slice, label: str) -> np.ndarray:
        count = len(self)
        try:
            numbers = np.arange(*which.indices(count))
        except (TypeError, ValueError) as error:
            raise InputError(f"which: expected a slice of rows, received {which}") from error
        done = self._is_done(numbers)
        if done.all():
            return self._read(numbers, label)
        array = self._array(label, "maps")
        values = np.full((len(numbers), *array.shape[1:]), np.nan, dtype=np.float32)
        values[done] = self._read(numbers[done], label)
        return values

    def _chosen(self, numbers: np.ndarray, label: str) -> np.ndarray:
        self._check_done(numbers)
        return self._read(numbers, label)

    def _read(self, numbers: np.ndarray, label: str) -> np.ndarray:
        """float32 (n, …) of rows of the source that are in the index."""
        self._check_files(numbers, label)
        values = self._selected(numbers, label, "maps").astype(np.float32)
        scale = self._selected(numbers, label, "scale")
        values *= scale.reshape(*scale.shape, *[1] * (values.ndim - scale.ndim))
        return values

    def _selected(self, numbers: np.ndarray, label: str, kind: str) -> np.ndarray:
        array = self._array(label, kind)
        adjacent = len(numbers) > 0 and bool((np.diff(numbers) == 1).all())
        try:
            return np.asarray(array[numbers[0] : numbers[-1] + 1] if adjacent else array.oindex[numbers])
        except Exception as error:  # a damaged file can raise anything inside a codec
            if is_of_the_system(error):
                raise cannot_read(self.path / label / kind, error) from error
            raise InputError(
                f"store: a file of {str(self.path / label / kind)!r} is damaged ({error or type(error).__name__}): "
                "verify() names it; delete it and run the same command again"
            ) from error

    def _check_files(self, numbers: np.ndarray, label: str) -> None:
        """Refuse shards without their files, which Zarr would fill with NaN."""
        for kind in ("maps", "scale"):
            for shard in np.unique(numbers // self._layout.shard).tolist():
                path = self.path / self._layout.file(f"{label}/{kind}", shard)
                if file_size(path) is None:
                    raise InputError(f"store: {str(path)!r} is absent: {_AGAIN}")

    def _verify_metadata(self) -> Iterator[str]:
        """What is wrong with any ``zarr.json``; the root's settings are what each part of the index names."""
        root = self.path / "zarr.json"
        files = read_json(root).get("attributes", {}).get(FILES, {})
        absent = {f"{label}/{kind}/zarr.json" for label in self.methods for kind in ("maps", "scale")} - set(files)
        if absent:
            yield f"{str(root)!r} is not what was written, as it does not name {min(absent)!r}: {_ANEW}"
        for name, (size, digest) in files.items():
            yield from self._verify_file(name, size, digest, again=_ANEW, changed=_ANEW)

    def _verify_part(self, number: int, part: Path) -> Iterator[str]:
        try:
            self._checked_part(number, part)
            files = read_part_summary(part).files
        except InputError as error:
            yield str(error).removeprefix("store: ")
            return
        for name, (size, digest) in files.items():
            yield from self._verify_file(name, size, digest, again=_AGAIN, changed=_DELETE)

    def _verify_file(self, name: str, size: int, digest: str, *, again: str, changed: str) -> Iterator[str]:
        path = self.path / name
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            yield f"{str(path)!r} is absent: {again}"
        except (OSError, MemoryError) as error:
            yield str(cannot_read(path, error)).removeprefix("store: ")
        else:
            if len(content) != size:
                yield f"{str(path)!r} has {len(content)} bytes, expected {size}: {again}"
            elif hashlib.sha256(content).hexdigest() != digest:
                yield f"{str(path)!r} is not what was written: {changed}"


class TorchMaps(Dataset[dict[str, Any]]):
    """The images of a store that have maps. Worker processes open the files themselves.

    Args:
        store: read from.
        methods: labels.
        by_label: whether an item's maps are a dict by label.
    """

    def __init__(self, store: MapStore, methods: Sequence[str], by_label: bool) -> None:
        self.store, self.methods, self.by_label = store, tuple(methods), by_label
        self._numbers = store._rows_with_maps()

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, item: int) -> dict[str, Any]:
        return self.__getitems__([item])[0]

    def __getitems__(self, items: Sequence[int]) -> list[dict[str, Any]]:
        """Several items; a ``DataLoader`` asks for a batch at once, so that each chunk is read once for it."""
        numbers = self._numbers[list(items)]
        maps = {label: torch.from_numpy(self.store._chosen(numbers, label)) for label in self.methods}
        rows = [self.store._row(number) for number in numbers.tolist()]
        return [
            {
                "id": row["id"],
                "row": row["row"],
                "maps": {label: values[place] for label, values in maps.items()}
                if self.by_label
                else maps[self.methods[0]][place],
                "target": _as_class(row["target"]),
                "prediction": _as_class(row["prediction"]),
                "label": _as_class(row["label"]),
            }
            for place, row in enumerate(rows)
        ]


def _is_single(which: Any) -> bool:
    return isinstance(which, str) or getattr(which, "ndim", None) == 0 or not hasattr(which, "__iter__")


def _as_class(value: int | list[int] | None) -> int | Tensor:
    if isinstance(value, list):
        return torch.tensor(value, dtype=torch.int64)
    return NO_LABEL if value is None else value


def _not_done(number: int) -> InputError:
    return InputError(f"which: the shard of row {number} is not done yet; {_AGAIN}")


def _fields(schema: pyarrow.Schema, names: Sequence[str]) -> pyarrow.Schema:
    import pyarrow as pa

    return pa.schema([schema.field(name) for name in names])
