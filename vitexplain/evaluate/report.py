"""An evaluation as one self-contained page: tables, curves, a gallery of maps, settings."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.ticker import MaxNLocator
from PIL import Image

from ..errors import InputError
from ..files import write_whole
from ..heatmap import SCALES, as_photo, colorize, upsample
from .curves import COLORS, CurveGroup, Stroke, band_opacity, curve_groups, strokes
from .results import Column, Figure, GalleryPhoto, Results
from .tables import (
    EXPLAINED,
    Layout,
    groups,
    interval,
    lay_out,
    left_out_entry,
    names,
    number,
    number_styles,
    overview,
    protocols,
)

TEMPLATE = "report.html.j2"
PICTURE_SIDE = 160  # pixels of the longer side in the gallery
QUALITY = 80

_CHART = (460, 300)  # of a chart's own units
_CHART_MARGIN = (38, 40, 12, 12)  # left, bottom, right, top
_FLOOR = 6  # between the lowest point and the axis
_LINE_WIDTH = 1.7


@dataclass(frozen=True)
class _Cell:
    """A figure; ``raw`` sorts, ``shade`` goes from 0 (worst) to 1 (best)."""

    value: str
    interval: str
    raw: float
    shade: float
    best: bool


@dataclass(frozen=True)
class _Line:
    """A method's curve as paths of SVG."""

    key: str
    name: str
    stroke: _Look
    line: str
    band: str


@dataclass(frozen=True)
class _Look:
    """A stroke in CSS's words."""

    color: str
    dashes: str


@dataclass(frozen=True)
class _Chart:
    """A group of curves with its axes; ticks are pairs of place and text."""

    title: str
    explained: str
    x_label: str
    y_label: str
    alt: str
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    lines: tuple[_Line, ...]
    opacity: float


@dataclass(frozen=True)
class _Picture:
    """A photo or map of the gallery; ``source`` holds the whole file."""

    key: str
    name: str
    source: str


@dataclass(frozen=True)
class _GalleryRow:
    """One photo with its maps."""

    name: str
    caption: str
    disagreement: str
    photo: str
    width: int
    height: int
    maps: tuple[_Picture, ...]


def write_report(results: Results, photos: Sequence[GalleryPhoto], path: str | Path) -> Path:
    """Write the page, which asks for nothing outside itself; returns its path.

    Args:
        photos: of the gallery, in the order in which they are shown; none leaves it out.

    Raises:
        InputError: the file cannot be written, or jinja2 is not installed.
    """
    path = Path(path)
    content = render(results, photos).encode("utf-8", "backslashreplace")  # names of files need not be text
    write_whole(path, content, make_folder=True)
    return path


def render(results: Results, photos: Sequence[GalleryPhoto]) -> str:
    """The page's text; arguments and errors as for ``write_report``."""
    try:
        import jinja2
    except ImportError as error:
        raise InputError("report: needs jinja2, which is not installed: pip install 'vitexplain[evaluate]'") from error
    text = resources.files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(text).render(_content(results, photos))


def _content(results: Results, photos: Sequence[GalleryPhoto]) -> dict[str, Any]:
    titles = _titles(results, photos)
    keys = {label: f"m{index}" for index, label in enumerate(titles)}  # labels are anybody's text: none becomes an id
    looks = {label: _look(stroke) for label, stroke in strokes(results).items()}
    facts = overview(results)
    return {
        "title": f"Evaluation of {_first_word(results, 'model')}",
        "facts": facts,
        "counts": _counts(results),
        "tables": [_table(lay_out(results, protocol), keys) for protocol in protocols(results)],
        "charts": [_chart(group, titles, keys, looks) for group in curve_groups(results)],
        "legend": _legend(results, titles, keys, looks),
        "rows": _filter_groups(results, titles, keys),
        "gallery": [_gallery_row(photo, titles, keys) for photo in photos],
        "scales": _scales(photos),
        "left_out": [left_out_entry(entry) for entry in results.left_out],
        "settings": _settings(results),
        "colors": COLORS,
        "chart": {"width": _CHART[0], "height": _CHART[1], "margin": _CHART_MARGIN, "line": _LINE_WIDTH},
    }


def _titles(results: Results, photos: Sequence[GalleryPhoto]) -> dict[str, str]:
    """By label, of the results' methods, then of maps that only the gallery has."""
    extra = dict.fromkeys(label for photo in photos for label in photo.maps if label not in results.methods)
    return {**names(results), **{label: label for label in extra}}


