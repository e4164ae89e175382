"""Replaying explanations: what is captured anew, what is replayed, and that results stay as they were.

A capture needs a GPU (``tests/test_running_on_gpu.py``). Here a recording that does its call again on inputs of its own, and
writes over its outputs as a graph does, stands in for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import pytest
import torch
from torch import Tensor

import vitexplain
from vitexplain import InputError, UnsupportedModelError, cuda_graphs, explainer
from vitexplain.cuda_graphs import CannotBeCapturedError, GraphCache

from .conftest import MODEL_SHAPES, build_model, images_for

CPU = torch.device("cpu")


class Recording:
    """In the place of ``CapturedCall``."""

    made = 0
    places: ClassVar[set[object]] = set()

    def __init__(
        self, call: Callable, inputs: Sequence[Tensor | None], device: torch.device, pool: object = None, stream: object = None
    ) -> None:
        type(self).made += 1
        type(self).places.add((pool, stream))
        self.call, self.device = call, device
        self.inputs = [None if tensor is None else tensor.clone() for tensor in inputs]
        self.outputs = {name: tensor.clone() for name, tensor in call(*self.inputs).items()}

    def __call__(self, *inputs: Tensor | None) -> dict[str, Tensor]:
        for static, tensor in zip(self.inputs, inputs, strict=True):
            if static is not None:
                static.copy_(tensor)
        for name, tensor in self.call(*self.inputs).items():
            self.outputs[name].copy_(tensor)
        return self.outputs


class Place:
    """In the place of a device's memory and stream."""

    log: ClassVar[list[str]] = []

    def __init__(self, device: torch.device) -> None:  # noqa: ARG002
        self.pool, self.stream = object(), object()

    def wait(self) -> None:
        self.log.append("wait")

    def finished(self) -> None:
        self.log.append("finished")


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> type[Recording]:
    monkeypatch.setattr(cuda_graphs, "CapturedCall", Recording)
    monkeypatch.setattr(cuda_graphs, "_Place", Place)
    monkeypatch.setattr(explainer, "REPLAYED_ON", "cpu")
    Recording.made = 0
    Recording.places.clear()
    Place.log.clear()
    return Recording


def test_results_are_tensors_of_their_own(recordings: type[Recording]) -> None:
    cache = GraphCache()
    first = cache("double", lambda x: {"y": 2 * x}, (torch.ones(2),), CPU)["y"]
    second = cache("double", lambda x: {"y": 2 * x}, (torch.full((2,), 5.0),), CPU)["y"]
    assert first.tolist() == [2, 2]
    assert second.tolist() == [10, 10]
    assert recordings.made == 1


def test_the_call_that_was_not_used_for_longest_goes_first(recordings: type[Recording]) -> None:
    cache = GraphCache(most=2)
    for key in (1, 2, 1, 3, 1):
        cache(key, lambda x: {"y": x}, (torch.ones(key),), CPU)
    assert len(cache) == 2
    assert recordings.made == 3
    assert len(recordings.places) == 1, "captured calls share their memory and their stream"
    assert Place.log == ["wait", "finished"] * 5, "no call begins before the last one's results are copied"
    cache(2, lambda x: {"y": x}, (torch.ones(2),), CPU)
    assert recordings.made == 4


def test_replayed_explanations_are_those_of_plain_calls(recordings: type[Recording]) -> None:
    model = build_model(**MODEL_SHAPES["class_token_n17"])
    methods = {"a": "tokentm", "b": "gmar", "c": "iba"}
    plain = vitexplain.Explainer(model, methods)
    replayed = vitexplain.Explainer(model, methods, cuda_graph=True)
    for seed, target in enumerate([None, None, 3, [1, 2], torch.tensor([4, 0]), "top2", [[1, 2], [3, 4]]]):
        images = images_for(model, 2) + seed
        expected, found = plain.attribute(images, target), replayed.attribute(images, target)
        for label in methods:
            assert torch.equal(found[label].maps, expected[label].maps)
            assert torch.equal(found[label].target, expected[label].target)
            assert torch.equal(found[label].logits, expected[label].logits)
            assert found[label].options == expected[label].options
            assert found[label].method == expected[label].method
    assert recordings.made == 4, "for no target, one class an image, the likeliest two, and two named ones"


