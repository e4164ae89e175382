"""WebDataset's tar shards: their headers are read once, then each image alone from its place in its shard."""

from __future__ import annotations

import glob
import io
import itertools
import json
import math
import os
import re
import tarfile
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from ..errors import InputError
from ..files import check_file
from ..messages import brief, some
from ..photos import Photo, decode_photo
from .base import Content
from .columns import as_labels
from .files import IMAGE_SUFFIXES, stamp
from .ids import made_unique, printable
from .labels import is_integer
from .masks import decode_mask
from .splits import SPLIT_NAMES, refuse_split

MAX_SHARDS = 1_000_000

_IMAGES = tuple(suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES)
_MASKS = ("mask.png", "mask", "seg.png")
_KEY = re.compile(r"((?:.*/)?[^.]+)\.([^/]*)", re.DOTALL)  # as WebDataset divides a path into key and extension
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4")
_MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")
_BRACES = re.compile(r"\{([^{}]*)\}")


class _Member(NamedTuple):
    """A file in a shard, and where its bytes are."""

    name: str
    offset: int
    size: int


_Files = Mapping[str, _Member]  # of one sample, by extension


@dataclass(frozen=True, eq=False)
class _Members:
    """One file a sample, as columns: ``shard``, places in ``shards``, ``offset`` and ``size`` are (n,) of integers.

    ``faults`` says by place why a sample has no such file.
    """

    shards: tuple[Path, ...]
    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    names: tuple[str, ...]
    faults: Mapping[int, str]

    def path_of(self, position: int) -> str | None:
        if position in self.faults:
            return None
        return f"{printable(str(self.shards[self.shard[position]]))}::{self.names[position]}"

    def part(self, positions: Sequence[int]) -> _Members:
        """These files alone, and the shards they are in."""
        rows = list(positions)
        used, shard = np.unique(self.shard[rows], return_inverse=True)
        shards, names = tuple(self.shards[place] for place in used), tuple(self.names[row] for row in rows)
        faults = {place: self.faults[row] for place, row in enumerate(rows) if row in self.faults}
        return _Members(shards, shard, self.offset[rows], self.size[rows], names, faults)

    def stream(self, position: int) -> BinaryIO:
        if position in self.faults:
            raise InputError(self.faults[position])
        path = self.shards[self.shard[position]]
        try:
            with open(path, "rb") as file:
                content = _bytes(file, int(self.offset[position]), int(self.size[position]))
        except OSError as error:
            raise InputError(f"data: cannot read the shard {str(path)!r}: {brief(error)}") from error
        return io.BytesIO(content)


class _Columns:
    """``_Members`` that are being found, sample by sample."""

    def __init__(self) -> None:
        self._shard, self._offset, self._size = array("i"), array("q"), array("q")
        self._names: list[str] = []
        self._faults: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._names)

    @property
    def faults(self) -> Mapping[int, str]:
        return self._faults

    def add(self, place: int, member: _Member | str) -> None:
        """A sample's file in the shard at a place, or why it has none."""
        if isinstance(member, str):
            self._faults[len(self)] = member
            member = _Member("", 0, 0)
        self._shard.append(place)
        self._offset.append(member.offset)
        self._size.append(member.size)
        self._names.append(member.name)

    def members(self, shards: Sequence[Path]) -> _Members:
        shard, offset, size = np.array(self._shard, np.int32), np.array(self._offset, np.int64), np.array(self._size, np.int64)
        return _Members(tuple(shards), shard, offset, size, tuple(self._names), self._faults)


