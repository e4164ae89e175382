"""Folders of images: what comes back, and what is refused in one line."""

from __future__ import annotations

import os
import tracemalloc

import pytest
from PIL import features

from vitexplain import InputError
from vitexplain.sources import open_source

from .made import cut_photo, put, reds, refused

OTHERS = [suffix for suffix, codec in (("avif", "avif"), ("jp2", "jpg_2000")) if features.check(codec)]


def test_class_folders(tmp_path, demo) -> None:
    put(tmp_path, "dog/b.png", "cat/deep/er/c.JPG", "cat/a.jpeg", "cat/.hidden.png", ".git/d.png")
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / "empty").mkdir()
    source = open_source(tmp_path, classes=demo)
    assert (source.kind, source.name, source.split) == ("imagefolder", tmp_path.name, None)
    assert source.ids == ("cat/a.jpeg", "cat/deep/er/c.JPG", "dog/b.png")
    assert source.labels == (3, 3, 5)
    assert (source.has_labels, source.has_masks, len(source)) == (True, False, 3)
    assert reds(source) == [2, 1, 0]
    sample = source.sample(2)
    assert (sample.id, sample.label, sample.mask, sample.photo.mode, sample.photo.size) == ("dog/b.png", 5, None, "RGB", (12, 8))


@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "PNG", "webp", "bmp", "tif", "tiff", "gif", "ppm", "jfif", "pgm", *OTHERS])
def test_a_flat_folder_of_images(tmp_path, suffix: str) -> None:
    source = open_source(put(tmp_path, f"b.{suffix}", f"a.{suffix}"))
    assert (source.kind, source.ids, source.labels, source.has_labels) == ("folder", (f"a.{suffix}", f"b.{suffix}"), None, False)
    assert source.sample(0).label is None
    assert source.sample(0).photo.mode == "RGB"


def test_class_folders_can_be_links(tmp_path, demo) -> None:
    put(tmp_path / "elsewhere", "a.png")
    (tmp_path / "data" / "cat").mkdir(parents=True)
    (tmp_path / "data" / "dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "cat" / "b.png").symlink_to(tmp_path / "elsewhere" / "a.png")
    source = open_source(tmp_path / "data", classes=demo)
    assert (source.ids, source.labels, reds(source)) == (("cat/b.png", "dog/a.png"), (3, 5), [0, 0])


def test_links_that_lead_in_a_circle(tmp_path) -> None:
    put(tmp_path / "data", "cat/a.png", "dog/deep/b.png")
    (tmp_path / "data" / "cat" / "self").symlink_to(tmp_path / "data" / "cat")
    (tmp_path / "data" / "dog" / "deep" / "up").symlink_to("..")
    (tmp_path / "data" / "all").symlink_to(".")
    (tmp_path / "data" / "bird").symlink_to("dog")
    source = open_source(tmp_path / "data")
    assert source.ids == ("bird/deep/b.png", "cat/a.png", "dog/deep/b.png"), "a folder may be there twice, but not in itself"
    assert source.labels == (0, 1, 2)


def test_images_come_folder_by_folder(tmp_path) -> None:
    names = ["a b/x.png", "a/x.png", "a/b/x.png", "a/b!.png", "a-b/x.png", "a/b.png"]
    assert open_source(put(tmp_path, *names)).ids == tuple(sorted(names, key=lambda name: name.split("/")))


def test_many_files_take_little_memory(tmp_path) -> None:
    put(tmp_path, "a.png")
    count = 2000
    (tmp_path / "data" / "n01440764").mkdir(parents=True)
    for index in range(count):
        os.link(tmp_path / "a.png", tmp_path / "data" / "n01440764" / f"n01440764_{index:08d}.png")
    lines = ["path", *(f"data/n01440764/n01440764_{index:08d}.png" for index in range(count))]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    for path in (tmp_path / "data", tmp_path / "t.csv"):
        open_source(path)
        tracemalloc.start()
        try:
            source = open_source(path)
            source.fingerprint()
            held = tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()
        assert len(source) == count
        assert held < 200 * count


def test_train_is_a_class_where_its_images_lie_in_it(tmp_path) -> None:
    assert open_source(put(tmp_path, "train/a.png")).labels == (0,)


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
    refused(match, tmp_path, **options)


def test_images_that_cannot_be_read_are_named(tmp_path) -> None:
    put(tmp_path, "cat/a.png", "cat/d.png")
    (tmp_path / "cat" / "b.jpg").write_bytes(cut_photo())
    (tmp_path / "cat" / "c.jpg").write_text("not a picture")
    source = open_source(tmp_path)
    (tmp_path / "cat" / "d.png").unlink()
    assert source.sample(0).id == "cat/a.png"
    for index, match in ((1, r"cat/b.jpg.*truncated"), (2, r"cat/c.jpg.*not an image"), (3, r"no file .*cat/d.png")):
        with pytest.raises(InputError, match=match):
            source.sample(index)
