"""Localisation: does the map lie on the object?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ...heatmap import min_max
from ...options import option
from ..batch import Batch, RankedMaps
from .base import Metric, Protocol, Raw


@dataclass(frozen=True, kw_only=True)
class Localisation(Protocol):
    """The map R, min–max scaled, as a segmentation of the foreground, against masks.

    Foreground is where it exceeds its threshold. Pixel accuracy: over all pixels of the data set. mIoU: mean over background and
    foreground of Σ intersection / Σ union over the data set. mAP: mean over images of the average precision of the scores
    [1 − R, R] against the one-hot mask. AUROC: mean over images of the pixels' area under the ROC curve; images whose mask is all
    of one kind have none and count as 50 %.
    """

    name: ClassVar[str] = "localisation"
    title: ClassVar[str] = "overlap with masks of the foreground"
    source: ClassVar[str] = "VTranM, Table 2 (left); Chefer et al. (CVPR 2021)"
    needs_scikit_learn: ClassVar[bool] = True

    threshold: str = option("mean", "of the map's foreground: its own mean, or a half", choices=("mean", "half"))

    @property
    def needs_masks(self) -> bool:
        return True

    def measure(self, batch: Batch, maps: RankedMaps, target: Tensor) -> dict[str, Tensor]:  # noqa: ARG002
        assert batch.masks is not None, "data without masks have been refused"
        scaled, masks = min_max(maps.pixels.double()), batch.masks  # in less, values of different pixels fall together
        level = scaled.mean((1, 2), keepdim=True) if self.threshold == "mean" else 0.5
        found = scaled > level
        both, neither = (found & masks).sum((1, 2)), (~found & ~masks).sum((1, 2))
        union, other_union = (found | masks).sum((1, 2)), (~found | ~masks).sum((1, 2))
        average_precision, auroc = _ranking(scaled, masks)
        return {
            "overlap": torch.stack([both, union, neither, other_union], 1),
            "average_precision": average_precision,
            "auroc": auroc,
        }

    def metrics(self, explained: str, *, labels: bool) -> tuple[Metric, ...]:  # noqa: ARG002
        return (
            Metric("pixel accuracy", "higher", "%", _overlap, _pixel_accuracy),
            Metric("mIoU", "higher", "%", _overlap, _mean_iou),
            Metric("mAP", "higher", "%", lambda raw: 100.0 * raw["average_precision"][:, None]),
            Metric("AUROC", "higher", "%", lambda raw: 100.0 * raw["auroc"][:, None]),
        )


def _ranking(scaled: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Average precision and area under the ROC curve of each image, (B,) float64 each, by scikit-learn."""
    from sklearn.metrics import average_precision_score, roc_auc_score  # an extra

    precision, auroc = [], []
    for scores, truth in zip(scaled.flatten(1).cpu().numpy(), masks.flatten(1).cpu().numpy(), strict=True):
        precision.append(average_precision_score(np.concatenate([~truth, truth]), np.concatenate([1 - scores, scores])))
        auroc.append(roc_auc_score(truth, scores) if truth.any() and not truth.all() else 0.5)
    return torch.tensor(precision, dtype=torch.float64), torch.tensor(auroc, dtype=torch.float64)


def _overlap(raw: Raw) -> np.ndarray:
    return raw["overlap"].astype(np.float64)


def _pixel_accuracy(means: np.ndarray) -> np.ndarray:
    both, union, neither, _ = np.moveaxis(means, -1, 0)
    return 100 * (both + neither) / (union + neither)


def _mean_iou(means: np.ndarray) -> np.ndarray:
    both, union, neither, other_union = np.moveaxis(means, -1, 0)
    return 50 * (_share(both, union) + _share(neither, other_union))


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole; 0 for a kind of pixel that is neither found nor there in the whole data set."""
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)
