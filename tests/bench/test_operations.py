"""Operations: who does which, that each is checked before it is timed, and what is counted."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from bench import layer_operations
from bench.cases import operations
from bench.cases.operations import DEVICE, Operations
from bench.layer import CPU_SIZES, GPU_SIZES, Layer, LayerSize
from bench.layer_operations import (
    BACKWARD,
    BACKWARD_AND_ROW,
    BY_WORK,
    COLUMN_MEANS,
    COLUMN_MEANS_ALONE,
    EITHER,
    FORWARD,
    LIBRARY,
    NAIVE_COLREDUCE,
    OPERATIONS,
    TWO_PASSES,
)
from bench.peaks import BANDWIDTH, COMPUTE, Peak
from bench.record import Row
from bench.registry import COLREDUCE, DENSE, TORCH, TRITON, Entry, Setting, Size, Unavailable

CPU = torch.device("cpu")
QUICK = Setting(CPU, seconds=0.001, least=3)
TINY = Size("2 heads of 16", 2, 33, 0)
PAIR = 2 * 2 * 2 * 33**2 * 16  # FLOPs of one product of all queries with all keys
CASE = Operations()


@pytest.fixture(autouse=True)
def unchecked() -> Iterator[None]:
    """Every test checks anew."""
    operations.check_at.cache_clear()
    yield
    operations.check_at.cache_clear()


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    """Everything that is measured at a tiny size."""
    return list(CASE.measure(TINY, QUICK))


def test_every_line_has_time_work_and_one_fraction_of_a_peak(rows: list[Row]) -> None:
    pytest.importorskip("flash_colreduce", reason="the nearest prior art, which not every platform can install")
    wanted = {(entry.work, entry.provider) for entry in CASE.entries(TINY, "cpu")}
    assert {(row.work, row.provider) for row in rows} == wanted
    assert all(row.measured for row in rows)
    for work, provider in wanted:
        found = {row.metric: row.value for row in rows if (row.work, row.provider) == (work, provider)}
        assert found["time"] > 0
        assert sum(metric.startswith("fraction of peak") for metric in found) == 1
        assert {f"ratio to {FORWARD}", f"ratio to {BACKWARD}"} <= set(found)
        if provider != LIBRARY:
            assert found["relative error"] <= found["error limit"], work
            against = BY_WORK[work].against
            assert [metric for metric in found if metric.startswith("rate over")] == ([f"rate over {against}"] if against else [])


def test_work_is_counted_as_products_of_queries_with_keys(rows: list[Row]) -> None:
    found = {row.work: row.value for row in rows if row.metric == "work" and row.provider in (LIBRARY, TORCH)}
    for work, products in ((FORWARD, 2), (BACKWARD, 5), (COLUMN_MEANS, 1), (BACKWARD_AND_ROW, 5)):
        assert found[work] == pytest.approx(products * PAIR / 1e9, rel=1e-3)
    rates = {row.metric: row.value for row in rows if row.work == COLUMN_MEANS and row.provider == TORCH}
    assert rates["rate"] == pytest.approx(rates["work"] / rates["time"], rel=1e-2)


def test_a_rate_over_fused_attention_is_the_ratio_of_the_rates(rows: list[Row]) -> None:
    mine = {row.metric: row.value for row in rows if row.work == COLUMN_MEANS and row.provider == DENSE}
    # half of the FLOPs of the forward
    assert mine[f"rate over {FORWARD}"] == pytest.approx(0.5 / mine[f"ratio to {FORWARD}"], rel=0.02)


def test_two_ways_of_one_work_are_counted_alike(rows: list[Row]) -> None:
    mine = [row for row in rows if row.work == BACKWARD_AND_ROW]
    assert {row.provider for row in mine} == {TORCH, f"{TORCH}, {TWO_PASSES}"}
    for metric in ("work", "moved"):
        assert len({row.p50 for row in mine if row.metric == metric}) == 1


def test_a_projection_reads_tokens_values_and_its_weight_once() -> None:
    layer = Layer(LayerSize(2, 3, 10, 4), torch.bfloat16, CPU)
    (operation,) = (operation for operation in OPERATIONS if operation.bound == EITHER)
    assert operation.moved_bytes(layer) == 2 * (2 * 10 * 12) * 2 + 12 * 12 * 2 + 2 * 3 * 10 * 4


@pytest.mark.parametrize(("ridge", "bound"), [(1.0, COMPUTE), (1e6, BANDWIDTH)])
def test_intensity_decides_which_roof_a_projection_is_held_against(monkeypatch, ridge: float, bound: str) -> None:
    roof = {COMPUTE: Peak(ridge, ()), BANDWIDTH: Peak(1.0, ())}
    monkeypatch.setattr(operations, "peaks", lambda *_: roof)
    (work,) = (operation.work for operation in OPERATIONS if operation.bound == EITHER)
    counted = CASE.prepare(TINY, QUICK).counted(Entry(work, TORCH))
    assert counted is not None
    assert counted.bound == bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.work)
def test_every_operation_and_every_rival_is_right(operation: layer_operations.Operation, dtype: torch.dtype) -> None:
    layer = Layer(LayerSize(1, 2, 197, 80), dtype, CPU)
    for provider in (TORCH, *operation.rivals, *operation.on_cpu):
        if provider == NAIVE_COLREDUCE:
            pytest.importorskip("flash_colreduce", reason="the nearest prior art, which not every platform can install")
        check = operations.check(operation.work, provider, layer)
        assert check is not None
        assert check.passed, (provider, check)
        assert check.limit < 0.1


def test_the_gate_looks_at_the_layers_width_and_length(monkeypatch) -> None:
    looked: list[tuple[int, ...]] = []

    def check_at(work: str, provider: str, size: LayerSize, *_: object) -> operations.Check:  # noqa: ARG001
        looked.append((size.batch, size.heads, size.tokens, size.head_dim))
        return operations.Check(size.tokens / 1e4, 1.0)

    monkeypatch.setattr(operations, "check_at", check_at)
    monkeypatch.setattr(operations, "MOST_GATED_TOKENS", 150)
    for tokens, worst in ((140, 0.014), (160, 0.013)):
        found = operations.check(COLUMN_MEANS, TORCH, Layer(LayerSize(1, 3, tokens, 24), torch.float32, CPU))
        assert found is not None
        assert found.error == worst
    assert looked == [(2, 2, 130, 24), (1, 2, 140, 24), (2, 2, 130, 24)]


@pytest.mark.parametrize(("dtype", "worse"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_a_result_further_off_than_rounding_is_wrong(monkeypatch, dtype: torch.dtype, worse: float) -> None:
    right = layer_operations.kernels.row_propagation
    monkeypatch.setattr(layer_operations.kernels, "row_propagation", lambda *a, **k: (1 + worse) * right(*a, **k))
    check = operations.check(COLUMN_MEANS, TORCH, Layer(LayerSize(1, 2, 130, 16), dtype, CPU))
    assert check.error == pytest.approx(worse, rel=0.3)
    assert not check.passed


def test_a_wrong_operation_is_not_timed(monkeypatch) -> None:
    right = layer_operations.kernels.contribution_map
    monkeypatch.setattr(layer_operations.kernels, "contribution_map", lambda *a, **k: 1.1 * right(*a, **k))
    rows = list(CASE.measure(TINY, Setting(CPU, 0.001, 2, works=("contribution_map",))))
    (time,) = (row for row in rows if row.metric == "time" and row.provider == TORCH and row.work.startswith("contribution"))
    assert time.p50.startswith("wrong: error ")
    assert any(row.measured for row in rows if row.metric == "time" and row.provider == DENSE)


def test_a_result_that_is_not_a_number_is_wrong(monkeypatch) -> None:
    right = layer_operations.kernels.head_norms
    monkeypatch.setattr(layer_operations.kernels, "head_norms", lambda *a, **k: float("nan") * right(*a, **k))
    check = operations.check("head_norms, L1", TORCH, Layer(LayerSize(1, 2, 33, 16), torch.float32, CPU))
    assert check is not None
    assert not check.passed


def test_a_rival_that_is_not_installed_says_so(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_colreduce", None)
    setting = Setting(CPU, 0.001, 2, works=(COLUMN_MEANS_ALONE,), providers=(COLREDUCE,))
    rows = [row for row in CASE.measure(TINY, setting) if row.provider == NAIVE_COLREDUCE]
    assert [row.p50 for row in rows] == ["unavailable: flash-colreduce is not installed"]


def test_in_float32_on_a_gpu_the_rival_that_takes_tf32_is_not_compared(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_colreduce", SimpleNamespace(flash_colreduce=lambda query, *_, **__: query))
    call = BY_WORK[COLUMN_MEANS_ALONE].on_gpu[COLREDUCE]
    on_gpu = SimpleNamespace(device=torch.device("cuda"), query=torch.ones(1, 2, 3), key=None, scale=1.0)
    with pytest.raises(Unavailable, match="flash-colreduce multiplies float32 in TF32"):
        call(SimpleNamespace(dtype=torch.float32, **vars(on_gpu)))
    assert call(SimpleNamespace(dtype=torch.bfloat16, **vars(on_gpu))) is not None


def test_on_a_gpu_tiled_torch_stands_beside_triton() -> None:
    entries = CASE.entries(Size("12 heads of 64", 64, 197, 0, "bfloat16"), "cuda")
    providers = {work: [entry.provider for entry in entries if entry.work == work] for work in BY_WORK}
    assert providers[COLUMN_MEANS] == [TRITON, TORCH, DENSE], "flash-colreduce makes its own logsumexp"
    assert providers[COLUMN_MEANS_ALONE] == [TRITON, DENSE, COLREDUCE]
    assert providers[BACKWARD_AND_ROW] == [TRITON, TORCH, f"{TRITON}, {TWO_PASSES}"]
    assert TORCH not in providers["relevance_rows"]
    longest = CASE.entries(Size("16 heads of 64", 1, 16385, 0, "bfloat16"), "cuda")
    assert not any(entry.work.startswith("contribution_map") for entry in longest)


def test_peaks_are_rows_of_their_own() -> None:
    size = next(size for size in CASE.sizes("cpu") if size.model == DEVICE)
    rows = list(CASE.measure(size, QUICK))
    assert [(row.work, row.provider, row.metric, row.unit) for row in rows] == [
        ("peak", "large product", "rate", "TFLOP/s"), ("peak", "large copy", "rate", "TB/s"),
    ]  # fmt: skip
    blank = list(CASE.blank_rows(size, "nvidia-h200"))
    assert [(row.metric, row.unit, row.p50) for row in blank] == [(row.metric, row.unit, "not measured") for row in rows]


def test_sizes_come_back_from_the_columns() -> None:
    for size in (*CPU_SIZES, *GPU_SIZES):
        assert LayerSize.of(size.form, size.batch, size.tokens) == size
    assert CASE.sizes("cuda")[0].dtype == "bfloat16"


def test_a_layer_cast_keeps_its_inputs() -> None:
    layer = Layer(LayerSize(1, 2, 5, 8), torch.bfloat16, CPU)
    wide = layer.cast(torch.float64)
    assert layer.query.dtype == torch.bfloat16
    assert (wide.dtype, wide.query.dtype, wide.row.dtype) == (torch.float64,) * 3
    assert torch.equal(wide.query, layer.query.double())
    assert torch.equal(wide.contribution, layer.contribution)
