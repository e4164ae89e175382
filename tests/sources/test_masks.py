"""Masks of every mode."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from vitexplain.sources import foreground

_FOREGROUND = np.arange(80).reshape(8, 10) % 3 == 0


def _palette(first: tuple[int, ...], second: tuple[int, ...]) -> Image.Image:
    image = Image.fromarray(_FOREGROUND.astype(np.uint8), "L")
    image.putpalette([*first, *second])
    return image


MASKS: dict[str, Callable[[], Image.Image]] = {
    "0/255": lambda: Image.fromarray(_FOREGROUND.astype(np.uint8) * 255),
    "0/1": lambda: Image.fromarray(_FOREGROUND.astype(np.uint8)),
    "127/128": lambda: Image.fromarray(np.where(_FOREGROUND, 128, 127).astype(np.uint8)),
    "one bit": lambda: Image.fromarray(_FOREGROUND),
    "16 bits": lambda: Image.fromarray(np.where(_FOREGROUND, 40000, 30000).astype(np.uint16)),
    "0/1 in 16 bits": lambda: Image.fromarray(_FOREGROUND.astype(np.uint16)),
    "0/255 in 32 bits": lambda: Image.fromarray(_FOREGROUND.astype(np.int32) * 255),
    "floats": lambda: Image.fromarray(np.where(_FOREGROUND, 0.6, 0.4).astype(np.float32)),
    "not a number": lambda: Image.fromarray(np.where(_FOREGROUND, 1, np.nan).astype(np.float32)),
    "white on black": lambda: Image.fromarray(_FOREGROUND.astype(np.uint8) * 255).convert("RGB"),
    "red on black": lambda: Image.fromarray(_FOREGROUND[..., None] * np.array([255, 0, 0], np.uint8)),
    "palette": lambda: _palette((0, 0, 0), (128, 0, 0)),
    "reversed palette": lambda: Image.fromarray(_FOREGROUND.astype(np.uint8) * 255).quantize(2),
    "alpha": lambda: Image.fromarray(
        np.concatenate([np.full((8, 10, 3), 255, np.uint8), _FOREGROUND[..., None] * np.uint8(255)], -1)
    ),
}


@pytest.mark.parametrize("case", MASKS)
def test_masks_of_every_kind(case: str) -> None:
    found = foreground(MASKS[case]())
    assert found.dtype == bool
    np.testing.assert_array_equal(found, _FOREGROUND)


def test_a_mask_without_foreground() -> None:
    assert not foreground(Image.new("L", (4, 3))).any()
    assert foreground(Image.new("L", (4, 3), 255)).all()
