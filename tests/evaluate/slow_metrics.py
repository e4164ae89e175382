"""The metrics of an evaluation once more, slowly: plain loops in float64, written from their definitions alone.

What the library computes is held against these. Nothing here is imported from it, and nothing is vectorised that a loop over
pixels says more plainly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np

Predict = Callable[[np.ndarray], np.ndarray]


# -- maps and ranks ------------------------------------------------------------------------------------------------------


def upsample(grid: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear up-sampling of (gh, gw) to (height, width): half-pixel centres (align_corners False), edges clamped."""
    grid = np.asarray(grid, dtype=np.float64)
    rows, columns = grid.shape
    pixels = np.zeros((height, width))
    for y in range(height):
        top, bottom, down = _neighbours(y, height, rows)
        for x in range(width):
            left, right, across = _neighbours(x, width, columns)
            upper = (1 - across) * grid[top, left] + across * grid[top, right]
            lower = (1 - across) * grid[bottom, left] + across * grid[bottom, right]
            pixels[y, x] = (1 - down) * upper + down * lower
    return pixels


def _neighbours(pixel: int, pixels: int, cells: int) -> tuple[int, int, float]:
    """The two cells whose centres enclose a pixel's centre, and the second one's share."""
    position = (pixel + 0.5) * cells / pixels - 0.5
    position = min(max(position, 0.0), cells - 1.0)
    first = math.floor(position)
    return first, min(first + 1, cells - 1), position - first


def ranks(pixels: np.ndarray, tie_break: np.ndarray) -> np.ndarray:
    """Rank of each pixel of (h, w), 0 the most important: by value, equal values by ``tie_break``, both descending."""
    values = [float(value) for value in np.asarray(pixels).ravel()]
    breaks = [float(value) for value in np.asarray(tie_break).ravel()]
    if any(math.isnan(value) for value in values + breaks):
        raise ValueError("ranks: expected numbers, received NaN")
    order = sorted(range(len(values)), key=lambda i: (-values[i], -breaks[i]))
    rank_of = np.zeros(len(values), dtype=np.int64)
    for rank, pixel in enumerate(order):
        rank_of[pixel] = rank
    return rank_of.reshape(np.shape(pixels))


def min_max(pixels: np.ndarray) -> np.ndarray:
    """A map scaled to [0, 1]; a constant one becomes zeros."""
    pixels = np.asarray(pixels, dtype=np.float64)
    low, high = pixels.min(), pixels.max()
    return np.zeros_like(pixels) if high == low else (pixels - low) / (high - low)


# -- perturbation --------------------------------------------------------------------------------------------------------


def level_counts(levels_percent: Sequence[float], num_pixels: int) -> list[int]:
    """How many pixels each level removes, rounded down; exact, so that 29 % of 100 pixels are 29 and not 28."""
    return [math.floor(Fraction(str(level)) * num_pixels / 100) for level in levels_percent]


