"""Pictures to look at: a photo beside its heat maps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from .errors import InputError
from .heatmap import blend

COLUMNS = 5
CELL_INCHES = 2.6


def panel(photo: Image.Image, maps: Mapping[str, Tensor], *, title: str = "", photo_title: str = "photo") -> Figure:
    """A figure of the photo and, for each title, its map (gh, gw) laid over it; at most five pictures a row.

    Args:
        photo: the part of the photo that the model saw.
        maps: maps by title; one with negative values is shown on a diverging scale.
        title: above everything.
        photo_title: above the photo.
    """
    pictures = {photo_title: photo.convert("RGB")}
    pictures |= {name: blend(photo, heat, signed=bool((heat < 0).any())) for name, heat in maps.items()}
    columns = min(len(pictures), COLUMNS)
    rows = -(-len(pictures) // columns)
    cell_height = CELL_INCHES * photo.height / photo.width + 0.35
    figure = Figure(figsize=(columns * (CELL_INCHES + 0.12), rows * cell_height + (0.45 if title else 0.1)), facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, (name, picture) in zip(axes.flat, pictures.items(), strict=False):
        axis.imshow(np.asarray(picture), interpolation="antialiased")
        axis.set_title(name, fontsize=11, pad=5)
    if title:
        figure.suptitle(title, fontsize=13, fontweight="semibold")
    figure.tight_layout(pad=0.5, h_pad=0.8, w_pad=0.5)
    return figure


def save_panel(path: str | Path, photo: Image.Image, maps: Mapping[str, Tensor], *, title: str = "", dpi: int = 120) -> Path:
    """Write ``panel`` to a picture file; raises ``InputError`` where it cannot be written."""
    path = Path(path)
    try:
        panel(photo, maps, title=title).savefig(path, dpi=dpi)
    except (OSError, ValueError) as error:  # ValueError: a suffix that matplotlib does not write
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise InputError(f"output: cannot write {str(path)!r}: {reason}") from error
    return path
