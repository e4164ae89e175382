"""Timing of calls: on a GPU by events, with a cold second-level cache; on a CPU by the clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cache

import torch

COLD_CACHE_BYTES = 256 << 20  # more than any second-level cache: written before each sample
WARM_UP = 3
LEAST, MOST = 5, 200


@cache
def _cache_filler(device: torch.device) -> torch.Tensor:
    return torch.empty(COLD_CACHE_BYTES, dtype=torch.int8, device=device)


def samples_ms(call: Callable[[], object], device: torch.device, seconds: float = 0.25, least: int = LEAST) -> list[float]:
    """Milliseconds of single calls, after a warm-up, for about ``seconds`` and at least ``least`` of them."""
    return interleaved_ms([call], device, seconds, least)[0]


def interleaved_ms(
    calls: Sequence[Callable[[], object]], device: torch.device, seconds: float = 0.25, least: int = LEAST
) -> list[list[float]]:
    """Milliseconds of each call, taken in turns, so that a drift of the machine hits all alike; after a warm-up.

    Args:
        calls: what is timed.
        device: where they work.
        seconds: for which rounds go on, all calls together.
        least: rounds at least.
    """
    one = cuda_sample if device.type == "cuda" else cpu_sample
    for call in calls:
        for _ in range(WARM_UP if device.type == "cuda" else 1):
            call()
    samples: list[list[float]] = [[one(call, device)] for call in calls]
    rounds = max(least, min(MOST, int(1e3 * seconds / max(sum(first[0] for first in samples), 1e-3))))
    for _ in range(rounds - 1):
        for call, taken in zip(calls, samples, strict=True):
            taken.append(one(call, device))
    return samples


def cuda_sample(call: Callable[[], object], device: torch.device) -> float:
    """Milliseconds between two events around the call."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    _cache_filler(device).zero_()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def cpu_sample(call: Callable[[], object], device: torch.device) -> float:  # noqa: ARG001
    """Milliseconds by the clock."""
    started = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - started)
