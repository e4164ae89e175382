"""WebDataset's tar shards: what comes back, and what is refused in one line."""

from __future__ import annotations

import gzip
import io
import json
import multiprocessing
import os
import tarfile
import tracemalloc
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from operator import methodcaller
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from vitexplain import InputError
from vitexplain.sources import IMAGE_SUFFIXES, open_source

from .made import cut_photo, encode, picture, put, reds, refused, write_shard

IMAGE = encode(picture(0))
MASK = encode(Image.fromarray(np.full((8, 12), 255, np.uint8)))


def _sample(index: int, **fields: object) -> dict[str, object]:
    """As WebDataset has it: its key, and its files by extension."""
    return {"__key__": f"{index:04d}", "png": encode(picture(10 * index)), **fields}


def _shards(folder: Path, count: int = 6, **fields: Callable[[int], object]) -> Path:
    """Shards of two samples each, by WebDataset's own writer."""
    folder.mkdir(exist_ok=True)
    with webdataset.ShardWriter(str(folder / "shard-%06d.tar"), maxcount=2, verbose=0) as writer:
        for index in range(count):
            writer.write(_sample(index, **{name: value(index) for name, value in fields.items()}))
    return folder


def _tar(path: Path, files: Mapping[str, bytes], **options: object) -> Path:
    """A tar file of files by name, in this order."""
    with tarfile.open(path, "w", **options) as shard:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))
    return path


# -- what comes back -----------------------------------------------------------------------------------------------------


def test_one_shard(tmp_path, demo) -> None:
    path = write_shard(tmp_path / "a.tar", [_sample(index, cls=index + 3) for index in range(3)])
    source = open_source(path, classes=demo)
    assert (source.kind, source.name, source.split, source.location) == ("webdataset", "a.tar", None, str(path))
    assert (source.ids, source.labels) == (("0000", "0001", "0002"), (3, 4, 5))
    assert (source.has_labels, source.has_masks, reds(source)) == (True, False, [0, 1, 2])
    assert source.path(1) == f"{path}::0001.png"
    assert source.sample(1).note is None


def test_a_folder_and_a_pattern_of_shards(tmp_path, monkeypatch) -> None:
    folder = _shards(tmp_path / "data", cls=lambda index: index)
    whole = open_source(folder)
    assert (whole.kind, whole.name, whole.labels, reds(whole)) == ("webdataset", "data", (0, 1, 2, 3, 4, 5), [0, 1, 2, 3, 4, 5])
    pattern = folder / "shard-{000001..000002}.tar"
    part = open_source(pattern)
    assert (part.name, part.location, part.labels) == ("shard-{000001..000002}.tar", str(pattern), (2, 3, 4, 5))
    assert part.path(3) == f"{folder}/shard-000002.tar::0005.png"
    assert open_source(folder / "shard-{000002,000000}.tar").ids == ("0004", "0005", "0000", "0001")
    assert open_source(folder / "shard-{000002..000000}.tar").ids[:2] == ("0004", "0005")
    assert open_source(pattern, images="::3").path(1) == part.path(3)
    monkeypatch.chdir(tmp_path)
    assert open_source("{data,data}/shard-{000001..000001}.tar").ids == ("0002", "0003", "0002 #2", "0003 #2")
    assert open_source("data/shard-{000001..000001}.tar").location == str(folder / "shard-{000001..000001}.tar")


def test_a_pattern_of_stars(tmp_path) -> None:
    folder = _shards(tmp_path / "data[1]", cls=lambda index: index)
    source = open_source(folder.parent / "data*" / "*.tar")
    assert (source.name, source.location) == ("*.tar", str(tmp_path / "data*" / "*.tar"))
    assert (source.labels, reds(source)) == ((0, 1, 2, 3, 4, 5), [0, 1, 2, 3, 4, 5])
    assert open_source(tmp_path / "{data*,data[[]1]}" / "shard-00000[02].tar").labels == (0, 1, 4, 5) * 2
    assert open_source(folder / "shard-{000001..000002}.tar").labels == (2, 3, 4, 5), "brackets in a name that is there"
    refused("received '.*/other-\\*.tar', which none matches", tmp_path / "data*" / "other-*.tar")


