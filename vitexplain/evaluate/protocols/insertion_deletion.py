"""Insertion and deletion: the class's probability while its important pixels come or go."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ...errors import InputError
from ...options import option
from ..batch import SUBSTRATES, Batch, RankedMaps
from .base import CurveOf, Metric, Protocol, Raw, area, counts_at, of_class, spans_first


@dataclass(frozen=True, kw_only=True)
class InsertionDeletion(Protocol):
    """Area under the explained class's probability, × 100: deletion removes its most important pixels first, insertion brings
    them back first, into a blurred image."""

    name: ClassVar[str] = "insertion_deletion"
    title: ClassVar[str] = "probability while important pixels come or go"
    source: ClassVar[str] = "RISE (BMVC 2018); metrics of GMAR"

    step: int = option(5, "percent of the pixels that change at once, a divisor of 100", minimum=1)
    insertion_substrate: str = option("blur", "what insertion starts from", choices=SUBSTRATES)
    deletion_substrate: str = option("zeros", "what deleted pixels become", choices=SUBSTRATES)

    def __post_init__(self) -> None:
        super().__post_init__()
        if 100 % self.step:
            raise InputError(f"option 'step' of {self.name}: expected a divisor of 100, received {self.step}")

    @property
    def levels(self) -> tuple[int, ...]:
        """Percent of pixels changed."""
        return tuple(range(0, 101, self.step))

    def measure(self, batch: Batch, maps: RankedMaps, target: Tensor) -> dict[str, Tensor]:
        counts = counts_at(self.levels, batch.num_pixels)
        still_missing = torch.stack([counts, torch.full_like(counts, batch.num_pixels)], 1)
        return {
            "insertion": of_class(batch.probe(maps.ranks, still_missing, self.insertion_substrate), target).exp(),
            "deletion": of_class(batch.probe(maps.ranks, spans_first(counts), self.deletion_substrate), target).exp(),
        }

    def _area(self, name: str, raw: Raw) -> np.ndarray:
        return area(raw[name], self.levels)

    def metrics(self, explained: str, *, labels: bool) -> tuple[Metric, ...]:  # noqa: ARG002
        return tuple(
            Metric(name, better, "%", partial(self._area, name))
            for name, better in (("insertion", "higher"), ("deletion", "lower"))
        )

    def curves(self, explained: str, *, labels: bool) -> tuple[CurveOf, ...]:  # noqa: ARG002
        share = tuple(map(float, self.levels))
        return tuple(
            CurveOf(name, "probability of the explained class, %", share, partial(_percent, name))
            for name in ("insertion", "deletion")
        )


def _percent(name: str, raw: Raw) -> np.ndarray:
    return 100 * raw[name].astype(np.float64)
