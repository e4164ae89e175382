"""Average drop and increase: what is left of the class when only what the map shows is left of the image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from ..batch import Batch, RankedMaps
from .base import Metric, Protocol, Raw


@dataclass(frozen=True, kw_only=True)
class AverageDrop(Protocol):
    """With Y the explained class's probability and O that of the image multiplied by its min–max-scaled map (in [0, 1] space):
    average drop 100 · mean max(0, Y − O) / Y, average increase 100 · mean[O > Y]."""

    name: ClassVar[str] = "average_drop"
    title: ClassVar[str] = "probability of what the map leaves of the image"
    source: ClassVar[str] = "Grad-CAM++ (WACV 2018); metrics of GMAR"

    def measure(self, batch: Batch, maps: RankedMaps, target: Tensor) -> dict[str, Tensor]:
        black = batch.classifier.black
        shown = black + (batch.images - black) * maps.scaled.unsqueeze(1)
        log_p = batch.classifier.log_probabilities(shown).gather(1, target.unsqueeze(1)).squeeze(1)
        return {"clean_log_p": batch.clean.gather(1, target.unsqueeze(1)).squeeze(1), "shown_log_p": log_p}

    def metrics(self, explained: str, *, labels: bool) -> tuple[Metric, ...]:  # noqa: ARG002
        return (
            Metric("average drop", "lower", "%", _drop),
            Metric("average increase", "higher", "%", lambda raw: 100.0 * (raw["shown_log_p"] > raw["clean_log_p"])[:, None]),
        )


def _drop(raw: Raw) -> np.ndarray:
    ratio = np.exp(raw["shown_log_p"].astype(np.float64) - raw["clean_log_p"].astype(np.float64))
    return 100 * np.maximum(0, 1 - ratio)[:, None]
