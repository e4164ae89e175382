"""The report's photos: those on which the methods disagree most."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping
from itertools import combinations

import numpy as np

from ..heatmap import is_signed
from ..loading import short_class_name
from .results import GalleryPhoto
from .runner import BETWEEN, Evaluation


def disagreement(maps: Mapping[str, np.ndarray]) -> float:
    """Mean over pairs of maps (gh, gw) of 1 − Spearman's rank correlation; a constant map correlates with nothing.

    0 for a single map.
    """
    ranks = [_standard_ranks(values) for values in maps.values()]
    pairs = [1 - float(a @ b) for a, b in combinations(ranks, 2)]
    return float(np.mean(pairs)) if pairs else 0.0


def _standard_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks, equal values sharing their mean, with mean 0 and length 1; zeros for a constant map."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse.ravel()]
    centred = ranks - ranks.mean()
    length = np.linalg.norm(centred)
    return centred / length if length else centred


def choose_gallery(evaluation: Evaluation, count: int) -> list[GalleryPhoto]:
    """The ``count`` photos with the largest disagreement between methods, the largest first."""
    methods = [label for label, row in evaluation.rows.items() if row.entry.kind != "control"]
    largest = heapq.nsmallest(count, _candidates(evaluation, methods), key=lambda item: (-item[0], item[1]))
    return [_photo(evaluation, *item) for item in largest]


def _candidates(evaluation: Evaluation, methods: list[str]) -> Iterator[tuple[float, str, dict[str, np.ndarray], str]]:
    """Disagreement, name, maps and caption of every photo."""
    for number in range(evaluation.num_chunks):
        arrays, _ = evaluation.journal.read(number)
        for row, name in enumerate(arrays.get("ids", ())):
            maps = {label: arrays[f"map{BETWEEN}{label}"][row].astype(np.float32) for label in methods}
            yield disagreement(maps), str(name), maps, _caption(evaluation, arrays, row)


def _caption(evaluation: Evaluation, arrays: Mapping[str, np.ndarray], row: int) -> str:
    predicted = int(arrays["predicted"][row])
    text = f"{_short(evaluation, predicted)} ({100 * np.exp(float(arrays['clean_log_p'][row])):.0f} %)"
    if "labels" in arrays and int(arrays["labels"][row]) != predicted:
        text += f", truly {_short(evaluation, int(arrays['labels'][row]))}"
    return text


def _short(evaluation: Evaluation, index: int) -> str:
    return short_class_name(evaluation.model.class_names, index)


def _photo(evaluation: Evaluation, value: float, name: str, maps: dict[str, np.ndarray], caption: str) -> GalleryPhoto:
    sample = evaluation.source.sample(evaluation.source.ids.index(name))
    seen = evaluation.preprocess.seen(sample.photo).permute(1, 2, 0).numpy()
    signed = frozenset(label for label, values in maps.items() if is_signed(values))
    return GalleryPhoto(name, caption, seen, maps, signed, value)
