"""Bootstrap intervals over images, and which differences between methods they carry."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

INTERVAL = (0.025, 0.975)
LEAST_IMAGES = 20  # for a winner: intervals of fewer are too narrow, of one they have no width at all
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

    def means(self, columns: np.ndarray) -> np.ndarray:
        """Means over every resample (R, c) of numbers of each image (n, c), in one pass over the draws."""
        columns = columns.astype(np.float64)
        return np.concatenate([weights @ columns for weights in self._weights()])

    def _weights(self) -> Iterator[np.ndarray]:
        """Blocks (r, n) of the share that each image has in each resample."""
        generator = np.random.default_rng(self.seed)
        block = max(1, _COUNTS_AT_ONCE // self.count)
        for start in range(0, self.resamples, block):
            size = min(block, self.resamples - start)
            yield generator.multinomial(self.count, np.full(self.count, 1 / self.count), size=size) / self.count


def ends(resampled: np.ndarray) -> tuple[float, float]:
    """The 95 % percentile interval of resampled values (R,); resamples without a value, NaN, are left aside."""
    low, high = np.nanquantile(resampled, INTERVAL)
    return float(low), float(high)


def standing(
    values: Mapping[str, float], resampled: Mapping[str, np.ndarray], better: str, count: int
) -> tuple[str | None, tuple[str, ...]]:
    """Who is best, where the intervals say so.

    Args:
        values: the figure of each row.
        resampled: its resamples (R,), the same images for every row.
        better: ``"lower"`` or ``"higher"``.
        count: of images; with fewer than ``LEAST_IMAGES`` no row can be told from another.

    Returns:
        The winner, if the paired difference to every other row has an interval without 0, else None; and the rows that cannot be
        told from the best, the best first of all.
    """
    if not values:
        return None, ()
    sign = 1 if better == "higher" else -1
    best = max(values, key=lambda label: sign * values[label])

    def beaten(label: str) -> bool:
        return count >= LEAST_IMAGES and ends(sign * (resampled[best] - resampled[label]))[0] > 0

    contenders = (best, *(label for label in values if label != best and not beaten(label)))
    return (best if len(contenders) == 1 and count >= LEAST_IMAGES else None), contenders
