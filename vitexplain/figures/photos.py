"""A photo under its heat maps: beside one another, one class against another, and block by block."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from ..errors import InputError
from ..explanation import Explanation
from ..heatmap import ALPHA, SCALES, SIGNED_COLORMAP, as_photo, blend, check_colormap, is_signed
from .layout import DPI, PANEL, Cells, Scale, compose, save_figure, wrapped_name

_EVOLUTION = Cells(6, 1.9, 0.17, 9, 5.4)
_MOST = 0.99  # of all values that a common scale takes in on each side
_ROUNDING = 1e-5  # of the largest share: what is nearer than that is equal, as shares are quotients in float32


def panel(
    photo: object,
    maps: Mapping[str, Tensor],
    *,
    title: str = "",
    caption: str = "",
    photo_title: str | None = "photo",
    alpha: float = ALPHA,
    colormap: str | None = None,
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
        colormap: name of a matplotlib colour map for every map; by its sign where None: perceptually uniform, or diverging.

    Returns:
        A figure that belongs to no global state.

    Raises:
        InputError: a photo, map or alpha that does not fit, or nothing to show.
        UnknownNameError: no colour map has that name.
    """
    check_colormap(colormap)
    if photo_title is None and not maps:
        raise InputError("maps: expected at least one where photo_title=None leaves the photo out, received none")
    cells, picture = PANEL.shaped_for(as_photo(photo))
    pictures = [] if photo_title is None else [(photo_title, picture)]
    for name, heat in maps.items():
        _check_map(name, heat)
        pictures.append((name, blend(picture, heat.detach(), alpha=alpha, signed=is_signed(heat), colormap=colormap)))
    named = [(wrapped_name(name, cells), shown) for name, shown in pictures]
    scales = [_scale(kind, colormap) for kind in sorted({is_signed(heat) for heat in maps.values()})]
    return compose(named, title, caption, scales, cells)


def save_panel(path: str | Path, photo: object, maps: Mapping[str, Tensor], *, dpi: int = DPI, **layout: Any) -> Path:
    """Write ``panel``, which has the same ``layout`` options, to a picture file.

    Raises:
        InputError: as ``panel`` and ``save_figure``.
    """
    return save_figure(path, panel(photo, maps, **layout), dpi=dpi)


def contrast(
    photo: object,
    explanation: Explanation,
    *,
    index: int = 0,
    pair: tuple[int, int] = (0, 1),
    names: Sequence[str] | None = None,
    title: str | None = None,
    caption: str | None = None,
    alpha: float = ALPHA,
    colormap: str | None = None,
) -> Figure:
    """What speaks for one class rather than another: the photo, the map of each, and the difference of the two.

    The difference is taken of shares, each map divided by the sum of its magnitudes, as two classes' maps can differ in size
    alone. It is shown on the diverging scale, zero in the middle: warm speaks for the first class, cool for the second.

    Args:
        photo: as of ``panel``.
        explanation: of at least two classes an image, such as ``target="top2"`` gives.
        index: which image of the batch.
        pair: which two of its K classes.
        names: of the K classes, in the order of ``explanation.target``; their numbers where None.
        title: above everything; says what is shown where None.
        caption: in small below the title; says how to read the difference where None.
        alpha: the map's share of each overlay, 0 to 1.
        colormap: name of a matplotlib colour map for the two classes' maps; that of the difference stays.

    Returns:
        A figure that belongs to no global state.

    Raises:
        InputError: no second class, or another argument that does not fit.
        UnknownNameError: no colour map has that name.
    """
    explanation.expect_images()
    check_colormap(colormap)
    if explanation.num_targets is None or explanation.num_targets < 2:
        received = explanation.num_targets or "one without an axis of classes"
        raise InputError(f"explanation: expected two classes an image or more, as of target='top2', received {received}")
    if not isinstance(pair, Sequence) or len(pair) != 2 or not all(isinstance(which, Integral) for which in pair):
        raise InputError(f"pair: expected the places of two classes, such as (0, 1), received {pair!r}")
    heats = [explanation.select(index, which).detach().float().cpu() for which in pair]
    called = [_class_name(explanation, index, which, names) for which in pair]
    for name, heat in zip(called, heats, strict=True):
        _check_map(name, heat)
    first, second = (textwrap.shorten(name, 28, placeholder=" …") for name in called)
    difference = _difference(*heats)
    if caption is None:
        caption = f"{explanation.method}. Last picture: first map − second, each as shares of its own total"
        caption += "." if difference.any() else "; both are the same here."
    cells, picture = PANEL.shaped_for(as_photo(photo))
    pictures = [("photo", picture)]
    for which, name, heat in zip(pair, called, heats, strict=True):
        shown = blend(picture, heat, alpha=alpha, signed=explanation.signed, colormap=colormap)
        pictures.append((f"{name}{_probability(explanation, index, which)}", shown))
    pictures.append((f"{first} or {second}?", blend(picture, difference, alpha=alpha, signed=True)))
    named = [(wrapped_name(name, cells), shown) for name, shown in pictures]
    scales = [_scale(explanation.signed, colormap), (SIGNED_COLORMAP, f"for {second}", f"for {first}")]
    return compose(named, f"What speaks for {first} rather than {second}" if title is None else title, caption, scales, cells)


