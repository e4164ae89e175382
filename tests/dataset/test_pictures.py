"""Pictures of stores: the right photo under the right map, means by hand, and nothing cut or overlapping."""

from __future__ import annotations

import itertools
import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from vitexplain.dataset import pictures
from vitexplain.dataset.maps import MapStore, open_maps
from vitexplain.dataset.pictures import NoPhotos, Photos, class_means, contact_sheet, drawable, overlay
from vitexplain.errors import InputError
from vitexplain.heatmap import colorize, upsample
from vitexplain.sources import open_source

from .made_store import GRID, SIDE, make_photos, make_store, place

BOTH = {"rollout": (GRID, False), "attcat": (GRID, True), "lrp:rule=gamma": (SIDE, False)}
UNREADABLE = {5: ("unreadable", "not an image"), 6: ("not_finite", "rollout")}
ODD = "a $ in_ a^name{ with\na line break, and far longer than what fits into the width of a cell or of a whole panel " * 2


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return make_photos(tmp_path_factory.mktemp("data") / "photos")


@pytest.fixture
def make(tmp_path, photos) -> Callable[..., MapStore]:
    """A store of the photos."""
    return lambda name="maps", **options: open_maps(make_store(tmp_path / f"{name}.zarr", photos, **options))


def shown(figure: Figure) -> list[np.ndarray]:
    """The pictures of a figure, (h, w, 3) each, without the legend's bars."""
    arrays = [np.asarray(axes.images[0].get_array()) for axes in figure.axes]
    return [array for array in arrays if array.ndim == 3]


def words(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.texts]


def captions(figure: Figure) -> list[str]:
    """What stands above each picture of a sheet with one legend, below the title and its lines."""
    return words(figure)[-len(shown(figure)) - 2 : -2]


