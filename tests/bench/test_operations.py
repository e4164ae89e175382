"""Operations: who does which, that each is checked before it is timed, and what is counted."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch

from bench import layer_operations
from bench.cases import operations
from bench.cases.operations import DEVICE, Operations
from bench.layer import CPU_SIZES, GPU_SIZES, Layer, LayerSize
from bench.layer_operations import BACKWARD, BY_WORK, COLUMN_MEANS, FORWARD, LIBRARY, NAIVE_COLREDUCE, OPERATIONS
from bench.record import Row
from bench.registry import COLREDUCE, DENSE, TORCH, TRITON, Setting, Size

CPU = torch.device("cpu")
QUICK = Setting(CPU, seconds=0.001, least=3)
TINY = Size("2 heads of 16", 2, 33, 0)
PAIR = 2 * 2 * 2 * 33**2 * 16  # FLOPs of one product of all queries with all keys
CASE = Operations()


@pytest.fixture(autouse=True)
def unchecked() -> Iterator[None]:
    """Every test checks anew."""
    operations.check.cache_clear()
    yield
    operations.check.cache_clear()


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
    for work, products in ((FORWARD, 2), (BACKWARD, 5), (COLUMN_MEANS, 1), ("attention_backward with the row, one pass", 5)):
        assert found[work] == pytest.approx(products * PAIR / 1e9, rel=1e-3)
    rates = {row.metric: row.value for row in rows if row.work == COLUMN_MEANS and row.provider == TORCH}
    assert rates["rate"] == pytest.approx(rates["work"] / rates["time"], rel=1e-2)


def test_a_rate_over_fused_attention_is_the_ratio_of_the_rates(rows: list[Row]) -> None:
    mine = {row.metric: row.value for row in rows if row.work == COLUMN_MEANS and row.provider == DENSE}
    # half of the FLOPs of the forward
    assert mine[f"rate over {FORWARD}"] == pytest.approx(0.5 / mine[f"ratio to {FORWARD}"], rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.work)
def test_every_operation_and_every_rival_is_right(operation: layer_operations.Operation, dtype: torch.dtype) -> None:
    for provider in (TORCH, *operation.rivals):
        check = operations.check(operation.work, provider, dtype, CPU)
        assert check is not None
        assert check.passed, provider


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
    check = operations.check("head_norms, L1", TORCH, torch.float32, CPU)
    assert check is not None
    assert not check.passed


def test_a_rival_that_is_not_installed_says_so(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_colreduce", None)
    setting = Setting(CPU, 0.001, 2, works=(COLUMN_MEANS,), providers=(COLREDUCE,))
    rows = [row for row in CASE.measure(TINY, setting) if row.provider == NAIVE_COLREDUCE]
    assert [row.p50 for row in rows] == ["unavailable: flash-colreduce is not installed"] * 2


def test_on_a_gpu_tiled_torch_stands_beside_triton() -> None:
    entries = CASE.entries(Size("12 heads of 64", 64, 197, 0, "bfloat16"), "cuda")
    providers = {work: [entry.provider for entry in entries if entry.work == work] for work in BY_WORK}
    assert providers[COLUMN_MEANS] == [TRITON, TORCH, DENSE, COLREDUCE]
    assert providers["attention_backward with the row, one pass"] == [TRITON, TORCH]
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