def test_a_folder_as_img2dataset_writes_it(tmp_path) -> None:
    for stem in ("00000", "00001"):
        write_shard(tmp_path / f"{stem}.tar", [_sample(int(stem), json={"caption": "a cat"})])
        (tmp_path / f"{stem}.parquet").write_bytes(b"not looked at")
        (tmp_path / f"{stem}_stats.json").write_text("{}")
    source = open_source(tmp_path)
    assert (source.kind, reds(source)) == ("webdataset", [0, 1])
    (tmp_path / "other.parquet").write_bytes(b"not looked at")
    refused(r"received both \(00000.parquet, 00000.tar\)", tmp_path)


def test_a_sample_without_an_image_cannot_be_read_and_leaves_the_others(tmp_path) -> None:
    files = {"a.png": IMAGE, "a.cls": b"1", "b.cls": b"2", "b.json": b"{}", "c.png": encode(picture(20)), "c.cls": b"3"}
    source = open_source(_tar(tmp_path / "a.tar", files))
    assert (source.ids, source.labels) == (("a", "b", "c"), (1, 2, 3))
    for whole in (source, source.select(slice(1, None)), source.part(range(1, 3))):
        at = whole.ids.index("b")
        assert (whole.path(at), whole.path(at + 1)) == (None, f"{tmp_path}/a.tar::c.png")
        with pytest.raises(InputError, match=r"expected one image .* for 'b' in the shard '.*/a.tar', received cls, json$"):
            whole.sample(at)
        assert whole.sample(at + 1).photo.getpixel((3, 3)) == (20, 0, 0)


def test_many_samples_take_little_memory_while_they_are_found(tmp_path) -> None:
    path, count = tmp_path / "a.tar", 3000
    with tarfile.open(path, "w") as shard:
        for index in range(count):
            for extension in ("cls", "png"):
                shard.addfile(tarfile.TarInfo(f"{index:08d}.{extension}"))
    open_source(path)
    tracemalloc.start()
    try:
        source = open_source(path)
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(source) == count
    assert held < 250 * count
    assert peak < 700 * count


def test_numbers_in_patterns_are_padded_where_one_begins_with_zero(tmp_path) -> None:
    for number in ("9", "10", "09"):
        write_shard(tmp_path / f"{number}.tar", [_sample(int(number), txt=number)])
    assert open_source(tmp_path / "{9..10}.tar").path(0) == f"{tmp_path}/9.tar::0009.png"
    assert open_source(tmp_path / "{09..10}.tar").path(0) == f"{tmp_path}/09.tar::0009.png"


def test_a_file_whose_own_name_has_braces(tmp_path) -> None:
    write_shard(tmp_path / "a{0..1}.tar", [_sample(3)])
    assert reds(open_source(tmp_path / "a{0..1}.tar")) == [3]


@pytest.mark.parametrize("extension", [*(suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES), "JPEG"])
def test_images_by_extension(tmp_path, extension: str) -> None:
    image = picture(250).convert("L") if extension == "pgm" else picture(250)
    kind = {"jpg": "JPEG", "jfif": "JPEG", "tif": "TIFF", "pgm": "PPM", "jp2": "JPEG2000"}.get(extension, extension).upper()
    source = open_source(_tar(tmp_path / "a.tar", {f"a.{extension}": encode(image, kind)}))
    assert (source.ids, source.sample(0).photo.size) == (("a",), (12, 8))


def test_keys_with_dots_and_letters_of_every_kind(tmp_path) -> None:
    keys = ["dir.v1/é.x", "dir.v1/猫", "./b", "plain", "deep/er/" + "long" * 40]
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        path = _tar(tmp_path / "a.tar", {f"{key}.png": IMAGE for key in keys}, format=form, encoding="utf-8")
        source = open_source(path)
        assert source.ids == ("dir.v1/é", "dir.v1/猫", "./b", "plain", keys[-1])
        assert [source.path(index) for index in (0, 1)] == [f"{path}::dir.v1/é.x.png", f"{path}::dir.v1/猫.png"]
    latin = open_source(_tar(tmp_path / "b.tar", {"é.png": IMAGE}, format=tarfile.GNU_FORMAT, encoding="latin-1"))
    assert latin.ids == ("\\xe9",)