def check_layout(figure: Figure) -> None:
    """Nothing is cut, and no text lies on another or on a picture."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # they are boxes
        renderer = figure.canvas.get_renderer()
        texts = [text.get_window_extent(renderer) for text in figure.texts]
    boxes = [*texts, *(axes.get_window_extent(renderer) for axes in figure.axes)]
    for text, box in zip(figure.texts, boxes, strict=False):
        assert box.x0 >= 0, text
        assert box.y0 >= 0, text
        assert box.x1 <= figure.bbox.width, text
        assert box.y1 <= figure.bbox.height, text
    for one, other in itertools.combinations(boxes, 2):
        assert not (min(one.x1, other.x1) - max(one.x0, other.x0) > 1 and min(one.y1, other.y1) - max(one.y0, other.y0) > 1)


def peak(picture: np.ndarray) -> tuple[float, float]:
    """Where a picture is brightest, as shares of width and height."""
    light = picture.astype(float).sum(-1)
    y, x = np.nonzero(light >= np.quantile(light, 0.995))
    return float(x.mean() / picture.shape[1]), float(y.mean() / picture.shape[0])


# -- photos ------------------------------------------------------------------------------------------------------------


def test_a_photo_is_what_the_model_saw_of_it(make) -> None:
    store = make()
    found = Photos(store)
    for row in (0, 7, 11):
        photo = found.find(store.row(row))
        assert photo.size == (448, 448)  # the central square of 96 × 64
        assert peak(np.asarray(photo)) == pytest.approx(place(row), abs=0.02)


def test_where_the_whole_photo_is_squeezed_it_is_shown_in_its_own_proportions(make) -> None:
    store = make(resize="squash")
    assert Photos(store).find(store.row(0)).size == (672, 448)


def test_the_slice_that_the_store_was_made_of_counts(make) -> None:
    store = make(images="1::2")
    assert peak(np.asarray(Photos(store).find(store.row(2)))) == pytest.approx(place(5), abs=0.02)


def test_photos_that_have_moved(make, photos, tmp_path) -> None:
    store = make()
    shutil.copytree(photos, tmp_path / "elsewhere")
    moved = Photos(store, tmp_path / "elsewhere").find(store.row(3))
    assert np.array_equal(np.asarray(moved), np.asarray(Photos(store).find(store.row(3))))
    with pytest.raises(InputError, match="no file or folder"):
        Photos(store, tmp_path / "nowhere").find(store.row(3))


def test_another_photo_is_never_taken_for_the_right_one(make, photos, tmp_path) -> None:
    store = make()
    changed = Path(shutil.copytree(photos, tmp_path / "changed"))
    (changed / "class_00" / "photo 0.jpg").unlink()
    found = Photos(store, changed)
    for row in (1, 11):  # each one place further on
        assert np.array_equal(np.asarray(found.find(store.row(row))), np.asarray(Photos(store).find(store.row(row))))
    with pytest.raises(InputError, match=r"expected 'class_00/photo 0.jpg' in 'changed', received none of that name"):
        found.find(store.row(0))


def test_one_photo_is_read_without_looking_for_all(make, monkeypatch) -> None:
    store = make()
    expected = np.asarray(Photos(store, store.settings["data"]["path"]).find(store.row(7)))
    monkeypatch.setattr(pictures, "open_source", lambda *_, **__: pytest.fail("the whole source was opened"))
    assert np.array_equal(np.asarray(Photos(store).find(store.row(7))), expected)


def test_a_part_of_a_source_that_was_chosen_in_python(tmp_path, photos) -> None:
    source = open_source(photos).select(slice(1, None, 2))
    store = open_maps(make_store(tmp_path / "maps.zarr", photos, source=source))
    found = Photos(store, photos)
    assert peak(np.asarray(found.find(store.row(2)))) == pytest.approx(place(5), abs=0.02)


def _archive(path: Path, colours: tuple[int, ...], labels: tuple[int, ...] = (0, 1, 2, 0, 1, 2)) -> Path:
    images = np.stack([np.full((64, 64, 3), colour, dtype=np.uint8) for colour in colours])
    np.savez(path, images=images, labels=np.array(labels))
    return path


@pytest.mark.parametrize("part", [slice(None), slice(1, 6, 2)])
def test_an_archive_is_known_by_its_content(tmp_path, part: slice) -> None:
    data = _archive(tmp_path / "data.npz", (0, 50, 100, 150, 200, 250))
    store = open_maps(make_store(tmp_path / "maps.zarr", data, source=open_source(data).select(part)))
    same = Path(shutil.copy(data, tmp_path / "same.npz"))
    other = _archive(tmp_path / "other.npz", (0, 50, 101, 150, 200, 250))
    colours = range(0, 300, 50)[part]
    for path in (None, same):
        found = Photos(store, path)
        if path is None:
            assert found.doubt is None
        assert [np.asarray(found.find(store.row(row)))[0, 0, 0] for row in range(len(store))] == list(colours)
    for use in (lambda photos: photos.doubt, lambda photos: photos.find(store.row(0))):
        with pytest.raises(NoPhotos, match=r"'other.npz' is not what the maps were made of: its content has changed"):
            use(Photos(store, other))


def test_labels_that_the_model_numbers_otherwise_do_not_make_an_archive_another(tmp_path) -> None:
    data = _archive(tmp_path / "data.npz", (0, 50, 100, 150, 200, 250))
    source = replace(open_source(data), labels=(2, 1, 0, 2, 1, 0))
    assert Photos(open_maps(make_store(tmp_path / "maps.zarr", data, source=source))).doubt is None
    begun = open_maps(make_store(tmp_path / "begun.zarr", data, source=source, shards=[0]))
    assert "cannot be compared" in Photos(begun).doubt
    begun = open_maps(make_store(tmp_path / "same.zarr", data, source=open_source(data), shards=[0]))
    assert Photos(begun).doubt is None


def test_a_hugging_face_dataset_whose_files_have_changed_is_drawn_with_a_note(tmp_path) -> None:
    datasets = pytest.importorskip("datasets")
    images = [Image.new("RGB", (64, 64), (colour, 0, 0)) for colour in (0, 100, 200)]
    rows = datasets.Dataset.from_dict({"image": images}, features=datasets.Features({"image": datasets.Image()}))
    rows.save_to_disk(tmp_path / "data")
    data = tmp_path / "data"
    store = open_maps(make_store(tmp_path / "maps.zarr", data, source=open_source(data), labels=False))
    assert Photos(store).doubt is None
    for file in data.glob("*.arrow"):
        os.utime(file, (1, 1))
    assert Photos(store).doubt == "'data' may not be what the maps were made of: its files have changed"
    assert np.asarray(Photos(store).find(store.row(2)))[0, 0, 0] in range(198, 203)


# -- overlays ----------------------------------------------------------------------------------------------------------


def test_every_method_lies_over_the_photo_where_its_object_is(make) -> None:
    store = make(methods=BOTH)
    row = store.row("class_01/photo 3.jpg")
    figure = overlay(store, row, Photos(store).find(row))
    photo, *laid = shown(figure)
    assert len(laid) == 3
    for picture in (photo, *laid):
        assert peak(picture) == pytest.approx(place(7), abs=0.04)
    assert {"class_01/photo 3.jpg", "photo", *BOTH, "low", "high", "against the class", "for the class"} < set(words(figure))
    expected = "predicted: cost in $ or $_{x}^2 (75.0 %) · label: cost in $ or $_{x}^2 · explained: cost in $ or $_{x}^2"
    assert expected in words(figure)
    check_layout(figure)


def test_one_method_and_no_label(make) -> None:
    store = make(methods=BOTH, labels=False, names=None)
    figure = overlay(store, store.row(1), Image.new("RGB", (60, 60)), methods=["attcat"], alpha=0.3)
    assert len(shown(figure)) == 2
    assert "predicted: class 0 (75.0 %) · explained: class 0" in words(figure)
    check_layout(figure)


def test_a_map_for_each_explained_class_or_for_one_of_them(make) -> None:
    store = make(num_targets=3, methods={"a": (GRID, False), "b": (GRID, True)})
    row = store.row(9)
    figure = overlay(store, row, Photos(store).find(row))
    names = ("1. crane", "2. crane", "3. tench")  # two classes of one name stay apart
    assert {f"{label}: {name}" for label in "ab" for name in names} < set(words(figure))
    assert "predicted: crane (75.0 %) · label: crane · explained: crane, crane, tench" in words(figure)
    assert len(shown(figure)) == 7
    check_layout(figure)
    one = overlay(store, row, Photos(store).find(row), target_index=2)
    assert {"a", "b", "predicted: crane (75.0 %) · label: crane · explained: tench"} < set(words(one))
    for picture, number in zip(shown(one)[1:], (3, 6), strict=True):
        assert np.array_equal(picture, shown(figure)[number])


def test_maps_alone_have_the_shape_of_the_models_input(make) -> None:
    store = make(methods={"attcat": (GRID, True)})
    figure = overlay(store, store.row(2), None, alpha=0.2)
    (picture,) = shown(figure)
    assert picture.shape == (448, 448, 3)
    assert np.array_equal(picture, colorize(upsample(store.maps(2, as_torch=True), 448), signed=True))
    assert "photo" not in words(figure)
    check_layout(figure)


# -- class means -------------------------------------------------------------------------------------------------------


def by_hand(store: MapStore, label: str, rows: list[int], *, signed: bool) -> np.ndarray:
    """The colours of a mean of scaled maps."""
    maps = store.maps(rows, label).astype(np.float64)
    if signed:
        scaled = maps / np.abs(maps).max((1, 2), keepdims=True)
    else:
        low, high = maps.min((1, 2), keepdims=True), maps.max((1, 2), keepdims=True)
        scaled = (maps - low) / (high - low)
    return colorize(upsample(torch.from_numpy(scaled.mean(0)).float(), 272), signed=signed)


@pytest.mark.parametrize("read", [1, 600, 10**6])
@pytest.mark.parametrize(("label", "signed"), [("rollout", False), ("attcat", True), ("lrp:rule=gamma", False)])
def test_means_of_scaled_maps_by_label(make, monkeypatch, read: int, label: str, signed: bool) -> None:
    monkeypatch.setattr(pictures, "_READ_BYTES", read)
    store = make(methods=BOTH, lost=UNREADABLE)
    figure = class_means(store, label)
    classes = {"tench (4)": [0, 1, 2, 3], "crane (4)": [8, 9, 10, 11], "cost in $ or $_{x}^2 (2)": [4, 7]}
    assert captions(figure) == list(classes)  # those with most images first
    for picture, rows in zip(shown(figure), classes.values(), strict=True):
        expected = by_hand(store, label, rows, signed=signed)
        assert np.abs(picture.astype(int) - expected).max() <= 1
    assert words(figure)[0] == f"Mean map of each class: {label}"
    about = "small_vit on photos · explained: the predicted class · by label (images)"
    assert words(figure)[1] == about
    check_layout(figure)


def test_no_more_maps_than_fit_are_read_at_once(make, monkeypatch) -> None:
    monkeypatch.setattr(pictures, "_READ_BYTES", 3 * GRID * GRID * 4)
    read = []
    maps = MapStore.maps
    monkeypatch.setattr(
        MapStore, "maps", lambda self, *a, **k: (read.append(np.ndim(a[0]) and len(a[0])), maps(self, *a, **k))[1]
    )
    class_means(make())
    assert read == [0, 3, 3, 3, 3]


def test_by_prediction_where_there_are_no_labels(make) -> None:
    store = make(labels=False)
    figure = class_means(store)
    assert "small_vit on photos · explained: the predicted class · by prediction (images)" in " ".join(words(figure))
    predictions = store.index["prediction"].to_pylist()
    rows = [row for row, prediction in enumerate(predictions) if prediction == 0]
    assert np.abs(shown(figure)[0].astype(int) - by_hand(store, "rollout", rows, signed=False)).max() <= 1


def test_the_first_of_several_targets(make) -> None:
    one = shown(class_means(make()))
    several = class_means(make("several", num_targets=2))
    assert "explained: the first of 2 classes" in " ".join(words(several))
    for picture, expected in zip(shown(several), one, strict=True):
        assert np.array_equal(picture, expected)


def test_the_largest_of_many_classes(tmp_path) -> None:
    data = make_photos(tmp_path / "many", classes=30, each=2)
    (data / "class_29" / "photo 0.jpg").rename(data / "class_28" / "photo 2.jpg")
    store = open_maps(make_store(tmp_path / "maps.zarr", data, names=[f"{i} {ODD}, other name" for i in range(1000)]))
    figure = class_means(store)
    assert len(shown(figure)) == 24
    assert captions(figure)[0].startswith("28 a $ in_")
    assert captions(figure)[0].endswith("… (3)")
    assert "the 24 largest of 30 classes, by label" in words(figure)[1]
    check_layout(figure)


# -- the contact sheet -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "rows"), [(1, [0]), (3, [0, 4, 11]), (4, [0, 3, 8, 11]), (400, [0, 1, 2, 3, 4, 7, 8, 9, 10, 11])]
)
def test_images_spread_evenly_each_under_its_own_map(make, count: int, rows: list[int]) -> None:
    store = make(methods=BOTH, lost=UNREADABLE)
    figure = contact_sheet(store, Photos(store).find, "lrp:rule=gamma", count=count)
    assert [caption.partition("\n")[0] for caption in captions(figure)] == [store.row(row)["id"] for row in rows]
    assert all(caption.endswith(" (75 %)") for caption in captions(figure))
    for picture, row in zip(shown(figure), rows, strict=True):
        assert peak(picture) == pytest.approx(place(row), abs=0.04)
    assert f"lrp:rule=gamma on {len(rows)} of 10 images" in words(figure)
    check_layout(figure)


def test_maps_alone_in_the_place_of_photos_that_are_not_found(make) -> None:
    store = make(methods={"attcat": (GRID, True)})
    find = Photos(store).find
    figure = contact_sheet(store, lambda row: None if row["row"] == 1 else find(row))
    expected = colorize(upsample(store.maps(1, as_torch=True), 272), signed=True)
    assert np.array_equal(shown(figure)[1], expected)
    assert not np.array_equal(shown(figure)[2], colorize(upsample(store.maps(2, as_torch=True), 272), signed=True))
    assert len([word for word in words(figure) if word == "for the class"]) == 1
    check_layout(figure)


@pytest.mark.parametrize("count", [1, 2, 40])
def test_long_and_odd_names_fit(tmp_path, count: int) -> None:
    data = make_photos(tmp_path / "many", classes=10, size=(50, 90))
    for name, path in zip(("W" * 100, "金魚", "a $ b_{\nx", "i" * 100), sorted(data.rglob("*.jpg"))[::13], strict=False):
        path.rename(path.with_name(f"{name}.jpg"))
    store = open_maps(make_store(tmp_path / "m.zarr", data, names=[ODD] * 10, resize="squash", num_targets=2))
    check_layout(contact_sheet(store, Photos(store).find, count=count))
    for row in drawable(store).to_pylist()[::7]:
        check_layout(overlay(store, row, None, target_index=0))


@pytest.mark.parametrize("shards", [(), (1,)])
def test_where_nothing_can_be_drawn_it_is_said(make, shards: tuple[int, ...]) -> None:
    store = make(shards=shards, lost=dict.fromkeys(range(12), ("unreadable", None)))
    for draw in (class_means, lambda store: contact_sheet(store, lambda _: None)):
        with pytest.raises(InputError, match=r"expected images with maps in .*received none"):
            draw(store)


def test_what_is_done_of_a_run_that_goes_on(make) -> None:
    store = make(shards=[2, 0])
    assert [row["row"] for row in drawable(store).to_pylist()] == [0, 1, 2, 3, 8, 9, 10, 11]
    assert captions(class_means(store)) == ["tench (4)", "crane (4)"]
    assert len(shown(contact_sheet(store, Photos(store).find))) == 8