@dataclass(frozen=True, eq=False)
class _Shards:
    """Photos and masks in tar files that are opened anew for each."""

    photos: _Members
    masks: _Members | None

    @property
    def has_masks(self) -> bool:
        return self.masks is not None

    def read(self, position: int, name: str, masks: bool) -> tuple[Photo, np.ndarray | None]:  # noqa: ARG002
        photo = decode_photo(self.photos.stream(position), repr(self.photos.path_of(position)))
        if self.masks is None or not masks:
            return photo, None
        return photo, decode_mask(self.masks.stream(position), repr(self.masks.path_of(position)))

    def path_of(self, position: int) -> str | None:
        return self.photos.path_of(position)

    def missing(self, positions: Iterable[int]) -> list[str]:  # noqa: ARG002
        return []

    def stamps(self, positions: Iterable[int]) -> Iterator[str]:
        for place in np.unique(self.photos.shard[list(positions)]):
            path = self.photos.shards[place]
            yield f"{printable(path.name)} {stamp(path)}"

    def part(self, positions: Sequence[int]) -> _Shards:
        return _Shards(self.photos.part(positions), None)


# -- which shards ------------------------------------------------------------------------------------------------------


def is_pattern(path: Path) -> bool:
    """Whether a path is of tar files and has braces, or ``*``, ``?`` or ``[``, which stand for several paths."""
    return path.name.lower().endswith((".tar", *_COMPRESSED)) and bool(_BRACES.search(str(path)) or glob.has_magic(str(path)))


def open_tar(path: Path, split: str | None) -> Content:
    """The samples of one shard."""
    refuse_split(split, path)
    return open_shards([path], path.name)


def open_pattern(path: Path, split: str | None) -> Content:
    """The samples of the shards that a pattern such as ``shard-{000000..000009}.tar`` or ``shard-*.tar`` names.

    Raises:
        InputError: some of them are not there.
    """
    refuse_split(split, path)
    refuse_compressed(path.name)
    shards = [Path(shard) for text in _expand(str(path)) for shard in _matching(text)]
    missing = [shard.name for shard in shards if not os.path.isfile(shard)]
    if missing:
        raise InputError(
            f"data: of the {len(shards)} shards of {str(path)!r}, {len(missing)} do not exist: {some(map(repr, missing))}"
        )
    return open_shards(shards, path.name)


def refuse_compressed(name: str) -> None:
    """Raise ``InputError`` where a file is a compressed tar by its name."""
    if name.lower().endswith(_COMPRESSED):
        raise _is_compressed(name)


def _is_compressed(name: str) -> InputError:
    return InputError(
        f"data: expected .tar shards that are not compressed, received {name!r}: images can only be read from the middle of a "
        "plain .tar; unpack it, as by gunzip"
    )


def _expand(pattern: str) -> Iterator[str]:
    """The paths that a pattern stands for, in order: ``{000..009}`` counts, ``{a,b}`` lists."""
    parts = _BRACES.split(pattern)
    choices = [_choices(part, pattern) if place % 2 else (part,) for place, part in enumerate(parts)]
    if math.prod(map(len, choices)) > MAX_SHARDS:
        raise InputError(f"data: expected a pattern of at most {MAX_SHARDS} shards, received {pattern!r}")
    return map("".join, itertools.product(*choices))


def _matching(text: str) -> Sequence[str]:
    """The files that ``*``, ``?`` and ``[…]`` in a path stand for, sorted; the path itself where it has none or is a file."""
    if not glob.has_magic(text) or os.path.isfile(text):
        return [text]
    found = sorted(glob.glob(text, recursive=True))
    if not found:
        raise InputError(f"data: expected a pattern of files that are there, received {text!r}, which none matches")
    return found


def _choices(text: str, pattern: str) -> Sequence[str]:
    """What one pair of braces stands for."""
    bounds = re.fullmatch(r"([0-9]{1,12})\.\.([0-9]{1,12})", text)
    if bounds is None:
        if "," in text:
            return text.split(",")
        raise InputError(f"data: expected {{000..009}} or {{a,b}} in the pattern {pattern!r}, received {{{text}}}")
    first, last = map(int, bounds.groups())
    if abs(last - first) >= MAX_SHARDS:
        raise InputError(f"data: expected a pattern of at most {MAX_SHARDS} shards, received {pattern!r}")
    width = max(map(len, bounds.groups())) if any(bound.startswith("0") for bound in bounds.groups()) else 0
    step = 1 if first <= last else -1
    return [f"{number:0{width}d}" for number in range(first, last + step, step)]


# -- samples -----------------------------------------------------------------------------------------------------------


