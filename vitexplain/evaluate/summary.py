"""From what was measured of every image to figures, curves and winners."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from .protocols import Protocol
from .results import Column, Curve, Figure
from .statistics import Bootstrap, ends, standing

Raw = dict[str, np.ndarray]


@dataclass(frozen=True)
class Summary:
    """Columns, figures and curves of a whole evaluation."""

    columns: tuple[Column, ...]
    figures: tuple[Figure, ...]
    curves: tuple[Curve, ...]


def summarise(
    raw: Mapping[tuple[str, str, str], Raw],
    protocols: Mapping[str, Protocol],
    explained: tuple[str, ...],
    *,
    labels: bool,
    resamples: int,
    seed: int,
) -> Summary:
    """Figures with intervals, from arrays with images first.

    Args:
        raw: by (method, protocol, explained class), what the protocol measured.
        protocols: by label.
        explained: ``"pred"``, ``"gt"``, or both.
        labels: whether the data have labels.
        resamples: of the bootstrap.
        seed: of its draws.
    """
    columns: list[Column] = []
    figures: list[Figure] = []
    curves: list[Curve] = []
    for label, protocol in protocols.items():
        for kind in explained:
            measured = {method: arrays for (method, name, which), arrays in raw.items() if (name, which) == (label, kind)}
            if not measured:
                continue
            count = len(next(iter(next(iter(measured.values())).values())))
            bootstrap = Bootstrap(count, resamples, seed)
            for metric in protocol.metrics(kind, labels=labels):
                found = {method: bootstrap.values(metric.columns(arrays), metric) for method, arrays in measured.items()}
                values = {method: value for method, (value, _) in found.items()}
                winner, contenders = standing(values, {method: spread for method, (_, spread) in found.items()}, metric.better)
                columns.append(Column(label, metric.name, kind, metric.better, metric.unit, winner, contenders))
                figures += [
                    Figure(method, label, metric.name, kind, value, *ends(spread), count)
                    for method, (value, spread) in found.items()
                ]
            for curve in protocol.curves(kind, labels=labels):
                for method, arrays in measured.items():
                    band = (tuple(map(float, part)) for part in bootstrap.band(curve.points(arrays)))
                    curves.append(Curve(method, label, curve.name, kind, curve.quantity, curve.share, *band))
    return Summary(tuple(columns), tuple(figures), tuple(curves))
