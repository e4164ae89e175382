"""The benchmark's bookkeeping, and that the README says what the committed results say."""

from __future__ import annotations

import pytest
import torch

from bench.cost import gate, interleaved
from bench.readme import README, rendered
from bench.record import Row, environment, read_rows, spread, write_rows

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
    monkeypatch.setattr("vitexplain.methods.rollout.propagate", lambda rows, _block: 1.5 * rows.values)
    with pytest.raises(SystemExit, match=r"rollout: relative error .* exceeds .*: not timed"):
        gate(model, images, ["gmar", "rollout"])


def test_cases_are_timed_in_turns_after_a_warm_up() -> None:
    calls: list[str] = []
    samples = interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3, torch.device("cpu"))
    assert calls == ["a", "b"] * 5
    assert {name: len(values) for name, values in samples.items()} == {"a": 3, "b": 3}


def test_the_readme_is_what_the_results_say() -> None:
    assert README.read_text() == rendered(README.read_text()), "run python -m bench.readme"
