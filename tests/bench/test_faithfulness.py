"""The faithfulness studies: what they ask for, and what was found."""

from __future__ import annotations

import dataclasses

import pytest

from bench import faithfulness
from vitexplain.evaluate.protocols import build_protocols
from vitexplain.evaluate.results import Results
from vitexplain.methods import method_from_text, own_methods


@pytest.mark.parametrize("name", faithfulness.STUDIES)
def test_every_faithfulness_study_asks_for_what_there_is_and_has_results(name: str) -> None:
    study = faithfulness.STUDIES[name]
    protocols = build_protocols(study.protocols)
    methods = {text: method_from_text(text) for text in study.methods or own_methods()}
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


def test_a_faithfulness_study_runs_from_any_folder_of_data(shared, tmp_path, monkeypatch) -> None:
    folder = shared("data/cifar10_exact_test1017.npz").parent
    monkeypatch.setattr(faithfulness, "WORK", tmp_path / "work")
    monkeypatch.setattr(faithfulness, "FAITHFULNESS", tmp_path / "results")
    small = dataclasses.replace(faithfulness.STUDIES["cifar10"], methods=("rollout",), images=":3", settings={})
    monkeypatch.setitem(faithfulness.STUDIES, "cifar10", small)
    faithfulness.run("cifar10", folder, "cpu")
    assert Results.read(tmp_path / "results" / "cifar10" / "results.json").timing["images"] == 3
    assert (tmp_path / "work" / "cifar10" / "report.html").exists()
