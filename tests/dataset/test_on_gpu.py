"""A data set on a GPU: what the CPU finds, from a graph and without, the same bits each time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import timm.data
import torch
from PIL import Image
from torch import nn

from vitexplain import dataset
from vitexplain.dataset.auto_batch import best_batch
from vitexplain.dataset.compute import BatchExplainer
from vitexplain.dataset.settings import Plan
from vitexplain.loading import LoadedModel, load_model
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
    assert all(values.device.type == torch.device(device).type for batch in batches for values in batch.maps.values())
    maps = {method: torch.cat([batch.maps[method] for batch in batches]).cpu() for method in METHODS}
    return maps, [status for batch in batches for status in batch.status]


@pytest.mark.parametrize("target", ["pred", "label", "top2"])
@pytest.mark.parametrize("graph", [True, False])
def test_maps_are_those_of_the_cpu(folder, target: str, graph: bool) -> None:
    expected, statuses = maps_of(folder, "cpu", target=target)
    found, again = maps_of(folder, "cuda", target=target, cuda_graph=graph)
    assert statuses == again
    assert statuses.count("unreadable") == 1
    for method in METHODS:
        readable = [i for i, status in enumerate(statuses) if status == "ok"]
        assert relative_error(found[method][readable], expected[method][readable]) <= 1e-2, method


def random_tiny(device: str) -> LoadedModel:
    """197 tokens: enough for an attention backward that adds up in any order to show it."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224").eval().to(device)
    return LoadedModel("vit_tiny_patch16_224", model, timm.data.resolve_model_data_config(model), None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("graph", [True, False])
def test_two_runs_give_the_same_bits(folder, dtype: str, graph: bool) -> None:
    model, source = random_tiny("cuda"), open_source(folder)
    first, second = (
        [batch.maps for batch in dataset.stream(model, source, METHODS, batch=8, dtype=dtype, cuda_graph=graph, workers=0)]
        for _ in range(2)
    )
    for one, other in zip(first, second, strict=True):
        for method in METHODS:
            assert torch.equal(one[method], other[method]), method
    assert not torch.are_deterministic_algorithms_enabled()


def test_between_batches_torch_is_as_the_caller_has_it(folder) -> None:
    for _ in dataset.stream(load_model("demo", device="cuda"), open_source(folder), "tokentm", batch=8, workers=0):
        assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_model_on_the_second_gpu_is_explained_there(folder) -> None:
    expected, statuses = maps_of(folder, "cpu")
    maps_of(folder, "cuda:0")  # a capture on another device came before
    found, _ = maps_of(folder, "cuda:1")
    readable = [i for i, status in enumerate(statuses) if status == "ok"]
    for method in METHODS:
        assert relative_error(found[method][readable], expected[method][readable]) <= 1e-2, method


class _LooksAtAValue(nn.Module):
    """A model that waits for the GPU in its forward, so that it cannot be captured."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        assert float(tokens.detach().abs().max()) >= 0
        return self.inside(tokens)


def test_a_model_that_cannot_be_captured_is_explained_without_a_graph(folder) -> None:
    model = load_model("demo", device="cuda")
    model.model.patch_embed = _LooksAtAValue(model.model.patch_embed)
    with pytest.warns(UserWarning, match="not replayed from a CUDA graph"):
        batches = list(dataset.stream(model, open_source(folder), "tokentm", batch=8, workers=0))
    assert sum(len(batch.ids) for batch in batches) == COUNT


def test_a_graph_is_replayed_and_results_do_not_run_into_each_other() -> None:
    model = load_model("demo", device="cuda")
    options = {"target": "pred", "dtype": torch.float32, "backend": "auto", "batch": 4}
    graphed, eager = (BatchExplainer(model, build_methods("tokentm", {}), cuda_graph=graph, **options) for graph in (True, False))
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
        report = dataset.run(model, folder, tmp_path / name / "maps.zarr", METHODS, batch=8, shard=16, workers=2)
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
