"""Sheets of many small pictures."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace

from matplotlib.figure import Figure
from PIL import Image

from ..heatmap import SCALES
from .layout import SHEET, compose, text_width


def sheet(
    pictures: Sequence[tuple[str, Image.Image]],
    *,
    title: str = "",
    caption: str = "",
    kinds: Sequence[bool] = (),
    columns: int = SHEET.columns,
) -> Figure:
    """A figure of many small pictures.

    Args:
        pictures: what stands above each, as lines that ``fitted`` made, and the picture itself, as ``in_cell`` made it.
        title: above everything.
        caption: in small below the title.
        kinds: of the maps shown, for the legend: whether they are signed.
        columns: the most pictures in a row.

    Returns:
        A figure that belongs to no global state.
    """
    return compose(pictures, title, caption, [SCALES[kind] for kind in kinds], replace(SHEET, columns=columns))


def in_cell(picture: Image.Image) -> Image.Image:
    """A picture as large as a square cell of a sheet allows, at the pixels it has on the figure."""
    scale = SHEET.pixels / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


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

    if text_width(text + end, SHEET.size) <= SHEET.width:
        return text + end
    return shortened(bisect_right(range(1, len(text)), SHEET.width, key=lambda kept: text_width(shortened(kept), SHEET.size)))