def test_the_files_of_a_key_need_not_be_neighbours(tmp_path) -> None:
    files = {
        "a.png": encode(picture(20)),
        "b.png": encode(picture(30)),
        ".hidden.png": b"",
        "dir/._a.png": b"",
        "README": b"x",
        "b.cls": b"1",
        "a.cls": b"0",
    }
    source = open_source(_tar(tmp_path / "a.tar", files))
    assert (source.ids, source.labels, reds(source)) == (("a", "b"), (0, 1), [2, 3])


def test_the_same_key_in_two_shards(tmp_path) -> None:
    for name in ("a", "b"):
        write_shard(tmp_path / f"{name}.tar", [_sample(1)])
    assert open_source(tmp_path).ids == ("0001", "0001 #2")


LABELS = {
    "indices": ([{"cls": 3}, {"cls": 5}], (3, 5)),
    "names": ([{"cls": "cat"}, {"cls": " Dog\n"}], (3, 5)),
    "in json": ([{"json": {"label": "cat"}}, {"json": {"cls": "dog", "label": None}}], (3, 5)),
    "text in json": ([{"json": {"label": "3"}}, {"json": {"label": "5"}}], (3, 5)),
    "cls before json": ([{"cls": 3, "json": {"label": 9}}, {"cls": 5, "json": [1]}], (3, 5)),
    "some of each": ([{"cls": 3}, {"json": {"label": 5, "cls": 9}}], (3, 5)),
    "none": ([{"json": {"caption": "a cat"}}, {"json": ["a dog"]}], None),
    "nothing in them": ([{"cls": " "}, {"json": {"label": ""}}], None),
}


@pytest.mark.parametrize("case", LABELS)
def test_labels(tmp_path, demo, case: str) -> None:
    fields, expected = LABELS[case]
    path = write_shard(tmp_path / "a.tar", [_sample(index, **more) for index, more in enumerate(fields)])
    assert open_source(path, classes=demo).labels == expected


@pytest.mark.parametrize("extension", ["mask.png", "mask", "seg.png", "MASK.png"])
def test_masks(tmp_path, extension: str) -> None:
    path = _tar(tmp_path / "a.tar", {f"a.{extension}": MASK, "a.jpg": encode(picture(0), "JPEG"), "a.depth.png": MASK})
    source = open_source(path)
    assert (source.has_masks, source.path(0)) == (True, f"{path}::a.jpg")
    assert source.sample(0).mask.all()
    assert source.sample(0, masks=False).mask is None


def test_a_mask_that_does_not_fit_or_cannot_be_read(tmp_path) -> None:
    path = _tar(
        tmp_path / "a.tar", {"a.png": IMAGE, "a.mask": encode(Image.new("L", (8, 12))), "b.png": IMAGE, "b.mask": cut_photo()}
    )
    source = open_source(path)
    with pytest.raises(InputError, match=r"12 × 8, received 8 × 12 for 'a' in 'a.tar'"):
        source.sample(0)
    with pytest.raises(InputError, match=r"^mask: cannot read '.*/a.tar::b.mask': .*truncated"):
        source.sample(1)


def test_images_that_cannot_be_read_are_named(tmp_path) -> None:
    source = open_source(_tar(tmp_path / "a.tar", {"a.png": IMAGE, "b.jpg": cut_photo(), "c.jpg": b"", "d.jpg": b"no picture"}))
    assert source.sample(0).id == "a"
    for index, match in (
        (1, r"a.tar::b.jpg': .*truncated"),
        (2, r"a.tar::c.jpg' is not an im"),
        (3, r"a.tar::d.jpg' is not an im"),
    ):
        with pytest.raises(InputError, match=match):
            source.sample(index)


# -- what is refused -----------------------------------------------------------------------------------------------------

