"""A data set on a GPU: what the CPU finds, from a graph and without, the same bits each time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitexplain import dataset
from vitexplain.dataset.auto_batch import best_batch
from vitexplain.dataset.compute import BatchExplainer
from vitexplain.dataset.settings import Plan
from vitexplain.loading import load_model
from vitexplain.methods import build_methods
from vitexplain.sources import open_source
from vitexplain.testing import relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
METHODS = ["tokentm", "gmar", "iba", "transformer_mm", "conservative_lrp"]
COUNT, UNREADABLE = 37, 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        path = folder / ("cat", "dog")[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((40, 30)).save(path)
        if i == UNREADABLE:
            path.write_bytes(b"")
    return folder


def maps_of(folder: Path, device: str, **settings) -> tuple[dict[str, torch.Tensor], list[str]]:
    model = load_model("demo", device=device)
    source = open_source(folder, classes=model)
    batches = list(dataset.stream(model, source, METHODS, **{"batch": 8, "workers": 2, **settings}))
    assert all(values.device.type == device for batch in batches for values in batch.maps.values())
    maps = {method: torch.cat([batch.maps[method] for batch in batches]).cpu() for method in METHODS}
    return maps, [status for batch in batches for status in batch.status]


@pytest.mark.parametrize("target", ["pred", "label", "top2"])
@pytest.mark.parametrize("graph", [True, False])
def test_maps_are_those_of_the_cpu(folder, target: str, graph: bool) -> None:
    expected, statuses = maps_of(folder, "cpu", target=target)
    found, again = maps_of(folder, "cuda", target=target, graph=graph)
    assert statuses == again
    assert statuses.count("unreadable") == 1
    for method in METHODS:
        readable = [i for i, status in enumerate(statuses) if status == "ok"]
        assert relative_error(found[method][readable], expected[method][readable]) <= 1e-2, method


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_runs_give_the_same_bits(folder, dtype: str) -> None:
    first, _ = maps_of(folder, "cuda", dtype=dtype)
    second, _ = maps_of(folder, "cuda", dtype=dtype)
    for method in METHODS:
        assert torch.equal(first[method].nan_to_num(), second[method].nan_to_num()), method


def test_a_graph_is_replayed_and_results_do_not_run_into_each_other() -> None:
    model = load_model("demo", device="cuda")
    options = {"target": "pred", "dtype": torch.float32, "backend": "auto", "batch": 4}
    graphed, eager = (BatchExplainer(model, build_methods("tokentm", {}), graph=graph, **options) for graph in (True, False))
    batches = [torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8).pin_memory() for _ in range(5)]
    pending = [graphed.submit(photos, None, 4) for photos in batches]  # all on their way before the first is looked at
    assert graphed.graphed
    for photos, waiting in zip(batches, pending, strict=True):
        waiting.wait_for_input()
        found, expected = waiting.result(), eager.submit(photos, None, 4).result()
        assert torch.equal(found.prediction, expected.prediction)
        unpacked = [result.maps["tokentm"].float() * result.scales["tokentm"][:, None, None] for result in (found, expected)]
        assert relative_error(*unpacked) <= 2e-3
    graphed.settle()
    assert graphed.busy > 0
    assert graphed.idle >= 0


def test_a_method_that_cannot_be_captured_is_explained_without_a_graph(folder) -> None:
    pytest.importorskip("captum", reason="its methods are captum's own")
    model = load_model("demo", device="cuda")
    batches = dataset.stream(model, open_source(folder), "input_x_gradient", batch=8, workers=0)
    assert sum(len(batch.ids) for batch in batches) == COUNT


def test_a_batch_is_found_by_measurement(folder) -> None:
    model = load_model("demo", device="cuda")
    assert best_batch(Plan(model, open_source(folder), build_methods("iba", {}))) >= 1


def test_a_whole_run_on_a_gpu_is_the_same_twice(folder, tmp_path) -> None:
    pytest.importorskip("zarr", reason="the store needs it")
    pytest.importorskip("pyarrow", reason="the index needs it")
    model = load_model("demo", device="cuda")
    for name in ("a", "b"):
        report = dataset.run(model, folder, METHODS, tmp_path / name / "maps.zarr", batch=8, shard=16, workers=2)
        assert report.graphed
        assert report.ok == COUNT - 1
    first, second = (
        {
            path.relative_to(tmp_path / name): path.read_bytes()
            for path in (tmp_path / name).rglob("*")
            if path.name[0] not in "_" and path.is_file()
        }
        for name in ("a", "b")
    )
    assert first == second