def removed(
    image: np.ndarray, ranks: np.ndarray, count: int, substrate: np.ndarray | float, order: str = "positive"
) -> np.ndarray:
    """The image (3, h, w) with its ``count`` most important pixels (negative order: least) replaced in all channels."""
    if order not in ("positive", "negative"):
        raise ValueError(f"order: expected 'positive' or 'negative', received {order!r}")
    image = np.asarray(image, dtype=np.float64)
    filling = np.zeros_like(image) + substrate
    result = image.copy()
    height, width = ranks.shape
    for y in range(height):
        for x in range(width):
            rank = ranks[y, x] if order == "positive" else height * width - 1 - ranks[y, x]
            if rank < count:
                for channel in range(image.shape[0]):
                    result[channel, y, x] = filling[channel, y, x]
    return result


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Natural logarithm of the probabilities of logits (C,)."""
    logits = np.asarray(logits, dtype=np.float64)
    largest = logits.max()
    return logits - largest - math.log(sum(math.exp(value - largest) for value in logits))


def perturbation(
    predict: Predict, image01: np.ndarray, ranks: np.ndarray, label: int, levels_percent: Sequence[float]
) -> dict[str, list]:
    """What removal to black does to one image, level by level, each from the original image.

    Returns:
        ``positive_correct`` and ``negative_correct`` (0 or 1 against the label), and ``log_p_pred``: in positive order, the log
        probability of the class that is predicted on the untouched image.
    """
    predicted = int(np.argmax(predict(image01)))
    result: dict[str, list] = {"positive_correct": [], "negative_correct": [], "log_p_pred": []}
    for count in level_counts(levels_percent, ranks.size):
        positive = predict(removed(image01, ranks, count, 0.0, "positive"))
        negative = predict(removed(image01, ranks, count, 0.0, "negative"))
        result["positive_correct"].append(int(np.argmax(positive) == label))
        result["negative_correct"].append(int(np.argmax(negative) == label))
        result["log_p_pred"].append(float(log_softmax(positive)[predicted]))
    return result


def auc_percent(values_per_level: Sequence[float], levels_percent: Sequence[float]) -> float:
    """Area by the trapezoid over the levels as shares, times 100; not divided by the range that the levels cover."""
    area = 0.0
    for i in range(1, len(levels_percent)):
        width = (levels_percent[i] - levels_percent[i - 1]) / 100
        area += width * (values_per_level[i] + values_per_level[i - 1]) / 2
    return 100 * area


def aopc(log_p: Sequence[float]) -> float:
    """Mean over the levels of p(y|x) − p(y|x_k), from log p; the first level is k = 0 and counts."""
    return sum(math.exp(log_p[0]) - math.exp(value) for value in log_p) / len(log_p)


def log_odds(log_p: Sequence[float]) -> float:
    """Mean over the levels of log(p(y|x_k) / p(y|x)), natural logarithm; the first level is k = 0 and counts."""
    return sum(value - log_p[0] for value in log_p) / len(log_p)


# -- insertion, deletion, drop, increase ---------------------------------------------------------------------------------


def gaussian_blur(image: np.ndarray, kernel: int = 11, sigma: float = 5) -> np.ndarray:
    """The image (3, h, w) under a normalised Gaussian window, mirrored at its edges without repeating the edge pixel."""
    image = np.asarray(image, dtype=np.float64)
    half = kernel // 2
    weights = [math.exp(-(offset**2) / (2 * sigma**2)) for offset in range(-half, half + 1)]
    weights = [weight / sum(weights) for weight in weights]
    channels, height, width = image.shape
    across, both = np.zeros_like(image), np.zeros_like(image)
    for channel in range(channels):
        for y in range(height):
            for x in range(width):
                for weight, offset in zip(weights, range(-half, half + 1), strict=True):
                    across[channel, y, x] += weight * image[channel, y, _mirrored(x + offset, width)]
        for y in range(height):
            for x in range(width):
                for weight, offset in zip(weights, range(-half, half + 1), strict=True):
                    both[channel, y, x] += weight * across[channel, _mirrored(y + offset, height), x]
    return both


def _mirrored(index: int, size: int) -> int:
    """An index beyond the edges walked back in: −1 is 1, size is size − 2."""
    while size > 1 and not 0 <= index < size:
        index = -index if index < 0 else 2 * (size - 1) - index
    return index if size > 1 else 0


def insertion_deletion(
    predict: Predict,
    image_normalised: np.ndarray,
    ranks: np.ndarray,
    target: int,
    counts: Sequence[int],
    blurred: np.ndarray,
    zeros: np.ndarray | float,
) -> tuple[float, float]:
    """Areas (times 100) under the target's probability as the most important pixels come back into the blurred image
    (insertion), and as they are replaced by zeros after normalisation (deletion); the counts are shares of all pixels.
    """
    inserted, deleted = [], []
    for count in counts:
        # The blurred image with its `count` most important pixels replaced by the original's.
        insertion = predict(removed(blurred, ranks, count, image_normalised))
        deletion = predict(removed(image_normalised, ranks, count, zeros))
        inserted.append(math.exp(log_softmax(insertion)[target]))
        deleted.append(math.exp(log_softmax(deletion)[target]))
    levels = [100 * count / ranks.size for count in counts]
    return auc_percent(inserted, levels), auc_percent(deleted, levels)


def masked_by_map(image01: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """The image (3, h, w) times the min–max-scaled map (h, w); a constant map leaves zeros."""
    scaled = min_max(pixels)
    return np.stack([np.asarray(channel, dtype=np.float64) * scaled for channel in image01])


def average_drop(before: Sequence[float], after: Sequence[float]) -> float:
    """100 · mean of max(0, Y − O)/Y, with the score Y of the image and O of the image multiplied by its map."""
    return 100 * sum(max(0.0, y - o) / y for y, o in zip(before, after, strict=True)) / len(before)


def average_increase(before: Sequence[float], after: Sequence[float]) -> float:
    """Percentage of images whose score grows, O > Y."""
    return 100 * sum(o > y for y, o in zip(before, after, strict=True)) / len(before)


# -- localisation --------------------------------------------------------------------------------------------------------


def _foreground(pixels: np.ndarray) -> np.ndarray:
    scaled = min_max(pixels)
    return scaled > scaled.mean()


def pixel_accuracy(maps: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> float:
    """Pixels whose side of the map's own mean agrees with the mask, over all pixels of the data set."""
    correct, total = 0, 0
    for pixels, mask in zip(maps, masks, strict=True):
        for found, true in zip(_foreground(pixels).ravel(), np.asarray(mask).ravel(), strict=True):
            correct += bool(found) == bool(true)
            total += 1
    return correct / total


