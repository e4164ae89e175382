"""What is done to images of every kind to read them, and that nothing but an ``InputError`` comes of those that cannot be."""

from __future__ import annotations

import contextlib
import io
import pickle
import struct
import tracemalloc
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from vitexplain import InputError
from vitexplain.heatmap import as_photo
from vitexplain.photos import decode_photo, load_photo
from vitexplain.sources import Source, open_source

from .made import cut_photo, encode, joined, picture, write_shard

RED, BLUE = Image.new("RGB", (24, 16), "red"), Image.new("RGB", (24, 16), "blue")
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 90, 3), dtype=np.uint8))


def _half_clear(mode: str = "RGBA") -> Image.Image:
    image = RED.convert("RGBA")
    image.paste((255, 0, 0, 0), (0, 0, 12, 16))
    return image.convert(mode)


def _moving(kind: str, count: int = 3) -> bytes:
    frames = [Image.new("RGB", (24, 16), (200 - 60 * index, 60 * index, 90)) for index in range(count)]
    return encode(frames[0], kind, save_all=True, append_images=frames[1:])


def _numbers(values: object, dtype: type, kind: str = "TIFF") -> bytes:
    """An image of these values, repeated to (16, 24)."""
    return encode(Image.fromarray(np.resize(np.array(values, dtype), (16, 24))), kind)


def _ycck() -> bytes:
    """A CMYK JPEG whose Adobe marker says that its first three components are luminance and colour differences."""
    content = bytearray(encode(RED.convert("CMYK"), "JPEG"))
    content[content.index(b"Adobe") + 11] = 2
    return bytes(content)


def _turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(RED, "JPEG", exif=exif)


def _clear_palette() -> bytes:
    return encode(RED.convert("P", palette=Image.Palette.ADAPTIVE), transparency=0)


_OF_FLOATS = "converted from floating-point grayscale (F) to RGB"
# A file, and the note of its sample.
READABLE: dict[str, tuple[Callable[[], bytes], str | None]] = {
    "jpeg": (lambda: encode(RED, "JPEG"), None),
    "progressive jpeg": (lambda: encode(NOISE, "JPEG", progressive=True), None),
    "turned jpeg": (_turned, None),
    "several pictures in a jpeg": (lambda: encode(RED, "MPO", save_all=True, append_images=[BLUE]), None),
    "grayscale jpeg": (lambda: encode(RED.convert("L"), "JPEG"), "converted from grayscale (L) to RGB"),
    "cmyk jpeg": (lambda: encode(RED.convert("CMYK"), "JPEG"), "converted from CMYK to RGB"),
    "ycck jpeg": (_ycck, "converted from CMYK to RGB"),
    "png": (lambda: encode(RED), None),
    "8 bits": (lambda: encode(RED.convert("L")), "converted from grayscale (L) to RGB"),
    "1 bit": (lambda: encode(RED.convert("1")), "converted from black and white (1) to RGB"),
    "16-bit png": (lambda: _numbers([0, 65535], np.uint16, "PNG"), "converted from 16-bit grayscale (I;16) to RGB"),
    "16-bit tiff": (lambda: _numbers([0, 65535], np.uint16), "converted from 16-bit grayscale (I;16) to RGB"),
    "32-bit tiff": (lambda: _numbers([0, 65535], np.int32), "converted from integer grayscale (I) to RGB"),
    "float tiff": (lambda: _numbers([0, 0.5, 1], np.float32), _OF_FLOATS),
    "some values not finite": (lambda: _numbers([0, np.nan, np.inf, 1], np.float32), _OF_FLOATS),
    "palette": (lambda: encode(RED.convert("P")), "converted from palette (P) to RGB"),
    "palette with transparency": (_clear_palette, "transparent parts on white (P)"),
    "opaque RGBA": (lambda: encode(RED.convert("RGBA")), "converted from RGBA to RGB"),
    "RGBA": (lambda: encode(_half_clear()), "transparent parts on white (RGBA)"),
    "LA": (lambda: encode(_half_clear("LA")), "transparent parts on white (LA)"),
    "opaque LA": (lambda: encode(RED.convert("LA")), "converted from grayscale with transparency (LA) to RGB"),
    "a transparent colour": (lambda: encode(RED, transparency=(255, 0, 0)), "transparent parts on white (RGB)"),
    "a transparent colour that is not there": (lambda: encode(RED, transparency=(0, 0, 9)), None),
    "animated gif": (lambda: _moving("GIF"), "first of 3 frames; converted from palette (P) to RGB"),
    "animated webp": (lambda: _moving("WEBP"), "first of 3 frames"),
    "animated png": (lambda: _moving("PNG"), "first of 3 frames"),
    "pages": (lambda: _moving("TIFF", 2), "first of 2 frames"),
    "lab tiff": (lambda: encode(Image.new("LAB", (24, 16)), "TIFF"), "converted from LAB to RGB"),
    "a wrong name": (lambda: encode(RED, "BMP"), None),
}  # fmt: skip


