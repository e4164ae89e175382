"""One pass (``attention_backward``) or two (the library's backward, then ``row_propagation``): whichever was measured faster.

``decisions.csv`` holds the measurements, made by ``python -m bench.tune --decisions``. The nearest measured number of tokens
decides, for the same architecture, element type and padded head width; without a measurement the library's backward is kept.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ..launch import architecture_of
from ..launch_table import padded_head_dim

TABLE = Path(__file__).resolve().parent / "decisions.csv"
ONE_PASS, TWO_PASSES = "one pass", "two passes"

# Module state, not a context variable: the backward of CUDA tensors runs in a thread of its own, which has no context.
_forced: str | None = None


@dataclass(frozen=True)
class Decision:
    """One measurement: milliseconds (median) of one pass, of the library's backward, and of the row step after it."""

    architecture: str
    dtype: str
    head_dim: str
    tokens: str
    batch_heads: str
    one_pass_ms: str
    backward_ms: str
    row_ms: str
    device: str
    versions: str

    @property
    def faster(self) -> str:
        """Which of the two was faster."""
        two = float(self.backward_ms) + float(self.row_ms)
        return ONE_PASS if float(self.one_pass_ms) < two else TWO_PASSES


def read_decisions(path: Path = TABLE) -> list[Decision]:
    """All measurements."""
    with path.open(newline="", encoding="utf-8") as stream:
        return [Decision(**row) for row in csv.DictReader(stream)]


@contextmanager
def forced(choice: str) -> Iterator[None]:
    """Take one of the two ways whatever was measured (for measuring and testing).

    Raises:
        ValueError: neither of the two.
    """
    if choice not in (ONE_PASS, TWO_PASSES):
        raise ValueError(f"choice: expected {ONE_PASS!r} or {TWO_PASSES!r}, received {choice!r}")
    global _forced
    before, _forced = _forced, choice
    try:
        yield
    finally:
        _forced = before


def decision_architecture(device: torch.device) -> str:
    """The table's name of a device: its compute capability or AMD target, or ``cpu``."""
    return "cpu" if device.type == "cpu" else architecture_of(device)


def one_pass_is_faster(query: Tensor, num_tokens: int) -> bool:
    """Whether ``attention_backward`` is to be used for a layer with this query (B, H, n, dh)."""
    choice = _forced
    if choice is None:
        architecture = decision_architecture(query.device)
        choice = _decided(architecture, str(query.dtype).removeprefix("torch."), query.shape[-1], num_tokens)
    return choice == ONE_PASS


@cache
def _decided(architecture: str, dtype: str, head_dim: int, num_tokens: int) -> str:
    wanted = (architecture, dtype, str(padded_head_dim(head_dim)))
    known = [row for row in read_decisions() if (row.architecture, row.dtype, row.head_dim) == wanted]
    if not known:
        return TWO_PASSES
    return min(known, key=lambda row: abs(math.log(int(row.tokens) / num_tokens))).faster
