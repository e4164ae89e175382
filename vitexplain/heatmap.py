"""From a map on the patch grid to colours: scaling, up-sampling, colour map, blending; and what they are laid over, as RGB."""

from __future__ import annotations

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .errors import InputError, unknown_name

UNSIGNED_COLORMAP = "inferno"
SIGNED_COLORMAP = "RdBu_r"
ALPHA = 0.55  # a map's share of an overlay, where none is asked for
# by whether a map is signed: its colour map, and what its ends mean
SCALES = {False: (UNSIGNED_COLORMAP, "low", "high"), True: (SIGNED_COLORMAP, "against the class", "for the class")}

_ROWS = 64  # of an image that are scaled at a time: in float64 the whole of a large one would take eight times its bytes
_MODES = {  # how messages name Pillow's modes
    "1": "black and white ({})",
    "L": "grayscale ({})",
    "LA": "grayscale with transparency ({})",
    "P": "palette ({})",
    "PA": "palette with transparency ({})",
    "I": "integer grayscale ({})",
    "F": "floating-point grayscale ({})",
    **dict.fromkeys(("I;16", "I;16L", "I;16B", "I;16N"), "16-bit grayscale ({})"),
}


def upsample(maps: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Bilinear up-sampling (align_corners False) of (…, gh, gw) to (…, height, width) pixels; an int is both.

    Raises:
        InputError: a size that is none.
    """
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise InputError(f"size: expected a positive int or (height, width), received {sides}")
    flat = maps.reshape(-1, 1, *maps.shape[-2:])
    return F.interpolate(flat, size=sides, mode="bilinear", align_corners=False).reshape(*maps.shape[:-2], *sides)


def is_signed(maps: Tensor | np.ndarray) -> bool:
    """Whether values below zero carry meaning, in maps of any shape: there are some."""
    return bool((maps < 0).any())


def min_max(maps: Tensor) -> Tensor:
    """Each map of (…, h, w) scaled to [0, 1]; a constant map becomes zeros."""
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    return (maps - low) / (high - low).clamp_min(torch.finfo(maps.dtype).tiny)


def max_magnitude(maps: Tensor) -> Tensor:
    """Each map of (…, h, w) divided by its largest magnitude; zeros stay zeros."""
    return maps / maps.abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)


def check_colormap(name: str | None) -> None:
    """Refuse a name that is no matplotlib colour map's.

    Raises:
        UnknownNameError: with near names.
    """
    if name is not None and name not in matplotlib.colormaps:
        raise unknown_name("colour map", name, matplotlib.colormaps)


def colorize(
    heat: Tensor, *, signed: bool = False, colormap: str | None = None, limits: tuple[float, float] | None = None
) -> np.ndarray:
    """Colours of one map (h, w) as (h, w, 3) uint8.

    Unsigned maps are min-max scaled and shown on a perceptually uniform scale; signed ones are scaled by their largest
    magnitude and shown on a diverging scale whose middle is zero. ``limits`` are values for the two ends of the scale instead,
    so that several maps can share one; what lies outside has the colour of the nearer end.

    Raises:
        UnknownNameError: no colour map has that name.
    """
    name = colormap or (SIGNED_COLORMAP if signed else UNSIGNED_COLORMAP)
    check_colormap(name)
    if limits is not None:
        low, high = limits
        unit = ((heat - low) / max(high - low, torch.finfo(heat.dtype).tiny)).clamp(0, 1)
    elif signed:
        unit = 0.5 + 0.5 * max_magnitude(heat)
    else:
        unit = min_max(heat)
    return matplotlib.colormaps[name](unit.cpu().numpy(), bytes=True)[..., :3].copy()


def blend(
    photo: Image.Image,
    heat: Tensor,
    *,
    alpha: float = ALPHA,
    signed: bool = False,
    colormap: str | None = None,
    limits: tuple[float, float] | None = None,
) -> Image.Image:
    """The photo with a map (gh, gw) laid over it, at the photo's size; ``alpha`` is the map's share, the rest as ``colorize``.

    Raises:
        InputError: an alpha beyond 0 to 1.
        UnknownNameError: no colour map has that name.
    """
    check_alpha(alpha)
    photo = photo.convert("RGB")
    enlarged = upsample(heat.float(), (photo.height, photo.width))
    colors = colorize(enlarged, signed=signed, colormap=colormap, limits=limits)
    return Image.blend(photo, Image.fromarray(colors), alpha)


def check_alpha(alpha: float) -> None:
    """Refuse a share that is none.

    Raises:
        InputError: beyond 0 to 1.
    """
    if not 0 <= alpha <= 1:
        raise InputError(f"alpha: expected 0 to 1, received {alpha}")


def as_photo(image: object) -> Image.Image:
    """A PIL image, an array (h, w, 3) uint8, or a tensor (3, h, w) uint8 or float in [0, 1], as a PIL image in RGB.

    Of a PIL image, transparent parts become white and values of 16 bits are scaled, as ``vitexplain.load_photo`` does.

    Raises:
        InputError: anything else, one without pixels, or values beyond [0, 1].
    """
    if isinstance(image, Image.Image) and min(image.size) > 0:
        try:
            return to_rgb(image)[0]
        except ValueError as error:
            raise InputError(f"image: expected an image to show, received one of mode {image.mode!r}: {error}") from error
    if isinstance(image, Tensor) and image.dim() == 3 and image.shape[0] == 3 and image.numel():
        if image.is_floating_point():
            return Image.fromarray(_channels_last((_in_unit_range(image.detach()) * 255).round().to(torch.uint8)))
        if image.dtype == torch.uint8:
            return Image.fromarray(_channels_last(image))
    if isinstance(image, np.ndarray) and image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.uint8 and image.size:
        return Image.fromarray(image)
    raise InputError(f"image: expected a PIL image, uint8 array (h, w, 3) or tensor (3, h, w), received {_described(image)}")


def _in_unit_range(image: Tensor) -> Tensor:
    low, high = float(image.min()), float(image.max())
    if not (low >= 0 and high <= 1):  # NaN neither
        raise InputError(f"image: expected values in [0, 1] (before normalisation), received {low:.3g} to {high:.3g}")
    return image


def _channels_last(image: Tensor) -> np.ndarray:
    return image.cpu().permute(1, 2, 0).contiguous().numpy()


def _described(image: object) -> str:
    """For a message: the kind of thing, and its shape and type where it has them."""
    shape = image.size if isinstance(image, Image.Image) else getattr(image, "shape", None)
    dtype = f" {image.dtype}" if isinstance(image, Tensor | np.ndarray) else ""
    return type(image).__name__ + (f" of shape {tuple(shape)}{dtype}" if shape is not None else "")


def to_rgb(image: Image.Image) -> tuple[Image.Image, str | None]:
    """An image of any mode as RGB, itself where it is, and what that changed, None where nothing.

    Transparent parts become white, and values of 16 bits or floats are scaled.

    Raises:
        ValueError: floats of which none is finite.
    """
    mode = image.mode
    conversion = None if mode == "RGB" else f"converted from {_MODES.get(mode, '{}').format(mode)} to RGB"
    if mode.startswith("I") or mode == "F":
        return Image.fromarray(_to_uint8(np.asarray(image))).convert("RGB"), conversion
    if mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image if mode == "RGBA" else image.convert("RGBA")
        if image.getchannel("A").getextrema()[0] == 255:
            return image.convert("RGB"), conversion
        conversion = f"transparent parts on white ({mode})"
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB"), conversion
    return image if mode == "RGB" else image.convert("RGB"), conversion


def _to_uint8(values: np.ndarray) -> np.ndarray:
    """Values in [0, 65535], or for floats also in [0, 1] or [0, 255] if none is larger, to [0, 255]."""
    top = 65535.0
    if values.dtype.kind == "f":
        largest = float(np.max(values, where=np.isfinite(values), initial=-np.inf))
        if largest == -np.inf:
            raise ValueError("none of its values is finite")
        top = next(limit for limit in (1.0, 255.0, max(65535.0, largest)) if largest <= limit)
    scaled = np.empty(values.shape, np.uint8)
    for start in range(0, len(values), _ROWS):
        block = np.nan_to_num(values[start : start + _ROWS]) / top
        scaled[start : start + _ROWS] = np.rint(np.clip(block, 0, 1) * 255)
    return scaled