def _bomb() -> bytes:
    """A PNG file of a few bytes that claims 100000 × 100000 pixels."""
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    parts = (struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


UNREADABLE: dict[str, tuple[Callable[[], bytes], str]] = {
    "nothing": (lambda: b"", "empty|not an image"),
    "text": (lambda: b"<!DOCTYPE html> 404", "is not an image in a known format"),
    "a cut jpeg": (cut_photo, "cannot read .*truncated"),
    "a cut png": (lambda: encode(NOISE)[:9000], "cannot read .*truncated"),
    "a cut webp": (lambda: encode(NOISE, "WEBP")[:2000], "cannot read|not an image"),
    "a cut gif": (lambda: encode(NOISE, "GIF")[:3000], "cannot read .*truncated"),
    "a cut tiff": (lambda: encode(NOISE, "TIFF")[:3000], "cannot read|not an image"),
    "a cut bmp": (lambda: encode(NOISE, "BMP")[:3000], "cannot read .*truncated"),
    "a header alone": (lambda: encode(NOISE, "JPEG")[:20], "cannot read|not an image"),
    "a bomb": (_bomb, "cannot read .*decompression bomb"),
    "a thread": (lambda: encode(picture(0, (900, 2))), "sides within a ratio of 100, received 900 × 2"),
    "no finite value": (lambda: _numbers([np.nan, np.inf], np.float32), "none of its values is finite"),
}


def _in_folder(folder: Path, images: Sequence[bytes]) -> Source:
    for index, image in enumerate(images):
        (folder / f"{index}.jpg").write_bytes(image)
    return open_source(folder)


def _in_table(folder: Path, images: Sequence[bytes]) -> Source:
    (folder / "images").mkdir()
    _in_folder(folder / "images", images)
    (folder / "t.csv").write_text("\n".join(["path", *(f"images/{index}.jpg" for index in range(len(images)))]))
    return open_source(folder / "t.csv")


def _in_npz(folder: Path, images: Sequence[bytes]) -> Source:
    jpeg, offsets = joined(images)
    np.savez(folder / "d.npz", jpeg=jpeg, offsets=offsets)
    return open_source(folder / "d.npz")


def _in_tar(folder: Path, images: Sequence[bytes]) -> Source:
    return open_source(
        write_shard(folder / "a.tar", [{"__key__": str(index), "jpg": image} for index, image in enumerate(images)])
    )


KINDS = {"folder": _in_folder, "table": _in_table, "npz": _in_npz, "tar": _in_tar}


@pytest.mark.parametrize("case", READABLE)
def test_what_was_done_to_an_image(tmp_path, case: str) -> None:
    make, note = READABLE[case]
    sample = _in_folder(tmp_path, [make()]).sample(0)
    assert sample.photo.mode == "RGB"
    assert sample.note == note


@pytest.mark.parametrize("case", READABLE)
def test_pixels_do_not_depend_on_the_file(tmp_path, case: str) -> None:
    content = READABLE[case][0]()
    path = tmp_path / "0.jpg"
    path.write_bytes(content)
    photo = load_photo(path)
    path.write_bytes(bytes(len(content)))
    assert type(photo) is Image.Image
    expected = decode_photo(io.BytesIO(content), "0.jpg").image
    np.testing.assert_array_equal(np.asarray(pickle.loads(pickle.dumps(photo))), np.asarray(expected))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "I;16", "I", "F", "CMYK"])
def test_an_opened_image_is_shown_as_its_file_is_loaded(tmp_path, mode: str) -> None:
    deep = {"I;16": np.uint16, "I": np.int32, "F": np.float32}
    if mode in deep:
        image = Image.fromarray(np.linspace(0, 65535, 64).reshape(8, 8).astype(deep[mode]))
    else:
        image = (RED if mode == "CMYK" else _half_clear()).convert(mode)
    if mode == "P":
        image.info["transparency"] = image.getpixel((0, 0))
    assert image.mode == mode
    path = tmp_path / ("photo.png" if mode == "P" else "photo.tif")
    image.save(path)
    shown = np.asarray(as_photo(image))
    np.testing.assert_array_equal(shown, np.asarray(load_photo(path)))
    assert shown.shape[2] == 3
    if mode in deep:
        assert len(np.unique(shown)) == 64, "not saturated"
    elif mode != "CMYK":
        assert shown[0, 0].tolist() == [255, 255, 255], "white where it is clear"


