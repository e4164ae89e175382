"""Photos from files: every mode, upright, as RGB, with one-line errors for what cannot be read."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import InputError
from .files import check_file
from .heatmap import to_rgb
from .messages import brief

MAX_SIDE_RATIO = 100

_ONE_PICTURE = ("MPO", "PSD")  # further frames are previews, depth maps or layers of the one picture
_Converted = TypeVar("_Converted")


@dataclass(frozen=True)
class Photo:
    """A photo as it was read.

    Attributes:
        image: RGB, upright.
        note: what was done to the file's own image apart from turning it upright, such as ``"converted from CMYK to RGB"``;
            None where nothing was.
    """

    image: Image.Image
    note: str | None


def load_photo(path: str | Path) -> Image.Image:
    """The photo in a file as RGB, upright; transparent parts become white, 16-bit values are scaled, and of an animation
    the first frame is taken.

    Raises:
        InputError: no such file, or it cannot be read as an image.
    """
    return read_photo(path).image


def read_photo(path: str | Path) -> Photo:
    """The photo in a file as ``load_photo`` gives it, with what was done to it.

    Raises:
        InputError: no such file, or it cannot be read as an image.
    """
    path = Path(path)
    check_file(path, "photo")
    return decode_photo(path, repr(str(path)))


def decode_photo(file: Path | BinaryIO, name: str) -> Photo:
    """The photo in a file or a stream of bytes as ``read_photo`` gives it; ``name`` stands for it in messages.

    Raises:
        InputError: it cannot be read as an image.
    """
    photo = decode_image(file, "photo", name, _as_photo)
    check_sides(photo.image.size, name)
    return photo


def check_sides(size: tuple[int, int], name: str) -> None:
    """Raise ``InputError`` where a photo of this width and height, called ``name``, is empty or but a thread."""
    width, height = size
    if min(size) == 0 or max(size) > MAX_SIDE_RATIO * min(size):
        raise InputError(f"photo: expected sides within a ratio of {MAX_SIDE_RATIO}, received {width} × {height} in {name}")


def decode_image(file: Path | BinaryIO, what: str, name: str, convert: Callable[[Image.Image], _Converted]) -> _Converted:
    """What ``convert`` makes of the image in a file or a stream of bytes.

    Args:
        file: the encoded image.
        what: what the image is for, ``"photo"`` or ``"mask"``; messages begin with it.
        name: stands for the image in messages.
        convert: from an image of any mode, as the file holds it: open, its first frame decoded, not yet upright.

    Raises:
        InputError: it cannot be read as an image, or not be converted.
        MemoryError: there is too little memory for it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # large photos and odd metadata
            with Image.open(file) as image:
                image.load()
                return convert(image)
    except MemoryError:  # the machine's trouble, not the file's: another try can succeed
        raise
    except UnidentifiedImageError as error:
        raise InputError(f"{what}: {name} is not an image in a known format") from error
    except Exception as error:  # a damaged file can raise anything inside a decoder
        raise InputError(f"{what}: cannot read {name}: {brief(error)}") from error


def _as_photo(image: Image.Image) -> Photo:
    rgb, conversion = to_rgb(upright(image))
    if rgb is image:
        rgb = _detached(image)
    return Photo(rgb, "; ".join(filter(None, (_frames(image), conversion))) or None)


def upright(image: Image.Image) -> Image.Image:
    """The image itself, turned as its metadata say; no copy is made of one that stands upright already."""
    ImageOps.exif_transpose(image, in_place=True)
    return image


def _frames(image: Image.Image) -> str | None:
    """That the file has more frames than the one that was decoded."""
    if image.format in _ONE_PICTURE:
        return None
    try:
        count = getattr(image, "n_frames", 1)
    except Exception:  # what comes behind the first frame is damaged
        return "first of several frames"
    return f"first of {count} frames" if count > 1 else None


def _detached(image: Image.Image) -> Image.Image:
    """An image of the same pixels that knows nothing of its file; they are copied only where they lie in the file, mapped."""
    return image.copy() if image.readonly else image._new(image.im)