TARS = {
    "no images": ({"b.cls": b"1", "b.json": b"{}", "c.cls": b"1"}, r"one image \(jpg, .* 'b' in .*a.tar', received cls, json"),
    "only a mask": ({"a.mask.png": MASK}, "for 'a' in the shard .* received mask.png"),
    "two images": ({"a.png": IMAGE, "a.jpg": IMAGE}, r"for 'a' in .* received several \(png, jpg\)"),
    "two parts": ({"a.in.png": IMAGE, "a.out.png": IMAGE}, r"received several \(in.png, out.png\)"),
    "twice": ({"a.png": IMAGE, "a.PNG": IMAGE}, "expected each file once in the shard .*a.tar', received several 'a.PNG'"),
    "some labels": ({"a.png": IMAGE, "a.cls": b"1", "b.png": IMAGE}, "label for every .* 1 of the 2, .* 'b' in .*'a.tar'$"),
    "some masks": ({"a.png": IMAGE, "a.mask": MASK, "b.png": IMAGE}, "mask for every .* 1 of the 2, .* 'b' in .*'a.tar'$"),
    "no text": ({"a.png": IMAGE, "a.cls": b"\xff"}, "^label: cannot read 'a.cls' in the shard .*a.tar': "),
    "no json": ({"a.png": IMAGE, "a.json": b"{"}, "^label: cannot read 'a.json' in the shard .*a.tar': "),
    "deep json": ({"a.png": IMAGE, "a.json": b"[" * 100_000}, "^label: cannot read 'a.json'"),
    "a fraction": ({"a.png": IMAGE, "a.json": b'{"label": 0.5}'}, r"class indices or names in 'a.tar', received 0.5 \(float\)"),
    "several": ({"a.png": IMAGE, "a.json": b'{"label": [1, 2]}'}, r"received \[1, 2\] \(list\)"),
    "both": ({"a.png": IMAGE, "a.cls": b"1", "b.png": IMAGE, "b.cls": b"cat"}, r"in 'a.tar', received both \(1 and 'cat'\)"),
    "no samples": ({"README": b"x"}, "expected images in .* received none"),
    "nothing": ({}, "expected images in .* received none"),
}  # fmt: skip


@pytest.mark.parametrize("case", TARS)
def test_bad_samples(tmp_path, case: str) -> None:
    files, match = TARS[case]
    refused(match, _tar(tmp_path / "a.tar", files))


