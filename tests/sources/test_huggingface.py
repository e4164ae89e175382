"""Hugging Face datasets: what comes back, and what is refused in one line."""

from __future__ import annotations

import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vitexplain import InputError
from vitexplain.sources import open_source

from .made import cut_photo, encode, make_dataset, picture, put, reds, refused


def test_a_saved_dataset(tmp_path, library, demo, capfd) -> None:
    make_dataset(library).with_format("numpy").save_to_disk(tmp_path / "saved")
    capfd.readouterr()
    source = open_source(tmp_path / "saved", classes=demo)
    assert (source.kind, source.name, source.split, source.has_masks) == ("huggingface", "saved", None, False)
    assert source.ids == ("000000", "000001", "000002")
    assert source.labels == (8, 3, 5)
    assert reds(source) == [0, 1, 2]
    assert open_source(tmp_path / "saved").labels == (0, 1, 2)
    refused("expected none, as 'saved' has no splits, received 'train'", tmp_path / "saved", split="train")
    assert capfd.readouterr() == ("", "")
    assert not library.are_progress_bars_disabled()


def test_saved_splits(tmp_path, library) -> None:
    library.DatasetDict(train=make_dataset(library), test=make_dataset(library, 2)).save_to_disk(tmp_path / "saved")
    assert [len(open_source(tmp_path / "saved", split=split)) for split in ("train", "test")] == [3, 2]
    assert open_source(tmp_path / "saved", split="test").split == "test"
    assert len(open_source(tmp_path / "saved" / "test")) == 2
    refused("expected one of train, test, which 'saved' has; received none", tmp_path / "saved")
    refused("expected one of train, test, which 'saved' has; received 'val'", tmp_path / "saved", split="val")


def test_parquet_files_as_on_the_hub(tmp_path, library, demo, capfd) -> None:
    hub = tmp_path / "hub [1]"
    (hub / "data").mkdir(parents=True)
    data = make_dataset(library)
    data.select([0]).to_parquet(hub / "data" / "train-00000-of-00002.parquet")
    data.select([1, 2]).to_parquet(hub / "data" / "train-00001-of-00002.parquet")
    data.select([2]).to_parquet(hub / "data" / "test-00000-of-00001-0123456789abcdef.parquet")
    (hub / "README.md").write_text("---\nconfigs:\n- config_name: x\n  data_files: https://example.org/x.parquet\n---\n")
    capfd.readouterr()
    source = open_source(hub, split="train", classes=demo)
    assert (source.kind, source.split, source.labels, reds(source)) == ("huggingface", "train", (8, 3, 5), [0, 1, 2])
    assert reds(open_source(hub, split="test")) == [2]
    assert capfd.readouterr() == ("", "")
    refused("expected one of test, train, which 'hub .1.' has; received none", hub)


def test_parquet_files_in_folders_of_splits_and_configurations(tmp_path, library) -> None:
    for name in ("a/train/0000.parquet", "a/train/0001.parquet", "a/test/0000.parquet", "b/train/0000.parquet"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        make_dataset(library, 1).to_parquet(tmp_path / name)
    assert len(open_source(tmp_path / "a", split="train")) == 2
    assert open_source(tmp_path / "b").split == open_source(tmp_path / "b" / "train").split == "train"
    refused(r"received several configurations \(a/train, b/train\); name the folder of one", tmp_path, split="train")


@pytest.mark.usefixtures("library")
def test_plain_parquet_with_images_inside(tmp_path, demo) -> None:
    images = [{"bytes": encode(picture(10 * index)), "path": None} for index in range(2)]
    pq.write_table(pa.table({"img": images, "fine_label": [5, 3], "coarse_label": [0, 1]}), tmp_path / "train.parquet")
    source = open_source(tmp_path, classes=demo)
    assert (source.labels, reds(source)) == ((5, 3), [0, 1])
    put(tmp_path / "b", "a.png")
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
    masked = make_dataset(library, image="photo", annotation=(library.Image(), grey))
    masked.remove_columns("label").save_to_disk(tmp_path / "masked")
    source = open_source(tmp_path / "masked")
    assert (source.has_masks, source.has_labels, reds(source)) == (True, False, [0, 1, 2])
    assert source.sample(1).mask.all()
    make_dataset(library, depth=(library.Image(), grey), mask=(library.Image(), grey)).save_to_disk(tmp_path / "several")
    assert reds(open_source(tmp_path / "several")) == [0, 1, 2]
    assert open_source(tmp_path / "several").has_masks
    make_dataset(library, image="a", b=(library.Image(), grey)).save_to_disk(tmp_path / "unclear")
    refused("one column of images in 'unclear', or one named image; received a .*, label .*, b ", tmp_path / "unclear")
    make_dataset(library).remove_columns("image").save_to_disk(tmp_path / "none")
    refused(r"one column of images in 'none'.* received label \(int64\)", tmp_path / "none")
    make_dataset(library).rename_column("label", "species").save_to_disk(tmp_path / "species")
    assert open_source(tmp_path / "species").labels == (0, 1, 2)


def test_labels_of_a_dataset_that_are_not_given(tmp_path, library) -> None:
    features = library.Features({"image": library.Image(), "label": library.ClassLabel(names=["a", "b"])})
    for name, labels in (("none", [-1, -1]), ("null", [None, None]), ("some", [1, -1])):
        columns = {"image": [picture(0)] * 2, "label": labels}
        library.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / name)
    assert open_source(tmp_path / "none").labels is open_source(tmp_path / "null").labels is None
    refused("received -1 for '000001' in 'some'", tmp_path / "some")


def test_datasets_that_cannot_be_read(tmp_path, library, monkeypatch) -> None:
    make_dataset(library).save_to_disk(tmp_path / "cut")
    for file in (tmp_path / "cut").glob("*.arrow"):
        file.write_bytes(b"not an arrow file")
    refused("cannot read .* as a Hugging Face dataset", tmp_path / "cut")
    (tmp_path / "noise").mkdir()
    (tmp_path / "noise" / "train.parquet").write_bytes(b"PAR1 and nothing more")
    refused("cannot read .* as a Hugging Face dataset: Parquet magic bytes not found", tmp_path / "noise")
    columns = {"image": [{"bytes": content, "path": None} for content in (cut_photo(), b"")]}
    library.Dataset.from_dict(columns, features=library.Features({"image": library.Image()})).save_to_disk(tmp_path / "images")
    with pytest.raises(InputError, match=r"cannot read '000000' in 'images': .*truncated"):
        open_source(tmp_path / "images").sample(0)
    with pytest.raises(InputError, match=r"'000001' in 'images' is not an image"):
        open_source(tmp_path / "images").sample(1)
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused(r"'images' needs datasets, .*pip install 'vitexplain\[huggingface\]'", tmp_path / "images")
