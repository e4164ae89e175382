"""The tuner: which shape is taken, and which of one backward pass and two is faster."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bench import tune
from bench.layer import LayerSize
from vitexplain.kernels import interpreting
from vitexplain.kernels.attention_backward import choose

TINY = LayerSize(2, 2, 33, 16)


def test_decisions_are_measured_and_say_which_is_faster(monkeypatch) -> None:
    monkeypatch.setattr(tune, "CPU_SIZES", (TINY,))
    made = list(tune.measured_decisions(torch.device("cpu"), seconds=0.001))
    assert [row.dtype for row in made] == ["float32", "bfloat16"]
    for row in made:
        assert (row.architecture, row.head_dim, row.tokens, row.batch_heads) == ("cpu", "16", "33", "4")
        two = float(row.backward_ms) + float(row.row_ms)
        assert row.faster == (choose.ONE_PASS if float(row.one_pass_ms) < two else choose.TWO_PASSES)


@pytest.mark.skipif(interpreting(), reason="interpreting and compiling cannot share a process")
def test_the_tuner_takes_the_first_candidate_that_does_not_spill(monkeypatch) -> None:
    pytest.importorskip("triton", reason="needs triton, which this platform has no wheel for")
    spilling, fine = tune.TileConfig(128, 128, 8, 2), tune.TileConfig(64, 64, 4, 2)
    monkeypatch.setitem(tune.CANDIDATES, "half", (spilling, fine, tune.TileConfig(32, 32, 4, 2)))
    task = tune.Task("single_row", "90", "half", 64)
    row = tune.compiled_row(task)
    assert (row.config, row.basis) == (fine, "compiles without spills")
    monkeypatch.setitem(tune.CANDIDATES, "half", (spilling,))
    assert tune.compiled_row(task).basis.startswith("spills ")
    assert tune._bounds() == ("337", "769", "2049", "any")


def test_a_few_spilled_bytes_are_forbidden_before_a_smaller_tile_is_taken(monkeypatch) -> None:
    pytest.importorskip("triton", reason="needs triton, which this platform has no wheel for")
    first, second = tune.CANDIDATES["half"][:2]
    task = tune.Task("single_row", "90", "half", 64)
    monkeypatch.setattr(tune, "_spilled_bytes", lambda _task, config: 0 if config.max_registers else 8)
    assert tune.compiled_row(task).config == dataclasses.replace(first, max_registers=255)
    monkeypatch.setattr(tune, "_spilled_bytes", lambda _task, config: 0 if config == second else 800)
    assert tune.compiled_row(task).config == second
    monkeypatch.setattr(tune, "_spilled_bytes", lambda *_: None)
    with pytest.raises(SystemExit, match="no candidate compiles within the shared memory"):
        tune.compiled_row(task)
