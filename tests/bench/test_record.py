"""Rows and the files that they are kept in."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from bench import record
from bench.lines import lines_of
from bench.record import blank, devices, read_rows, results_path, spread, unavailable, unmeasured, update

from . import made_rows

COMMON = made_rows.row("operations", "add, with a comma", "ours", made_rows.LAYER, "time", "ms", 2.0, "operation")


def test_the_spread_is_made_of_percentiles() -> None:
    assert spread([float(i) for i in range(11)]) == {"p20": "2", "p50": "5", "p80": "8", "repeats": 11}
    assert spread([4.0]) == {"p20": "4", "p50": "4", "p80": "4", "repeats": 1}


def test_rows_come_back_from_a_file(tmp_path) -> None:
    failed = replace(COMMON, work="other", **unmeasured("out of memory (limit 20 GB)"))
    path = update(tmp_path / "new" / "rows.csv", [COMMON, failed])
    assert read_rows(path) == [COMMON, failed]
    assert not path.with_suffix(".partial").exists()


def test_a_line_is_replaced_with_all_its_metrics_where_it_stands(tmp_path) -> None:
    path, other = tmp_path / "rows.csv", replace(COMMON, work="other")
    memory = replace(COMMON, metric="peak memory", unit="MiB")
    update(path, [COMMON, memory, other])
    again = replace(COMMON, **spread([7.0]))
    update(path, [again])
    assert read_rows(path) == [again, other], "the old memory went with the old time, the other line stayed behind it"


@pytest.mark.parametrize("field", ["case", "work", "provider", "model", "batch", "tokens", "dtype"])
def test_a_line_that_differs_in_anything_is_kept(tmp_path, field: str) -> None:
    value = 3 if field in ("batch", "tokens") else "another"
    path = update(tmp_path / "rows.csv", [COMMON])
    update(path, [replace(COMMON, **{field: value})])
    assert len(read_rows(path)) == 2


def test_kinds_and_cases_stand_together(tmp_path) -> None:
    path = update(tmp_path / "rows.csv", [replace(COMMON, case="resolution", kind="explanation"), COMMON])
    update(path, [replace(COMMON, case="explanations", kind="explanation"), replace(COMMON, work="second")])
    assert [(row.case, row.work) for row in read_rows(path)] == [
        ("explanations", COMMON.work),
        ("resolution", COMMON.work),
        ("operations", COMMON.work),
        ("operations", "second"),
    ]


def test_rows_are_chosen_by_their_fields(tmp_path) -> None:
    path = update(tmp_path / "rows.csv", [COMMON, replace(COMMON, tokens=3), replace(COMMON, case="explanations")])
    assert [row.tokens for row in read_rows(path, case="operations", provider="ours")] == [577, 3]
    assert read_rows(path, tokens=3) == [replace(COMMON, tokens=3)]
    assert read_rows(path, case="none") == []
    assert read_rows(tmp_path / "absent.csv") == []


def test_a_text_in_the_place_of_a_figure_is_no_figure() -> None:
    failed = replace(COMMON, **unmeasured("wrong: error 1.0e-01, limit 1.0e-05"))
    assert not failed.measured
    assert math.isnan(failed.value)
    assert COMMON.measured
    assert COMMON.value == pytest.approx(2.0)
    assert (type(COMMON.batch), type(COMMON.repeats)) == (int, int)


def test_a_device_that_is_not_at_hand_says_so() -> None:
    row = blank(COMMON, "nvidia-h200")
    assert (row.p50, row.device, row.versions, row.repeats) == ("not measured", "nvidia-h200", "not measured", 0)
    assert row.line == COMMON.line


def test_devices_are_folders_with_results(results) -> None:
    assert devices() == []
    results("cpu", [COMMON])
    results("nvidia-h200", [COMMON])
    (record.RESULTS / "faithfulness").mkdir()
    assert devices() == ["cpu", "nvidia-h200"]
    assert read_rows(results_path("cpu")) == [COMMON]
    assert record.device_folder(torch.device("cpu")) == "cpu"


def test_a_figure_stays_where_now_it_could_not_be_had_and_goes_where_now_it_is_bad(tmp_path) -> None:
    path = tmp_path / "benchmark.csv"
    update(path, [COMMON])
    update(path, [replace(COMMON, **unavailable("captum is not installed"))])
    assert read_rows(path) == [COMMON]
    failed = replace(COMMON, **unmeasured("out of memory"))
    update(path, [failed])
    assert read_rows(path) == [failed]
    absent = replace(COMMON, provider="another", **unavailable("not installed"))
    update(path, [absent])
    assert read_rows(path) == [failed, absent]


def test_what_is_not_installed_stands_in_no_row_and_a_gpu_is_named_with_its_cuda(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "A GPU")
    where = record.environment(torch.device("cuda"), "a-package-that-is-not-there", "pytest")
    assert (where["device"], "a-package" in where["versions"]) == ("A GPU", False)
    assert f"pytest {pytest.__version__}" in where["versions"]
    assert where["versions"].endswith(f"CUDA {torch.version.cuda}")
    assert "CUDA" not in record.environment(torch.device("cpu"))["versions"]


def test_an_error_is_named_by_its_type_in_a_table() -> None:
    shown = {"failed: ValueError: too many: (3)": "failed: ValueError", "out of memory (limit 20 GB)": "out of memory"}
    for text, reason in shown.items():
        (line,) = lines_of([replace(COMMON, **unmeasured(text))])
        assert line.reason == reason
