"""Rows read back for tables and figures: the figures of a line together, and how fast something grows."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from .measuring import FAILED, OUT_OF_MEMORY
from .record import LineKey, Row
from .registry import FORWARD_BACKWARD, TORCH, TRITON

LARGE = 500  # tokens from which growth is fitted: below, what does not depend on them weighs too much


@dataclass(frozen=True)
class Line(LineKey):
    """Who did what at one size, with every figure of it by metric."""

    figures: dict[str, Row]

    def value(self, metric: str) -> float:
        """The median; NaN where there is none."""
        return self.figures[metric].value if metric in self.figures else math.nan

    @property
    def measured(self) -> bool:
        """Whether it was timed."""
        return not math.isnan(self.value("time"))

    @property
    def reason(self) -> str:
        """Why it was not timed, without what stands in brackets or what an error says; empty where it was."""
        texts = [row.p50 for row in self.figures.values() if not row.measured]
        if not texts or self.measured:
            return ""
        return ":".join(texts[0].split(":")[:2]) if texts[0].startswith(FAILED) else texts[0].partition(" (")[0]

    @property
    def out_of_memory(self) -> bool:
        """Whether it took more memory than it was given."""
        return any(row.p50.startswith(OUT_OF_MEMORY) for row in self.figures.values())

    @property
    def size(self) -> tuple[str, int, int, str]:
        """What lines that are compared have in common."""
        return self.model, self.batch, self.tokens, self.dtype


def lines_of(rows: Iterable[Row]) -> list[Line]:
    """Rows put together, in the order in which they came."""
    found: dict[LineKey, Line] = {}
    for row in rows:
        key = row.line
        found.setdefault(key, Line(**vars(key), figures={})).figures[row.metric] = row
    return list(found.values())


def line_of(lines: Iterable[Line], work: str, provider: str | None = None) -> Line | None:
    """The first line of that work, by that provider where one is named."""
    return next((one for one in lines if one.work == work and provider in (None, one.provider)), None)


def ours_on(device: str) -> str:
    """This library's provider on a device that has this folder's name."""
    return TORCH if device == "cpu" else TRITON


def ratio_to_forward_backward(line: Line, others: Iterable[Line]) -> float:
    """Round by round where it was taken so, else of the medians."""
    paired = line.value(f"ratio to {FORWARD_BACKWARD}")
    base = line_of((other for other in others if other.size == line.size), FORWARD_BACKWARD)
    if not math.isnan(paired) or base is None:
        return paired
    return line.value("time") / base.value("time")


def points_of(lines: Iterable[Line], metric: str) -> list[tuple[int, float]]:
    """Tokens and figure per image, ascending, where there is one."""
    found = ((line.tokens, line.value(metric) / line.batch) for line in lines)
    return sorted(point for point in found if not math.isnan(point[1]))


def fitted_exponent(points: Iterable[tuple[float, float]], least: float = LARGE) -> float:
    """b of y = a·n^b by least squares in the logarithms, over n ≥ ``least``; NaN where fewer than two n are that large."""
    taken = [(math.log(n), math.log(y)) for n, y in points if n >= least and y > 0]
    if len({x for x, _ in taken}) < 2:
        return math.nan
    mean_x, mean_y = (sum(values) / len(taken) for values in zip(*taken, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in taken) / sum((x - mean_x) ** 2 for x, _ in taken)
