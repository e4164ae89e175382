"""Whole data sets: a run, the stages, what is said where data or packages are absent, and the page that is made of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench import data_set_runs, scale
from bench.cases.data_sets import DataSets
from bench.data_set_runs import Run, made_photos, measure
from bench.registry import TORCH, TRITON, Setting, Size

CPU = torch.device("cpu")
CASE = DataSets()
WHOLE, STAGES = (CASE.sizes("cpu")[i] for i in (0, -1))


@pytest.fixture
def small(monkeypatch) -> None:
    """Stages of a few images."""
    for name, value in {
        "DECODED": 3,
        "REPEATS": 2,
        "HELD_CLASSES": 2,
        "HELD_A_CLASS": 3,
        "STORED": 4,
        "STORED_SHARDS": 2,
    }.items():
        monkeypatch.setattr(data_set_runs, name, value)


def test_a_run_is_measured_from_beginning_to_end(tmp_path: Path) -> None:
    pytest.importorskip("zarr", reason="needs zarr, of the extra 'dataset'")
    pytest.importorskip("psutil", reason="needs psutil, of the extra 'test'")
    made_photos(tmp_path, photos=2, rows=6)
    found = measure(Run("demo", None, "photos.csv", None, 65, 2), tmp_path)
    assert found["images"] == 6
    assert found["bare images per second"] is None, "too short a run"
    assert all(found[name] > 0 for name in ("images per second", "seconds", "bytes of maps an image"))
    assert found["memory at 90 %"] > 0
    units = {name: data_set_runs.unit_of(name) for name in found}
    assert units["images per second"] == "1/s"
    assert units["bytes of maps an image"] == "bytes"
    assert units["peak memory until 10 %"] == "MiB"
    assert (units["seconds"], units["workers"]) == ("s", "1")


def test_figures_of_a_run_become_rows(monkeypatch) -> None:
    found = [data_set_runs.Found("cifar10", "images per second", "1/s", [123.4])]
    monkeypatch.setattr(data_set_runs, "measure_apart", lambda name: found if name == "cifar10" else [])
    (row,) = CASE.measure(WHOLE, Setting(CPU))
    assert (row.kind, row.case, row.work, row.provider) == ("data set", "data_sets", "cifar10", TORCH)
    assert (row.metric, row.unit, row.p50) == ("images per second", "1/s", "123.4")


def test_stages_that_need_no_photos(small, tmp_path: Path, monkeypatch) -> None:  # noqa: ARG001
    pytest.importorskip("zarr", reason="needs zarr, of the extra 'dataset'")
    monkeypatch.setenv("VITEXPLAIN_BENCH_DATA", str(tmp_path))
    rows = list(CASE.measure(STAGES, Setting(CPU)))
    found = {(row.work, row.metric): row for row in rows}
    assert found["write", "images per second a thread"].value > 0
    assert (found["write", "bytes an image"].repeats, found["write", "bytes an image"].threads) == (2, 1)
    assert found["source", "bytes an image"].value > 0
    absent = [row for row in rows if row.provider == "decoder"]
    assert {row.p50 for row in absent} == {f"unavailable: no imagenet_sample_500.npz in {tmp_path.name}"}
    assert [(row.work, row.metric) for row in absent] == [
        ("decode photos", "images per second a core"), ("decode usual photos", "images per second a core"),
    ]  # fmt: skip


def test_decoding_is_measured_on_real_photos(small, shared) -> None:  # noqa: ARG001
    shared("data/imagenet_sample_500.npz")
    rows = list(CASE.measure(STAGES, Setting(CPU, works=("decode",))))
    assert [(row.work, row.unit) for row in rows] == [
        (work, unit) for work in ("decode photos", "decode usual photos") for unit in ("1/s", "bytes")
    ]
    assert all(row.value > 0 and row.threads == 1 for row in rows)


def test_a_run_without_data_or_packages_says_so(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("VITEXPLAIN_BENCH_DATA", str(tmp_path))
    monkeypatch.setattr(data_set_runs, "expect_packages", lambda: None)
    (row,) = CASE.measure(WHOLE, Setting(CPU))
    assert (row.metric, row.p50, row.measured) == (
        "images per second",
        f"unavailable: no cifar10_jpeg.npz in {tmp_path.name}",
        False,
    )
    monkeypatch.undo()
    monkeypatch.setattr(data_set_runs, "find_spec", lambda name: None if name == "zarr" else object())
    (row,) = CASE.measure(WHOLE, Setting(CPU))
    assert row.p50 == "unavailable: zarr is not installed"


def test_a_gpu_streams_photos_made_on_the_spot() -> None:
    sizes = CASE.sizes("cuda")
    assert [size.dtype for size in sizes] == ["bfloat16", "bfloat16"]
    (entry,) = CASE.entries(sizes[0], "cuda")
    assert (entry.work, entry.provider) == ("stream", TRITON)
    (row,) = CASE.blank_rows(Size("vit_base_patch16_224", 256, 197, dtype="bfloat16"), "nvidia-h200")
    assert (row.metric, row.unit, row.p50) == ("images per second", "1/s", "not measured")


def test_the_page_on_scale_is_what_the_results_say() -> None:
    assert scale.PAGE.read_text() == scale.page(), "run python -m bench.scale"
