"""Views, fingerprints, and sources in other processes."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import DataLoader

from vitexplain import InputError
from vitexplain.sources import Source, open_source, parse_slice

from .made import encode, make_dataset, picture, pictures, put, reds, refused, write_shard


@pytest.mark.parametrize("text", ["0:64", "::2", "100:", ":-1", " 1 : 5 : 2 ", "::-1", ":"])
def test_slices(text: str) -> None:
    assert list(range(200))[parse_slice(text)] == eval(f"list(range(200))[{text}]")


@pytest.mark.parametrize("text", ["", "5", "a:b", "1:2:3:4", "0-64", "1.5:", "-:", "::0", "1_0:"])
def test_bad_slices(tmp_path, text: str) -> None:
    with pytest.raises(InputError, match=f"^images: expected a .*received {text!r}"):
        open_source(tmp_path / "is not looked at", images=text)


def test_select(tmp_path, demo) -> None:
    put(tmp_path, "cat/a.png", "cat/b.png", "dog/c.png", "dog/d.png", "frog/e.png")
    source = open_source(tmp_path, classes=demo)
    half = source.select(slice(None, None, 2))
    assert (half.ids, half.labels, reds(half)) == (("cat/a.png", "dog/c.png", "frog/e.png"), (3, 5, 6), [0, 2, 4])
    last = half.select(slice(-2, None))
    assert (last.ids, last.labels, reds(last)) == (("dog/c.png", "frog/e.png"), (5, 6), [2, 4])
    assert open_source(tmp_path, images="::2", classes=demo).ids == half.ids
    assert len(source) == 5
    assert len(source.select(slice(3, 64))) == 2
    for nothing in (slice(5, None), slice(2, 2)):
        with pytest.raises(InputError, match=r"a slice that leaves some of the 5 in .*received slice"):
            source.select(nothing)
    refused("leaves some of the 5", tmp_path, images="9:")
    with pytest.raises(IndexError):
        last.sample(2)


def test_a_source_says_where_it_is_from(tmp_path, monkeypatch) -> None:
    put(tmp_path, "cat/a.png", "cat/b.png", "dog/c.png")
    monkeypatch.chdir(tmp_path / "cat")
    source = open_source("../../" + tmp_path.name, images=" 1 : ")
    assert (source.location, source.images, source.name) == (str(tmp_path), "1:", tmp_path.name)
    assert Path(source.path(0)).is_absolute()
    assert Path(source.path(0)).samefile(tmp_path / "cat" / "b.png")
    assert source.select(slice(1, None)).path(0) == source.path(1)
    assert open_source("../dog").path(0) == str(tmp_path / "cat" / ".." / "dog" / "c.png")
    (tmp_path / "t.csv").write_text(f"path\n{tmp_path / 'dog' / 'c.png'}\ncat/a.png\n")
    table = open_source(tmp_path / "t.csv")
    assert [table.path(index) for index in (0, 1)] == [str(tmp_path / "dog" / "c.png"), str(tmp_path / "cat" / "a.png")]
    assert (table.location, table.images) == (str(tmp_path / "t.csv"), None)


def test_a_source_named_relatively_can_be_read_from_elsewhere(tmp_path, library, monkeypatch) -> None:
    list(_every_kind(tmp_path, library))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.csv").write_text("path\nimages/0.png\nimages/1.png\n")
    sources = [open_source(name) for name in ("images", "d.npz", "saved", "hub", "shards", "t.csv")]
    prints = [source.fingerprint() for source in sources]
    monkeypatch.chdir("/")
    assert [reds(source)[:2] for source in sources] == [[0, 1]] * 6
    assert [source.fingerprint() for source in sources] == prints


def test_names_that_are_not_utf8(tmp_path) -> None:
    name = b"caf\xe9.png"
    try:
        Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name))).write_bytes(encode(picture(10)))
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    source = open_source(tmp_path)
    assert (source.ids, reds(source)) == (("caf\\xe9.png",), [1])
    assert source.path(0) == f"{tmp_path}/caf\\xe9.png"


def test_fingerprints_of_files(tmp_path) -> None:
    put(tmp_path, "a.png", "b.png", "m.png")
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
        lambda: (picture(0, (90, 90)).save(tmp_path / "a.png"), os.utime(tmp_path / "a.png", (1, 1))),
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
    put(tmp_path, "cat/a.png")
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
    make_dataset(library).save_to_disk(tmp_path / "saved")
    before = open_source(tmp_path / "saved").fingerprint()
    assert open_source(tmp_path / "saved").fingerprint() == before
    os.utime(next((tmp_path / "saved").glob("*.arrow")), (1, 1))
    assert open_source(tmp_path / "saved").fingerprint() != before
    (tmp_path / "hub").mkdir()
    make_dataset(library).to_parquet(tmp_path / "hub" / "train.parquet")
    before = open_source(tmp_path / "hub").fingerprint()
    library.config.HF_DATASETS_CACHE = tmp_path / "another cache"
    assert open_source(tmp_path / "hub").fingerprint() == before
    make_dataset(library, 2).to_parquet(tmp_path / "hub" / "train.parquet")
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
    put(folder / "images", *(f"{index}.png" for index in range(4)))
    yield open_source(folder / "images")
    jpeg, offsets = pictures(4)
    np.savez(folder / "d.npz", jpeg=jpeg, offsets=offsets)
    yield open_source(folder / "d.npz")
    make_dataset(library, 4).save_to_disk(folder / "saved")
    yield open_source(folder / "saved")
    (folder / "hub").mkdir()
    make_dataset(library, 4).to_parquet(folder / "hub" / "train.parquet")
    yield open_source(folder / "hub")
    (folder / "shards").mkdir()
    for shard in range(2):
        samples = [{"__key__": str(index), "png": encode(picture(10 * index))} for index in (2 * shard, 2 * shard + 1)]
        write_shard(folder / "shards" / f"{shard}.tar", samples)
    yield open_source(folder / "shards")


def test_sources_can_be_read_in_other_processes(tmp_path, library) -> None:
    for source in _every_kind(tmp_path, library):
        assert reds(source) == [0, 1, 2, 3]
        view = pickle.loads(pickle.dumps(source.select(slice(1, None))))
        assert reds(view) == [1, 2, 3], source.kind
        assert view.fingerprint() == source.select(slice(1, None)).fingerprint()
        assert [int(red) for red in DataLoader(_Reds(source), batch_size=None, num_workers=1)] == [0, 1, 2, 3], source.kind


def test_a_part_for_another_process_is_small_and_has_its_own_photos_and_names(tmp_path, library) -> None:
    raw = tmp_path / "raw.npz"
    np.savez(raw, images=np.stack([np.full((8, 8, 3), 10 * index, np.uint8) for index in range(4)]))
    for source in (*_every_kind(tmp_path, library), open_source(raw)):
        part = source.select(slice(1, None)).part(range(1, 3))
        if source.kind == "huggingface":
            assert part is None, "its files are mapped into memory"
            continue
        part = pickle.loads(pickle.dumps(part))
        assert reds(part) == [2, 3], source.kind
        assert part.ids == source.ids[2:]
        assert [part.path(0), part.path(1)] == [source.path(2), source.path(3)]
        assert len(pickle.dumps(part)) < 8000


def test_a_part_of_many_files_does_not_grow_with_their_number(tmp_path) -> None:
    put(tmp_path / "images", "0.png")
    lines = ["path,label,id", *(f"images/0.png,{index % 3},{index}" for index in range(5000))]
    (tmp_path / "table.csv").write_text("\n".join(lines))
    source = open_source(tmp_path / "table.csv")
    part = source.part(range(100, 116))
    assert part.labels == source.labels[100:116]
    assert len(pickle.dumps(part)) < 4000 < len(pickle.dumps(source))
