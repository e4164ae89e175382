"""Pictures of a store: a photo under its maps, the mean map of each class, a sheet of many photos."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from ..errors import InputError
from ..heatmap import ALPHA, blend, is_signed, max_magnitude, min_max
from ..loading import Display, resized, short_class_name
from ..photos import load_photo
from ..sources import Source, open_source
from ..visualize import fitted, in_cell, panel, sheet
from .layout import as_text
from .maps import MapStore

if TYPE_CHECKING:
    import pyarrow

MAX_CLASSES = 24
NUM_IMAGES = 24

_READ_BYTES = 32 * 1024 * 1024  # of maps in memory at once
_WIDE_SHEET = 10  # columns, for more images than six columns show well
_ORDERLY = 36

Find = Callable[[Mapping[str, Any]], Image.Image | None]


class NoPhotos(InputError):
    """The data that a store was made of are not there, or are not the same ones."""


class Photos:
    """The photos that a store was made of, as the model saw them. Data are opened where a photo has no file of its own to read.

    Args:
        store: of their maps.
        path: where the data are now; None where they were.
    """

    def __init__(self, store: MapStore, path: str | Path | None = None) -> None:
        self._store, self._path = store, path
        model = store.settings["model"]
        known = {name: value for name, value in model["preprocessing"].items() if value is not None}
        self._display = Display(resized(known, model["resize"]))

    def find(self, row: Mapping[str, Any]) -> Image.Image:
        """The photo of a row of the index.

        Raises:
            NoPhotos: the data are not there, or are other ones.
            InputError: the data do not have this photo, or it cannot be read.
        """
        if self._path is None and row["path"] is not None and os.path.isfile(row["path"]):
            return self._display(load_photo(row["path"]))
        _ = self.doubt  # other data are refused
        return self._display(self._source.sample(self._place(row), masks=False).photo)

    @cached_property
    def doubt(self) -> str | None:
        """Why the photos may be other ones than the maps were made of; None where nothing says so, or each has a file.

        Raises:
            NoPhotos: the data are not there, or are other ones.
        """
        source, expected = self._source, self._store.settings["data"]["sha256"]
        if source.path(0) is not None:
            return None
        if (self._as_stored or source).fingerprint() == expected:
            return None
        if self._as_stored is None:
            return f"{source.name!r} cannot be compared with what the maps were made of, as not all of it is explained yet"
        if source.kind == "npz":  # a difference of its bytes, or of which images of it were explained
            raise NoPhotos(f"photo: {source.name!r} is not what the maps were made of: its content has changed")
        return f"{source.name!r} may not be what the maps were made of: its files have changed"

    # -- inside ------------------------------------------------------------------------------------------------------

    @cached_property
    def _source(self) -> Source:
        data = self._store.settings["data"]
        try:
            return open_source(data["path"] if self._path is None else self._path, split=data["split"], images=data["images"])
        except InputError as error:
            raise NoPhotos(str(error)) from error

    @property
    def _as_stored(self) -> Source | None:
        """The source with the images and labels of the store, which may be a part of it and numbered by the model's classes.

        None where they are not known yet.
        """
        index = self._store.index
        if not self._store.is_complete:
            return None
        labels = None if index["label"].null_count else tuple(index["label"].to_pylist())
        return replace(self._source, ids=tuple(self._store.ids), labels=labels)

    @cached_property
    def _places(self) -> dict[str, int]:
        """Of the source's images, by id as the index has it."""
        return {as_text(identity): place for place, identity in enumerate(self._source.ids)}

    def _place(self, row: Mapping[str, Any]) -> int:
        """Where the source has the image: a part of it may have been explained, or files may have come and gone."""
        place, ids = row["row"], self._source.ids
        if place < len(ids) and as_text(ids[place]) == row["id"]:
            return place
        if row["id"] not in self._places:
            raise InputError(f"photo: expected {row['id']!r} in {self._source.name!r}, received none of that name")
        return self._places[row["id"]]