def test_an_rgb_photo_is_decoded_once_and_not_copied(tmp_path, monkeypatch) -> None:
    NOISE.save(tmp_path / "a.png")
    for name in ("copy", "convert"):
        monkeypatch.setattr(Image.Image, name, lambda *_, name=name: pytest.fail(name))
    assert load_photo(tmp_path / "a.png").tobytes() == NOISE.tobytes()


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_values_of_16_bits_are_rounded_as_in_double_precision_in_little_memory(dtype: type) -> None:
    values = np.tile(np.arange(65536).astype(dtype).reshape(256, 256), (4, 4))
    file = io.BytesIO()
    Image.fromarray(values).save(file, "TIFF")
    tracemalloc.start()
    try:
        photo = decode_photo(file, "photo.tif").image
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    exact = np.rint(np.clip(values / 65535.0, 0, 1) * 255).astype(np.uint8)
    np.testing.assert_array_equal(np.asarray(photo)[..., 0], exact)
    assert peak < 16 * values.size


@pytest.mark.parametrize("kind", KINDS)
def test_want_of_memory_is_not_the_photos_fault(tmp_path, monkeypatch, kind: str) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    source = KINDS[kind](tmp_path, [encode(RED)])
    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(MemoryError):
        source.sample(0)


def test_an_animation_that_ends_early_has_its_first_frame(tmp_path) -> None:
    sample = _in_folder(tmp_path, [_moving("GIF")[:-40]]).sample(0)
    assert sample.note.startswith("first of ")
    assert sample.photo.size == (24, 16)


@pytest.mark.parametrize("kind", KINDS)
def test_notes_of_every_kind_of_data(tmp_path, kind: str) -> None:
    source = KINDS[kind](tmp_path, [encode(RED.convert("CMYK"), "JPEG"), encode(RED, "JPEG")])
    assert [source.sample(index).note for index in (0, 1)] == ["converted from CMYK to RGB", None]


def test_pixels_in_npz_have_no_note_and_no_path(tmp_path) -> None:
    np.savez(tmp_path / "d.npz", images=np.zeros((1, 4, 4, 3), np.uint8))
    source = open_source(tmp_path / "d.npz")
    assert (source.sample(0).note, source.path(0)) == (None, None)
    for shape in ((1, 0, 0, 3), (1, 0, 4, 3), (1, 2, 900, 3)):
        np.savez(tmp_path / "d.npz", images=np.zeros(shape, np.uint8))
        with pytest.raises(InputError, match=f"sides within a ratio of 100, received {shape[2]} × {shape[1]} in 'd.npz'"):
            open_source(tmp_path / "d.npz")


@pytest.mark.parametrize("kind", KINDS)
def test_one_image_that_cannot_be_read_leaves_the_others(tmp_path, kind: str) -> None:
    images = [make() for make, _ in UNREADABLE.values()]
    source = KINDS[kind](tmp_path, [*images, encode(RED, "JPEG")])
    assert len(source) == len(images) + 1
    for index, identity in enumerate(source.ids):
        place = int(Path(identity).stem)
        if place == len(images):
            assert source.sample(index).photo.size == (24, 16)
            continue
        case = list(UNREADABLE)[place]
        with pytest.raises(InputError, match=UNREADABLE[case][1]) as caught:
            source.sample(index)
        assert "\n" not in str(caught.value), case


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM"])
def test_damaged_bytes_give_an_image_or_an_input_error(tmp_path, kind: str) -> None:
    rng = np.random.default_rng(0)
    whole = np.frombuffer(encode(NOISE.resize((24, 24)), kind), np.uint8)
    images = []
    for _ in range(60):
        image = whole.copy()
        places = rng.integers(0, min(len(image), 200), 5)
        image[places] = rng.integers(0, 256, 5)
        images.append(image[: rng.integers(1, 2 * len(image))].tobytes())
    source = _in_npz(tmp_path, images)
    for index in range(len(source)):
        with contextlib.suppress(InputError):
            assert source.sample(index).photo.mode == "RGB"
