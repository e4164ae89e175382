"""Bootstrap intervals over images, and which differences between methods they carry."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from .protocols.base import Metric

INTERVAL = (0.025, 0.975)
_COUNTS_AT_ONCE = 2**24  # numbers of one block of resamples: 128 MiB


class Bootstrap:
    """Resamples of the images, the same for every method and metric, so that differences are paired.

    Args:
        count: of images.
        resamples: how many.
        seed: of the draws.
    """

    def __init__(self, count: int, resamples: int, seed: int) -> None:
        self.count, self.resamples, self.seed = count, resamples, seed

    def values(self, columns: np.ndarray, metric: Metric) -> tuple[float, np.ndarray]:
        """The metric of all images, and of every resample (R,), from what it reads of each image (n, c)."""
        columns = columns.astype(np.float64)
        means = np.concatenate([weights @ columns for weights in self._weights()])
        return float(metric.combine(columns.mean(0))), metric.combine(means)

    def band(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Mean, lower and upper end of the interval (L,) of (n, L) values."""
        points = points.astype(np.float64)
        low, high = np.quantile(np.concatenate([weights @ points for weights in self._weights()]), INTERVAL, axis=0)
        return points.mean(0), low, high

    def _weights(self) -> Iterator[np.ndarray]:
        """Blocks (r, n) of the share that each image has in each resample."""
        generator = np.random.default_rng(self.seed)
        block = max(1, _COUNTS_AT_ONCE // self.count)
        for start in range(0, self.resamples, block):
            size = min(block, self.resamples - start)
            yield generator.multinomial(self.count, np.full(self.count, 1 / self.count), size=size) / self.count


def ends(resampled: np.ndarray) -> tuple[float, float]:
    """The 95 % percentile interval of resampled values (R,)."""
    low, high = np.quantile(resampled, INTERVAL)
    return float(low), float(high)


def standing(values: Mapping[str, float], resampled: Mapping[str, np.ndarray], better: str) -> tuple[str | None, tuple[str, ...]]:
    """Who is best, where the intervals say so.

    Args:
        values: the figure of each method.
        resampled: its resamples (R,), the same images for every method.
        better: ``"lower"`` or ``"higher"``.

    Returns:
        The winner, if the paired difference to every other method has an interval without 0, else None; and the methods that
        cannot be told from the best, the best among them.
    """
    sign = 1 if better == "higher" else -1
    best = max(values, key=lambda label: sign * values[label])
    contenders = tuple(label for label in values if label == best or ends(sign * (resampled[best] - resampled[label]))[0] <= 0)
    return (best if contenders == (best,) else None), contenders
