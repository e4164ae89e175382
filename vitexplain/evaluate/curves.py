"""An evaluation's curves as pictures, and what every drawing of them shares: groups, names, colours, strokes."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..files import writing
from .results import Curve, Results
from .tables import EXPLAINED, names, protocol_title

DPI = 160
SUFFIXES = (".png", ".svg")
COLORS = ("#0072B2", "#D55E00", "#009E73", "#B5539A", "#2D9FDB", "#C98500")  # after Okabe and Ito; told apart by the colour-blind
DASHES: tuple[tuple[float, ...], ...] = ((), (6, 2), (1, 1.6), (6, 1.6, 1, 1.6))
CONTROL_COLOR = "#8a8a8a"
CONTROL_DASHES: tuple[tuple[float, ...], ...] = ((4, 2.5), (1, 2), (4, 1.5, 1, 1.5), (9, 3))

_INK, _FAINT, _RULE = "#1a1a1a", "#666666", "#e3e3e3"
_PLOT = (5.6, 4.2)  # these lengths are in inches
_MARGIN = (0.75, 0.6, 0.25, 0.75)  # left, bottom, right, top
_LONGEST_NAME = 60
_LEGEND_LINE = 0.205
_LEGEND_CHARACTER = 0.078


@dataclass(frozen=True)
class Stroke:
    """How a method's line looks; ``color`` is an index into ``COLORS``, or None for a control; ``dashes`` in line widths."""

    color: int | None
    dashes: tuple[float, ...]


@dataclass(frozen=True)
class CurveGroup:
    """What is drawn into one figure: the curves of all methods for one protocol, quantity and explained class.

    Attributes:
        file_name: without suffix; of letters that every file system takes.
        title, subtitle, x_label, y_label: for people.
    """

    file_name: str
    title: str
    subtitle: str
    x_label: str
    y_label: str
    curves: tuple[Curve, ...]


def save_curves(results: Results, folder: str | Path) -> list[Path]:
    """Write each group of curves as PNG and SVG, the same bytes for the same results; returns the paths.

    Raises:
        InputError: a file cannot be written.
    """
    folder = Path(folder)
    paths = []
    for group in curve_groups(results):
        figure = draw(group, names(results), strokes(results))
        for suffix in SUFFIXES:
            paths.append(_save(figure, folder / f"{group.file_name}{suffix}"))
    return paths


def draw(group: CurveGroup, titles: dict[str, str], looks: dict[str, Stroke]) -> Figure:
    """A group of curves with their intervals, the legend on the right; a figure that belongs to no global state."""
    shown = [textwrap.shorten(titles[curve.method], _LONGEST_NAME, placeholder=" …") for curve in group.curves]
    legend_width = 0.75 + _LEGEND_CHARACTER * max(map(len, shown))
    left, bottom, right, top = _MARGIN
    height = max(_PLOT[1], _LEGEND_LINE * len(shown)) + bottom + top
    width = left + _PLOT[0] + right + legend_width
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((left / width, bottom / height, _PLOT[0] / width, (height - bottom - top) / height))
    lines = [
        _draw_curve(axes, curve, looks[curve.method], len(shown) - i, band_opacity(len(shown)))
        for i, curve in enumerate(group.curves)
    ]
    _dress(axes, group)
    headings: tuple[tuple[float, str, dict[str, Any]], ...] = (
        (0.28, group.title, {"size": 12, "weight": "bold", "color": _INK}),
        (0.52, group.subtitle, {"size": 9, "color": _FAINT}),
    )
    for y, text, style in headings:
        figure.text(left / width, 1 - y / height, text, va="center", parse_math=False, **style)
    _legend(figure, axes, lines, shown)
    return figure


def curve_groups(results: Results) -> list[CurveGroup]:
    """The curves by protocol, name and explained class, in their order."""
    found: dict[tuple[str, str, str], list[Curve]] = {}
    for curve in results.curves:
        found.setdefault((curve.protocol, curve.name, curve.explained), []).append(curve)
    file_names = _file_names(found)
    return [_group(key, file_name, curves) for (key, curves), file_name in zip(found.items(), file_names, strict=True)]