def open_shards(shards: Sequence[Path], name: str) -> Content:
    """The samples of several shards, in their order; ``name`` stands for all in messages.

    A sample without an image is one that cannot be read, unless all are.

    Raises:
        InputError: a shard cannot be read, no sample has an image, or some samples have a label or a mask and others none.
    """
    _refuse_several_splits(shards, name)
    keys: list[str] = []
    labels: list[Any] = []
    photos, masks, unmasked = _Columns(), _Columns(), array("q")
    for place, path in enumerate(shards):
        listing = _listed(path)
        with _opened(path) as file:
            for key, files in listing.samples(path):
                keys.append(key)
                labels.append(_label(file, files, path))
                photos.add(place, _photo(files, key, path))
                mask = next((files[extension] for extension in _MASKS if extension in files), None)
                if mask is None:
                    unmasked.append(len(masks) + len(unmasked))
                else:
                    masks.add(place, mask)
    if photos.faults and len(photos.faults) == len(keys):
        raise InputError(photos.faults[0])
    found = photos.members(shards)
    unlabelled = array("q", (row for row, label in enumerate(labels) if label is None))
    has_labels = _all_or_none(unlabelled, "label", keys, found, name)
    has_masks = _all_or_none(unmasked, "mask", keys, found, name)
    return Content(
        kind="webdataset",
        ids=made_unique(keys),
        labels=as_labels(labels, name) if has_labels else None,
        names=None,
        reader=_Shards(found, masks.members(shards) if has_masks else None),
    )


def _refuse_several_splits(shards: Sequence[Path], name: str) -> None:
    """``train-000000.tar`` and ``val-000000.tar`` are not to be taken for one set."""
    words = (set(re.split(r"[^a-z]+", path.stem.lower())) & SPLIT_NAMES for path in shards)
    splits = sorted(set().union(*words))
    if len(splits) > 1:
        raise InputError(
            f"data: expected shards of one split in {name!r}, received several ({some(splits)}); name those of one, as "
            "train-{000000..000009}.tar"
        )


class _Listing:
    """The files of a shard's samples as columns, in their order in the shard; those of one sample need not be neighbours."""

    def __init__(self) -> None:
        self._places: dict[str, int] = {}  # of samples, by key
        self._sample, self._offset, self._size = array("q"), array("q"), array("q")
        self._names: list[str] = []

    def add(self, key: str, member: _Member) -> None:
        self._sample.append(self._places.setdefault(key, len(self._places)))
        self._offset.append(member.offset)
        self._size.append(member.size)
        self._names.append(member.name)

    def samples(self, path: Path) -> Iterator[tuple[str, _Files]]:
        """Each key with its files; ``path`` is the shard's, for messages."""
        order = iter(np.argsort(np.array(self._sample, np.int64), kind="stable"))
        counts = np.bincount(np.array(self._sample, np.int64), minlength=len(self._places))
        for key, count in zip(self._places, counts, strict=True):
            files: dict[str, _Member] = {}
            for row in itertools.islice(order, int(count)):
                name = self._names[row]
                extension = _extension(name)
                if extension in files:
                    raise InputError(f"data: expected each file once in the shard {str(path)!r}, received several {name!r}")
                files[extension] = _Member(name, self._offset[row], self._size[row])
            yield key, files


def _listed(path: Path) -> _Listing:
    """The files of a shard's samples; no content is read."""
    listing = _Listing()
    for member in _headers(path):
        parts = _KEY.fullmatch(member.name)
        hidden = os.path.basename(member.name).startswith(".")
        if parts is None or hidden or member.isdir():  # also what has no extension is of no sample
            continue
        if not member.isreg() or member.issparse():
            raise InputError(
                f"data: expected plain files in the shard {str(path)!r}, received the link or special {member.name!r}"
            )
        listing.add(parts[1], _Member(member.name, member.offset_data, member.size))
    return listing


def _extension(name: str) -> str:
    """What stands behind the first dot of the last part of a member's name, in lower case."""
    return name.rpartition("/")[2].partition(".")[2].lower()


