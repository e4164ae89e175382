"""What a data set's store is made of: names and places of its files, its arrays' shapes, its index's columns."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from ..files import writing

ATTRIBUTE = "vitexplain"  # of the root group, and of the metadata of the index's parts
FILES = "vitexplain_files"  # attribute of the root group: size and SHA-256 of the other zarr.json
FORMAT = 1  # of what stands on disk, in the settings
SUFFIX = ".zarr"
RUNS = "_runs.jsonl"  # in the index's folder
LOCK = "_lock"  # there, too

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
_LABEL_BYTES = 200  # of a folder's name; most file systems take 255
_NOT_IN_NAMES = set('/\\<>:"|?*' if os.name == "nt" else "/\\")


# -- places -----------------------------------------------------------------------------------------------------------


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


def index_path(output: Path) -> Path:
    """The index's folder of a store."""
    return output.with_suffix(".parquet")


def part_path(index: Path, number: int) -> Path:
    """A shard's part of the index."""
    return index / f"part-{number:06d}.parquet"


# -- content ----------------------------------------------------------------------------------------------------------


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
        return sum(map(self.entry_bytes, self.arrays))

    def entry_bytes(self, name: str) -> int:
        """Of one image's entry in one array, before compression."""
        dtype, entry = self.arrays[name]
        return math.prod(entry) * np.dtype(dtype).itemsize


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
