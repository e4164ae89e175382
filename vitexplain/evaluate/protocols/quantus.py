"""Any metric of Quantus that reads finished maps."""

from __future__ import annotations

from ast import literal_eval
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ...errors import InputError
from ...options import option, split_pair
from ..batch import Batch, RankedMaps
from ..quantus_bridge import build_metric, check_metric, explains_again, quantus_scores, reads_masks
from .base import Metric, Protocol, Raw


@dataclass(frozen=True, kw_only=True)
class Quantus(Protocol):
    """A metric of the Quantus library by name: one number an image, their mean over the images that have one.

    Metrics that explain again (of robustness and randomisation) need the method itself, and those that compare images with each
    other the whole data set: they run through ``quantus_bridge.quantus_scores`` in Python.
    """

    name: ClassVar[str] = "quantus"
    title: ClassVar[str] = "any metric of Quantus that reads finished maps"
    source: ClassVar[str] = "Quantus (JMLR 2023)"

    metric: str = option("Sparseness", "name of the metric in Quantus")
    parameters: str = option("", "the metric's own, as NAME=VALUE;NAME=VALUE")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_metric(self._metric, num_images=1)
        if explains_again(self._metric):
            raise InputError(
                f"protocol {self.name!r}: expected a metric of finished maps; {self.metric} explains again: call "
                "vitexplain.evaluate.quantus_bridge.quantus_scores with an explain_func"
            )

    @property
    def needs_masks(self) -> bool:
        """Metrics of localisation do."""
        return reads_masks(self._metric)

    @property
    def takes_negated_maps(self) -> bool:
        """Quantus refuses maps without a positive value."""
        return False

    @cached_property
    def _metric(self) -> Any:
        pairs = [split_pair(pair) for pair in self.parameters.split(";")] if self.parameters else []
        return build_metric(self.metric, **{name: _value(text) for name, text in pairs})

    def measure(self, batch: Batch, maps: RankedMaps, target: Tensor) -> dict[str, Tensor]:
        model = batch.classifier.anatomy.model
        scores = quantus_scores(self._metric, model, batch.images, target, maps.pixels, masks=batch.masks, seed=batch.seed)
        return {"score": torch.from_numpy(np.asarray(scores, dtype=np.float64))}

    def metrics(self, explained: str, *, labels: bool) -> tuple[Metric, ...]:  # noqa: ARG002
        direction = self._metric.score_direction.value
        return (Metric(self.metric, direction, "", _score_and_whether, _mean_of_those, _have_one),)


def _value(text: str) -> Any:
    """A number, truth value or word."""
    try:
        return literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _score_and_whether(raw: Raw) -> np.ndarray:
    """(n, 2): the score, 0 where an image has none, and whether it has one."""
    has = np.isfinite(raw["score"])
    return np.stack([np.where(has, raw["score"], 0), has], 1)


def _mean_of_those(means: np.ndarray) -> np.ndarray:
    """NaN where no image has one."""
    return np.divide(means[..., 0], means[..., 1], out=np.full_like(means[..., 0], np.nan), where=means[..., 1] > 0)


def _have_one(columns: np.ndarray) -> int:
    return int(columns[:, 1].sum())