def overlay(
    store: MapStore,
    row: Mapping[str, Any],
    photo: Image.Image | None,
    *,
    methods: Sequence[str] | None = None,
    target_index: int | None = None,
    alpha: float = ALPHA,
) -> Figure:
    """A panel of one image: the photo, and each method's map laid over it.

    Args:
        store: where the maps are.
        row: of its index, with status ok.
        photo: as ``Photos.find`` gives it; None for the maps alone.
        methods: labels; None for all.
        target_index: which of several targets; None for all.
        alpha: the map's share of the overlay, 0 to 1.
    """
    targets = [row["target"]] if store.num_targets is None else list(row["target"])
    shown = range(len(targets)) if target_index is None else [target_index]
    maps = {}
    for label in methods or store.methods:
        values = store.maps(row["row"], label, as_torch=True)
        for place in shown:
            name = label if len(shown) == 1 else f"{label}: {place + 1}. {_short_name(store.settings, targets[place])}"
            maps[name] = values if store.num_targets is None else values[place]
    ground, alpha = (_blank(store.settings), 1.0) if photo is None else (photo, alpha)
    return panel(
        ground,
        maps,
        title=row["id"],
        caption=_about(store.settings, row, [targets[place] for place in shown]),
        photo_title=None if photo is None else "photo",
        alpha=alpha,
    )


def class_means(store: MapStore, method: str | None = None) -> Figure:
    """The mean map of each of the largest classes: by label where there are labels, else by prediction.

    Each map is scaled first, so that no image outweighs the others: to [0, 1], or for a method with values below zero by its
    largest magnitude. Maps are read in slices, those of these classes alone.

    Raises:
        InputError: no image has a map.
    """
    label = _label(store, method)
    done = drawable(store)
    by = "prediction" if done["label"].null_count == len(done) else "label"
    classes = done[by].fill_null(-1).to_numpy()
    found, counts = np.unique(classes[classes >= 0], return_counts=True)
    largest = np.lexsort((found, -counts))[:MAX_CLASSES]
    means, signed = _means(store, label, done["row"].to_numpy(), classes, found[largest])
    ground = in_cell(_blank(store.settings))
    pictures = [
        (
            fitted(_short_name(store.settings, int(found[place])), end=f" ({counts[place]:,})"),
            blend(ground, mean, alpha=1.0, signed=signed),
        )
        for place, mean in zip(largest, means, strict=True)
    ]
    of_all = f"the {len(largest)} largest of {len(found):,} classes, " if len(largest) < len(found) else ""
    caption = f"{_about_store(store)} · {of_all}by {by} (images)"
    return sheet(pictures, title=f"Mean map of each class: {label}", caption=caption, kinds=[signed])


def contact_sheet(
    store: MapStore, find: Find, method: str | None = None, *, count: int = NUM_IMAGES, alpha: float = ALPHA
) -> Figure:
    """Images spread evenly over the store, each under its map.

    Args:
        store: where the maps are.
        find: gives the photo of a row of the index, or None, and then its map is shown alone.
        method: a label; None for the first.
        count: how many images at most.
        alpha: the map's share of the overlay, 0 to 1.

    Raises:
        InputError: no image has a map.
    """
    label = _label(store, method)
    done = drawable(store)
    places = np.linspace(0, len(done) - 1, min(count, len(done))).round().astype(int)
    rows = [done.slice(place, 1).to_pylist()[0] for place in places.tolist()]
    maps = [_first(store, store.maps([row["row"]], label, as_torch=True))[0] for row in rows]
    signed = any(is_signed(heat) for heat in maps)
    pictures = []
    for row, heat in zip(rows, maps, strict=True):
        photo = find(row)
        ground, share = (_blank(store.settings), 1.0) if photo is None else (photo, alpha)
        about = fitted(_short_name(store.settings, row["prediction"]), end=f" ({_percent(row['score'], 0)})")
        pictures.append(
            (f"{fitted(row['id'], keep_tail=True)}\n{about}", blend(in_cell(ground), heat, alpha=share, signed=signed))
        )
    columns = {} if len(rows) <= _ORDERLY else {"columns": _WIDE_SHEET}
    title = f"{label} on {len(rows):,} of {len(done):,} images"
    return sheet(pictures, title=title, caption=_about_store(store), kinds=[signed], **columns)


