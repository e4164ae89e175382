"""What a protocol is: what it measures of an image and a map, and how figures are made of that."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ...options import HasOptions
from ..batch import Batch, RankedMaps

Raw = Mapping[str, np.ndarray]


def first_column(means: np.ndarray) -> np.ndarray:
    """(…, 1) to (…): a metric that is the mean of one number an image."""
    return means[..., 0]


@dataclass(frozen=True)
class Metric:
    """One figure of a protocol: ``combine`` of the means over images of ``columns``.

    Attributes:
        name: in tables, such as ``"AOPC"``.
        better: ``"lower"`` or ``"higher"``.
        unit: ``"%"`` or ``""``.
        columns: from what was measured, arrays with images first, to (n, c) numbers an image.
        combine: from their means (…, c) to the figure (…); ratios of sums over the data set are ratios of means.
        counted: how many images have a number, from the columns.
    """

    name: str
    better: str
    unit: str
    columns: Callable[[Raw], np.ndarray]
    combine: Callable[[np.ndarray], np.ndarray] = first_column
    counted: Callable[[np.ndarray], int] = len


@dataclass(frozen=True)
class CurveOf:
    """A curve of a protocol: ``points`` maps what was measured to (n, len(share)) values an image."""

    name: str
    quantity: str
    share: tuple[float, ...]
    points: Callable[[Raw], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Protocol(HasOptions):
    """Base of all protocols.

    Class attributes:
        title: for listings.
        source: paper and table.
        needs_scikit_learn: which is an extra.
    """

    title: ClassVar[str]
    source: ClassVar[str]
    needs_scikit_learn: ClassVar[bool] = False

    @property
    def needs_masks(self) -> bool:
        """Whether the data must have masks."""
        return False

    @property
    def takes_negated_maps(self) -> bool:
        """Whether the negated control can be measured."""
        return True

    @abstractmethod
    def measure(self, batch: Batch, maps: RankedMaps, target: Tensor) -> dict[str, Tensor]:
        """What there is to measure of every image, tensors with images first.

        Args:
            batch: the images.
            maps: one method's maps of them.
            target: (B,) int64, the explained classes.
        """

    @abstractmethod
    def metrics(self, explained: str, *, labels: bool) -> tuple[Metric, ...]:
        """The figures that are made of it.

        Args:
            explained: ``"pred"`` or ``"gt"``: whether predicted or true classes were explained.
            labels: whether the data have labels.
        """

    def curves(self, explained: str, *, labels: bool) -> tuple[CurveOf, ...]:  # noqa: ARG002
        """The curves that are made of it."""
        return ()


# -- what several protocols share --------------------------------------------------------------------------------------


def counts_at(levels: tuple[int, ...], num_pixels: int) -> Tensor:
    """(L,) int64: how many of the pixels each level, in percent, is; rounded down."""
    return torch.tensor([num_pixels * level // 100 for level in levels])


def spans_first(counts: Tensor) -> Tensor:
    """(L, 2): the most important pixels."""
    return torch.stack([torch.zeros_like(counts), counts], 1)


def spans_last(counts: Tensor, num_pixels: int) -> Tensor:
    """(L, 2): the least important pixels."""
    return torch.stack([num_pixels - counts, torch.full_like(counts, num_pixels)], 1)


def of_class(log_probabilities: Tensor, target: Tensor) -> Tensor:
    """(B, S) of (B, S, classes): those of each image's class (B,)."""
    return log_probabilities.gather(2, target.view(-1, 1, 1).expand(-1, log_probabilities.shape[1], 1)).squeeze(2)


def area(values: np.ndarray, levels: tuple[int, ...]) -> np.ndarray:
    """Area under (n, L) by the trapezoid rule over the levels as shares, × 100; not divided by the range they cover. (n, 1)."""
    values = values.astype(np.float64)
    return ((values[:, 1:] + values[:, :-1]) / 2 @ np.diff(levels))[:, None]
