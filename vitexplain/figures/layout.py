"""Figures laid out by hand: titles above, pictures in one grid at their own pixels, what the colours mean below.

Lengths are in inches, sizes of letters in points.
"""

from __future__ import annotations

import math
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path
from PIL import Image

from ..errors import InputError
from ..files import writing

COLUMNS = 5
DPI = 160
GAP = 0.16
MARGIN = 0.3
INK, FAINT = "#1a1a1a", "#666666"
LEGEND_HEIGHT = 0.32

_TITLE_LINE = 0.3
_CAPTION_LINE = 0.21
_BAR = (1.3, 0.1)
_TITLE_SIZE, _CAPTION_SIZE, _LEGEND_SIZE = 14, 10.5, 8.5
_WIDEST, _TALLEST, _NARROWEST = 2, 1.5, 0.55

Scale = tuple[str, str, str]  # a colour map, and what its two ends mean


@dataclass(frozen=True)
class Cells:
    """How large pictures are, and the lines of text above each.

    Attributes:
        columns: the most pictures in a row.
        width: of one.
        line: height of a line above it.
        size: of that line's letters.
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

    def shaped_for(self, photo: Image.Image) -> tuple[Cells, Image.Image]:
        """Cells for pictures of a photo's shape, and the photo at the pixels it has in one.

        Beyond twice as wide as high, cells get wider, and fewer in a row, so that pictures are no mere strips; beyond one and a
        half times as high as wide they get narrower, so that a row fits on a screen.
        """
        aspect = photo.width / photo.height
        row = self.columns * (self.width + GAP)  # a gap more than it has
        width = min(self.width * max(1.0, aspect / _WIDEST), row / 2 - GAP)
        height = min(width / aspect, self.width * _TALLEST)
        cell = max(height * aspect, self.width * _NARROWEST)
        columns = max(1, min(self.columns, int((row + 1e-6) / (cell + GAP))))
        size = max(1, round(height * aspect * DPI)), max(1, round(height * DPI))
        resized = photo if photo.size == size else photo.resize(size, Image.Resampling.LANCZOS)
        return replace(self, columns=columns, width=cell), resized


PANEL = Cells(COLUMNS, 2.8, 0.2, 10.5)
SHEET = Cells(6, 1.7, 0.15, 8, 5.4)


def compose(
    pictures: Sequence[tuple[str, Image.Image]], title: str, caption: str, scales: Sequence[Scale], cells: Cells
) -> Figure:
    """Titles and pictures in one grid, whatever the length of the titles.

    Args:
        pictures: what stands above each, of one or more lines, and the picture at its own pixels.
        title: above everything.
        caption: in small below the title.
        scales: for the legend.
        cells: of the grid.
    """
    rows = math.ceil(len(pictures) / cells.columns)
    columns = math.ceil(len(pictures) / rows)  # as even as can be
    cell_height = max(picture.height for _, picture in pictures) / DPI
    name_height = cells.line * max(name.count("\n") + 1 for name, _ in pictures) + 0.08
    inside = max(columns * cells.width + (columns - 1) * GAP, cells.header)
    header = Header(title, caption, inside)
    row_height = name_height + cell_height + GAP
    height = 2 * MARGIN + header.height + rows * row_height - GAP + (LEGEND_HEIGHT if scales else 0)

    figure = new_figure(2 * MARGIN + inside, height)
    header.place(figure)
    for index, (name, picture) in enumerate(pictures):
        row, column = divmod(index, columns)
        left = MARGIN + column * (cells.width + GAP)
        top = height - MARGIN - header.height - row * row_height - name_height
        place_text(figure, left, top + 0.07, name, va="bottom", size=cells.size)
        picture_width, picture_height = picture.width / DPI, picture.height / DPI
        place_axes(figure, left, top - picture_height, picture_width, picture_height).imshow(
            np.asarray(picture), aspect="auto", interpolation="antialiased"
        )
    place_legend(figure, scales)
    return figure


def new_figure(width: float, height: float) -> Figure:
    """An empty white figure that belongs to no global state."""
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


class Header:
    """Title and caption, wrapped to a width."""

    def __init__(self, title: str, caption: str, width: float) -> None:
        bold = {"size": _TITLE_SIZE, "weight": "bold"}
        small = {"size": _CAPTION_SIZE, "color": FAINT}
        titles = _wrapped(title, width, 0.13, _TITLE_SIZE, "bold")
        captions = _wrapped(caption, width, 0.07, _CAPTION_SIZE, "normal")
        self._lines: list[tuple[str, float, dict[str, Any]]] = [(line, _TITLE_LINE, bold) for line in titles]
        self._lines += [(line, _CAPTION_LINE, small) for line in captions]
        self.height = sum(height for _, height, _ in self._lines) + 0.08 * bool(self._lines)

    def place(self, figure: Figure) -> None:
        """At the top of a figure."""
        top = figure.get_size_inches()[1] - MARGIN
        for text, height, style in self._lines:
            place_text(figure, MARGIN, top, text, va="top", **style)
            top -= height


def place_legend(figure: Figure, scales: Sequence[Scale]) -> None:
    """What the colours mean, at the bottom left: one bar for each scale shown."""
    if not scales:
        return
    words = [word for _, *ends in scales for word in ends]
    texts = sum(text_width(word, _LEGEND_SIZE) for word in words) + 0.16 * len(scales) + 0.4 * (len(scales) - 1)
    bar_width = max(0.3, min(_BAR[0], (figure.get_size_inches()[0] - 2 * MARGIN - texts) / len(scales)))
    left = MARGIN
    for name, low, high in scales:
        place_text(figure, left, MARGIN, low, va="center_baseline", size=_LEGEND_SIZE, color=FAINT)
        left += text_width(low, _LEGEND_SIZE) + 0.08
        bar = place_axes(figure, left, MARGIN - _BAR[1] / 2, bar_width, _BAR[1])
        bar.imshow(np.linspace(0, 1, 256)[None], aspect="auto", cmap=matplotlib.colormaps[name])
        left += bar_width + 0.08
        place_text(figure, left, MARGIN, high, va="center_baseline", size=_LEGEND_SIZE, color=FAINT)
        left += text_width(high, _LEGEND_SIZE) + 0.4


def place_text(figure: Figure, left: float, bottom: float, text: str, *, color: str = INK, **style: Any) -> None:
    """Text at a place counted from the figure's lower left corner."""
    width, height = figure.get_size_inches()
    figure.text(left / width, bottom / height, text, color=color, parse_math=False, **{"ha": "left", **style})