def drawable(store: MapStore) -> pyarrow.Table:
    """The rows of the index whose maps stand.

    Raises:
        InputError: there are none.
    """
    import pyarrow.compute as pc

    found = store.index.filter(pc.equal(store.index["status"], "ok"))
    if not len(found):
        raise InputError(f"store: expected images with maps in {str(store.path)!r}, received none")
    return found


def _short_name(settings: Mapping[str, Any], index: int) -> str:
    return short_class_name(settings["model"]["class_names"], index)


def _label(store: MapStore, method: str | None) -> str:
    return store.methods[0] if method is None else method


def _means(store: MapStore, label: str, rows: np.ndarray, classes: np.ndarray, wanted: np.ndarray) -> tuple[Tensor, bool]:
    """Mean of each wanted class's scaled maps (classes, gh, gw), and whether the method's maps are signed.

    Whether they are is known only at the end, so that sums for both ways to scale are kept.
    """
    place_of = {int(index): place for place, index in enumerate(wanted)}
    chosen = np.isin(classes, wanted)
    places = torch.tensor([place_of[int(index)] for index in classes[chosen]])
    sums: dict[bool, Tensor] = {}
    signed, start = False, 0
    for maps in _slices(store, label, rows[chosen].tolist()):
        here = places[start : start + len(maps)]
        start += len(maps)
        signed = signed or is_signed(maps)
        for kind, scaled in ((False, min_max(maps)), (True, max_magnitude(maps))):
            total = sums.setdefault(kind, torch.zeros(len(wanted), *maps.shape[1:], dtype=torch.float64))
            total.index_add_(0, here, scaled.double())
    return (sums[signed] / torch.bincount(places)[:, None, None]).float(), signed


def _slices(store: MapStore, label: str, rows: list[int]) -> Iterator[Tensor]:
    """The maps (n, gh, gw) of these rows in their order, as many at once as fit."""
    entry = store.maps(rows[0], label).nbytes
    step = max(1, _READ_BYTES // entry)
    for start in range(0, len(rows), step):
        yield _first(store, store.maps(rows[start : start + step], label, as_torch=True))


def _first(store: MapStore, maps: Tensor) -> Tensor:
    """(n, gh, gw) of the first target."""
    return maps if store.num_targets is None else maps[:, 0]


def _blank(settings: Mapping[str, Any]) -> Image.Image:
    """In the place of a photo, of the shape of the model's input."""
    _, height, width = settings["model"]["preprocessing"]["input_size"]
    return Image.new("RGB", (width, height), "white")


def _about(settings: Mapping[str, Any], row: Mapping[str, Any], explained: Sequence[int]) -> str:
    parts = [f"predicted: {_short_name(settings, row['prediction'])} ({_percent(row['score'], 1)})"]
    if row["label"] is not None:
        parts.append(f"label: {_short_name(settings, row['label'])}")
    return " · ".join([*parts, f"explained: {', '.join(_short_name(settings, index) for index in explained)}"])


def _about_store(store: MapStore) -> str:
    settings = store.settings
    explained = {"pred": "the predicted class", "label": "the label"}.get(settings["target"], settings["target"])
    if store.num_targets is not None:
        explained = f"the first of {store.num_targets} classes"
    return f"{settings['model']['name']} on {settings['data']['name']} · explained: {explained}"


def _percent(share: float, digits: int) -> str:
    return f"{100 * share:.{digits}f} %"
