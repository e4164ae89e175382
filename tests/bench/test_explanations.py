"""Whole explanations: every line is gated, and what is wrong is not timed."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch

from bench import measuring
from bench.cases.explanations import (
    CAM_OF_TOKENS,
    FEW_STEPS,
    FIVE_CLASSES,
    THREE,
    Explanations,
    PreparedExplanations,
    explaining,
)
from bench.providers import hooks, ours, peers
from bench.record import Row
from bench.registry import BASELINES, CAPTUM, DENSE, GRAD_CAM, MODEL_ITSELF, TORCH, TRITON, Setting, Size, Unavailable
from vitexplain.methods import own_methods

CPU = torch.device("cpu")
TINY = Size("vit_tiny_patch16_224", 3, 17, 64)
QUICK = Setting(CPU, seconds=1e-9, least=2, memory=False)
COMPILED = f"{TORCH}, compiled"


@pytest.fixture(scope="module")
def prepared() -> PreparedExplanations:
    return PreparedExplanations(TINY, CPU)


def _found(rows: Iterable[Row]) -> dict[tuple[str, str, str], Row]:
    return {(row.work, row.provider, row.metric): row for row in rows}


def _needs(provider: str) -> None:
    if provider in (CAPTUM, GRAD_CAM):
        pytest.importorskip({CAPTUM: "captum", GRAD_CAM: "pytorch_grad_cam"}[provider])


def test_sizes_are_those_of_the_models() -> None:
    case = Explanations()
    for device in ("cpu", "cuda"):
        sizes = case.sizes(device)
        assert len(set(sizes)) == len(sizes) == 4
        assert {(size.tokens, size.image_size) for size in sizes} == {(197, 224)}


def test_every_method_stands_beside_its_reference_on_both_kinds_of_device() -> None:
    lines = {device: {(e.work, e.provider) for e in Explanations().entries(TINY, device)} for device in ("cpu", "cuda")}
    shared = {(work, MODEL_ITSELF) for work in BASELINES} | {(method, DENSE) for method in own_methods()}
    for device, provider in (("cpu", TORCH), ("cuda", TRITON)):
        own = {(work, provider) for work in (*own_methods(), THREE, FIVE_CLASSES, FEW_STEPS)}
        assert shared | own <= lines[device]
        assert (CAM_OF_TOKENS, GRAD_CAM) in lines[device]
        assert len([work for work, provider in lines[device] if work == CAM_OF_TOKENS]) == 1, "no ratio to another map"
    ways = (TRITON, f"{TRITON}, CUDA graph", f"{TRITON}, compiled, CUDA graph", DENSE)
    assert {provider for work, provider in lines["cuda"] if work == "gmar"} == set(ways)
    assert ("tokentm", COMPILED) in lines["cpu"]


def test_what_sends_relevance_back_is_timed_alone() -> None:
    alone = {(entry.work, entry.provider) for entry in Explanations().entries(TINY, "cpu") if entry.alone}
    works = ("transformer_attribution", "lrp", "partial_lrp", "conservative_lrp")
    ours = {provider for _, provider in alone if provider.startswith(TORCH)}
    assert {(work, provider) for work, provider in alone if provider in (TORCH, DENSE)} == {
        (work, provider) for work in works for provider in (TORCH, DENSE)
    }
    assert ours == {TORCH, f"{TORCH}, relevance in float32"}


@pytest.mark.parametrize(
    "entry", [e for e in Explanations().entries(TINY, "cpu") if e.provider != COMPILED], ids=lambda e: f"{e.work}-{e.provider}"
)
def test_every_line_passes_its_gate(prepared: PreparedExplanations, entry) -> None:
    _needs(entry.provider)
    check = prepared.check(entry)
    assert (check is None) == (entry.baseline or entry.work == CAM_OF_TOKENS)
    assert check is None or check.passed


@pytest.mark.parametrize("provider", [TORCH, DENSE])
def test_half_precision_is_held_to_its_own_budget(provider: str) -> None:
    half = PreparedExplanations(Size(TINY.model, 2, 17, 64, "bfloat16"), CPU)
    check = half.check(explaining("tokentm", provider))
    assert check.passed
    assert check.limit > 1e-3


def test_rows_hold_times_ratios_and_the_fraction_of_what_cannot_be_avoided() -> None:
    found = _found(Explanations().measure(TINY, Setting(CPU, 1e-9, 2, ("gmar", "conservative"), (TORCH, DENSE), memory=False)))
    timed = {(work, provider) for work, provider, metric in found if metric == "time" and found[work, provider, metric].measured}
    assert {(work, MODEL_ITSELF) for work in BASELINES} | {("gmar", TORCH), ("gmar", DENSE), ("conservative_lrp", DENSE)} <= timed
    for base in BASELINES:
        assert found["gmar", DENSE, f"ratio to {base}"].value > 0
        assert found["conservative_lrp", TORCH, f"ratio to {base}"].value > 0
        assert found[base, MODEL_ITSELF, f"ratio to {base}"].value == 1
    assert found["gmar", TORCH, "work"].value == pytest.approx(2 * found["forward", MODEL_ITSELF, "work"].value, rel=1e-3)
    assert 0 < found["gmar", TORCH, "fraction of peak compute"].value < 1
    assert ("gmar", DENSE, "work") not in found


def test_a_wrong_rival_is_refused_and_not_timed(monkeypatch) -> None:
    calls = []

    def wrong(stored: hooks.StoredMaps) -> torch.Tensor:
        calls.append(len(stored.maps[0]))
        return hooks.gmar(stored).flip(-1)

    monkeypatch.setitem(hooks.METHODS, "gmar", wrong)
    found = _found(Explanations().measure(TINY, Setting(CPU, 1e-9, 2, ("gmar",), memory=False)))
    assert found["gmar", DENSE, "time"].p50.startswith("wrong: error ")
    assert found["gmar", DENSE, "relative error"].value > found["gmar", DENSE, "error limit"].value
    assert ("gmar", DENSE, "pace") not in found
    assert found["gmar", TORCH, "time"].measured
    assert calls == [2], "by the gate alone"


def test_peak_memory_has_its_line(monkeypatch) -> None:
    monkeypatch.setattr(measuring, "host_call", lambda *_: {"mib": 12.0, "ms": [1.0]})
    setting = Setting(CPU, 1e-9, 2, ("rollout", "attcat"))
    found = _found(Explanations().measure(TINY, setting))
    assert {(w, p) for w, p, metric in found if metric == "peak memory"} == {
        *((work, MODEL_ITSELF) for work in BASELINES),
        *(("rollout", provider) for provider in (TORCH, DENSE)),
    }


def test_a_map_that_is_not_finite_is_refused(prepared: PreparedExplanations, monkeypatch) -> None:
    monkeypatch.setattr(peers, "grad_cam", lambda _, images: torch.full((len(images), 64, 64), torch.nan))
    with pytest.raises(Unavailable, match="not finite"):
        prepared.check(explaining(CAM_OF_TOKENS, GRAD_CAM))


def test_a_provider_s_name_says_how_the_library_is_run(prepared: PreparedExplanations, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr("vitexplain.Explainer", lambda _, method, **options: asked.append((method, options)))
    for provider in (TRITON, ours.switched(TRITON, ours.COMPILED, ours.CUDA_GRAPH), ours.switched(TORCH, ours.CHECKPOINTED)):
        prepared.call(explaining("tokentm", provider))
    prepared.call(explaining(THREE, TORCH))
    prepared.call(explaining(FEW_STEPS, TORCH))
    assert asked == [
        ("tokentm", {}),
        ("tokentm", {"compile": True, "cuda_graph": True}),
        ("tokentm", {"checkpoint": True}),
        (("tokentm", "gmar", "iba"), {}),
        ("integrated_gradients", {"steps": 4}),
    ]


def test_what_the_library_refuses_is_told(prepared: PreparedExplanations) -> None:
    with pytest.raises(Unavailable, match="unknown method"):
        prepared.call(explaining("no such method", TORCH))
