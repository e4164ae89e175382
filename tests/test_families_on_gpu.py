"""Every family on a GPU: masks, biases, rotations and relevance through the kernels, within the error budget."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vitexplain
from vitexplain.testing import DenseReference
from vitexplain.testing.families import FAMILY_CASES

from .conftest import METHODS, PLAIN_METHODS, all_tokens, relative_error, rms_error
from .test_families import CASES, taken

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def on_gpu(inputs: Any) -> Any:
    """Images or texts moved to the device."""
    return inputs.cuda() if isinstance(inputs, torch.Tensor) else {name: value.cuda() for name, value in inputs.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_every_family_is_within_the_error_budget(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    pytest.importorskip(case.package, reason=f"{case.package} is an extra, and is not installed")
    model, inputs = case.model(dtype), case.inputs(dtype, batch=3)
    reference, plain = DenseReference(model, inputs), DenseReference(model, inputs, dtype=dtype)
    target = reference.logits.argmax(-1)
    methods = taken(case, PLAIN_METHODS)
    score = case.score()
    asked = {"score": score} if score else {"target": target.cuda()}
    ours = vitexplain.explain(model.cuda(), on_gpu(inputs), method=methods, **asked)
    for method in methods:
        exact = reference.explain(method, score or target)
        eager = rms_error(plain.explain(method, score or target), exact)
        error = rms_error(all_tokens(ours[method]).cpu(), exact)
        assert error <= 2 * eager + 4 * torch.finfo(dtype).eps, f"{method}: error {error:.2e}, plain torch {eager:.2e}"


@pytest.mark.parametrize("name", CASES)
def test_relevance_is_what_it_is_on_a_cpu(name: str) -> None:
    case = CASES[name]
    pytest.importorskip(case.package, reason=f"{case.package} is an extra, and is not installed")
    methods = taken(case, ["transformer_attribution", "conservative_lrp"])
    model, inputs = case.model(torch.float32), case.inputs(torch.float32, batch=8)
    exact = vitexplain.explain(case.model(), case.inputs(batch=8), method=methods, score=case.score())
    cpu = vitexplain.explain(model, inputs, method=methods, score=case.score())
    gpu = vitexplain.explain(model.cuda(), on_gpu(inputs), method=methods, score=case.score())
    for method in methods:
        expected = all_tokens(exact[method])
        scale = expected.norm(dim=1).clamp_min(1e-30)
        errors = [((all_tokens(run[method]).cpu() - expected).norm(dim=1) / scale).median() for run in (gpu, cpu)]
        assert errors[0] <= 4 * errors[1] + 1e-5, method


def test_the_same_map_by_triton_and_by_torch() -> None:
    for case in FAMILY_CASES:
        if case.package == "timm":
            model, images = case.model(torch.float32).cuda(), on_gpu(case.inputs(torch.float32))
            methods = taken(case, METHODS)
            by_triton = vitexplain.explain(model, images, method=methods, backend="triton")
            by_torch = vitexplain.explain(model, images, method=methods, backend="torch")
            for method in methods:
                assert relative_error(by_triton[method].maps, by_torch[method].maps) <= 1e-2, (case.family, method)


def test_a_relevance_pass_can_be_captured_in_a_graph() -> None:
    case = next(case for case in FAMILY_CASES if case.package == "timm")
    model, images = case.model(torch.float32).cuda(), on_gpu(case.inputs(torch.float32))
    methods = ["transformer_attribution", "lrp", "partial_lrp", "conservative_lrp", "legrad", "cdam"]
    explainer, target = vitexplain.Explainer(model, methods), torch.tensor([1, 2], device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            expected = explainer.attribute(images, target)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = explainer.attribute(images, target)
    graph.replay()
    for method in methods:
        assert relative_error(captured[method].maps, expected[method].maps) <= 1e-3, method
