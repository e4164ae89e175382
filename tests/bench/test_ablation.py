"""The ablation changes what it says and nothing else."""

from __future__ import annotations

import pytest
import torch

from bench.cases import ablation
from bench.cases.ablation import AS_IT_IS, CHANGES, METHODS, OPTIONS, TO_PIXELS, WHOLE_LAST_BLOCK, Ablation
from bench.providers import models
from bench.registry import BASELINES, Setting, Size
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
        if entry.work not in BASELINES:
            assert found["relative error"].value <= found["error limit"].value


@pytest.mark.parametrize(
    ("work", "held"),
    [
        (AS_IT_IS, [("tokentm", ())]),
        (ablation.SEVERAL_CLASSES, [("tokentm", (5,))]),
        (ablation.CLASS_BY_CLASS, [("tokentm", ())] * 5),
        (ablation.SEVERAL_METHODS, [(method, ()) for method in METHODS]),
        (ablation.METHOD_BY_METHOD, [(method, ()) for method in METHODS]),
    ],
)
def test_every_method_and_class_is_gated(work: str, held: list[tuple[str, tuple[int, ...]]], monkeypatch) -> None:
    prepared = Ablation().prepare(TINY, Setting(CPU))
    check, seen = prepared.gate.check, []

    def look(method: str, values: torch.Tensor, classes: torch.Tensor) -> object:
        seen.append((method, tuple(classes.shape[1:])))
        return check(method, values, classes)

    monkeypatch.setattr(prepared.gate, "check", look)
    entry = next(entry for entry in Ablation().entries(TINY, "cpu") if entry.work == work)
    assert prepared.check(entry).passed
    assert seen == held


def test_one_wrong_class_of_several_is_refused(monkeypatch) -> None:
    prepared = Ablation().prepare(TINY, Setting(CPU))
    entry = next(entry for entry in Ablation().entries(TINY, "cpu") if entry.work == ablation.SEVERAL_CLASSES)
    real = prepared.explainer(entry)[0].attribute

    def attribute(*args: object, **options: object) -> object:
        found = real(*args, **options)
        found.maps[:, 3] *= 1.5
        return found

    monkeypatch.setattr(prepared.explainer(entry)[0], "attribute", attribute)
    assert not prepared.check(entry).passed


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
