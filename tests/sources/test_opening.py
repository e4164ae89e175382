"""Which kind of data a path is, and what is refused of every kind."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from vitexplain.sources import open_source

from .made import make_dataset, make_table, npz_of, picture, put, refused


def test_photos_are_upright(tmp_path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(0, (40, 20)).save(tmp_path / "turned.jpg", exif=exif)
    Image.new("L", (20, 40), 255).save(tmp_path / "mask.png")
    (tmp_path / "table.csv").write_text("path,mask\nturned.jpg,mask.png\n")
    sample = open_source(tmp_path / "table.csv").sample(0)
    assert sample.photo.size == (20, 40)
    assert sample.mask.shape == (40, 20)


def test_paths_that_are_no_data(tmp_path) -> None:
    refused("there is no file or folder", tmp_path / "nothing")
    refused("there is no file or folder", Path("a\0b"))
    (tmp_path / "data.txt").write_text("x")
    refused("expected a folder of images, a .csv, .parquet or .npz file.*received 'data.txt'", tmp_path / "data.txt")
    (tmp_path / "data.csv").write_text("")
    refused(r"is empty \(0 bytes\)", tmp_path / "data.csv")


@pytest.mark.parametrize("address", ["s3://bucket/photos", "https://host/a.tar", Path("s3://bucket/photos")])
def test_addresses_are_no_paths(address) -> None:
    text = str(address).replace("s3:/b", "s3://b")
    refused(f"expected a path of a file system, received the address '{text}'", address)


def test_a_location_behind_a_link_is_one_that_exists(tmp_path, library) -> None:
    put(tmp_path / "real", "photos/a.png")
    (tmp_path / "real" / "inside").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real" / "inside")
    for path, location in (
        (tmp_path / "link" / ".." / "photos", tmp_path / "real" / "photos"),
        (tmp_path / "link" / "..", tmp_path / "real"),
        (tmp_path / "real" / ".." / "real" / "photos", tmp_path / "real" / "photos"),
    ):
        source = open_source(path)
        assert (source.location, source.name) == (str(location), location.name)
    (tmp_path / "kept").symlink_to(tmp_path / "real" / "photos")
    assert open_source(tmp_path / "kept").location == str(tmp_path / "kept")
    (tmp_path / "real" / "hub").mkdir()
    make_dataset(library).to_parquet(tmp_path / "real" / "hub" / "train.parquet")
    assert len(open_source(tmp_path / "link" / ".." / "hub")) == 3


@pytest.mark.parametrize("kind", ["csv", "npz", "parquet"])
def test_files_have_no_splits(tmp_path, kind: str) -> None:
    put(tmp_path, "a.png")
    npz_of(tmp_path, [1], None).rename(tmp_path / "table.npz")
    if kind != "npz":
        make_table(tmp_path, {"path": ["a.png"]}, kind)
    refused(f"expected none, as 'table.{kind}' has no splits, received 'train'", tmp_path / f"table.{kind}", split="train")
