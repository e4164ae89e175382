"""The ablation changes what it says and nothing else."""

from __future__ import annotations

import pytest
import torch

from bench.cases import ablation
from bench.cases.ablation import AS_IT_IS, CHANGES, OPTIONS, TO_PIXELS, WHOLE_LAST_BLOCK, Ablation
from bench.providers import models
from bench.registry import Setting, Size
from vitexplain.fused_attention import attention_backward
from vitexplain.tap import Tap

CPU = torch.device("cpu")
TINY = Size("vit_tiny_patch16_224", 2, 17, 64)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Ablation:
    monkeypatch.setattr(Ablation, "sizes", lambda *_: (TINY,))
    monkeypatch.setitem(OPTIONS, "+ compiled blocks", {})  # the compiler's time is not what is tested
    return Ablation()


def test_every_line_is_right_and_timed(tiny: Ablation) -> None:
    rows = list(tiny.measure(TINY, Setting(CPU, seconds=0.01, least=1, memory=False)))
    for entry in tiny.entries(TINY, "cpu"):
        found = {row.metric: row for row in rows if row.work == entry.work}
        assert found["time"].measured, found["time"].p50
        assert found[f"ratio to {AS_IT_IS}"].measured
        if entry.work in (*OPTIONS, *CHANGES):
            assert found["relative error"].value <= found["error limit"].value


@pytest.mark.parametrize("work", [WHOLE_LAST_BLOCK, TO_PIXELS])
def test_a_change_is_undone(work: str) -> None:
    before = Tap.rows_read_of, Tap.forward
    with CHANGES[work]():
        assert (Tap.rows_read_of, Tap.forward) != before
    assert (Tap.rows_read_of, Tap.forward) == before


def test_without_the_reduced_last_block_one_more_whole_attention_backward_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr("vitexplain.tap.attention_backward", lambda *args: calls.append(1) or attention_backward(*args))
    prepared = Ablation().prepare(TINY, Setting(CPU))
    depth = len(models.build(TINY, CPU).blocks)
    for work, expected in ((AS_IT_IS, depth - 2), (WHOLE_LAST_BLOCK, depth - 1), (TO_PIXELS, depth - 1)):
        calls.clear()
        prepared.call(next(entry for entry in Ablation().entries(TINY, "cpu") if entry.work == work))()
        assert len(calls) == expected, work


def test_a_gpu_has_lines_of_its_own() -> None:
    size = Ablation().sizes("cuda")[0]
    works = [entry.work for entry in Ablation().entries(size, "cuda")]
    assert {"+ CUDA graph", "+ compiled blocks, CUDA graph", ablation.VALUES} <= set(works)
    assert not {"+ CUDA graph", ablation.VALUES} & {entry.work for entry in Ablation().entries(size, "cpu")}
