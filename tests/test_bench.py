"""The benchmark's bookkeeping, and that the README says what the committed results say."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bench import faithfulness, operations, tune
from bench.cost import gate, interleaved
from bench.readme import README, rendered
from bench.record import Row, environment, read_rows, spread, write_rows
from bench.timing import interleaved_ms, samples_ms
from vitexplain.evaluate.protocols import build_protocols
from vitexplain.evaluate.results import Results
from vitexplain.kernels import interpreting
from vitexplain.kernels.attention_backward import choose
from vitexplain.methods import Rollout, method_from_text, own_methods
from vitexplain.relevance import Update

from .conftest import build_model, images_for


def test_rows_come_back_from_a_file(tmp_path) -> None:
    common = {"case": "cost", "provider": "ours", "model": "vit, small", "batch": 8, "tokens": 197, "dtype": "float32"}
    row = Row(metric="time", unit="ms", **common, **spread([1.0, 2.0, 3.0]), **environment(torch.device("cpu")))
    failed = Row(
        metric="time", unit="ms", **common, p20="", p50="not measured", p80="", repeats=0, **environment(torch.device("cpu"))
    )
    assert read_rows(write_rows(tmp_path / "new" / "rows.csv", [row, failed])) == [row, failed]


def test_the_spread_is_made_of_percentiles() -> None:
    assert spread([float(i) for i in range(11)]) == {"p20": "2", "p50": "5", "p80": "8", "repeats": 11}
    assert spread([4.0]) == {"p20": "4", "p50": "4", "p80": "4", "repeats": 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gate_stops_a_wrong_method(monkeypatch, dtype: torch.dtype) -> None:
    model = build_model().to(dtype)
    images = images_for(model, 2).to(dtype)
    assert set(gate(model, images, ["rollout", "gmar"])) == {"rollout", "gmar"}
    monkeypatch.setattr(Rollout, "update", lambda *_: Update(factor=0.75, residual=0.5))
    with pytest.raises(SystemExit, match=r"rollout: relative error .* exceeds .*: not timed"):
        gate(model, images, ["gmar", "rollout"])


def test_cases_are_timed_in_turns_after_a_warm_up() -> None:
    calls: list[str] = []
    samples = interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3, torch.device("cpu"))
    assert calls == ["a", "b"] * 5
    assert {name: len(values) for name, values in samples.items()} == {"a": 3, "b": 3}


def test_the_readme_is_what_the_results_say() -> None:
    assert README.read_text() == rendered(README.read_text()), "run python -m bench.readme"


def test_a_call_is_timed_after_a_warm_up() -> None:
    calls: list[int] = []
    samples = samples_ms(lambda: calls.append(1), torch.device("cpu"), seconds=1e-9, least=4)
    assert (len(samples), len(calls)) == (4, 5)
    assert min(samples) >= 0


def test_calls_that_are_compared_are_timed_in_turns() -> None:
    order: list[str] = []
    samples = interleaved_ms([lambda: order.append("a"), lambda: order.append("b")], torch.device("cpu"), seconds=1e-9)
    assert order[6:] == ["a", "b"] * 5, "after three calls of each"
    assert [len(taken) for taken in samples] == [5, 5]


TINY = operations.Size(2, 2, 33, 16)


def test_every_operation_has_its_line_with_work_and_fraction() -> None:
    rows = operations.measured_rows((TINY,), torch.float32, torch.device("cpu"), seconds=0.001)
    names = {case.name for case in operations.cases(operations.Layer(TINY, torch.float32, torch.device("cpu")))}
    assert {row.provider for row in rows if row.case == "operation"} == names
    assert len(names) >= 15
    rival = {name for name in names if name.startswith("flash-colreduce")}
    assert {row.p50 for row in rows if row.provider in rival} == {"not measured"}, "it needs a GPU"
    for name in names - rival:
        found = {row.metric: float(row.p50) for row in rows if row.provider == name}
        assert found["time"] > 0
        assert sum(metric.startswith("fraction of peak") for metric in found) == 1
        if found["work"]:
            assert found["rate"] == pytest.approx(found["work"] / found["time"], rel=1e-2)
    pair = 2 * 2 * 2 * 33**2 * 16
    by_name = {row.provider: float(row.p50) for row in rows if row.metric == "work"}
    assert by_name[operations.FORWARD] == pytest.approx(2 * pair / 1e9, rel=1e-3)
    assert by_name["attention_backward with the row, one pass"] == pytest.approx(5 * pair / 1e9, rel=1e-3)


def test_lines_that_were_not_measured_say_so() -> None:
    rows = operations.unmeasured_rows((TINY,), torch.bfloat16, "nvidia-h200")
    measured = operations.measured_rows((TINY,), torch.float32, torch.device("cpu"), seconds=0.001)
    assert {row.p50 for row in rows} == {"not measured"}
    assert {row.provider for row in rows} == {row.provider for row in measured}


def test_a_wrong_operation_is_not_timed(monkeypatch) -> None:
    operations.gate(torch.float32, torch.device("cpu"))
    operations.gate(torch.bfloat16, torch.device("cpu"))
    right = operations.kernels.contribution_map
    monkeypatch.setattr(operations.kernels, "contribution_map", lambda *a, **k: 1.1 * right(*a, **k))
    with pytest.raises(SystemExit, match=r"contribution_map: relative error .* exceeds .*: nothing is timed"):
        operations.gate(torch.float32, torch.device("cpu"))


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


@pytest.mark.parametrize("name", faithfulness.CASES)
def test_every_faithfulness_case_asks_for_what_there_is_and_has_results(name: str) -> None:
    case = faithfulness.CASES[name]
    protocols = build_protocols(case.protocols)
    methods = {text: method_from_text(text) for text in case.methods or own_methods()}
    results = Results.read(faithfulness.FAITHFULNESS / name / "results.json")
    assert list(results.settings["protocols"]) == list(protocols)
    assert {label for label, entry in results.methods.items() if entry.kind == "method"} <= set(methods)
    assert results.environment["device"]
    assert all(figure.low <= figure.mean <= figure.high for figure in results.figures)
    assert (faithfulness.FAITHFULNESS / name / "results.md").exists()


@pytest.mark.parametrize("name", ["perturbation", "localisation", "cifar10"])
def test_controls_lose_in_the_committed_tables(name: str) -> None:
    results = Results.read(faithfulness.FAITHFULNESS / name / "results.json")
    for column in results.columns:
        assert not {"random", "negated tokentm"} & set(column.contenders), column.title


def test_a_faithfulness_case_runs_from_any_folder_of_data(shared, tmp_path, monkeypatch) -> None:
    folder = shared("data/cifar10_exact_test1017.npz").parent
    monkeypatch.setattr(faithfulness, "WORK", tmp_path / "work")
    monkeypatch.setattr(faithfulness, "FAITHFULNESS", tmp_path / "results")
    small = dataclasses.replace(faithfulness.CASES["cifar10"], methods=("rollout",), images=":3", settings={})
    monkeypatch.setitem(faithfulness.CASES, "cifar10", small)
    faithfulness.run("cifar10", folder, "cpu")
    assert Results.read(tmp_path / "results" / "cifar10" / "results.json").timing["images"] == 3
    assert (tmp_path / "work" / "cifar10" / "report.html").exists()
