"""Pictures for people, each a matplotlib figure that belongs to no global state.

``panel``: a photo beside the heat maps of several methods. ``contrast``: what speaks for one class rather than another.
``evolution``: a map as it grows block by block. ``tokens``: words coloured by their values. ``sheet``: many small pictures.
"""

from __future__ import annotations

from .figures.layout import COLUMNS, DPI, save_figure
from .figures.photos import contrast, evolution, panel, save_panel
from .figures.sheets import fitted, in_cell, sheet
from .figures.words import tokens

__all__ = [
    "COLUMNS",
    "DPI",
    "contrast",
    "evolution",
    "fitted",
    "in_cell",
    "panel",
    "save_figure",
    "save_panel",
    "sheet",
    "tokens",
]
