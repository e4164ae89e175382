"""Pictures for people: a photo beside the heat maps of several methods."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from .errors import InputError
from .heatmap import SCALES, as_photo, blend

COLUMNS = 5
DPI = 160

_CELL = 2.8  # width of one picture; these lengths are in inches
_GAP = 0.16
_MARGIN = 0.3
_LINE = 0.2
_TITLE_LINE = 0.3
_BAR = (1.3, 0.1)
_INK, _FAINT = "#1a1a1a", "#666666"


def panel(
    photo: object, maps: Mapping[str, Tensor], *, title: str = "", photo_title: str = "photo", alpha: float = 0.55
) -> Figure:
    """A figure of the photo and, for each title, its map laid over it; at most five pictures a row.

    Args:
        photo: the part of the photo that the model saw: a PIL image, uint8 array (h, w, 3), or tensor (3, h, w) in uint8 or
            [0, 1].
        maps: by title, (gh, gw) each; one with values below zero is shown on a diverging scale, whose middle is zero.
        title: above everything.
        photo_title: above the photo.
        alpha: the map's share of the overlay, 0 to 1.

    Returns:
        A figure that belongs to no global state.

    Raises:
        InputError: a photo, map or alpha that does not fit.
    """
    picture = _sized(as_photo(photo).convert("RGB"))
    pictures = [(photo_title, picture)]
    for name, heat in maps.items():
        _check_map(name, heat)
        pictures.append((name, blend(picture, heat.detach(), alpha=alpha, signed=_signed(heat))))
    return _compose(pictures, title, sorted({_signed(heat) for heat in maps.values()}))


def save_panel(path: str | Path, photo: object, maps: Mapping[str, Tensor], *, title: str = "", dpi: int = DPI) -> Path:
    """Write ``panel`` to a picture file; raises ``InputError`` where it cannot be written."""
    path = Path(path)
    figure = panel(photo, maps, title=title)
    if path.suffix.lower().removeprefix(".") not in figure.canvas.get_supported_filetypes():
        raise InputError(f"output: cannot write {str(path)!r}: expected the suffix of a picture, such as .png")
    try:
        figure.savefig(path, dpi=dpi)
    except OSError as error:
        raise InputError(f"output: cannot write {str(path)!r}: {error.strerror or error}") from error
    return path


def _check_map(name: str, heat: object) -> None:
    if not isinstance(heat, Tensor) or heat.dim() != 2:
        received = tuple(heat.shape) if isinstance(heat, Tensor) else type(heat).__name__
        raise InputError(f"maps: expected a tensor (gh, gw) for {name!r}, received {received}")
    if not torch.isfinite(heat).all():
        raise InputError(f"maps: expected finite values for {name!r}, received NaN or infinity")


def _signed(heat: Tensor) -> bool:
    return bool((heat < 0).any())


def _sized(photo: Image.Image) -> Image.Image:
    """The photo at the pixels it has on the figure, so that nothing is resampled twice."""
    width = round(_CELL * DPI)
    height = max(1, round(width * photo.height / photo.width))
    return photo if photo.size == (width, height) else photo.resize((width, height), Image.Resampling.LANCZOS)


def _compose(pictures: list[tuple[str, Image.Image]], title: str, kinds: list[bool]) -> Figure:
    """Place titles and pictures by hand: every picture has the same size, whatever its title."""
    rows = math.ceil(len(pictures) / COLUMNS)
    columns = math.ceil(len(pictures) / rows)  # as even as can be
    cell_height = _CELL * pictures[0][1].height / pictures[0][1].width
    names = ["\n".join(textwrap.wrap(name, 36, max_lines=2, placeholder=" …")) for name, _ in pictures]
    name_height = _LINE * max(name.count("\n") + 1 for name in names) + 0.08
    width = 2 * _MARGIN + columns * _CELL + (columns - 1) * _GAP
    lines = textwrap.wrap(title, int((width - 2 * _MARGIN) / 0.13), max_lines=3, placeholder=" …")
    header_height = _TITLE_LINE * len(lines) + 0.08 * bool(lines)
    row_height = name_height + cell_height + _GAP
    height = 2 * _MARGIN + header_height + rows * row_height - _GAP + (0.32 if kinds else 0)

    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    for index, line in enumerate(lines):
        _text(figure, _MARGIN, height - _MARGIN - index * _TITLE_LINE, line, va="top", size=14, weight="bold")
    for index, (name, (_, picture)) in enumerate(zip(names, pictures, strict=True)):
        row, column = divmod(index, columns)
        left = _MARGIN + column * (_CELL + _GAP)
        top = height - _MARGIN - header_height - row * row_height - name_height
        _text(figure, left, top + 0.07, name, va="bottom", size=10.5)
        _axes(figure, left, top - cell_height, _CELL, cell_height).imshow(
            np.asarray(picture), aspect="auto", interpolation="antialiased"
        )
    _legend(figure, kinds)
    return figure


def _legend(figure: Figure, kinds: list[bool]) -> None:
    """What the colours mean, at the bottom left: one bar for each kind of map shown."""
    left = _MARGIN
    for kind in kinds:
        name, low, high = SCALES[kind]
        for text, gap in ((low, 0.08), (high, 0.4)):
            _text(figure, left, _MARGIN, text, va="center_baseline", size=8.5, color=_FAINT)
            left += 0.064 * len(text) + gap
            if text == low:
                bar = _axes(figure, left, _MARGIN - _BAR[1] / 2, *_BAR)
                bar.imshow(np.linspace(0, 1, 256)[None], aspect="auto", cmap=matplotlib.colormaps[name])
                left += _BAR[0] + 0.08


def _text(figure: Figure, left: float, bottom: float, text: str, *, color: str = _INK, **style: Any) -> None:
    """Text at a place in inches from the figure's lower left corner."""
    width, height = figure.get_size_inches()
    figure.text(left / width, bottom / height, text, ha="left", color=color, parse_math=False, **style)


def _axes(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Bare axes at a place in inches."""
    whole_width, whole_height = figure.get_size_inches()
    axes = figure.add_axes((left / whole_width, bottom / whole_height, width / whole_width, height / whole_height))
    axes.set_axis_off()
    return axes
