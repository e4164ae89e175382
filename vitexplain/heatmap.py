"""From a map on the patch grid to colours: scaling, up-sampling, colour map, blending."""

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
    """A PIL image, an array (h, w, 3) uint8, or a tensor (3, h, w) uint8 or float in [0, 1], as a PIL image.

    Raises:
        InputError: anything else, or values beyond [0, 1].
    """
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, Tensor) and image.dim() == 3 and image.shape[0] == 3:
        image = image.detach().cpu()
        if image.is_floating_point():
            if image.min() < 0 or image.max() > 1:
                low, high = float(image.min()), float(image.max())
                raise InputError(f"image: expected values in [0, 1] (before normalisation), received {low:.3g} to {high:.3g}")
            image = (image * 255).round().to(torch.uint8)
        return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    if isinstance(image, np.ndarray) and image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.uint8:
        return Image.fromarray(image)
    shape = f" of shape {tuple(image.shape)}" if hasattr(image, "shape") else ""
    raise InputError(
        f"image: expected a PIL image, uint8 array (h, w, 3) or tensor (3, h, w), received {type(image).__name__}{shape}"
    )