def test_links_are_refused(tmp_path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as shard:
        link = tarfile.TarInfo("a.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        shard.addfile(link)
    refused("expected plain files in the shard .*a.tar', received the link or special 'a.png'", tmp_path / "a.tar")


def _changed(content: bytes, at: int, new: bytes) -> bytes:
    return content[:at] + new + content[at + len(new) :]


# Three members of 512 + 1024 bytes each, and the end: 10240 bytes in all.
DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "in the last file": (lambda tar: tar[: 3 * 1536 - 800], "unexpected end of data"),
    "in the padding of the last file": (lambda tar: tar[: 3 * 1536 - 8], "unexpected end of data"),
    "in a header": (lambda tar: tar[: 2 * 1536 + 100], "mark of its end is not there at byte 3072"),
    "before a header": (lambda tar: tar[: 2 * 1536], "mark of its end is not there at byte 3072"),
    "at its end": (lambda tar: tar[: 3 * 1536], "mark of its end is not there at byte 4608"),
    "a header of noise": (lambda tar: _changed(tar, 1536, b"\xff" * 512), "expected its end at byte 1536"),
    "a changed size": (lambda tar: _changed(tar, 1536 + 124, b"77777777777"), "expected its end at byte 1536"),
    "the first header": (lambda tar: _changed(tar, 20, b"noise"), "bad checksum"),
    "an erased header": (lambda tar: _changed(tar, 1536, bytes(512)), "expected its end at byte 1536"),
    "another behind it": (lambda tar: tar + tar, "expected its end at byte 4608"),
    "text": (lambda _: b"no archive" * 200, "is truncated, damaged or no .tar file: .*header|checksum"),
    "few bytes": (lambda _: b"x", "truncated header"),
    "none": (lambda _: b"", r"is empty \(0 bytes\)"),
    "a compressed one": (lambda tar: gzip.compress(tar), "not compressed, received 'a.tar'"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_shards_are_named(tmp_path, case: str) -> None:
    change, match = DAMAGES[case]
    content = _tar(tmp_path / "a.tar", {f"{key}.bmp": encode(picture(1, (24, 13)), "BMP")[:990] for key in "abc"}).read_bytes()
    assert len(content) == 10240
    (tmp_path / "a.tar").write_bytes(change(content))
    refused(match, tmp_path / "a.tar")
    write_shard(tmp_path / "0.tar", [_sample(0)])
    refused("a.tar'", tmp_path)


def test_a_shard_that_changed_since_it_was_opened(tmp_path) -> None:
    path = write_shard(tmp_path / "a.tar", [_sample(index) for index in range(3)])
    source = open_source(path)
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(InputError, match=r"cannot read the shard '.*a.tar': expected .* bytes from byte .*, received 0"):
        source.sample(2)
    path.unlink()
    with pytest.raises(InputError, match=r"cannot read the shard '.*a.tar': No such file"):
        source.sample(0)


@pytest.mark.parametrize("name", ["a.tar.gz", "a.TGZ", "a.tar.bz2", "a.tar.xz", "a.tar.zst"])
def test_compressed_shards(tmp_path, name: str) -> None:
    (tmp_path / name).write_bytes(b"not looked at")
    for path in (tmp_path / name, tmp_path):
        refused(f"expected .tar shards that are not compressed, received '{name}'.* middle of a plain .tar; unpack it", path)
    (tmp_path / "b").mkdir()
    refused("that are not compressed", tmp_path / f"b{{0..1}}{name}")
    put(tmp_path, "picture.png")
    assert open_source(tmp_path).kind == "folder"


PATTERNS = {
    "shard-{000000..000009}.tar": r"of the 10 shards of '.*', 7 do not exist: 'shard-000003.tar', .* \(7 in all\)",
    "shard-{000002..000003}.tar": "of the 2 shards of '.*', 1 do not exist: 'shard-000003.tar'",
    "other-{0..1}.tar": "2 do not exist: 'other-0.tar', 'other-1.tar'",
    "shard-{0..}.tar": r"expected \{000..009\} or \{a,b\} in the pattern '.*', received \{0..\}",
    "shard-{}.tar": r"received \{\}",
    "shard-{0..99999999}.tar": "at most 1000000 shards",
    "shard-{0..99999}{0..99999}.tar": "at most 1000000 shards",
    "shard-{0..1}.csv": "there is no file or folder",
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_bad_patterns(tmp_path, pattern: str) -> None:
    refused(PATTERNS[pattern], _shards(tmp_path / "data") / pattern)


def test_splits(tmp_path) -> None:
    for name in ("train-0.tar", "train-1.tar", "val-0.tar"):
        write_shard(tmp_path / name, [_sample(0)])
    refused(r"expected shards of one split in '.*', received several \(train, val\); name those of one", tmp_path)
    for path in (tmp_path, tmp_path / "val-0.tar", tmp_path / "val-{0..0}.tar"):
        refused("expected none, as '.*' has no splits, received 'val'", path, split="val")
    assert len(open_source(tmp_path / "train-{0..1}.tar")) == 2


def test_shards_beside_other_data(tmp_path) -> None:
    write_shard(tmp_path / "a.tar", [_sample(0)])
    put(tmp_path, "b.png")
    refused(r"images, parquet files or .tar shards in .* received both \(b.png, a.tar\)", tmp_path)


# -- fingerprints, processes ---------------------------------------------------------------------------------------------


def test_fingerprints(tmp_path) -> None:
    folder = _shards(tmp_path / "data", cls=lambda index: index)
    before = open_source(folder).fingerprint()
    assert open_source(folder).fingerprint() == before
    first = open_source(folder, images=":2").fingerprint()
    os.utime(folder / "shard-000002.tar", (1, 1))
    assert open_source(folder).fingerprint() != before
    assert open_source(folder, images=":2").fingerprint() == first, "another shard"
    os.utime(folder / "shard-000000.tar", (1, 1))
    assert open_source(folder, images=":2").fingerprint() != first


def test_labels_count_in_fingerprints(tmp_path) -> None:
    prints = set()
    for label in (1, 2):
        path = write_shard(tmp_path / "a.tar", [_sample(0, json=json.dumps({"label": label}).encode())])
        os.utime(path, (1, 1))
        prints.add(open_source(path).fingerprint())
    assert len(prints) == 2


def test_no_image_is_read_at_opening(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("vitexplain.sources.webdataset.decode_photo", lambda *_: pytest.fail("decoded"))
    assert len(open_source(_tar(tmp_path / "a.tar", {"a.png": b"no picture"}))) == 1


def test_a_spawned_process_reads_a_shard(tmp_path) -> None:
    source = open_source(_shards(tmp_path / "data", cls=lambda index: index, **{"mask.png": lambda _: MASK}))
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        sample = pool.submit(methodcaller("sample", 3), source).result()
    assert (sample.id, sample.label, sample.photo.getpixel((3, 3))) == ("0003", 3, (30, 0, 0))
    assert sample.mask.all()
