"""Masks of the foreground."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from ..photos import decode_image, upright


def decode_mask(file: Path | BinaryIO, name: str) -> np.ndarray:
    """Bool (h, w) of the upright mask in a file or a stream of bytes; ``name`` stands for it in messages.

    Raises:
        InputError: it cannot be read as an image.
    """
    return decode_image(file, "mask", name, lambda image: foreground(upright(image)))


def foreground(image: Image.Image) -> np.ndarray:
    """Bool (h, w) of a mask of any mode: more than half of the full range, of the brightest channel where there are several.

    The full range is 0…1 where no value is larger, else 0…255, else 0…65535.
    """
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
    if image.mode not in ("1", "L", "F") and not image.mode.startswith("I"):
        image = image.convert("RGB")  # the colours of a palette, not their numbers
    values = np.asarray(image)
    if values.dtype.kind == "f":
        values = np.nan_to_num(values)
    if values.ndim == 3:
        values = values.max(-1)
    full = next(limit for limit in (1.0, 255.0, np.inf) if values.max() <= limit)
    return values > (full if np.isfinite(full) else 65535.0) / 2
