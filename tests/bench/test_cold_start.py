"""Cold starts: what a fresh process waits for, and the compiler."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from bench.cases import cold_start
from bench.cases.cold_start import AHEAD, AT_FIRST_USE, COMPILER, FIRST, IMPORT, LIBRARIES, SECOND, ColdStart
from bench.registry import MODEL_ITSELF, TORCH, Setting, Size, Unavailable
from vitexplain.kernels import interpreting
from vitexplain.kernels.aot.manifest import read_manifest
from vitexplain.kernels.attention_backward.choose import ONE_PASS, forced

CPU = torch.device("cpu")
CASE = ColdStart()
TINY = Size("test_vit", 1, 101, 160)
# An explainer that needs 0.3 s to be made and 0.05 s for each explanation
STANDING_IN = """
class Explainer:
    def __init__(self, *_):
        time.sleep(0.3)
    def attribute(self, *_):
        time.sleep(0.05)
"""


def test_every_step_of_a_fresh_process_is_measured(monkeypatch) -> None:
    monkeypatch.setattr(cold_start, "REPEATS", 1)
    rows = list(CASE.measure(TINY, Setting(CPU)))
    assert [(row.work, row.provider) for row in rows] == [
        (LIBRARIES, MODEL_ITSELF), (IMPORT, TORCH), (FIRST, TORCH), (SECOND, TORCH),
    ]  # fmt: skip
    assert {(row.metric, row.unit, row.repeats) for row in rows} == {("time", "ms", 1)}
    found = {row.work: row.value for row in rows}
    assert min(found[LIBRARIES], found[IMPORT]) > 100, "both bring torch"


def test_figures_are_of_the_step_they_stand_beside() -> None:
    slow = "import time\ntime.sleep(0.2)\n"
    code = cold_start.EXPLAINING.replace("from vitexplain import Explainer", f"{slow}{STANDING_IN}")
    imported, first, second = cold_start.one_process(code, ["test_vit", "tokentm", "1", "160", "float32", "cpu"])
    assert 200 <= imported < 5000
    assert 50 <= second < 300 <= first, "the first explanation alone sets an explainer up"


def test_an_empty_cache_of_kernels_is_of_one_process() -> None:
    code = "import json, os; print(os.environ['TRITON_CACHE_DIR']); print(json.dumps([len(os.listdir({0})), 1.0]))"
    assert cold_start.one_process(code.replace("{0}", "os.environ['TRITON_CACHE_DIR']")) == [0, 1.0]


def test_kernels_that_were_not_compiled_ahead_are_named(monkeypatch) -> None:
    compiling = "import os, pathlib; pathlib.Path(os.environ['TRITON_CACHE_DIR'], 'single_row.cubin').touch(); print([1, 2, 3])"
    assert cold_start.one_process(compiling) == [1, 2, 3], "at first use it may"
    monkeypatch.setattr(cold_start, "EXPLAINING", compiling)
    monkeypatch.setattr(cold_start, "IMPORTING", "print([1.0])")  # what it is of is measured above
    with pytest.raises(Unavailable, match="not compiled ahead: single_row"):
        cold_start.steps(TINY, "cpu", {cold_start.IMAGES: "somewhere"})
    monkeypatch.setattr(CASE, "_steps", lambda *_: cold_start.steps(TINY, "cpu", {cold_start.IMAGES: "somewhere"}))
    rows = list(CASE.measure(TINY, Setting(CPU, works=("explanation",))))
    assert [(row.work, row.p50) for row in rows if row.provider == TORCH] == [
        (step, "unavailable: not compiled ahead: single_row") for step in (FIRST, SECOND)
    ]


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


def test_ahead_of_time_is_what_the_first_explanation_launches_and_no_more() -> None:
    pytest.importorskip("triton", reason="needs triton, which this platform has no wheel for")
    size = CASE.sizes("cuda")[0]
    names = Counter(variant.kernel for variant in cold_start.launched_variants(size, "90"))
    assert names["single_row_kernel"] == 2, "all rows, and the last block's"
    assert set(names) >= {"token_transformation_kernel", "attention_token_transformation_kernel", "normalise_kernel"}
    assert "many_rows_kernel" not in names
    with forced(ONE_PASS):
        more = Counter(variant.kernel for variant in cold_start.launched_variants(size, "90"))
    assert more["attention_backward_kernel"] > 0


@pytest.mark.skipif(interpreting(), reason="interpreting and compiling cannot share a process")
def test_what_is_compiled_ahead_can_be_loaded(monkeypatch) -> None:
    pytest.importorskip("triton", reason="needs triton, which this platform has no wheel for")
    size, few = CASE.sizes("cuda")[0], cold_start.launched_variants
    monkeypatch.setattr(cold_start, "launched_variants", lambda *a: few(*a)[:2])
    with cold_start.compiled_ahead(size, "90") as images:
        found = read_manifest(images / "90").images
    assert [image.kernel for image in found] == [variant.kernel for variant in few(size, "90")[:2]]


def test_a_gpu_has_both_ways_to_come_by_kernels() -> None:
    (size,) = CASE.sizes("cuda")
    entries = CASE.entries(size, "cuda")
    assert [entry.provider for entry in entries if entry.work == FIRST] == [AT_FIRST_USE, AHEAD]
    assert entries[-1].work == COMPILER
