"""What a device can do at most, measured: a large matrix product and a large copy."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from functools import cache

import torch

from .timing import samples_ms

COMPUTE, BANDWIDTH = "compute", "bandwidth"


@dataclass(frozen=True)
class Peak:
    """One limit.

    Attributes:
        rate: FLOP/s or bytes/s, the median.
        rates: of every sample.
    """

    rate: float
    rates: tuple[float, ...]


@cache
def peaks(device: torch.device, dtype: torch.dtype) -> dict[str, Peak]:
    """``"compute"`` in FLOP/s of this element type, ``"bandwidth"`` in bytes/s read and written; once a process."""
    side, copied = (8192, 1 << 30) if device.type == "cuda" else (2048, 1 << 27)
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    source = torch.empty(copied, dtype=torch.int8, device=device).fill_(1)
    target = torch.empty_like(source)
    products = samples_ms(lambda: left @ right, device)
    copies = samples_ms(lambda: target.copy_(source), device)
    return {COMPUTE: _peak(2.0 * side**3, products), BANDWIDTH: _peak(2.0 * copied, copies)}


def _peak(work: float, milliseconds: list[float]) -> Peak:
    return Peak(1e3 * work / statistics.median(milliseconds), tuple(1e3 * work / sample for sample in milliseconds))