def mean_iou(maps: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> float:
    """Mean over background and foreground of Σ intersection / Σ union over the data set; a class found nowhere counts 0."""
    intersection, union = [0, 0], [0, 0]
    for pixels, mask in zip(maps, masks, strict=True):
        for found, true in zip(_foreground(pixels).ravel(), np.asarray(mask).ravel(), strict=True):
            for side in (0, 1):
                intersection[side] += bool(found) == side and bool(true) == side
                union[side] += bool(found) == side or bool(true) == side
    return sum(i / u if u else 0.0 for i, u in zip(intersection, union, strict=True)) / 2


def average_precision(scores: Sequence[float], targets: Sequence[bool]) -> float:
    """Σ (R_n − R_{n−1}) P_n over the thresholds, descending; equal scores are one threshold. 0 without a positive."""
    positives = sum(bool(target) for target in targets)
    if positives == 0:
        return 0.0
    ordered = sorted(zip(map(float, scores), map(bool, targets), strict=True), key=lambda pair: -pair[0])
    total, true_so_far, recall_before = 0.0, 0, 0.0
    for i, (score, true) in enumerate(ordered):
        true_so_far += true
        if i + 1 < len(ordered) and ordered[i + 1][0] == score:
            continue  # the threshold takes in all of its equals
        recall, precision = true_so_far / positives, true_so_far / (i + 1)
        total += (recall - recall_before) * precision
        recall_before = recall
    return total


def mean_average_precision(maps: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> float:
    """Mean over images of the average precision of the pooled scores [1 − R, R] against [background, foreground]."""
    total = 0.0
    for pixels, mask in zip(maps, masks, strict=True):
        scaled = [float(value) for value in min_max(pixels).ravel()]
        truth = [bool(value) for value in np.asarray(mask).ravel()]
        scores = [1 - value for value in scaled] + scaled
        total += average_precision(scores, [not value for value in truth] + truth)
    return total / len(maps)


def auroc(scores: Sequence[float], targets: Sequence[bool]) -> float:
    """Area under the ROC curve by the rank sum, equal scores sharing their middle rank; NaN where one side is empty."""
    scores = [float(score) for score in scores]
    targets = [bool(target) for target in targets]
    positives = sum(targets)
    negatives = len(targets) - positives
    if positives == 0 or negatives == 0:
        return math.nan
    order = sorted(range(len(scores)), key=lambda i: scores[i])
    rank_sum, start = 0.0, 0
    while start < len(order):
        end = start
        while end < len(order) and scores[order[end]] == scores[order[start]]:
            end += 1
        middle = (start + 1 + end) / 2  # mean of the ranks start + 1 … end
        rank_sum += middle * sum(targets[i] for i in order[start:end])
        start = end
    return (rank_sum - positives * (positives + 1) / 2) / (positives * negatives)


# -- consistency of groups, intervals ------------------------------------------------------------------------------------


def saco(
    predict: Predict, image_normalised: np.ndarray, pixels: np.ndarray, ranks: np.ndarray, target: int, groups: int = 10
) -> float:
    """Salience-guided Faithfulness Coefficient (Wu et al., CVPR 2024, Algorithm 1), −1 to 1.

    Group i holds the pixels of rank ⌊i·N/groups⌋ up to ⌊(i + 1)·N/groups⌋; it is replaced by the image's mean colour.
    Its salience is the mean of the map over it: of groups of one size the same as the paper's sum, of others no favour to the
    larger.
    """
    image = np.asarray(image_normalised, dtype=np.float64)
    mean_colour = [channel.mean() for channel in image]
    height, width = ranks.shape
    clean = math.exp(log_softmax(predict(image))[target])
    salience, effect = [], []
    for group in range(groups):
        first, last = group * ranks.size // groups, (group + 1) * ranks.size // groups
        without, group_sum, group_size = image.copy(), 0.0, 0
        for y in range(height):
            for x in range(width):
                if first <= ranks[y, x] < last:
                    group_sum += float(pixels[y, x])
                    group_size += 1
                    for channel in range(image.shape[0]):
                        without[channel, y, x] = mean_colour[channel]
        salience.append(group_sum / group_size)
        effect.append(clean - math.exp(log_softmax(predict(without))[target]))
    weights = []
    for i in range(groups):
        for j in range(i + 1, groups):
            difference = salience[i] - salience[j]
            weights.append(difference if effect[i] >= effect[j] else -difference)
    denominator = sum(abs(weight) for weight in weights)
    return sum(weights) / denominator if denominator else 0.0


def bootstrap_interval(values: Sequence[float], counts: np.ndarray) -> tuple[float, float]:
    """The 2.5 and 97.5 percentiles of the mean under resamples: ``counts`` (R, n) says how often each value was drawn."""
    means = []
    for row in counts:
        drawn = [float(value) for value, times in zip(values, row, strict=True) for _ in range(int(times))]
        means.append(sum(drawn) / len(drawn))
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
