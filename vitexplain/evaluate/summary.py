"""From what was measured of every image to figures, curves and winners."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .protocols import CurveOf, Metric, Protocol
from .results import Column, Curve, Figure
from .statistics import INTERVAL, Bootstrap, ends, standing

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
            if measured:
                gathered = _Gathered(measured, protocol.metrics(kind, labels=labels), protocol.curves(kind, labels=labels))
                gathered.resample(resamples, seed)
                columns += gathered.columns(label, kind)
                figures += gathered.figures(label, kind)
                curves += gathered.curves(label, kind)
    return Summary(tuple(columns), tuple(figures), tuple(curves))


class _Gathered:
    """All numbers an image has under one protocol, side by side, so that one pass over the draws resamples them all."""

    def __init__(self, measured: Mapping[str, Raw], metrics: Sequence[Metric], curves: Sequence[CurveOf]) -> None:
        self.metrics, self.curves_of = metrics, curves
        self.parts: dict[tuple[str, str], np.ndarray] = {}
        for method, arrays in measured.items():
            self.parts |= {(method, metric.name): metric.columns(arrays).astype(np.float64) for metric in metrics}
            self.parts |= {(method, f"curve {curve.name}"): curve.points(arrays).astype(np.float64) for curve in curves}
        self.methods = tuple(measured)
        self.count = len(next(iter(self.parts.values())))

    def resample(self, resamples: int, seed: int) -> None:
        """Means over every resample, by part (R, c)."""
        together = Bootstrap(self.count, resamples, seed).means(np.concatenate(list(self.parts.values()), axis=1))
        bounds = np.cumsum([part.shape[1] for part in self.parts.values()])[:-1]
        self.resampled = dict(zip(self.parts, np.split(together, bounds, axis=1), strict=True))

    def _found(self, metric: Metric) -> dict[str, tuple[float, np.ndarray]]:
        """Value and resamples of each row that has a value."""
        found = {
            method: (
                float(metric.combine(self.parts[method, metric.name].mean(0))),
                metric.combine(self.resampled[method, metric.name]),
            )
            for method in self.methods
        }
        return {method: pair for method, pair in found.items() if np.isfinite(pair[0])}

    def columns(self, protocol: str, explained: str) -> Iterator[Column]:
        for metric in self.metrics:
            found = self._found(metric)
            values = {method: value for method, (value, _) in found.items()}
            resampled = {method: means for method, (_, means) in found.items()}
            winner, contenders = standing(values, resampled, metric.better, self.count)
            yield Column(protocol, metric.name, explained, metric.better, metric.unit, winner, contenders)

    def figures(self, protocol: str, explained: str) -> Iterator[Figure]:
        for metric in self.metrics:
            for method, (value, resampled) in self._found(metric).items():
                counted = metric.counted(self.parts[method, metric.name])
                yield Figure(method, protocol, metric.name, explained, value, *ends(resampled), counted)

    def curves(self, protocol: str, explained: str) -> Iterator[Curve]:
        for curve in self.curves_of:
            for method in self.methods:
                key = (method, f"curve {curve.name}")
                low, high = np.quantile(self.resampled[key], INTERVAL, axis=0)
                band = (tuple(map(float, values)) for values in (self.parts[key].mean(0), low, high))
                yield Curve(method, protocol, curve.name, explained, curve.quantity, curve.share, *band)