def test_another_shape_or_model_in_its_place_is_captured_anew(recordings: type[Recording]) -> None:
    model = build_model(**MODEL_SHAPES["class_token_n17"])
    explainer = vitexplain.Explainer(model, "gmar", cuda_graph=True)
    explainer.attribute(images_for(model, 2))
    explainer.attribute(images_for(model, 3))
    assert recordings.made == 2
    with torch.no_grad():
        model.head.weight.mul_(2)  # in place: a graph reads what is there now
    explainer.attribute(images_for(model, 2))
    assert recordings.made == 2
    model.head.weight.data = model.head.weight.data.clone()
    found = explainer.attribute(images_for(model, 2))
    assert recordings.made == 3
    assert torch.equal(found.maps, vitexplain.explain(model, images_for(model, 2), method="gmar").maps)


@pytest.mark.usefixtures("recordings")
def test_values_are_still_looked_at() -> None:
    model = build_model(**MODEL_SHAPES["class_token_n17"])
    images = images_for(model, 2)
    explainer = vitexplain.Explainer(model, "gmar", cuda_graph=True)
    explainer.attribute(images)
    with pytest.raises(InputError, match="images: expected finite"):
        explainer.attribute(images * float("nan"))
    with pytest.raises(InputError, match="target: expected classes 0 to"):
        explainer.attribute(images, 99)
    with pytest.raises(InputError, match="model output: expected finite"):
        explainer.attribute(images.sign() * 3e38)
    maps = explainer.attribute(images * float("nan"), check_values=False).maps
    assert not torch.isfinite(maps).flatten(1).all(1).any()


def test_a_score_is_captured_too(recordings: type[Recording]) -> None:
    model = build_model(**MODEL_SHAPES["class_token_n17"])
    images = images_for(model, 2)
    score = vitexplain.margin(1, 2)
    found = vitexplain.Explainer(model, "gmar", score=score, cuda_graph=True).attribute(images)
    assert torch.equal(found.maps, vitexplain.explain(model, images, method="gmar", score=score).maps)
    assert found.target is None
    assert recordings.made == 1


def test_what_cannot_be_captured_is_refused(monkeypatch: pytest.MonkeyPatch, recordings: type[Recording]) -> None:
    model = build_model(**MODEL_SHAPES["class_token_n17"])
    images = images_for(model, 1)
    explainer = vitexplain.Explainer(model, "gmar", cuda_graph=True)

    def fails(*_: object) -> None:
        raise CannotBeCapturedError("operation not permitted when stream is capturing")

    monkeypatch.setattr(recordings, "__init__", fails)
    with pytest.raises(UnsupportedModelError, match="cuda_graph: VisionTransformer cannot be captured: operation not permitted"):
        explainer.attribute(images)

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(recordings, "__init__", full)
    with pytest.raises(torch.OutOfMemoryError):
        explainer.attribute(images)


def test_where_there_is_no_gpu_and_nothing_to_replay_it_is_said() -> None:
    model = build_model(**MODEL_SHAPES["class_token_n17"])
    with pytest.raises(InputError, match="expected a model on a GPU, received one on cpu"):
        vitexplain.explain(model, images_for(model, 1), cuda_graph=True)
    for options in ({"backend": "dense"}, {"method": ["tokentm", "smoothgrad"]}):
        for switch in ("cuda_graph", "compile", "checkpoint"):
            with pytest.raises(InputError, match=f"{switch}: expected this library's own methods and kernels"):
                vitexplain.Explainer(model, **options, **{switch: True})


@pytest.mark.usefixtures("recordings")
def test_a_graph_serves_inside_inference_mode_and_outside() -> None:
    model = build_model(**MODEL_SHAPES["class_token_n17"])
    images = images_for(model, 2)
    explainer = vitexplain.Explainer(model, "gmar", cuda_graph=True)
    with torch.inference_mode():
        inside = explainer.attribute(images.clone())
    assert torch.equal(explainer.attribute(images).maps, inside.maps)


def test_a_buffer_in_another_place_is_captured_anew(recordings: type[Recording]) -> None:
    model = build_model(**MODEL_SHAPES["class_token_n17"])
    model.register_buffer("table", torch.zeros(3))
    explainer = vitexplain.Explainer(model, "gmar", cuda_graph=True)
    explainer.attribute(images_for(model, 2))
    model.table = torch.ones(3)
    explainer.attribute(images_for(model, 2))
    assert recordings.made == 2
