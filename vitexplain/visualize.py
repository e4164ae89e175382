"""Pictures for people: a photo beside the heat maps of several methods, and sheets of many small pictures."""

from __future__ import annotations

import math
import textwrap
import warnings
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path
from PIL import Image
from torch import Tensor

from .errors import InputError
from .heatmap import SCALES, as_photo, blend

COLUMNS = 5
DPI = 160

_GAP = 0.16  # these lengths are in inches
_MARGIN = 0.3
_TITLE_LINE = 0.3
_CAPTION_LINE = 0.21
_BAR = (1.3, 0.1)
_TITLE_SIZE, _CAPTION_SIZE = 14, 10.5  # in points
_INK, _FAINT = "#1a1a1a", "#666666"


@dataclass(frozen=True)
class _Cells:
    """How large pictures are, and the lines of text above each.

    Attributes:
        columns: the most pictures in a row.
        width: of one.
        line: height of a line above it.
        size: of that line's letters, in points.
        header: the least width of what stands above all.
    """

    columns: int
    width: float
    line: float
    size: float
    header: float = 0.0

    @property
    def pixels(self) -> int:
        """Of a picture's width on the figure, so that nothing is resampled twice."""
        return round(self.width * DPI)


_PANEL = _Cells(COLUMNS, 2.8, 0.2, 10.5)
_SHEET = _Cells(6, 1.7, 0.15, 8, 5.4)


def panel(
    photo: object,
    maps: Mapping[str, Tensor],
    *,
    title: str = "",
    caption: str = "",
    photo_title: str | None = "photo",
    alpha: float = 0.55,
) -> Figure:
    """A figure of the photo and, for each title, its map laid over it; at most five pictures a row.

    Args:
        photo: the part of the photo that the model saw: a PIL image, uint8 array (h, w, 3), or tensor (3, h, w) in uint8 or
            [0, 1].
        maps: by title, (gh, gw) each; one with values below zero is shown on a diverging scale, whose middle is zero.
        title: above everything.
        caption: in small below the title.
        photo_title: above the photo; None leaves the photo itself out.
        alpha: the map's share of the overlay, 0 to 1.

    Returns:
        A figure that belongs to no global state.

    Raises:
        InputError: a photo, map or alpha that does not fit.
    """
    picture = _sized(as_photo(photo).convert("RGB"))
    pictures = [] if photo_title is None else [(photo_title, picture)]
    for name, heat in maps.items():
        _check_map(name, heat)
        pictures.append((name, blend(picture, heat.detach(), alpha=alpha, signed=_signed(heat))))
    named = [("\n".join(textwrap.wrap(name, 36, max_lines=2, placeholder=" …")), shown) for name, shown in pictures]
    return _compose(named, title, caption, sorted({_signed(heat) for heat in maps.values()}), _PANEL)


def sheet(
    pictures: Sequence[tuple[str, Image.Image]],
    *,
    title: str = "",
    caption: str = "",
    kinds: Sequence[bool] = (),
    columns: int = _SHEET.columns,
) -> Figure:
    """A figure of many small pictures.

    Args:
        pictures: what stands above each, as lines that ``fitted`` made, and the picture itself, as ``in_cell`` made it.
        title: above everything.
        caption: in small below the title.
        kinds: of the maps shown, for the legend: whether they are signed.
        columns: the most pictures in a row.
    """
    return _compose(pictures, title, caption, kinds, replace(_SHEET, columns=columns))


def in_cell(picture: Image.Image) -> Image.Image:
    """A picture as large as a square cell of a sheet allows, at the pixels it has on the figure."""
    scale = _SHEET.pixels / max(picture.size)
    return picture.resize([max(1, round(side * scale)) for side in picture.size], Image.Resampling.LANCZOS)


def fitted(text: str, *, end: str = "", keep_tail: bool = False) -> str:
    """A line as wide as a cell of a sheet at most, shortened where it must be.

    Args:
        text: what may be shortened.
        end: what follows and stays whole.
        keep_tail: leave out from the beginning, as of a path, instead of from the end.
    """
    text = " ".join(text.split())  # one line, whatever names of files hold

    def shortened(kept: int) -> str:
        return (f"…{text[len(text) - kept :]}" if keep_tail else f"{text[:kept].rstrip()}…") + end

    if _width(text + end, _SHEET.size) <= _SHEET.width:
        return text + end
    return shortened(bisect_right(range(1, len(text)), _SHEET.width, key=lambda kept: _width(shortened(kept), _SHEET.size)))


def save_panel(path: str | Path, photo: object, maps: Mapping[str, Tensor], *, dpi: int = DPI, **layout: Any) -> Path:
    """Write ``panel``, which has the same ``layout`` options, to a picture file.

    Raises:
        InputError: as ``panel`` and ``save_figure``.
    """
    return save_figure(path, panel(photo, maps, **layout), dpi=dpi)


