"""Labelled images from every kind of data: what comes back, and what is refused in one line."""

from __future__ import annotations

import io
import os
import pickle
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm.data
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from vitexplain import InputError
from vitexplain.loading import DEMO, LoadedModel, load_model
from vitexplain.sources import Source, foreground, open_source, parse_slice

CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@pytest.fixture(scope="module")
def demo() -> LoadedModel:
    return load_model(DEMO)


@pytest.fixture(scope="module")
def imagenet(demo: LoadedModel) -> LoadedModel:
    """The classes of ImageNet without the weights."""
    info = timm.data.ImageNetInfo()
    return _classes(demo, 1000, [info.index_to_description(index) for index in range(1000)])


def _classes(demo: LoadedModel, count: int, names: Sequence[str] | None) -> LoadedModel:
    model = nn.Identity()
    model.num_classes = count
    return replace(demo, model=model, class_names=None if names is None else tuple(names))


def _picture(value: int, size: tuple[int, int] = (12, 8)) -> Image.Image:
    return Image.new("RGB", size, (value, 0, 0))


def _bytes(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def _cut(seed: int = 0) -> bytes:
    """A photo of which half is missing."""
    pixels = np.random.default_rng(seed).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    content = _bytes(Image.fromarray(pixels), "JPEG")
    return content[: len(content) // 2]


def _put(folder: Path, *names: str) -> Path:
    """PNG and JPEG files whose red is ten times their place in the list."""
    for place, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        _picture(10 * place).save(folder / name)
    return folder


def _red(source: Source) -> list[int]:
    """Which pictures a source gives, by their red."""
    return [round(source.sample(index).photo.getpixel((3, 3))[0] / 10) for index in range(len(source))]


def _refused(match: str, path: Path, **options: object) -> None:
    with pytest.raises(InputError, match=match) as caught:
        open_source(path, **options)
    assert "\n" not in str(caught.value)


# -- folders -------------------------------------------------------------------------------------------------------------


def test_class_folders(tmp_path, demo) -> None:
    _put(tmp_path, "dog/b.png", "cat/deep/er/c.JPG", "cat/a.jpeg", "cat/.hidden.png", ".git/d.png")
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / "empty").mkdir()
    source = open_source(tmp_path, classes=demo)
    assert (source.kind, source.name, source.split) == ("imagefolder", tmp_path.name, None)
    assert source.ids == ("cat/a.jpeg", "cat/deep/er/c.JPG", "dog/b.png")
    assert source.labels == (3, 3, 5)
    assert (source.has_labels, source.has_masks, len(source)) == (True, False, 3)
    assert _red(source) == [2, 1, 0]
    sample = source.sample(2)
    assert (sample.id, sample.label, sample.mask, sample.photo.mode, sample.photo.size) == ("dog/b.png", 5, None, "RGB", (12, 8))


@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "PNG", "webp", "bmp", "tif", "tiff", "gif", "ppm"])
def test_a_flat_folder_of_images(tmp_path, suffix: str) -> None:
    source = open_source(_put(tmp_path, f"b.{suffix}", f"a.{suffix}"))
    assert (source.kind, source.ids, source.labels, source.has_labels) == ("folder", (f"a.{suffix}", f"b.{suffix}"), None, False)
    assert source.sample(0).label is None
    assert source.sample(0).photo.mode == "RGB"


