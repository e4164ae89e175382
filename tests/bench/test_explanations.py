"""Whole explanations: every line is gated, and what is wrong is not timed."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import pytest
import torch

import vitexplain
from bench import measuring
from bench.cases.explanations import (
    CAM_OF_TOKENS,
    FEW_STEPS,
    FIVE_CLASSES,
    FROZEN,
    THREE,
    Explanations,
    PreparedExplanations,
    explaining,
)
from bench.providers import hooks, models, ours, peers
from bench.record import Row
from bench.registry import BASELINES, CAPTUM, DENSE, GRAD_CAM, MODEL_ITSELF, TORCH, TRITON, Check, Setting, Size, Unavailable
from vitexplain.methods import own_methods

from ..test_running import eager_compiler as eager_compiler

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
    shared = {(work, MODEL_ITSELF) for work in BASELINES} | {(method, DENSE) for method in own_methods()} | {("tokentm", FROZEN)}
    for device, provider in (("cpu", TORCH), ("cuda", TRITON)):
        own = {(work, provider) for work in (*own_methods(), THREE, FIVE_CLASSES, FEW_STEPS)}
        assert shared | own <= lines[device]
        assert (CAM_OF_TOKENS, GRAD_CAM) in lines[device]
        for work in ("input_x_gradient", FEW_STEPS):
            assert {rival for asked, rival in lines[device] if asked == work} == {provider, CAPTUM}, "no map is needed"
        assert len([work for work, provider in lines[device] if work == CAM_OF_TOKENS]) == 1, "no ratio to another map"
    ways = (TRITON, f"{TRITON}, CUDA graph", f"{TRITON}, compiled, CUDA graph", DENSE)
    assert {provider for work, provider in lines["cuda"] if work == "gmar"} == set(ways)
    assert ("tokentm", COMPILED) in lines["cpu"]


def test_relevance_is_sent_back_over_stored_maps_for_the_smaller_model_alone_on_a_cpu() -> None:
    case = Explanations()
    for device, expected in (("cpu", {"vit_small_patch16_224"}), ("cuda", {size.model for size in case.sizes("cuda")})):
        lines = {size: {(e.work, e.provider) for e in case.entries(size, device)} for size in case.sizes(device)}
        for method in hooks.STANDS_IN:
            assert {size.model for size, found in lines.items() if (method, DENSE) in found} == expected
        assert all(("gmar", DENSE) in found for found in lines.values())


def test_much_stored_is_timed_alone_on_a_gpu() -> None:
    big = Size("vit_large_patch16_224", 256, 197, dtype="bfloat16")
    for size, device, expected in ((big, "cuda", True), (big, "cpu", False), (TINY, "cuda", False)):
        alone = {e.work: e.alone for e in Explanations().entries(size, device) if e.provider in (DENSE, FROZEN)}
        assert alone["tokentm"] == alone["legrad"] == expected
        assert not alone["cdam"]


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


def test_a_compiled_line_is_gated_as_it_is_timed(eager_compiler: None) -> None:  # noqa: ARG001
    compiled = PreparedExplanations(TINY, CPU)
    entry = explaining("tokentm", COMPILED)
    torch._dynamo.utils.counters.clear()
    assert compiled.check(entry).passed
    made = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert made > 0
    compiled.call(entry)()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == made, "what is timed was there when the gate held it"


@pytest.mark.parametrize("work", ["tokentm", FIVE_CLASSES, THREE])
def test_the_gate_holds_the_call_that_is_timed_for_the_classes_that_it_chose(work: str, monkeypatch) -> None:
    fresh, real, held, calls = PreparedExplanations(TINY, CPU), vitexplain.Explainer.attribute, [], []

    def attribute(explainer: vitexplain.Explainer, images: torch.Tensor, target: object = None, **options: object) -> object:
        calls.append((explainer, images, target, options))
        return real(explainer, images, torch.tensor([[7, 8], [9, 5], [6, 4]]), **options)  # as if it had chosen these

    check = fresh.gate.check

    def seen(method: str, values: torch.Tensor, classes: torch.Tensor, **options: object) -> Check:
        held.append((len(values), classes.tolist()))
        return check(method, values, classes, **options)

    monkeypatch.setattr(vitexplain.Explainer, "attribute", attribute)
    monkeypatch.setattr(fresh.gate, "check", seen)
    assert fresh.check(explaining(work, TORCH)).passed
    assert held == [(2, [[7, 8], [9, 5]])] * (3 if work == THREE else 1)
    fresh.call(explaining(work, TORCH))()
    gated, timed = calls
    assert gated == timed, "the same explainer, all images, the same target"
    assert gated[1] is fresh.images


def test_a_rival_is_told_the_classes_that_its_reference_explains(prepared: PreparedExplanations, monkeypatch) -> None:
    told, expected = [], models.forward(prepared.model, prepared.images[:2]).argmax(-1)

    def explain(_model: object, images: torch.Tensor, _method: str, target: torch.Tensor, *, frozen: bool) -> torch.Tensor:
        told.append((len(images), target.tolist(), frozen))
        return torch.zeros(2, 17)

    monkeypatch.setattr(hooks, "explain", explain)
    for provider in (DENSE, FROZEN):
        assert not prepared.check(explaining("tokentm", provider)).passed
    assert told == [(2, expected.tolist(), False), (2, expected.tolist(), True)]


def test_gates_leave_nothing_in_memory() -> None:
    fresh = PreparedExplanations(TINY, CPU)
    fresh.gates_done()
    assert fresh.check(explaining("lrp", TORCH)).passed
    runs = weakref.ref(fresh.gate.exact_run), weakref.ref(fresh.gate.plain_run)
    fresh.gates_done()
    assert [run() for run in runs] == [None, None]


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


def test_a_provider_s_name_says_how_the_library_is_run(monkeypatch) -> None:
    asked, prepared = [], PreparedExplanations(TINY, CPU)
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
