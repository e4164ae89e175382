"""Reading a data set's maps: by image, by rows, as arrays, tensors or a torch data set."""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import ExplanationError, InputError, unknown_name
from .store import (
    FORMAT,
    RUNS,
    as_text,
    damaged_part,
    import_parquet,
    import_zarr,
    index_path,
    index_schema,
    parts,
    read_part_files,
    read_settings,
)

if TYPE_CHECKING:
    import pyarrow

NO_LABEL = -1

_AGAIN = "run the same command again, what is missing is then explained anew"
_NEAR_AMONG = 20_000  # ids; among more, looking for near ones takes seconds


def open_maps(output: str | Path) -> MapStore:
    """Read the maps of a data set that ``vitexplain dataset`` wrote, also while it is being written.

    Args:
        output: the store, ``NAME.zarr``; its index ``NAME.parquet`` stands beside it.

    Raises:
        InputError: there is no such store, or it is damaged.
    """
    return MapStore(output)


class MapStore:
    """Maps of a data set on disk, with their index. It can be pickled; what was read is not.

    Attributes:
        path: of the store, ``NAME.zarr``.
        settings: everything the maps depend on.
        methods: labels of the methods.
    """

    def __init__(self, output: str | Path) -> None:
        self.path = Path(output)
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
        """A row an image whose shard is done, in the order of the source.

        Raises:
            InputError: a part of it is damaged.
        """
        import_parquet()
        import pyarrow as pa

        tables = [_read_part(part) for part in parts(self._index_folder).values()]
        schema = index_schema(self.num_targets)
        return pa.concat_tables([schema.empty_table(), *(table.cast(schema) for table in tables)]).combine_chunks()

    @property
    def num_targets(self) -> int | None:
        """K where each image was explained for K targets, else None."""
        factors = self._array(self.methods[0], "scale").shape[1:]
        return factors[0] if factors else None

    @property
    def is_complete(self) -> bool:
        """Whether every image of the source is in the index."""
        return len(self.index) == len(self)

    @property
    def ids(self) -> list[str]:
        """Of the images in the index."""
        return list(self._positions)

    def row(self, which: str | int) -> dict[str, Any]:
        """An image's row of the index, by column.

        Args:
            which: its id, or its row in the source; negative ones count from the end.

        Raises:
            UnknownNameError: no such id.
            InputError: no such row, or its shard is not done.
        """
        number = self._number(which)
        return self.index.slice(int(self._places(np.array([number]))[0]), 1).to_pylist()[0]

    # -- maps --------------------------------------------------------------------------------------------------------

    def maps(
        self,
        which: str | int | slice | Sequence[str | int] | np.ndarray | None = None,
        method: str | None = None,
        *,
        as_torch: bool = False,
    ) -> np.ndarray | Tensor:
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
        """Look at every byte: what is absent, damaged, or not what was written, in words; nothing where all is whole."""
        standing = parts(self._index_folder)
        problems = [problem for label in self.methods for problem in self._verify_metadata(label)]
        absent = [] if problems else [number for number in range(-(-len(self) // self._shard)) if number not in standing]
        if absent:
            problems.append(f"{len(absent)} shards are not done, the first of them number {absent[0]}: {_AGAIN}")
        for part in standing.values():
            problems += self._verify_part(part)
        return problems

    def runs(self) -> list[dict[str, Any]]:
        """What the runs that wrote this logged, the first one first."""
        path = self._index_folder / RUNS
        if not path.exists():
            return []
        try:
            return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError) as error:
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
                raise InputError(f"store: {str(self.path / name / 'zarr.json')!r} is absent or damaged: {error}") from error
        return self._arrays[name]

    @property
    def _shard(self) -> int:
        return self._array(self.methods[0], "scale").shards[0]

    @cached_property
    def _rows(self) -> np.ndarray:
        """Row in the source of each row of the index, rising."""
        return self.index["row"].to_numpy()

    @cached_property
    def _positions(self) -> dict[str, int]:
        """Row in the source by id."""
        return dict(zip(self.index["id"].to_pylist(), self._rows.tolist(), strict=True))

    def _label(self, method: str | None) -> str:
        if method is None and len(self.methods) == 1:
            return self.methods[0]
        if method is None:
            raise InputError(f"method: expected one of {', '.join(self.methods)}, as there are several")
        if method not in self.methods:
            raise unknown_name("method", str(method), self.methods)
        return method

    def _number(self, which: Any) -> int:
        """Row in the source of an id or a row."""
        if isinstance(which, str):
            found = self._positions.get(as_text(which))
            if found is None:
                raise self._unknown_id(which)
            return found
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
            return np.array([self._number(one) for one in which], dtype=np.int64)
        except TypeError as error:
            received = type(which).__name__
            raise InputError(f"which: expected ids, rows or a slice of rows, received {received}") from error

    def _unknown_id(self, which: str) -> ExplanationError:
        if len(self._positions) <= _NEAR_AMONG:
            return unknown_name("id", which, self._positions)
        first = next(iter(self._positions))
        return InputError(f"which: expected one of {len(self._positions)} ids such as {first!r}, received {which!r}")

    def _places(self, numbers: np.ndarray) -> np.ndarray:
        """Rows of the index of rows of the source."""
        done = self._is_done(numbers)
        if not done.all():
            raise InputError(f"which: the shard of row {numbers[~done][0]} is not done yet; {_AGAIN}")
        return np.searchsorted(self._rows, numbers)

    def _is_done(self, numbers: np.ndarray) -> np.ndarray:
        """bool (n,): whether rows of the source are in the index."""
        if not len(self._rows):
            return np.zeros(len(numbers), dtype=bool)
        places = np.searchsorted(self._rows, numbers).clip(max=len(self._rows) - 1)
        return self._rows[places] == numbers

    def _sliced(self, which: slice, label: str) -> np.ndarray:
        rows = np.arange(len(self))
        try:
            numbers = rows[which]
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
        self._places(numbers)
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
            raise InputError(
                f"store: a file of {str(self.path / label / kind)!r} is damaged ({error or type(error).__name__}): "
                "verify() names it; delete it and run the same command again"
            ) from error

    def _check_files(self, numbers: np.ndarray, label: str) -> None:
        """Refuse shards without their files, which Zarr would fill with NaN."""
        for kind in ("maps", "scale"):
            array = self._array(label, kind)
            for shard in np.unique(numbers // self._shard).tolist():
                path = self.path / label / kind / array.metadata.encode_chunk_key((shard, *[0] * (array.ndim - 1)))
                if not path.exists():
                    raise InputError(f"store: {str(path)!r} is absent: {_AGAIN}")

    def _verify_metadata(self, label: str) -> Iterator[str]:
        for kind in ("maps", "scale"):
            try:
                self._array(label, kind)
            except InputError as error:
                yield str(error).removeprefix("store: ")

    def _verify_part(self, part: Path) -> Iterator[str]:
        try:
            files = read_part_files(part)[1]
            _read_part(part)
        except InputError as error:
            yield str(error).removeprefix("store: ")
            return
        for name, (size, digest) in files.items():
            path = self.path / name
            try:
                content = path.read_bytes()
            except FileNotFoundError:
                yield f"{str(path)!r} is absent: {_AGAIN}"
            except OSError as error:
                yield f"{str(path)!r} cannot be read: {error.strerror}"
            else:
                if len(content) != size:
                    yield f"{str(path)!r} has {len(content)} bytes, expected {size}: {_AGAIN}"
                elif hashlib.sha256(content).hexdigest() != digest:
                    yield f"{str(path)!r} is not what was written: delete it and {_AGAIN}"


class TorchMaps(Dataset):
    """The images of a store that have maps. Worker processes open the files themselves.

    Args:
        store: read from.
        methods: labels.
        by_label: whether an item's maps are a dict by label.
    """

    def __init__(self, store: MapStore, methods: Sequence[str], by_label: bool) -> None:
        self.store, self.methods, self.by_label = store, tuple(methods), by_label
        self._numbers = store._rows[store.index["status"].to_numpy() == "ok"]

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, item: int) -> dict[str, Any]:
        return self.__getitems__([item])[0]

    def __getitems__(self, items: Sequence[int]) -> list[dict[str, Any]]:
        """Several items; a ``DataLoader`` asks for a batch at once, so that each chunk is read once for it."""
        numbers = self._numbers[list(items)]
        maps = {label: torch.from_numpy(self.store._chosen(numbers, label)) for label in self.methods}
        rows = self.store.index.take(self.store._places(numbers)).to_pylist()
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


def _read_part(part: Path) -> pyarrow.Table:
    """A part of the index, every page checked.

    Raises:
        InputError: it is damaged.
    """
    parquet = import_parquet()
    try:
        return parquet.ParquetFile(part, page_checksum_verification=True).read()
    except Exception as error:  # a damaged file can raise anything inside a parser
        raise damaged_part(part) from error
