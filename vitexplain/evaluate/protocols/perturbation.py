"""Perturbation: does accuracy fall when important pixels go, and hold when unimportant ones go?"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
from torch import Tensor

from ...options import option
from ..batch import SUBSTRATES, Batch, RankedMaps
from .base import CurveOf, Metric, Protocol, Raw, area, counts_at, of_class, spans_first, spans_last

VTRANM = tuple(range(0, 101, 5))
CHEFER = tuple(range(0, 91, 10))


@dataclass(frozen=True, kw_only=True)
class Perturbation(Protocol):
    """Accuracy against the true label while the most (positive) or least (negative) important pixels are removed, as the area
    under the curve × 100; with the same images AOPC and LOdds of the predicted class. Without labels only the last two.

    ``convention="vtranm"`` removes 0, 5, …, 100 % and integrates over [0, 1]; ``"chefer"`` 0, 10, …, 90 % and integrates over
    [0, 0.9], not divided by 0.9: published figures of the two are not comparable. ``"both"`` shows both from one run.
    """

    name: ClassVar[str] = "perturbation"
    title: ClassVar[str] = "accuracy and probability while pixels are removed"
    source: ClassVar[str] = "VTranM, Tables 1, 2 (right) and 3; Chefer et al. (CVPR 2021)"

    convention: str = option("vtranm", "steps and area", choices=("vtranm", "chefer", "both"))
    substrate: str = option("black", "what removed pixels become", choices=SUBSTRATES)

    @property
    def levels(self) -> tuple[int, ...]:
        """Percent of pixels removed."""
        return CHEFER if self.convention == "chefer" else VTRANM

    def measure(self, batch: Batch, maps: RankedMaps, target: Tensor) -> dict[str, Tensor]:  # noqa: ARG002
        counts = counts_at(self.levels, batch.num_pixels)
        positive = batch.probe(maps.ranks, spans_first(counts), self.substrate)
        raw = {"log_p": of_class(positive, batch.predicted)}
        if batch.labels is not None:
            negative = batch.probe(maps.ranks, spans_last(counts, batch.num_pixels), self.substrate)
            labels = batch.labels.unsqueeze(1)
            raw |= {"positive": positive.argmax(-1) == labels, "negative": negative.argmax(-1) == labels}
        return raw

    def metrics(self, explained: str, *, labels: bool) -> tuple[Metric, ...]:
        found: list[Metric] = []
        if labels:
            for name, better in (("positive", "lower"), ("negative", "higher")):
                found += [
                    Metric(name + suffix, better, "%", partial(self._area, name, levels)) for suffix, levels in self._shown()
                ]
        if explained == "pred":  # y is the predicted class in both
            found += [Metric("AOPC", "higher", "", self._aopc), Metric("LOdds", "lower", "", self._log_odds)]
        return tuple(found)

    def _shown(self) -> list[tuple[str, tuple[int, ...]]]:
        named = {"vtranm": [("", VTRANM)], "chefer": [("", CHEFER)], "both": [("", VTRANM), (" (10 % steps to 90 %)", CHEFER)]}
        return named[self.convention]

    def _area(self, name: str, levels: tuple[int, ...], raw: Raw) -> np.ndarray:
        return area(self._at(raw[name], levels), levels)

    def _at(self, values: np.ndarray, levels: tuple[int, ...]) -> np.ndarray:
        return values[:, [self.levels.index(level) for level in levels]]

    @staticmethod
    def _aopc(raw: Raw) -> np.ndarray:
        probability = np.exp(raw["log_p"].astype(np.float64))
        return (probability[:, :1] - probability).mean(1, keepdims=True)

    @staticmethod
    def _log_odds(raw: Raw) -> np.ndarray:
        log_p = raw["log_p"].astype(np.float64)
        return (log_p - log_p[:, :1]).mean(1, keepdims=True)

    def curves(self, explained: str, *, labels: bool) -> tuple[CurveOf, ...]:
        share = tuple(map(float, self.levels))
        found = []
        if labels:
            found += [CurveOf(name, "accuracy, %", share, partial(_percent, name)) for name in ("positive", "negative")]
        if explained == "pred":
            found.append(
                CurveOf("probability", "probability of the predicted class, %", share, lambda raw: 100 * np.exp(raw["log_p"]))
            )
        return tuple(found)


def _percent(name: str, raw: Raw) -> np.ndarray:
    return 100.0 * raw[name]