def save_figure(path: str | Path, figure: Figure, *, dpi: int = DPI) -> Path:
    """Write a figure to a picture file; raises ``InputError`` where it cannot be written."""
    path = Path(path)
    if path.suffix.lower().removeprefix(".") not in figure.canvas.get_supported_filetypes():
        raise InputError(f"output: cannot write {str(path)!r}: expected the suffix of a picture, such as .png")
    try:
        with _any_letters():
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
    """The photo at the pixels it has on a panel."""
    width = _PANEL.pixels
    height = max(1, round(width * photo.height / photo.width))
    return photo if photo.size == (width, height) else photo.resize((width, height), Image.Resampling.LANCZOS)


def _compose(
    pictures: Sequence[tuple[str, Image.Image]], title: str, caption: str, kinds: Sequence[bool], cells: _Cells
) -> Figure:
    """Place titles and pictures by hand: pictures stand in one grid, whatever their titles, at their own pixels."""
    rows = math.ceil(len(pictures) / cells.columns)
    columns = math.ceil(len(pictures) / rows)  # as even as can be
    cell_height = max(picture.height for _, picture in pictures) / DPI
    name_height = cells.line * max(name.count("\n") + 1 for name, _ in pictures) + 0.08
    inside = max(columns * cells.width + (columns - 1) * _GAP, cells.header)
    width = 2 * _MARGIN + inside
    header = _header(title, caption, inside)
    header_height = sum(line for _, line, _ in header) + 0.08 * bool(header)
    row_height = name_height + cell_height + _GAP
    height = 2 * _MARGIN + header_height + rows * row_height - _GAP + (0.32 if kinds else 0)

    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    top = height - _MARGIN
    for text, line, style in header:
        _text(figure, _MARGIN, top, text, va="top", **style)
        top -= line
    for index, (name, picture) in enumerate(pictures):
        row, column = divmod(index, columns)
        left = _MARGIN + column * (cells.width + _GAP)
        top = height - _MARGIN - header_height - row * row_height - name_height
        _text(figure, left, top + 0.07, name, va="bottom", size=cells.size)
        picture_width, picture_height = picture.width / DPI, picture.height / DPI
        _axes(figure, left, top - picture_height, picture_width, picture_height).imshow(
            np.asarray(picture), aspect="auto", interpolation="antialiased"
        )
    _legend(figure, kinds)
    return figure


def _header(title: str, caption: str, width: float) -> list[tuple[str, float, dict[str, Any]]]:
    """Lines above the pictures: text, height and style of each."""
    bold = {"size": _TITLE_SIZE, "weight": "bold"}
    small = {"size": _CAPTION_SIZE, "color": _FAINT}
    titles = [(line, _TITLE_LINE, bold) for line in _wrapped(title, width, 0.13, _TITLE_SIZE, "bold")]
    return titles + [(line, _CAPTION_LINE, small) for line in _wrapped(caption, width, 0.07, _CAPTION_SIZE, "normal")]


def _wrapped(text: str, width: float, letter: float, size: float, weight: str) -> list[str]:
    """At most three lines; ``letter`` is about the width of one, from which a fitting number of them is looked for."""
    for letters in range(int(width / letter), 8, -1):
        lines = textwrap.wrap(text, letters, max_lines=3, placeholder=" …")
        if all(_width(line, size, weight) <= width for line in lines):
            break
    return lines


def _width(text: str, size: float, weight: str = "normal") -> float:
    """Of a line of text, in inches; a little more than its outlines, as letters are fitted to pixels."""
    font = FontProperties(size=size, weight=weight)
    with _any_letters():
        return 1.03 * text_to_path.get_text_width_height_descent(text, font, ismath=False)[0] / 72


@contextmanager
def _any_letters() -> Iterator[None]:
    """Letters that the font does not have are shown as boxes, without a word about each."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .*missing from")
        yield


def _legend(figure: Figure, kinds: Sequence[bool]) -> None:
    """What the colours mean, at the bottom left: one bar for each kind of map shown."""
    left = _MARGIN
    texts = sum(0.064 * len(text) + gap for kind in kinds for text, gap in zip(SCALES[kind][1:], (0.16, 0.4), strict=True)) - 0.4
    bar_width = min(_BAR[0], (figure.get_size_inches()[0] - 2 * _MARGIN - texts) / max(1, len(kinds)))
    for kind in kinds:
        name, low, high = SCALES[kind]
        for text, gap in ((low, 0.08), (high, 0.4)):
            _text(figure, left, _MARGIN, text, va="center_baseline", size=8.5, color=_FAINT)
            left += 0.064 * len(text) + gap
            if text == low:
                bar = _axes(figure, left, _MARGIN - _BAR[1] / 2, bar_width, _BAR[1])
                bar.imshow(np.linspace(0, 1, 256)[None], aspect="auto", cmap=matplotlib.colormaps[name])
                left += bar_width + 0.08


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