def _first_word(results: Results, setting: str) -> str:
    value = results.settings.get(setting)
    name = value.get("name") if isinstance(value, Mapping) else value
    return str(name or f"a {setting}")


def _counts(results: Results) -> str:
    kinds = [entry.kind for entry in results.methods.values()]
    words = {"method": "method", "ablation": "variant", "control": "control"}
    found = [(kinds.count(kind), word) for kind, word in words.items()]
    return ", ".join(f"{count} {word}{'s' * (count > 1)}" for count, word in found if count)


def _filter_groups(
    results: Results, titles: Mapping[str, str], keys: Mapping[str, str]
) -> list[tuple[str, list[tuple[str, str]]]]:
    """What can be shown or hidden: headings, each with keys and names."""
    kinds = {label: entry.kind for label, entry in results.methods.items()}
    found = []
    for heading, kind in (("Methods", "method"), ("Variants", "ablation"), ("Controls", "control")):
        members = [(keys[label], name) for label, name in titles.items() if kinds.get(label, "method") == kind]
        found += [(heading, members)] if members else []
    return found


def _settings(results: Results) -> list[tuple[str, list[tuple[str, str]]]]:
    """Everything that was set, then environment and timing: headings, each with names and values in full."""
    simple = {name: value for name, value in results.settings.items() if not isinstance(value, Mapping)}
    parts = {name: value for name, value in results.settings.items() if isinstance(value, Mapping)}
    parts |= {"options": simple, "environment": results.environment, "timing": results.timing}
    return [(heading.capitalize(), _lines(value)) for heading, value in parts.items() if value]


def _lines(value: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(str(name), _in_full(item)) for name, item in value.items()]


def _in_full(value: Any) -> str:
    if isinstance(value, Mapping):
        inner = value.get("options")
        if set(value) == {"name", "options"} and isinstance(inner, Mapping):  # a method or protocol, whose label stands before
            return _in_full(inner)
        return ", ".join(f"{name} = {_in_full(item)}" for name, item in value.items()) or "no options"
    if isinstance(value, list | tuple):
        return ", ".join(map(_in_full, value)) or "none"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    return f"{value:.6g}" if isinstance(value, float) else str(value)


# -- tables ----------------------------------------------------------------------------------------------------------------


def _table(layout: Layout, keys: Mapping[str, str]) -> dict[str, Any]:
    styles = number_styles(layout)
    shades = [_shades(column, [(row.kind, row.figures[i]) for row in layout.rows]) for i, column in enumerate(layout.columns)]
    cells = {
        row.label: [
            _cell(column, figure, style, shade[place])
            for column, figure, style, shade in zip(layout.columns, row.figures, styles, shades, strict=True)
        ]
        for place, row in enumerate(layout.rows)
    }
    meanings = {column.title: (head.meaning, column.better) for column, head in zip(layout.columns, layout.heads, strict=True)}
    return {
        "title": layout.title,
        "summary": layout.summary,
        "heads": [{"head": head, "better": column.better} for head, column in zip(layout.heads, layout.columns, strict=True)],
        "groups": [
            (heading, [{"key": keys[row.label], "name": row.name, "kind": row.kind, "cells": cells[row.label]} for row in rows])
            for heading, rows in groups(layout)
        ],
        "notes": layout.notes,
        "meanings": [
            (title, "; ".join(part for part in (meaning, f"{better} is better") if part))
            for title, (meaning, better) in meanings.items()
        ],
    }


def _cell(column: Column, figure: Figure | None, style: str, shade: float) -> _Cell | None:
    if figure is None:
        return None
    best = column.winner == figure.method
    return _Cell(number(figure.mean, style), interval(figure, style), figure.mean, round(shade, 3), best)


def _shades(column: Column, figures: Sequence[tuple[str, Figure | None]]) -> list[float]:
    """From 0, the worst method, to 1, the best; a control beyond either has the shade of that end."""
    values = [figure.mean for kind, figure in figures if figure and kind != "control"]
    if not values or max(values) == min(values):
        return [0.0] * len(figures)
    worst, best = (min(values), max(values)) if column.better == "higher" else (max(values), min(values))
    return [min(1.0, max(0.0, (figure.mean - worst) / (best - worst))) if figure else 0.0 for _, figure in figures]


# -- curves ----------------------------------------------------------------------------------------------------------------


def _look(stroke: Stroke) -> _Look:
    color = "grey" if stroke.color is None else f"c{stroke.color}"
    return _Look(color, " ".join(f"{length * _LINE_WIDTH:.3g}" for length in stroke.dashes))