def place_axes(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Bare axes at a place."""
    whole_width, whole_height = figure.get_size_inches()
    axes = figure.add_axes((left / whole_width, bottom / whole_height, width / whole_width, height / whole_height))
    axes.set_axis_off()
    return axes


def text_width(text: str, size: float, weight: str = "normal") -> float:
    """Of a line of text; a little more than its outlines, as letters are fitted to pixels."""
    font = FontProperties(size=size, weight=weight)
    with any_letters():
        return 1.03 * text_to_path.get_text_width_height_descent(text, font, ismath=False)[0] / 72


def wrapped_name(name: str, cells: Cells) -> str:
    """What stands above a picture of a panel, in two lines at most, no wider than the picture's cell."""
    return "\n".join(_wrapped(name, cells.width, 0.07, cells.size, "normal", most=2))


def save_figure(path: str | Path, figure: Figure, *, dpi: int = DPI) -> Path:
    """Write a figure to a picture file; returns its path.

    Raises:
        InputError: the suffix is no picture's, or the file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower().removeprefix(".") not in figure.canvas.get_supported_filetypes():
        raise InputError(f"output: cannot write {str(path)!r}: expected the suffix of a picture, such as .png")
    with writing(path), any_letters():
        figure.savefig(path, dpi=dpi)
    return path


@contextmanager
def any_letters() -> Iterator[None]:
    """Letters that the font does not have are shown as boxes, without a word about each."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .*missing from")
        yield


def _wrapped(text: str, width: float, letter: float, size: float, weight: str, *, most: int = 3) -> list[str]:
    """At most so many lines; ``letter`` is about the width of one, from which a fitting number of them is looked for."""
    lines: list[str] = []
    for letters in range(int(width / letter), 1, -1):
        lines = textwrap.wrap(text, letters, max_lines=most, placeholder=" …")
        if all(text_width(line, size, weight) <= width for line in lines):
            break
    return lines
