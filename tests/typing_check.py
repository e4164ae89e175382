"""What a user writes has the types that it should: read by mypy --strict (make lint), never run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import assert_type

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import vitexplain
from vitexplain import Anatomy, BlockAnatomy, Explainer, Explanation, InputError, ResidualBranches, explain
from vitexplain.dataset import ExplainedBatch, MapStore, Progress, Report, run, stream
from vitexplain.dataset import open as open_store
from vitexplain.evaluate import PROTOCOLS, Evaluation, Protocol, Results, evaluate
from vitexplain.loading import LoadedModel, load_model
from vitexplain.methods import GMAR, REGISTRY, Method, MethodChoice, MethodInfo, TokenTM
from vitexplain.sources import Source, open_source


def one_method(model: nn.Module, images: Tensor) -> Image.Image:
    explanation = explain(model, images)
    assert_type(explanation, Explanation)
    assert_type(explanation.maps, Tensor)
    assert_type(explanation.target, Tensor | None)
    assert_type(Explainer(model), Explainer[Explanation])
    assert_type(Explainer(model, TokenTM(length=False), "torch", rows="all").attribute(images, [3, 4]).maps, Tensor)
    assert_type(explain(model, images, "top3", "gmar", norm="l2"), Explanation)
    assert_type(explain(model, images, compile="default", checkpoint=True, check_values=False), Explanation)
    return explanation.overlay(np.zeros((32, 32, 3), np.uint8), index=0)


def several_methods(model: nn.Module, images: Tensor) -> list[Tensor]:
    found = explain(model, images, None, ["tokentm", GMAR()])
    assert_type(found, dict[str, Explanation])
    explainer = Explainer(model, {"short": TokenTM(aggregate=False), "long": "tokentm"}, compile=True)
    assert_type(explainer.attribute(images), dict[str, Explanation])
    of_one_kind, named = [GMAR(), GMAR(norm="l2")], {"short": TokenTM(aggregate=False)}
    assert_type(explain(model, images, method=of_one_kind), dict[str, Explanation])
    assert_type(explain(model, images, method=named), dict[str, Explanation])
    assert_type(explain(model, images, method=("tokentm", GMAR())), dict[str, Explanation])
    assert_type(explain(model, images, method={"tokentm", "gmar"}), dict[str, Explanation])
    assert_type(explain(model, images, method=REGISTRY.keys()), dict[str, Explanation])
    assert_type(explain(model, images, method=(name for name in REGISTRY)), dict[str, Explanation])
    return [explanation.maps for explanation in found.values()]


def any_methods(explainer: Explainer, model: nn.Module, images: Tensor, method: MethodChoice) -> Explanation:
    found = explainer.attribute(images)
    assert_type(found, Explanation | dict[str, Explanation])
    assert_type(Explainer(model, method).attribute(images), Explanation | dict[str, Explanation])
    assert_type(explain(model, images, method=method), Explanation | dict[str, Explanation])
    any_methods(Explainer(model), model, images, "rollout")
    one_or_some: str | list[str] = _one_or_some()
    assert_type(Explainer(model, one_or_some).attribute(images), Explanation | dict[str, Explanation])
    assert_type(explain(model, images, None, one_or_some), Explanation | dict[str, Explanation])
    return found if isinstance(found, Explanation) else found["tokentm"]


def _one_or_some() -> str | list[str]:
    return ["tokentm", "gmar"]


def a_text(model: nn.Module, tokens: dict[str, Tensor]) -> Explanation:
    return Explainer(model, score=vitexplain.margin(1, 0)).attribute(tokens)


def names() -> list[str]:
    assert_type(vitexplain.methods(), tuple[MethodInfo, ...])
    assert_type(REGISTRY["gmar"], type[Method])
    assert_type(vitexplain.__version__, str)
    return [f"{info.name}: {info.paper}" for info in vitexplain.methods()]


def own_anatomy(model: nn.Module, block: nn.Module) -> Anatomy:
    branches = ResidualBranches(lambda: torch.ones(4, 4), lambda tokens: tokens, block, block)
    return Anatomy(
        model=model,
        blocks=(BlockAnatomy(block, block, branches),),
        num_classes=10,
        head=lambda tokens: tokens[:, 0],
        grid=lambda height, width: (height // 16, width // 16),
    )


def a_data_set(folder: Path) -> Iterator[Tensor]:
    loaded = load_model("demo")
    assert_type(loaded, LoadedModel)
    source = open_source(folder, classes=loaded)
    assert_type(source, Source)

    def watch(progress: Progress) -> None:
        print(progress)

    assert_type(run(loaded, source, folder / "maps.zarr", "tokentm", progress=watch), Report)
    store = open_store(folder / "maps.zarr")
    assert_type(store, MapStore)
    assert_type(store.maps("a.png"), np.ndarray)
    assert_type(store.maps(["a.png", 3], as_torch=True), Tensor)
    for batch in stream(loaded, source, ["tokentm", "gmar"]):
        assert_type(batch, ExplainedBatch)
        yield batch.maps["tokentm"]


def an_evaluation(loaded: LoadedModel, source: Source, protocol: Protocol) -> Results:
    assert_type(PROTOCOLS["saco"], type[Protocol])
    try:
        return evaluate(loaded, source, "out", ["tokentm", "gmar"], ["perturbation", protocol], bootstrap=100)
    except InputError:
        return Evaluation(loaded, source, "out", "gmar", "saco").run()