def test_class_folders_can_be_links(tmp_path, demo) -> None:
    _put(tmp_path / "elsewhere", "a.png")
    (tmp_path / "data" / "cat").mkdir(parents=True)
    (tmp_path / "data" / "dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "cat" / "b.png").symlink_to(tmp_path / "elsewhere" / "a.png")
    source = open_source(tmp_path / "data", classes=demo)
    assert (source.ids, source.labels, _red(source)) == (("cat/b.png", "dog/a.png"), (3, 5), [0, 0])


def test_train_is_a_class_where_its_images_lie_in_it(tmp_path) -> None:
    assert open_source(_put(tmp_path, "train/a.png")).labels == (0,)


def test_photos_are_upright(tmp_path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    _picture(0, (40, 20)).save(tmp_path / "turned.jpg", exif=exif)
    Image.new("L", (20, 40), 255).save(tmp_path / "mask.png")
    (tmp_path / "table.csv").write_text("path,mask\nturned.jpg,mask.png\n")
    sample = open_source(tmp_path / "table.csv").sample(0)
    assert sample.photo.size == (20, 40)
    assert sample.mask.shape == (40, 20)


FOLDERS = {
    "nothing": ([], {}, "expected images .* received an empty folder"),
    "no images": (["a.txt", "b/c.txt"], {}, "received a.txt, b/c.txt"),
    "hidden only": ([".a.png", ".b/c.png"], {}, "received an empty folder"),
    "both": (["a.png", "cat/b.png"], {}, "class folders only, or beside each other only, .*received a.png and cat/b.png"),
    "a split": (["cat/a.png"], {"split": "val"}, "expected none, as .* has no splits, received 'val'$"),
    "a folder for it": (["val/cat/a.png"], {"split": "val"}, "has no splits, received 'val'; its subfolder can be named"),
    "splits": (["val/cat/a.png", "train/cat/a.png"], {}, r"received splits \(train, val\); name one of them"),
    "images and tables": (["a.png", "data/train.parquet"], {}, r"received both \(a.png, data/train.parquet\)"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_bad_folders(tmp_path, case: str) -> None:
    names, options, match = FOLDERS[case]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text("nothing is decoded yet")
    _refused(match, tmp_path, **options)


def test_paths_that_are_no_data(tmp_path) -> None:
    _refused("there is no file or folder", tmp_path / "nothing")
    _refused("there is no file or folder", Path("a\0b"))
    (tmp_path / "data.txt").write_text("x")
    _refused("expected a folder of images, a .csv, .parquet or .npz file.*received 'data.txt'", tmp_path / "data.txt")
    (tmp_path / "data.csv").write_text("")
    _refused(r"is empty \(0 bytes\)", tmp_path / "data.csv")


def test_images_that_cannot_be_read_are_named(tmp_path) -> None:
    _put(tmp_path, "cat/a.png", "cat/d.png")
    (tmp_path / "cat" / "b.jpg").write_bytes(_cut())
    (tmp_path / "cat" / "c.jpg").write_text("not a picture")
    source = open_source(tmp_path)
    (tmp_path / "cat" / "d.png").unlink()
    assert source.sample(0).id == "cat/a.png"
    for index, match in ((1, r"cat/b.jpg.*truncated"), (2, r"cat/c.jpg.*not an image"), (3, r"no file .*cat/d.png")):
        with pytest.raises(InputError, match=match):
            source.sample(index)


# -- labels --------------------------------------------------------------------------------------------------------------


def _labels(folder: Path, names: Sequence[str], classes: LoadedModel | None) -> dict[str, int]:
    """What folders of these names stand for."""
    source = open_source(_put(folder, *(f"{name}/a.png" for name in names)), classes=classes)
    return dict(zip([identity.partition("/")[0] for identity in source.ids], source.labels, strict=True))


def test_names_are_looked_up_among_the_models(tmp_path, demo, imagenet) -> None:
    assert _labels(tmp_path / "1", ["Cat", "airplane"], demo) == {"Cat": 3, "airplane": 0}
    assert _labels(tmp_path / "2", ["tabby cat", "Tinca tinca"], imagenet) == {"tabby cat": 281, "Tinca tinca": 0}


def test_wordnet_ids_are_imagenets_classes(tmp_path, imagenet, demo) -> None:
    wnids = {"n01440764": 0, "n02123045": 281, "n15075141": 999}
    assert _labels(tmp_path / "1", list(wnids), imagenet) == wnids
    assert _labels(tmp_path / "2", ["n02123045", "tench"], imagenet) == {"n02123045": 281, "tench": 0}
    _refused("of the 3 in '1', not among them are 'n01440764', 'n02123045'", tmp_path / "1", classes=demo)


def test_numbers_are_indices(tmp_path, demo) -> None:
    assert _labels(tmp_path / "1", ["7", "2", "05"], demo) == {"7": 7, "2": 2, "05": 5}
    assert _labels(tmp_path / "1", ["7", "2", "05"], None) == {"7": 7, "2": 2, "05": 5}
    ten = [str(number) for number in range(1, 11)]
    _put(tmp_path / "2", *(f"{number}/a.png" for number in ten))
    _refused("expected a class index from 0 to 9, received 10 for '10/a.png'", tmp_path / "2", classes=demo)


def test_names_count_in_order_where_nothing_else_is_known(tmp_path, demo) -> None:
    assert _labels(tmp_path / "1", ["b", "c", "a"], _classes(demo, 3, None)) == {"a": 0, "b": 1, "c": 2}
    assert _labels(tmp_path / "1", ["b", "c", "a"], None) == {"a": 0, "b": 1, "c": 2}
    assert _labels(tmp_path / "1", ["b", "c", "a"], _classes(demo, 3, ["x", "y", "z"])) == {"a": 0, "b": 1, "c": 2}


def test_empty_class_folders_are_numbered_too(tmp_path, demo) -> None:
    (tmp_path / "b").mkdir()
    assert _labels(tmp_path, ["a", "c"], _classes(demo, 3, None)) == {"a": 0, "c": 2}
    assert _labels(tmp_path, ["a", "c"], _classes(demo, 2, None)) == {"a": 0, "c": 1}
    assert _labels(tmp_path, ["a", "c"], _classes(demo, 9, ["a", "c", *"defghij"])) == {"a": 0, "c": 1}


def test_names_that_do_not_fit(tmp_path, demo, imagenet) -> None:
    _put(tmp_path / "1", *(f"{name}/a.png" for name in ("plane", *CIFAR[1:])))
    # The sorted order would call a bird 1 and the plane 8.
    _refused("such as 'airplane'.* model's 10 classes; of the 10 .*not among them are 'plane'$", tmp_path / "1", classes=demo)
    _put(tmp_path / "2", "crane/a.png", "tench/a.png", "no such thing/a.png")
    _refused("among them are 'no such thing'; names of several are 'crane'$", tmp_path / "2", classes=imagenet)
    _refused("names of exactly 7 classes, .*received 3 names", tmp_path / "2", classes=_classes(demo, 7, None))


def _npz_of(folder: Path, labels: object, class_names: Sequence[str] | None) -> Path:
    arrays = {} if class_names is None else {"class_names": np.array(class_names)}
    np.savez(folder / "d.npz", images=np.zeros((len(labels), 4, 4, 3), np.uint8), labels=np.array(labels), **arrays)
    return folder / "d.npz"


NAMED = {
    "another order": ([0, 1, 2], ["z", "y", "x"], ["x", "y", "z"], (2, 1, 0)),
    "a subset": ([0, 1, 1], ["z", "x"], ["x", "y", "z"], (2, 0, 0)),
    "other names": ([0, 1, 2], ["p", "q", "r"], ["x", "y", "z"], (0, 1, 2)),
    "other names, fewer": ([0, 1, 1], ["p", "q"], ["x", "y", "z"], (0, 1, 1)),
    "two names of a class": ([0, 1, 2, 2], ["z", "Z ", "x", "y"], ["x", "y", "z"], (2, 2, 0, 0)),
    "some known, in the model's order": ([0, 1, 2], ["x", "y", "r"], ["x", "y", "z"], (0, 1, 2)),
    "no names of the model": ([0, 2, 1], ["z", "y", "x"], None, (0, 2, 1)),
    "numbers": ([0, 1, 1], ["2", "0"], ["x", "y", "z"], (2, 0, 0)),
    "no names beside them": ([2, 0, 1], None, ["x", "y", "z"], (2, 0, 1)),
    "names as labels": (["z", "x", "y"], None, ["x", "y", "z"], (2, 0, 1)),
    "names as labels, in the order given": (["q", "p", "r"], ["r", "q", "p"], ["x", "y", "z"], (1, 2, 0)),
}


@pytest.mark.parametrize("case", NAMED)
def test_indices_with_names_beside_them(tmp_path, demo, case: str) -> None:
    labels, class_names, own, expected = NAMED[case]
    path = _npz_of(tmp_path, labels, class_names)
    assert open_source(path, classes=_classes(demo, 3, own)).labels == expected
    if isinstance(labels[0], int):
        assert open_source(path).labels == tuple(labels)


def test_indices_that_mean_nothing(tmp_path, demo) -> None:
    three = _classes(demo, 3, ["x", "y", "z"])
    _refused("not among them are 'q'", _npz_of(tmp_path, [0, 1], ["x", "q"]), classes=three)
    _refused("of the 3 in 'd.npz', not among them are 'r'", _npz_of(tmp_path, [0, 1], ["z", "y", "r"]), classes=three)
    _refused("expected one of 0, 1, received 2 for '000001'", _npz_of(tmp_path, [0, 2], ["x", "y"]), classes=three)
    _refused("index from 0 to 2, received 3 for '000001' in 'd.npz'", _npz_of(tmp_path, [0, 3], None), classes=three)
    _refused("index 0 or more, received -1 for '000001'", _npz_of(tmp_path, [0, -1], None))
    _refused("expected one of 'x', 'y', received 'q' for '000001'", _npz_of(tmp_path, ["x", "q"], ["x", "y"]))
    _refused(r"of integers or text .* received \(2,\) float64", _npz_of(tmp_path, [0.0, 1.0], None))


# -- tables --------------------------------------------------------------------------------------------------------------


def _table(folder: Path, columns: dict[str, list], kind: str) -> Path:
    path = folder / f"table.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table(columns), path)
    else:
        rows = [",".join(columns), *(",".join(map(str, row)) for row in zip(*columns.values(), strict=True))]
        path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_tables(tmp_path, demo, kind: str) -> None:
    _put(tmp_path, "b.png", "deep/a.jpg", "elsewhere/c.png")
    folder = tmp_path / "tables"
    folder.mkdir()
    paths = ["../b.png", str(tmp_path / "deep" / "a.jpg"), "./../elsewhere/c.png"]
    source = open_source(_table(folder, {"path": paths, "label": ["cat", "ship", "Cat"]}, kind), classes=demo)
    assert (source.kind, source.name) == (kind, f"table.{kind}")
    assert source.ids == ("../b.png", "../deep/a.jpg", "../elsewhere/c.png")
    assert source.labels == (3, 8, 3)
    assert _red(source) == [0, 1, 2]
    table = _table(folder, {"id": ["x", "y", "z"], "label": [7, 0, 9], "path": paths}, kind)
    assert open_source(table, classes=demo).ids == ("x", "y", "z")
    assert open_source(table, classes=demo).labels == open_source(table).labels == (7, 0, 9)
    assert open_source(_table(folder, {"path": paths}, kind)).labels is None


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_tables_with_masks(tmp_path, kind: str) -> None:
    _put(tmp_path, "a.png")
    mask = np.zeros((8, 12), np.uint8)
    mask[2:4, 5:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    source = open_source(_table(tmp_path, {"path": ["a.png"], "mask": ["mask.png"]}, kind))
    assert source.has_masks
    assert source.sample(0).mask.dtype == bool
    np.testing.assert_array_equal(source.sample(0).mask, mask > 0)
    Image.new("L", (8, 12)).save(tmp_path / "mask.png")
    with pytest.raises(InputError, match=r"size of the upright photo, 12 × 8, received 8 × 12 for 'a.png' in 'table"):
        source.sample(0)
    (tmp_path / "mask.png").write_bytes(_cut())
    with pytest.raises(InputError, match=r"^mask: cannot read .*mask.png.*truncated"):
        source.sample(0)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_csv_with_and_without_a_mark_of_byte_order(tmp_path, demo, encoding: str) -> None:
    _put(tmp_path, "é, ü.png")
    (tmp_path / "t.csv").write_bytes('path, label\r\n"é, ü.png", dog \r\n\r\n'.encode(encoding))
    source = open_source(tmp_path / "t.csv", classes=demo)
    assert (source.ids, source.labels) == (("é, ü.png",), (5,))
    (tmp_path / "t.csv").write_bytes('path, label\r\n"é, ü.png", 7 \r\n'.encode(encoding))
    assert open_source(tmp_path / "t.csv", classes=demo).labels == (7,)


def test_parquet_as_pandas_and_others_write_it(tmp_path, demo) -> None:
    _put(tmp_path, "a.png", "b.png")
    columns = {
        "path": pa.array(["a.png", "b.png"], pa.large_string()),
        "label": pa.array(["cat", "dog"]).dictionary_encode(),
        "__index_level_0__": [5, 6],
    }
    assert open_source(_table(tmp_path, columns, "parquet"), classes=demo).labels == (3, 5)
    small = {"path": ["a.png", "b.png"], "label": pa.array([3, 5], pa.uint8()), "mask": pa.nulls(2, pa.string())}
    source = open_source(_table(tmp_path, small, "parquet"), classes=demo)
    assert (source.labels, source.has_masks) == ((3, 5), False)


def test_a_label_column_with_nothing_in_it(tmp_path) -> None:
    _put(tmp_path, "a.png")
    (tmp_path / "t.csv").write_text("path,label\na.png,\n")
    assert open_source(tmp_path / "t.csv").labels is None


CSVS = {
    "another delimiter": (
        "path;label\na.png;1\n",
        "columns path and, if wanted, label, mask, id in 't.csv', received path;label",
    ),
    "no path": ("label\n1\n", "received label"),
    "unknown": ("path,label,colour\na.png,1,red\n", "received path, label, colour"),
    "twice": ("path,path\na.png,a.png\n", "received path, path"),
    "no columns": ("\n\n", "received none"),
    "no rows": ("path,label\n", "expected images in .* received none"),
    "short row": ("path,label\na.png,1\na.png\n", "expected 2 values in row 2 of 't.csv', received 1"),
    "long row": ("path,label\na.png,1,2\n", "expected 2 values in row 1 of 't.csv', received 3"),
    "some labels": (
        "path,label\na.png,1\na.png,\n",
        "expected a label in every row of 't.csv' or in none, received none in row 2",
    ),
    "some paths": ("path,label\n,1\na.png,1\n,1\n", "expected a path in every row .* rows 1, 3"),
    "some masks": ("path,mask\na.png,a.png\na.png,\n", "expected a mask in every row"),
    "missing file": ("path\na.png\nb.png\n", "files named in 't.csv' do not exist: '.*b.png'"),
    "missing mask": ("path,mask\na.png,c.png\n", "do not exist: '.*c.png'"),
    "ids twice": ("path,id\na.png,x\na.png,y\na.png,x\n", "id: expected each once in 't.csv', received several times 'x'"),
    "quotes": ('path\n"a.png\n', "as a table in UTF-8: unexpected end of data"),
    "encoding": (b"path\n\xe9.png\n", "as a table in UTF-8: "),
}


@pytest.mark.parametrize("case", CSVS)
def test_bad_csv(tmp_path, case: str) -> None:
    text, match = CSVS[case]
    _put(tmp_path, "a.png")
    (tmp_path / "t.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    _refused(match, tmp_path / "t.csv")


def test_only_files_that_are_wanted_must_exist(tmp_path) -> None:
    _put(tmp_path, "a.png")
    (tmp_path / "t.csv").write_text("path\na.png\nb.png\n")
    assert open_source(tmp_path / "t.csv", images=":1").ids == ("a.png",)
    _refused("do not exist", tmp_path / "t.csv", images="1:")


def test_the_same_path_twice_gets_ids_of_its_own(tmp_path) -> None:
    _put(tmp_path, "a.png")
    (tmp_path / "t.csv").write_text("path\na.png\n./a.png\na.png\n")
    assert open_source(tmp_path / "t.csv").ids == ("a.png", "a.png #2", "a.png #3")


PARQUETS = {
    "no path": ({"file": ["a.png"], "label": [1]}, "^data: expected the columns path and, .* received file, label$"),
    "images inside": ({"image": [b"x"], "label": [1]}, "received image, label; name the folder of a Hugging Face dataset"),
    "numbers for paths": ({"path": [1]}, "expected text in the column path .* received 1"),
    "fractions": ({"path": ["a.png"], "label": [1.0]}, r"expected class indices or names .* received 1.0 \(float\)"),
    "truth values": ({"path": ["a.png"], "label": [True]}, r"received True \(bool\)"),
    "some labels": ({"path": ["a.png"] * 2, "label": [None, 1]}, "expected a label in every row .* row 1"),
    "ids twice": ({"path": ["a.png"] * 2, "id": [1, 1]}, "received several times '1'"),
}


@pytest.mark.parametrize("case", PARQUETS)
def test_bad_parquet(tmp_path, case: str) -> None:
    columns, match = PARQUETS[case]
    _put(tmp_path, "a.png")
    _refused(match, _table(tmp_path, columns, "parquet"))


def test_parquet_that_cannot_be_read(tmp_path, monkeypatch) -> None:
    (tmp_path / "t.parquet").write_bytes(b"PAR1 and nothing more")
    _refused("data: cannot read .*t.parquet", tmp_path / "t.parquet")
    for name in [name for name in sys.modules if name.partition(".")[0] == "pyarrow"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    _refused(r"'t.parquet' needs pyarrow.*pip install 'vitexplain\[evaluate\]'", tmp_path / "t.parquet")


@pytest.mark.parametrize("kind", ["csv", "npz", "parquet"])
def test_files_have_no_splits(tmp_path, kind: str) -> None:
    _put(tmp_path, "a.png")
    _npz_of(tmp_path, [1], None).rename(tmp_path / "table.npz")
    if kind != "npz":
        _table(tmp_path, {"path": ["a.png"]}, kind)
    _refused(f"expected none, as 'table.{kind}' has no splits, received 'train'", tmp_path / f"table.{kind}", split="train")


# -- masks ---------------------------------------------------------------------------------------------------------------

_FOREGROUND = np.arange(80).reshape(8, 10) % 3 == 0


def _palette(first: tuple[int, ...], second: tuple[int, ...]) -> Image.Image:
    image = Image.fromarray(_FOREGROUND.astype(np.uint8), "L")
    image.putpalette([*first, *second])
    return image


MASKS: dict[str, Callable[[], Image.Image]] = {
    "0/255": lambda: Image.fromarray(_FOREGROUND.astype(np.uint8) * 255),
    "0/1": lambda: Image.fromarray(_FOREGROUND.astype(np.uint8)),
    "127/128": lambda: Image.fromarray(np.where(_FOREGROUND, 128, 127).astype(np.uint8)),
    "one bit": lambda: Image.fromarray(_FOREGROUND),
    "16 bits": lambda: Image.fromarray(np.where(_FOREGROUND, 40000, 30000).astype(np.uint16)),
    "0/1 in 16 bits": lambda: Image.fromarray(_FOREGROUND.astype(np.uint16)),
    "0/255 in 32 bits": lambda: Image.fromarray(_FOREGROUND.astype(np.int32) * 255),
    "floats": lambda: Image.fromarray(np.where(_FOREGROUND, 0.6, 0.4).astype(np.float32)),
    "not a number": lambda: Image.fromarray(np.where(_FOREGROUND, 1, np.nan).astype(np.float32)),
    "white on black": lambda: Image.fromarray(_FOREGROUND.astype(np.uint8) * 255).convert("RGB"),
    "red on black": lambda: Image.fromarray(_FOREGROUND[..., None] * np.array([255, 0, 0], np.uint8)),
    "palette": lambda: _palette((0, 0, 0), (128, 0, 0)),
    "reversed palette": lambda: Image.fromarray(_FOREGROUND.astype(np.uint8) * 255).quantize(2),
    "alpha": lambda: Image.fromarray(
        np.concatenate([np.full((8, 10, 3), 255, np.uint8), _FOREGROUND[..., None] * np.uint8(255)], -1)
    ),
}


@pytest.mark.parametrize("case", MASKS)
def test_masks_of_every_kind(case: str) -> None:
    found = foreground(MASKS[case]())
    assert found.dtype == bool
    np.testing.assert_array_equal(found, _FOREGROUND)


def test_a_mask_without_foreground() -> None:
    assert not foreground(Image.new("L", (4, 3))).any()
    assert foreground(Image.new("L", (4, 3), 255)).all()


# -- .npz ----------------------------------------------------------------------------------------------------------------


def _encoded(images: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    return np.frombuffer(b"".join(images), np.uint8), np.cumsum([0, *map(len, images)])


def _pictures(count: int) -> tuple[np.ndarray, np.ndarray]:
    return _encoded([_bytes(_picture(10 * index), "JPEG", quality=100) for index in range(count)])


def test_npz_of_encoded_images(tmp_path, demo) -> None:
    jpeg, offsets = _pictures(3)
    mask = _bytes(Image.fromarray(np.full((8, 12), 255, np.uint8)))
    mask_png, mask_offsets = _encoded([mask, _bytes(Image.new("L", (12, 8))), _bytes(Image.new("L", (8, 12)))])
    np.savez(
        tmp_path / "d.npz", jpeg=jpeg, offsets=offsets, labels=np.array([1, 2, 9], np.uint8),
        mask_png=mask_png, mask_offsets=mask_offsets, ids=np.array(["a", "b", "c"]),
    )  # fmt: skip
    source = open_source(tmp_path / "d.npz", classes=demo)
    assert (source.kind, source.name, source.split, source.has_masks) == ("npz", "d.npz", None, True)
    assert (source.ids, source.labels) == (("a", "b", "c"), (1, 2, 9))
    assert source.sample(1).photo.getpixel((0, 0))[0] == pytest.approx(10, abs=2)
    assert source.sample(0).mask.all()
    assert not source.sample(1).mask.any()
    with pytest.raises(InputError, match=r"12 × 8, received 8 × 12 for 'c' in 'd.npz'"):
        source.sample(2)


def test_npz_of_splits(tmp_path, demo) -> None:
    train, train_offsets = _pictures(3)
    test, test_offsets = _encoded([_cut()])
    np.savez_compressed(
        tmp_path / "d.npz", train_jpeg=train, train_offsets=train_offsets, train_labels=[0, 1, 1], test_jpeg=test,
        test_offsets=test_offsets, test_labels=[1], class_names=["ship", "cat"],
    )  # fmt: skip
    source = open_source(tmp_path / "d.npz", split="train")
    assert (source.split, source.labels, _red(source)) == ("train", (0, 1, 1), [0, 1, 2])
    assert open_source(tmp_path / "d.npz", split="train", classes=demo).labels == (8, 3, 3)
    held_out = open_source(tmp_path / "d.npz", split="test")
    with pytest.raises(InputError, match=r"^photo: cannot read '000000' in 'd.npz': .*truncated"):
        held_out.sample(0)
    _refused("expected one of train, test, which 'd.npz' has; received none", tmp_path / "d.npz")
    _refused("expected one of train, test, which 'd.npz' has; received 'val'", tmp_path / "d.npz", split="val")


def test_npz_of_pixels(tmp_path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), dtype=np.uint8)
    np.savez(tmp_path / "d.npz", images=pixels, names=["crane", "crane"])
    source = open_source(tmp_path / "d.npz")
    assert (source.ids, source.labels) == (("crane", "crane #2"), None)
    np.testing.assert_array_equal(np.asarray(source.sample(1).photo), pixels[1])
    np.savez(tmp_path / "d.npz", images=pixels, names=["cat", "dog", "ship"])
    assert open_source(tmp_path / "d.npz").ids == ("000000", "000001")


_JPEG, _OFFSETS = np.zeros(9, np.uint8), np.array([0, 4, 9])
NPZS = {
    "other arrays": (dict(x=[1], y=[2]), "expected jpeg and offsets, .*received x, y"),
    "nothing": ({}, "received nothing"),
    "no images": (dict(jpeg=_JPEG, offsets=np.array([0])), "expected images in .* received none"),
    "no offsets": (dict(jpeg=_JPEG), "expected offsets beside jpeg in 'd.npz', received jpeg"),
    "no mask offsets": (dict(jpeg=_JPEG, offsets=_OFFSETS, mask_png=_JPEG), "expected mask_offsets beside mask_png"),
    "too far": (dict(jpeg=_JPEG, offsets=_OFFSETS + 1), "offsets that rise from 0 to at most 9 .* from 1 to 10"),
    "falling": (dict(jpeg=_JPEG, offsets=_OFFSETS[::-1]), "offsets that rise"),
    "fractions": (dict(jpeg=_JPEG, offsets=_OFFSETS * 1.0), r"of integers .* received \(3,\) float64"),
    "wide bytes": (dict(jpeg=_JPEG.astype(int), offsets=_OFFSETS), r"jpeg \(bytes,\) uint8 .* received \(9,\) int64"),
    "fewer labels": (dict(jpeg=_JPEG, offsets=_OFFSETS, labels=[1]), r"expected labels \(2,\) .* received \(1,\) int64"),
    "fewer masks": (
        dict(jpeg=_JPEG, offsets=_OFFSETS, mask_png=_JPEG, mask_offsets=[0, 9]),
        "expected 2 masks in 'd.npz', one an image, received 1",
    ),
    "fewer ids": (dict(jpeg=_JPEG, offsets=_OFFSETS, ids=["a"]), r"expected ids \(2,\)"),
    "ids twice": (dict(jpeg=_JPEG, offsets=_OFFSETS, ids=[3, 3]), "received several times '3'"),
    "float pixels": (dict(images=np.zeros((1, 4, 4, 3))), r"images \(n, h, w, 3\) uint8 .* received \(1, 4, 4, 3\) float64"),
    "grey pixels": (dict(images=np.zeros((1, 4, 4), np.uint8)), r"received \(1, 4, 4\) uint8"),
    "objects": (dict(images=np.array([{}, []], object)), "cannot read .*d.npz"),
}


@pytest.mark.parametrize("case", NPZS)
def test_bad_npz(tmp_path, case: str) -> None:
    arrays, match = NPZS[case]
    np.savez(tmp_path / "d.npz", **arrays)
    _refused(match, tmp_path / "d.npz")


def test_files_that_are_no_npz(tmp_path) -> None:
    (tmp_path / "text.npz").write_text("not an archive")
    (tmp_path / "pickle.npz").write_bytes(pickle.dumps([1, 2]))
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    cut = _npz_of(tmp_path, [1, 2], None).read_bytes()
    (tmp_path / "d.npz").write_bytes(cut[: len(cut) // 2])
    for name in ("text.npz", "pickle.npz", "array.npz", "d.npz"):
        _refused(f"data: cannot read .*{name}.*not a zip file", tmp_path / name)


@pytest.mark.parametrize(
    ("name", "split", "count", "first"),
    [
        ("imagenet_sample_500", None, 500, ("great white shark", 2)),
        ("ecssd_500", None, 500, ("0002", None)),
        ("cifar10_jpeg", "test", 10_000, ("000000", 3)),
        ("cifar10_exact_test1017", None, 1017, ("000000", 3)),
    ],
)
def test_real_npz(shared, demo, imagenet, name: str, split: str | None, count: int, first: tuple[str, int | None]) -> None:
    classes = demo if "cifar" in name else imagenet
    source = open_source(shared(f"data/{name}.npz"), split=split, classes=classes)
    assert len(source) == count
    samples = [source.sample(index) for index in (0, count // 2, count - 1)]
    assert (samples[0].id, samples[0].label) == first
    assert all(sample.photo.mode == "RGB" for sample in samples)
    assert source.has_masks == (name == "ecssd_500")
    for sample in samples:
        assert (sample.mask is not None) == source.has_masks
        if sample.mask is not None:
            assert 0.01 < sample.mask.mean() < 0.9


# -- Hugging Face --------------------------------------------------------------------------------------------------------


@pytest.fixture
def library(tmp_path, monkeypatch):
    """The ``datasets`` package with a cache of its own, bars on as users have them, and no way out."""
    datasets = pytest.importorskip("datasets", reason="needs the extra huggingface")

    def refuse(*_: object) -> None:
        raise AssertionError("reading a local dataset must not reach for the network")

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return datasets


def _dataset(library, count: int = 3, names: Sequence[str] = ("ship", "cat", "dog"), image: str = "image", **more: object):
    features = {image: library.Image(), "label": library.ClassLabel(names=list(names))}
    columns = {image: [_picture(10 * index) for index in range(count)], "label": [index % len(names) for index in range(count)]}
    features |= {name: feature for name, (feature, _) in more.items()}
    columns |= {name: values for name, (_, values) in more.items()}
    return library.Dataset.from_dict(columns, features=library.Features(features))


def test_a_saved_dataset(tmp_path, library, demo, capfd) -> None:
    _dataset(library).with_format("numpy").save_to_disk(tmp_path / "saved")
    capfd.readouterr()
    source = open_source(tmp_path / "saved", classes=demo)
    assert (source.kind, source.name, source.split, source.has_masks) == ("huggingface", "saved", None, False)
    assert source.ids == ("000000", "000001", "000002")
    assert source.labels == (8, 3, 5)
    assert _red(source) == [0, 1, 2]
    assert open_source(tmp_path / "saved").labels == (0, 1, 2)
    _refused("expected none, as 'saved' has no splits, received 'train'", tmp_path / "saved", split="train")
    assert capfd.readouterr() == ("", "")
    assert not library.are_progress_bars_disabled()


def test_saved_splits(tmp_path, library) -> None:
    library.DatasetDict(train=_dataset(library), test=_dataset(library, 2)).save_to_disk(tmp_path / "saved")
    assert [len(open_source(tmp_path / "saved", split=split)) for split in ("train", "test")] == [3, 2]
    assert open_source(tmp_path / "saved", split="test").split == "test"
    assert len(open_source(tmp_path / "saved" / "test")) == 2
    _refused("expected one of train, test, which 'saved' has; received none", tmp_path / "saved")
    _refused("expected one of train, test, which 'saved' has; received 'val'", tmp_path / "saved", split="val")


def test_parquet_files_as_on_the_hub(tmp_path, library, demo, capfd) -> None:
    hub = tmp_path / "hub [1]"
    (hub / "data").mkdir(parents=True)
    data = _dataset(library)
    data.select([0]).to_parquet(hub / "data" / "train-00000-of-00002.parquet")
    data.select([1, 2]).to_parquet(hub / "data" / "train-00001-of-00002.parquet")
    data.select([2]).to_parquet(hub / "data" / "test-00000-of-00001-0123456789abcdef.parquet")
    (hub / "README.md").write_text("---\nconfigs:\n- config_name: x\n  data_files: https://example.org/x.parquet\n---\n")
    capfd.readouterr()
    source = open_source(hub, split="train", classes=demo)
    assert (source.kind, source.split, source.labels, _red(source)) == ("huggingface", "train", (8, 3, 5), [0, 1, 2])
    assert _red(open_source(hub, split="test")) == [2]
    assert capfd.readouterr() == ("", "")
    _refused("expected one of test, train, which 'hub .1.' has; received none", hub)


def test_parquet_files_in_folders_of_splits_and_configurations(tmp_path, library) -> None:
    for name in ("a/train/0000.parquet", "a/train/0001.parquet", "a/test/0000.parquet", "b/train/0000.parquet"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        _dataset(library, 1).to_parquet(tmp_path / name)
    assert len(open_source(tmp_path / "a", split="train")) == 2
    assert open_source(tmp_path / "b").split == open_source(tmp_path / "b" / "train").split == "train"
    _refused(r"received several configurations \(a/train, b/train\); name the folder of one", tmp_path, split="train")


@pytest.mark.usefixtures("library")
def test_plain_parquet_with_images_inside(tmp_path, demo) -> None:
    images = [{"bytes": _bytes(_picture(10 * index)), "path": None} for index in range(2)]
    pq.write_table(pa.table({"img": images, "fine_label": [5, 3], "coarse_label": [0, 1]}), tmp_path / "train.parquet")
    source = open_source(tmp_path, classes=demo)
    assert (source.labels, _red(source)) == ((5, 3), [0, 1])
    _put(tmp_path / "b", "a.png")
    (tmp_path / "b" / "a.png").rename(tmp_path / "a")
    table = {"x": [{"bytes": None, "path": str(tmp_path / "a")}, {"bytes": None, "path": None}], "label": ["cat", "dog"]}
    (tmp_path / "c").mkdir()
    pq.write_table(pa.table(table), tmp_path / "c" / "train.parquet")
    source = open_source(tmp_path / "c", classes=demo)
    assert source.labels == (3, 5)
    assert source.sample(0).photo.size == (12, 8)
    with pytest.raises(InputError, match="photo: expected an image, received none for '000001' in 'c'"):
        source.sample(1)


def test_columns_of_a_dataset(tmp_path, library) -> None:
    grey = [Image.new("L", (12, 8), 255)] * 3
    masked = _dataset(library, image="photo", annotation=(library.Image(), grey))
    masked.remove_columns("label").save_to_disk(tmp_path / "masked")
    source = open_source(tmp_path / "masked")
    assert (source.has_masks, source.has_labels, _red(source)) == (True, False, [0, 1, 2])
    assert source.sample(1).mask.all()
    _dataset(library, depth=(library.Image(), grey), mask=(library.Image(), grey)).save_to_disk(tmp_path / "several")
    assert _red(open_source(tmp_path / "several")) == [0, 1, 2]
    assert open_source(tmp_path / "several").has_masks
    _dataset(library, image="a", b=(library.Image(), grey)).save_to_disk(tmp_path / "unclear")
    _refused("one column of images in 'unclear', or one named image; received a .*, label .*, b ", tmp_path / "unclear")
    _dataset(library).remove_columns("image").save_to_disk(tmp_path / "none")
    _refused(r"one column of images in 'none'.* received label \(int64\)", tmp_path / "none")
    _dataset(library).rename_column("label", "species").save_to_disk(tmp_path / "species")
    assert open_source(tmp_path / "species").labels == (0, 1, 2)


def test_labels_of_a_dataset_that_are_not_given(tmp_path, library) -> None:
    features = library.Features({"image": library.Image(), "label": library.ClassLabel(names=["a", "b"])})
    for name, labels in (("none", [-1, -1]), ("null", [None, None]), ("some", [1, -1])):
        columns = {"image": [_picture(0)] * 2, "label": labels}
        library.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / name)
    assert open_source(tmp_path / "none").labels is open_source(tmp_path / "null").labels is None
    _refused("received -1 for '000001' in 'some'", tmp_path / "some")


def test_datasets_that_cannot_be_read(tmp_path, library, monkeypatch) -> None:
    _dataset(library).save_to_disk(tmp_path / "cut")
    for file in (tmp_path / "cut").glob("*.arrow"):
        file.write_bytes(b"not an arrow file")
    _refused("cannot read .* as a Hugging Face dataset", tmp_path / "cut")
    (tmp_path / "noise").mkdir()
    (tmp_path / "noise" / "train.parquet").write_bytes(b"PAR1 and nothing more")
    _refused("cannot read .* as a Hugging Face dataset: Parquet magic bytes not found", tmp_path / "noise")
    columns = {"image": [{"bytes": content, "path": None} for content in (_cut(), b"")]}
    library.Dataset.from_dict(columns, features=library.Features({"image": library.Image()})).save_to_disk(tmp_path / "images")
    with pytest.raises(InputError, match=r"cannot read '000000' in 'images': .*truncated"):
        open_source(tmp_path / "images").sample(0)
    with pytest.raises(InputError, match=r"'000001' in 'images' is not an image"):
        open_source(tmp_path / "images").sample(1)
    monkeypatch.setitem(sys.modules, "datasets", None)
    _refused(r"'images' needs datasets, .*pip install 'vitexplain\[huggingface\]'", tmp_path / "images")


# -- views, fingerprints, workers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["0:64", "::2", "100:", ":-1", " 1 : 5 : 2 ", "::-1", ":"])
def test_slices(text: str) -> None:
    assert list(range(200))[parse_slice(text)] == eval(f"list(range(200))[{text}]")


@pytest.mark.parametrize("text", ["", "5", "a:b", "1:2:3:4", "0-64", "1.5:", "-:", "::0", "1_0:"])
def test_bad_slices(tmp_path, text: str) -> None:
    with pytest.raises(InputError, match=f"^images: expected a .*received {text!r}"):
        open_source(tmp_path / "is not looked at", images=text)


def test_select(tmp_path, demo) -> None:
    _put(tmp_path, "cat/a.png", "cat/b.png", "dog/c.png", "dog/d.png", "frog/e.png")
    source = open_source(tmp_path, classes=demo)
    half = source.select(slice(None, None, 2))
    assert (half.ids, half.labels, _red(half)) == (("cat/a.png", "dog/c.png", "frog/e.png"), (3, 5, 6), [0, 2, 4])
    last = half.select(slice(-2, None))
    assert (last.ids, last.labels, _red(last)) == (("dog/c.png", "frog/e.png"), (5, 6), [2, 4])
    assert open_source(tmp_path, images="::2", classes=demo).ids == half.ids
    assert len(source) == 5
    assert len(source.select(slice(3, 64))) == 2
    for nothing in (slice(5, None), slice(2, 2)):
        with pytest.raises(InputError, match=r"a slice that leaves some of the 5 in .*received slice"):
            source.select(nothing)
    _refused("leaves some of the 5", tmp_path, images="9:")
    with pytest.raises(IndexError):
        last.sample(2)


def test_fingerprints_of_files(tmp_path) -> None:
    _put(tmp_path, "a.png", "b.png", "m.png")
    table = tmp_path / "t.csv"
    table.write_text("path,label,mask\na.png,1,m.png\nb.png,2,m.png\n")

    def now() -> str:
        return open_source(table).fingerprint()

    seen = [now()]
    assert now() == seen[0]
    assert len(seen[0]) == 64
    assert open_source(table).select(slice(0, 1)).fingerprint() != seen[0]
    for change in (
        lambda: table.write_text("path,label,mask\na.png,1,m.png\nb.png,3,m.png\n"),
        lambda: table.write_text("path,label,mask\nb.png,3,m.png\na.png,1,m.png\n"),
        lambda: table.write_text("path,label\nb.png,3\na.png,1\n"),
        lambda: table.write_text("path,label,mask\nb.png,3,m.png\na.png,1,m.png\n"),
        lambda: os.utime(tmp_path / "a.png", (1, 1)),
        lambda: os.utime(tmp_path / "m.png", (1, 1)),
        lambda: (_picture(0, (90, 90)).save(tmp_path / "a.png"), os.utime(tmp_path / "a.png", (1, 1))),
    ):
        change()
        seen.append(now())
    assert seen[2] == seen[4]
    assert len(set(seen)) == len(seen) - 1
    first = open_source(table).select(slice(0, 1))
    before = first.fingerprint()
    os.utime(tmp_path / "a.png", (2, 2))  # the other photo
    assert first.fingerprint() == before
    (tmp_path / "b.png").unlink()
    assert first.fingerprint() != before


def test_the_fingerprint_of_a_folder_does_not_read_images(tmp_path) -> None:
    _put(tmp_path, "cat/a.png")
    source = open_source(tmp_path)
    before, stamp = source.fingerprint(), (tmp_path / "cat" / "a.png").stat()
    (tmp_path / "cat" / "a.png").write_bytes(bytes(stamp.st_size))
    os.utime(tmp_path / "cat" / "a.png", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert source.fingerprint() == before
    (tmp_path / "cat" / "a.png").rename(tmp_path / "cat" / "b.png")
    assert open_source(tmp_path).fingerprint() != before


def test_fingerprints_of_npz(tmp_path) -> None:
    images = np.zeros((2, 4, 4, 3), np.uint8)
    np.savez(tmp_path / "d.npz", a_images=images, b_images=images)
    stamp = (tmp_path / "d.npz").stat()
    parts = [open_source(tmp_path / "d.npz", split=split).fingerprint() for split in ("a", "b")]
    assert parts[0] != parts[1]
    assert open_source(tmp_path / "d.npz", split="a").fingerprint() == parts[0]
    os.utime(tmp_path / "d.npz", (1, 1))
    assert open_source(tmp_path / "d.npz", split="a").fingerprint() == parts[0]
    images[1, 2, 2, 0] = 1
    np.savez(tmp_path / "d.npz", a_images=images, b_images=images)
    os.utime(tmp_path / "d.npz", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert (tmp_path / "d.npz").stat().st_size == stamp.st_size
    assert open_source(tmp_path / "d.npz", split="a").fingerprint() != parts[0]


def test_fingerprints_of_datasets(tmp_path, library) -> None:
    _dataset(library).save_to_disk(tmp_path / "saved")
    before = open_source(tmp_path / "saved").fingerprint()
    assert open_source(tmp_path / "saved").fingerprint() == before
    os.utime(next((tmp_path / "saved").glob("*.arrow")), (1, 1))
    assert open_source(tmp_path / "saved").fingerprint() != before
    (tmp_path / "hub").mkdir()
    _dataset(library).to_parquet(tmp_path / "hub" / "train.parquet")
    before = open_source(tmp_path / "hub").fingerprint()
    library.config.HF_DATASETS_CACHE = tmp_path / "another cache"
    assert open_source(tmp_path / "hub").fingerprint() == before
    _dataset(library, 2).to_parquet(tmp_path / "hub" / "train.parquet")
    changed = open_source(tmp_path / "hub")
    assert len(changed) == 2, "the copy in the cache is out of date"
    assert changed.fingerprint() != before


class _Reds:
    """As an evaluation reads a source."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> int:
        return round(self.source.sample(index).photo.getpixel((3, 3))[0] / 10)


def _every_kind(folder: Path, library) -> Iterator[Source]:
    _put(folder / "images", *(f"{index}.png" for index in range(4)))
    yield open_source(folder / "images")
    jpeg, offsets = _pictures(4)
    np.savez(folder / "d.npz", jpeg=jpeg, offsets=offsets)
    yield open_source(folder / "d.npz")
    _dataset(library, 4).save_to_disk(folder / "saved")
    yield open_source(folder / "saved")
    (folder / "hub").mkdir()
    _dataset(library, 4).to_parquet(folder / "hub" / "train.parquet")
    yield open_source(folder / "hub")


def test_sources_can_be_read_in_other_processes(tmp_path, library) -> None:
    for source in _every_kind(tmp_path, library):
        assert _red(source) == [0, 1, 2, 3]
        view = pickle.loads(pickle.dumps(source.select(slice(1, None))))
        assert _red(view) == [1, 2, 3], source.kind
        assert view.fingerprint() == source.select(slice(1, None)).fingerprint()
        assert [int(red) for red in DataLoader(_Reds(source), batch_size=None, num_workers=1)] == [0, 1, 2, 3], source.kind