def _legend(
    results: Results, titles: Mapping[str, str], keys: Mapping[str, str], looks: Mapping[str, _Look]
) -> list[tuple[str, str, _Look]]:
    drawn = {curve.method for curve in results.curves}
    return [(keys[label], titles[label], looks[label]) for label in results.methods if label in drawn]


def _chart(group: CurveGroup, titles: Mapping[str, str], keys: Mapping[str, str], looks: Mapping[str, _Look]) -> _Chart:
    shares = np.array([share for curve in group.curves for share in curve.share])
    values = np.array([value for curve in group.curves for value in (*curve.low, *curve.high)])
    low, high = float(values.min()), float(values.max())
    y_ticks = np.asarray(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high))
    x_ticks = np.linspace(shares.min(), shares.max(), 6)
    left, bottom, right, top = _CHART_MARGIN
    x_axis = _Axis((x_ticks[0], x_ticks[-1]), (left, _CHART[0] - right))
    y_axis = _Axis((low, high), (_CHART[1] - bottom - _FLOOR, top))
    lines = []
    for curve in group.curves:
        x = x_axis.places(curve.share)
        band = [*zip(x, y_axis.places(curve.high), strict=True), *reversed([*zip(x, y_axis.places(curve.low), strict=True)])]
        line = _path(zip(x, y_axis.places(curve.mean), strict=True))
        lines.append(_Line(keys[curve.method], titles[curve.method], looks[curve.method], line, f"{_path(band)}Z"))
    explained = EXPLAINED.get(group.curves[0].explained, group.curves[0].explained)
    return _Chart(
        group.title,
        explained,
        group.x_label,
        group.y_label,
        f"{group.title}: {group.y_label} against {group.x_label}, a line for each of {len(lines)} rows of the table",
        x_axis.ticks(x_ticks),
        y_axis.ticks(y_ticks[(y_ticks >= low - 0.02 * (high - low)) & (y_ticks <= high)]),
        tuple(reversed(lines)),  # what is drawn last lies above
        band_opacity(len(lines)),
    )


@dataclass(frozen=True)
class _Axis:
    """From values to places on a chart."""

    values: tuple[float, float]
    span: tuple[float, float]

    def places(self, values: Sequence[float] | np.ndarray) -> list[float]:
        low, high = self.values
        unit = (np.asarray(values, dtype=float) - low) / ((high - low) or 1)
        return np.round(self.span[0] + unit * (self.span[1] - self.span[0]), 1).tolist()

    def ticks(self, values: np.ndarray) -> tuple[tuple[float, str], ...]:
        return tuple((place, number(value, ".4g")) for place, value in zip(self.places(values), values.tolist(), strict=True))


def _path(points: Any) -> str:
    return "M" + "L".join(f"{x:g},{y:g}" for x, y in points)


# -- gallery ---------------------------------------------------------------------------------------------------------------


def _gallery_row(photo: GalleryPhoto, titles: Mapping[str, str], keys: Mapping[str, str]) -> _GalleryRow:
    picture = as_photo(photo.photo)
    scale = PICTURE_SIDE / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    small = picture.resize((width, height), Image.Resampling.LANCZOS)
    maps = tuple(
        _Picture(keys[label], titles[label], _data(_colors(photo.maps[label], (height, width), label in photo.signed)))
        for label in titles
        if label in photo.maps
    )
    return _GalleryRow(photo.name, photo.caption, number(photo.disagreement, ".2f"), _data(small), width, height, maps)


def _colors(heat: Any, size: tuple[int, int], signed: bool) -> Image.Image:
    values = torch.as_tensor(np.asarray(heat, dtype=np.float32))
    return Image.fromarray(colorize(upsample(values, size), signed=signed))


def _data(picture: Image.Image) -> str:
    """The picture's file as an address of its own."""
    buffer = BytesIO()
    picture.save(buffer, "WEBP", quality=QUALITY, method=4)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _scales(photos: Sequence[GalleryPhoto]) -> list[tuple[str, str, str]]:
    """The colour scales that the maps use: a gradient of CSS and the words at its ends."""
    kinds = {label in photo.signed for photo in photos for label in photo.maps}
    return [(_gradient(colormap), low, high) for colormap, low, high in (SCALES[kind] for kind in sorted(kinds))]


def _gradient(colormap: str) -> str:
    colors = matplotlib.colormaps[colormap](np.linspace(0, 1, 9), bytes=True)[:, :3].tolist()
    return f"linear-gradient(90deg, {', '.join('rgb({} {} {})'.format(*color) for color in colors)})"