def _headers(path: Path) -> Iterator[tarfile.TarInfo]:
    """What is in a shard, to its end; no content is read.

    Raises:
        InputError: it is compressed, truncated, damaged or no tar file.
    """
    check_file(path, "data")
    try:
        with open(path, "rb") as file:
            if file.read(6).startswith(_MAGIC):
                raise _is_compressed(path.name)
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="backslashreplace") as shard:
                while (member := shard.next()) is not None:
                    shard.members.clear()  # type: ignore[attr-defined] # typeshed leaves it out; it would keep them all
                    yield _checked(member)
                _check_end(file, shard.offset)
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"data: cannot read the shard {str(path)!r}: {brief(error)}") from error
    except Exception as error:  # a damaged header can raise anything inside the parser
        raise InputError(f"data: the shard {str(path)!r} is truncated, damaged or no .tar file: {brief(error)}") from error


def _checked(member: tarfile.TarInfo) -> tarfile.TarInfo:
    if member.size < 0:  # the next header would be looked for before this one, for ever
        raise tarfile.ReadError(f"{member.name!r} has a size below 0")
    return member


def _check_end(file: BinaryIO, offset: int) -> None:
    """Where ``tarfile`` stopped must be the archive's end, blocks of zeros: a damaged header makes it stop, too."""
    file.seek(offset)
    if len(file.read(tarfile.BLOCKSIZE)) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"the mark of its end is not there at byte {offset}")
    file.seek(offset)
    while chunk := file.read(1 << 20):
        if chunk.strip(b"\0"):
            raise tarfile.ReadError(f"expected its end at byte {offset}, received something else")


def _photo(files: _Files, key: str, path: Path) -> _Member | str:
    """The image of a sample: by an extension that is an image's, else by the only one that ends in one, as ``v2.jpg``.

    Where there is none, what was expected.
    """
    plain = [extension for extension in files if extension in _IMAGES]
    ending = [extension for extension in files if extension not in _MASKS and extension.rpartition(".")[2] in _IMAGES]
    found = plain or ending
    if len(found) == 1:
        return files[found[0]]
    received = f"several ({', '.join(found)})" if found else ", ".join(files)
    fault = f"data: expected one image ({', '.join(_IMAGES)}) for {key!r} in the shard {str(path)!r}, received {received}"
    if found:
        raise InputError(fault)
    return fault


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        raise InputError(f"data: cannot read the shard {str(path)!r}: {brief(error)}") from error


def _label(file: BinaryIO, files: _Files, path: Path) -> Any:
    """What ``cls``, or else ``json``, says: an index, a name, None for nothing, or what is neither."""
    member = files.get("cls") or files.get("json")
    if member is None:
        return None
    content = _bytes(file, member.offset, member.size)
    try:
        value = content.decode() if "cls" in files else _label_in_json(content)
        if not isinstance(value, str):
            return value
        value = value.strip()
        return int(value) if is_integer(value) else value or None
    except (ValueError, RecursionError) as error:
        raise InputError(f"label: cannot read {member.name!r} in the shard {str(path)!r}: {brief(error)}") from error


def _label_in_json(content: bytes) -> Any:
    entries = json.loads(content)
    if not isinstance(entries, Mapping):
        return None
    return entries.get("cls") if entries.get("label") is None else entries["label"]


def _bytes(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    content = file.read(size)
    if len(content) < size:
        raise OSError(f"expected {size} bytes from byte {offset} on, received {len(content)}: it is not what it was")
    return content


def _all_or_none(lacking: Sequence[int], what: str, keys: Sequence[str], photos: _Members, name: str) -> bool:
    """Whether there is one for each sample; ``lacking`` are the places of those without."""
    if lacking and len(lacking) < len(keys):
        first = lacking[0]
        shard = photos.shards[photos.shard[first]].name
        raise InputError(
            f"data: expected a {what} for every sample of {name!r} or for none, received none for {len(lacking)} of the "
            f"{len(keys)}, the first of them {keys[first]!r} in the shard {shard!r}"
        )
    return not lacking