def band_opacity(num_lines: int) -> float:
    """The more bands lie over each other, the fainter each."""
    return min(0.18, max(0.06, 0.9 / num_lines))


def strokes(results: Results) -> dict[str, Stroke]:
    """How each method's line looks, the same in every figure: colours first, then dashes; controls in grey."""
    methods = [(dashes, color) for dashes, color in product(DASHES, range(len(COLORS)))]
    counts = {True: 0, False: 0}
    looks = {}
    for label, entry in results.methods.items():
        is_control = entry.kind == "control"
        index = counts[is_control]
        counts[is_control] += 1
        if is_control:
            looks[label] = Stroke(None, CONTROL_DASHES[index % len(CONTROL_DASHES)])
        else:
            dashes, color = methods[index % len(methods)]
            looks[label] = Stroke(color, dashes)
    return looks


# -- groups --------------------------------------------------------------------------------------------------------------


def _group(key: tuple[str, str, str], file_name: str, curves: list[Curve]) -> CurveGroup:
    protocol, name, explained = key
    verb = "put in" if name == "insertion" else "removed"
    title = f"{protocol_title(protocol)}: {name}"
    subtitle = f"explained class: {EXPLAINED.get(explained, explained)}; bands: 95 % intervals"
    return CurveGroup(file_name, title, subtitle, f"pixels {verb}, %", curves[0].quantity, tuple(curves))


def _file_names(keys: Iterable[tuple[str, str, str]]) -> list[str]:
    """Names of plain letters, each once."""
    taken: list[str] = []
    for key in keys:
        base = "_".join(re.sub(r"[^a-z0-9_]+", "-", part.lower()).strip("-") or "curve" for part in key)[:120]
        candidates = [base, *(f"{base}-{number}" for number in range(2, len(taken) + 3))]
        taken.append(next(name for name in candidates if name not in taken))
    return taken


# -- drawing -------------------------------------------------------------------------------------------------------------


def _draw_curve(axes: Axes, curve: Curve, look: Stroke, depth: int, opacity: float) -> Line2D:
    """The line over its band; earlier methods lie above later ones."""
    color = CONTROL_COLOR if look.color is None else COLORS[look.color]
    axes.fill_between(curve.share, curve.low, curve.high, color=color, alpha=opacity, linewidth=0, zorder=1)
    style = (0, look.dashes) if look.dashes else "-"
    (line,) = axes.plot(curve.share, curve.mean, color=color, linestyle=style, linewidth=1.5, zorder=2 + depth / 1000)
    return line


def _dress(axes: Axes, group: CurveGroup) -> None:
    """Few rules and quiet labels."""
    shares = [share for curve in group.curves for share in curve.share]
    axes.set_xlim(min(shares), max(shares) if max(shares) > min(shares) else min(shares) + 1)
    axes.set_xlabel(group.x_label, color=_INK, size=9.5)
    axes.set_ylabel(group.y_label, color=_INK, size=9.5, parse_math=False)
    axes.tick_params(colors=_FAINT, labelsize=8.5, length=0, pad=5)
    axes.grid(axis="y", color=_RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#b5b5b5")


def _legend(figure: Figure, axes: Axes, lines: list[Line2D], shown: list[str]) -> None:
    """Texts are set afterwards: a legend takes a leading underscore as a wish to be left out."""
    box = axes.get_position()
    legend = figure.legend(
        lines,
        [str(index) for index in range(len(lines))],
        loc="upper left",
        bbox_to_anchor=(box.x1 + 0.12 / figure.get_figwidth(), box.y1),
        borderaxespad=0,
        frameon=False,
        fontsize=8.5,
        handlelength=3.4,
        labelspacing=0.55,
    )
    for text, name in zip(legend.get_texts(), shown, strict=True):
        text.set(text=name, parse_math=False, color=_INK)


def _save(figure: Figure, path: Path) -> Path:
    """Without dates and with ids that depend on the content alone."""
    with writing(path), matplotlib.rc_context({"svg.hashsalt": "vitexplain"}):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=DPI, metadata={"Date": None} if path.suffix == ".svg" else None)
    return path
