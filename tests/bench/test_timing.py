"""Calls are warmed up, and taken in turns."""

from __future__ import annotations

import torch

from bench.timing import interleaved_ms, samples_ms

CPU = torch.device("cpu")


def test_a_call_is_timed_after_a_warm_up() -> None:
    calls: list[int] = []
    samples = samples_ms(lambda: calls.append(1), CPU, seconds=1e-9, least=4)
    assert (len(samples), len(calls)) == (4, 5)
    assert min(samples) >= 0


def test_calls_that_are_compared_are_timed_in_turns() -> None:
    order: list[str] = []
    samples = interleaved_ms([lambda: order.append("a"), lambda: order.append("b")], CPU, seconds=1e-9)
    assert order[2:] == ["a", "b"] * 5, "after one call of each"
    assert [len(taken) for taken in samples] == [5, 5]


def test_more_seconds_are_more_rounds_up_to_a_limit() -> None:
    (samples,) = interleaved_ms([lambda: None], CPU, seconds=10, least=5)
    assert len(samples) == 200
