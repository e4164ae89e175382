"""Images in .npz files: what comes back, and what is refused in one line."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from PIL import Image

from vitexplain import InputError
from vitexplain.sources import open_source

from .made import cut_photo, encode, joined, npz_of, pictures, reds, refused


def test_npz_of_encoded_images(tmp_path, demo) -> None:
    jpeg, offsets = pictures(3)
    mask = encode(Image.fromarray(np.full((8, 12), 255, np.uint8)))
    mask_png, mask_offsets = joined([mask, encode(Image.new("L", (12, 8))), encode(Image.new("L", (8, 12)))])
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
    train, train_offsets = pictures(3)
    test, test_offsets = joined([cut_photo()])
    np.savez_compressed(
        tmp_path / "d.npz", train_jpeg=train, train_offsets=train_offsets, train_labels=[0, 1, 1], test_jpeg=test,
        test_offsets=test_offsets, test_labels=[1], class_names=["ship", "cat"],
    )  # fmt: skip
    source = open_source(tmp_path / "d.npz", split="train")
    assert (source.split, source.labels, reds(source)) == ("train", (0, 1, 1), [0, 1, 2])
    assert open_source(tmp_path / "d.npz", split="train", classes=demo).labels == (8, 3, 3)
    held_out = open_source(tmp_path / "d.npz", split="test")
    with pytest.raises(InputError, match=r"^photo: cannot read '000000' in 'd.npz': .*truncated"):
        held_out.sample(0)
    refused("expected one of train, test, which 'd.npz' has; received none", tmp_path / "d.npz")
    refused("expected one of train, test, which 'd.npz' has; received 'val'", tmp_path / "d.npz", split="val")


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
    refused(match, tmp_path / "d.npz")


def test_files_that_are_no_npz(tmp_path) -> None:
    (tmp_path / "text.npz").write_text("not an archive")
    (tmp_path / "pickle.npz").write_bytes(pickle.dumps([1, 2]))
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    cut = npz_of(tmp_path, [1, 2], None).read_bytes()
    (tmp_path / "d.npz").write_bytes(cut[: len(cut) // 2])
    for name in ("text.npz", "pickle.npz", "array.npz", "d.npz"):
        refused(f"data: cannot read .*{name}.*not a zip file", tmp_path / name)


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
