"""Cold starts: what a fresh process waits for, and the compiler."""

from __future__ import annotations

import pytest
import torch

from bench.cases import cold_start
from bench.cases.cold_start import AHEAD, AT_FIRST_USE, COMPILER, FIRST, IMPORT, LIBRARIES, SECOND, ColdStart
from bench.registry import MODEL_ITSELF, TORCH, Setting, Size
from vitexplain.kernels import interpreting

CPU = torch.device("cpu")
CASE = ColdStart()
TINY = Size("test_vit", 1, 101, 160)


def test_every_step_of_a_fresh_process_is_measured(monkeypatch) -> None:
    monkeypatch.setattr(cold_start, "REPEATS", 1)
    rows = list(CASE.measure(TINY, Setting(CPU)))
    assert [(row.work, row.provider) for row in rows] == [
        (LIBRARIES, MODEL_ITSELF), (IMPORT, TORCH), (FIRST, TORCH), (SECOND, TORCH),
    ]  # fmt: skip
    assert {(row.metric, row.unit, row.repeats) for row in rows} == {("time", "ms", 1)}
    found = {row.work: row.value for row in rows}
    assert found[SECOND] < found[FIRST] + found[IMPORT]
    assert found[IMPORT] > 100, "it brings torch"


def test_all_steps_are_of_the_same_processes(monkeypatch) -> None:
    started: list[str] = []

    def one_process(code: str, *_: object) -> list[float]:
        started.append(code)
        return [1.0] if code == cold_start.IMPORTING else [2.0, 3.0, 4.0]

    monkeypatch.setattr(cold_start, "one_process", one_process)
    rows = list(CASE.measure(TINY, Setting(CPU)))
    assert [row.value for row in rows] == [1.0, 2.0, 3.0, 4.0]
    assert started == [cold_start.IMPORTING] * 3 + [cold_start.EXPLAINING] * 3


def test_a_process_that_fails_tells_why() -> None:
    with pytest.raises(SystemExit, match="no such thing"):
        cold_start.one_process("raise ValueError('no such thing')")


@pytest.mark.skipif(interpreting(), reason="interpreting and compiling cannot share a process")
def test_the_compiler_is_measured_without_a_gpu(monkeypatch) -> None:
    pytest.importorskip("triton", reason="needs triton, which this platform has no wheel for")
    monkeypatch.setattr(cold_start, "REPEATS", 1)
    (row,) = CASE.measure(CASE.sizes("cpu")[1], Setting(CPU))
    assert row.work == COMPILER
    assert row.value > 10


def test_without_triton_the_compiler_has_no_figure(monkeypatch) -> None:
    monkeypatch.setattr(cold_start, "find_spec", lambda _: None)
    (row,) = CASE.measure(CASE.sizes("cpu")[1], Setting(CPU))
    assert row.p50 == "unavailable: triton is not installed"


def test_a_gpu_has_both_ways_to_come_by_kernels() -> None:
    (size,) = CASE.sizes("cuda")
    entries = CASE.entries(size, "cuda")
    assert [entry.provider for entry in entries if entry.work == FIRST] == [AT_FIRST_USE, AHEAD]
    assert entries[-1].work == COMPILER
