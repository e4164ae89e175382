"""Evaluations: the curve by both ways, the gate between them, the pace of a whole one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from bench.cases import evaluations
from bench.cases.evaluations import ONE_BY_ONE, STEP_BY_STEP, WHOLE, Evaluations, _Curves
from bench.data_set_runs import made_photos
from bench.registry import TORCH, Setting, Size
from vitexplain.loading import LoadedModel
from vitexplain.sources import Source

from ..conftest import build_model

CPU = torch.device("cpu")
QUICK = Setting(CPU, seconds=0.001, least=2, memory=False)
CASE = Evaluations()
TINY = Size("tiny", 2, 17, 32)


@pytest.fixture
def tiny(monkeypatch, tmp_path: Path) -> None:
    """A tiny model, and photos made on the spot."""
    config = {"input_size": (3, 32, 32), "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "center"}
    config |= {"mean": (0.5,) * 3, "std": (0.5,) * 3}

    @contextmanager
    def photos_of(size: Size, device: torch.device) -> Iterator[tuple[LoadedModel, Source]]:  # noqa: ARG001
        count = evaluations.WHOLE_TIMES * size.batch
        yield LoadedModel("tiny", build_model(), config, None), made_photos(tmp_path, count, count)

    monkeypatch.setattr(evaluations, "photos_of", photos_of)


def test_a_curve_is_measured_by_every_way(tiny) -> None:  # noqa: ARG001
    rows = list(CASE.measure(TINY, QUICK))
    work = "perturbation curve of one map, 2 photos"
    assert {(row.kind, row.case, row.work) for row in rows} == {("evaluation", "evaluations", work)}
    assert {row.provider for row in rows if row.metric == "time" and row.measured} == {TORCH, STEP_BY_STEP, ONE_BY_ONE}
    errors = [row.value for row in rows if row.metric == "relative error"]
    assert len(errors) == 3
    assert max(errors) <= 1e-5


def test_curves_fall_from_the_whole_photo_to_none(tiny) -> None:  # noqa: ARG001
    prepared = CASE.prepare(TINY, QUICK)
    assert isinstance(prepared, _Curves)
    curves = prepared.together()
    assert curves.shape == (2, 21)
    clean = prepared.batch.clean.amax(-1).exp()
    assert torch.allclose(curves[:, 0], clean)
    assert torch.allclose(curves[0, -1], prepared.one_by_one()[0, -1], atol=1e-5)


@pytest.mark.parametrize(
    ("way", "wrong"),
    [
        ("one_by_one", {TORCH, STEP_BY_STEP, ONE_BY_ONE}),  # what the others are held against
        ("together", {TORCH, ONE_BY_ONE}),
        ("step_by_step", {STEP_BY_STEP}),
    ],
)
def test_curves_that_differ_are_not_timed(tiny, monkeypatch, way: str, wrong: set[str]) -> None:  # noqa: ARG001
    right = getattr(_Curves, way)
    monkeypatch.setattr(_Curves, way, lambda self: right(self) + 0.01)
    rows = [row for row in CASE.measure(TINY, QUICK) if row.metric == "time"]
    assert {row.provider for row in rows if row.p50.startswith("wrong: error ")} == wrong
    assert {row.provider for row in rows if row.measured} == {TORCH, STEP_BY_STEP, ONE_BY_ONE} - wrong


def test_a_whole_evaluation_has_its_pace(tiny, monkeypatch) -> None:  # noqa: ARG001
    monkeypatch.setattr(evaluations, "own_methods", lambda: ["rollout"])
    rows = list(CASE.measure(Size("tiny", 2, 17, 32, "bfloat16"), QUICK))
    assert [(row.work, row.provider, row.metric, row.unit) for row in rows] == [
        (WHOLE, TORCH, metric, "1/s") for metric in ("images per second", "changed images per second")
    ]
    assert all(row.value > 0 for row in rows)


def test_without_data_every_line_says_so(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("VITEXPLAIN_BENCH_DATA", str(tmp_path))
    rows = [row for size in CASE.sizes("cpu") for row in CASE.measure(size, QUICK)]
    assert [(row.provider, row.metric) for row in rows] == [
        *((provider, "time") for provider in (TORCH, STEP_BY_STEP, ONE_BY_ONE)), (TORCH, "images per second"),
    ]  # fmt: skip
    assert {row.p50 for row in rows} == {f"unavailable: no imagenet_sample_500.npz in {tmp_path.name}"}