def evolution(
    photo: object,
    explanation: Explanation,
    *,
    index: int = 0,
    target_index: int = 0,
    name: str | None = None,
    columns: int = _EVOLUTION.columns,
    title: str | None = None,
    caption: str | None = None,
    alpha: float = ALPHA,
    colormap: str | None = None,
) -> Figure:
    """A map as it grows: one overlay for each block, from the last block alone to all of them.

    Blocks are counted from 0, as in ``start_block``; the last picture is the map itself. Each map is shown as shares of its own
    total magnitude, all on one scale of colours.

    Args:
        photo: as of ``panel``.
        explanation: of an ``Explainer`` with ``rows="by_block"``.
        index: which image of the batch.
        target_index: which of its K classes.
        name: of the class, for the title.
        columns: the most pictures in a row; wide photos get fewer.
        title: above everything; says what is shown where None.
        caption: in small below the title; says how to read it where None.
        alpha: the map's share of each overlay, 0 to 1.
        colormap: name of a matplotlib colour map; chosen by the maps' sign where None.

    Returns:
        A figure that belongs to no global state.

    Raises:
        InputError: an explanation without a map for each block, or another argument that does not fit.
        UnknownNameError: no colour map has that name.
    """
    explanation.expect_images()
    check_colormap(colormap)
    if columns < 1:
        raise InputError(f"columns: expected at least 1, received {columns}")
    maps = explanation.select(index, target_index, by_block=True).detach().float().cpu()
    for block, heat in enumerate(maps):
        _check_map(f"block {block}", heat)
    signed = is_signed(maps)
    # What a chain of blocks adds up to grows by orders of magnitude, so that on a scale of values the first pictures would be
    # blank; scaled each on its own, a flat map would look like a peaked one. Shares on one scale show where a map is, and how
    # much more it is there than before. The few largest values of all blocks do not count, lest one patch dim everything else.
    shares = torch.stack([_share(heat) for heat in maps])
    limits = _common_limits(shares, signed=signed)
    cells, picture = replace(_EVOLUTION, columns=columns).shaped_for(as_photo(photo))
    last = len(maps) - 1
    pictures = [
        (
            f"block {last}" if block == last else f"blocks {last} … {block}",
            blend(picture, shares[block], alpha=alpha, signed=signed, colormap=colormap, limits=limits),
        )
        for block in range(last, -1, -1)
    ]
    if title is None:
        title = f"How the map{f' for {name}' if name else ''} grows, from the last block down"
    if caption is None:
        caption = f"{explanation.method}. Each picture: the share of every patch in the map of these blocks, on one scale."
    return compose(pictures, title, caption, [_scale(signed, colormap)], cells)


def _common_limits(shares: Tensor, *, signed: bool) -> tuple[float, float]:
    """Values for the two ends of the scale of maps (L, gh, gw)."""
    if signed:
        most = float(np.quantile(shares.abs().numpy(), _MOST))
        return -most, most
    low, high = np.quantile(shares.numpy(), [1 - _MOST, _MOST]).tolist()  # torch's takes no more than 2²⁴ values
    return (0.0, high) if high - low <= _ROUNDING * max(abs(low), abs(high)) else (low, high)


def _share(heat: Tensor) -> Tensor:
    """(h, w) divided by the sum of its magnitudes; zeros stay zeros."""
    return heat / heat.abs().sum().clamp_min(torch.finfo(heat.dtype).tiny)


def _difference(first: Tensor, second: Tensor) -> Tensor:
    """Of the shares of two maps (h, w), zero where they are equal but for rounding, which a scale of its own would show."""
    shares = torch.stack([_share(first), _share(second)])
    difference = shares[0] - shares[1]
    return difference.where(difference.abs() > _ROUNDING * shares.abs().max(), 0.0)


def _class_name(explanation: Explanation, index: int, which: int, names: Sequence[str] | None) -> str:
    count = explanation.num_targets
    if names is not None:
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise InputError(f"names: expected a list of the classes' names as text, received {names!r}")
        if len(names) != count:
            raise InputError(f"names: expected one for each of the {count} classes explained, received {len(names)}")
        return names[which]
    return f"score {which}" if explanation.target is None else f"class {int(explanation.target[index, which])}"


def _probability(explanation: Explanation, index: int, which: int) -> str:
    """Of a class, for its title; nothing where a score of its own was explained."""
    if explanation.target is None:
        return ""
    share = float(explanation.logits[index].float().softmax(-1)[explanation.target[index, which]])
    return f" ({100 * share:.1f} %)"


def _check_map(name: str, heat: object) -> None:
    if not isinstance(heat, Tensor) or heat.dim() != 2 or not heat.numel():
        received = tuple(heat.shape) if isinstance(heat, Tensor) else type(heat).__name__
        raise InputError(f"maps: expected a tensor (gh, gw) for {name!r}, received {received}")
    if not torch.isfinite(heat).all():
        raise InputError(f"maps: expected finite values for {name!r}, received NaN or infinity")


def _scale(signed: bool, colormap: str | None) -> Scale:
    """For the legend."""
    name, low, high = SCALES[signed]
    return colormap or name, low, high
