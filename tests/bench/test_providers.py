"""The rivals compute what they are timed for, leave the model as it was, and say where they are not installed."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, nn

from bench.providers import hooks, models, peers
from bench.providers.gate import Gate, worst
from bench.registry import Check, Size, Unavailable
from vitexplain.methods import Rollout
from vitexplain.relevance import Update
from vitexplain.testing import DenseReference

from ..conftest import build_model, images_for

TINY = Size("vit_tiny_patch16_224", 2, 17, 64)


@pytest.fixture(params=["class_token", "registers_layerscale"])
def model(request) -> nn.Module:
    options = dict(reg_tokens=4, init_values=0.3) if request.param == "registers_layerscale" else {}
    return build_model(**options).requires_grad_(False)


@pytest.mark.parametrize("method", hooks.METHODS)
@pytest.mark.parametrize("target", [None, (3, 1)])
def test_a_method_on_stored_maps_is_the_reference(model: nn.Module, method: str, target: tuple[int, ...] | None) -> None:
    images = images_for(model, 2)
    exact = DenseReference(model, images)
    classes = exact.logits.argmax(-1) if target is None else torch.tensor(target)
    expected = exact.explain(method, classes)
    given = None if target is None else classes
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        received = hooks.explain(models.own_copy(model).to(dtype), images.to(dtype), method, given)
        assert received.dtype == dtype
        assert (received.double() - expected).abs().max() <= tolerance * expected.abs().max()


def test_the_reference_stands_in_for_other_methods(model: nn.Module) -> None:
    images = images_for(model, 2)
    reference = DenseReference(model, images, torch.float32)
    assert torch.equal(hooks.explain(model, images, "legrad"), reference.explain("legrad", reference.logits.argmax(-1)))


def _state(model: nn.Module) -> list[object]:
    flags = [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    found = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    return [flags, found, [block.attn.fused_attn for block in model.blocks]]


def test_the_model_is_left_as_it_was(model: nn.Module, monkeypatch) -> None:
    model.blocks[1].attn.fused_attn = False
    before, images = _state(model), images_for(model, 2)
    hooks.explain(model, images, "attcat")
    assert _state(model) == before

    def fail(_: Tensor) -> Tensor:
        raise RuntimeError("half way")

    monkeypatch.setattr(model.blocks[2].mlp, "forward", fail)
    with pytest.raises(RuntimeError, match="half way"):
        hooks.explain(model, images, "tokentm")
    assert _state(model) == before


def test_another_head_is_refused() -> None:
    with pytest.raises(ValueError, match="reads its class token"):
        hooks.StoredMaps(build_model(global_pool="avg", class_token=False))


def test_weights_are_copied_once() -> None:
    model = build_model()
    copied = models.own_copy(model)
    again = DenseReference(copied, images_for(model, 1), torch.float32).model
    assert again is copied
    assert copied is not model


def test_stored_maps_are_counted_as_they_are() -> None:
    model = build_model()
    with hooks.StoredMaps(model) as stored:
        stored.run(images_for(model, 2))
    kept = sum(tensor.nbytes for pair in stored.pairs for tensor in pair)
    assert kept == hooks.stored_bytes(model, 2, 17, torch.float32)


@pytest.mark.parametrize("method", peers.CAPTUM_METHODS)
def test_captum_computes_what_our_adapter_returns(model: nn.Module, method: str) -> None:
    pytest.importorskip("captum")
    images = images_for(model, 2)
    options = {"steps": 3} if method == "integrated_gradients" else {}
    check = Gate(model, images).check(
        method, lambda pixels, classes: peers.captum(model, pixels, method, classes, **options), **options
    )
    assert check.passed


def test_grad_cam_of_tokens_is_finite_and_leaves_the_model_frozen() -> None:
    pytest.importorskip("pytorch_grad_cam")
    model = build_model(num_classes=7).requires_grad_(False)
    before = _state(model)
    found = peers.grad_cam(model, images_for(model, 2))
    assert found.shape == (2, 32, 32)
    assert torch.isfinite(found).all()
    assert _state(model) == before


def test_missing_packages_are_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    monkeypatch.setitem(sys.modules, "pytorch_grad_cam", None)
    model = build_model()
    with pytest.raises(Unavailable, match="captum is not installed"):
        peers.captum(model, images_for(model, 1), "input_x_gradient")
    with pytest.raises(Unavailable, match="grad-cam is not installed"):
        peers.grad_cam(model, images_for(model, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gate_stops_a_wrong_method(monkeypatch, dtype: torch.dtype) -> None:
    import vitexplain

    model = build_model().to(dtype)
    gate = Gate(model, images_for(model, 2).to(dtype))

    def ours(method: str) -> Check:
        def explain(images: Tensor, target: Tensor) -> Tensor:
            result = vitexplain.explain(model, images, target=target, method=method)
            return torch.cat([result.prefix_values, result.maps.flatten(1)], -1)

        return gate.check(method, explain)

    assert ours("rollout").passed
    assert ours("gmar").passed
    monkeypatch.setattr(Rollout, "update", lambda *_: Update(factor=0.75, residual=0.5))
    assert ours("gmar").passed
    assert not ours("rollout").passed


def test_the_gate_refuses_what_is_not_a_number(model: nn.Module) -> None:
    gate = Gate(model, images_for(model, 2))
    nothing = gate.check("rollout", lambda images, _: torch.full((len(images), gate.exact_run.pooling.shape[1]), torch.nan))
    assert not nothing.passed
    assert worst([Check(1e-9, 1e-5), nothing, Check(1e-7, 1e-5)]) is nothing
    assert worst([Check(1e-9, 1e-9), Check(1e-7, 1e-5)]) == Check(1e-9, 1e-9)


def test_flops_are_those_of_the_formula() -> None:
    tokens, width, depth = 17, 192, 12
    block = 2 * tokens * width * 12 * width + 4 * tokens**2 * width
    expected = depth * block + 2 * (tokens - 1) * 3 * 16 * 16 * width + 2 * width * models.CLASSES
    assert models.forward_flops(TINY.model, TINY.image_size) == expected
    assert models.least_work(TINY).flops == 2 * TINY.batch * expected


def test_models_and_images_are_the_same_each_time() -> None:
    size, device = Size("vit_tiny_patch16_224", 2, 17, 64, "bfloat16"), torch.device("cpu")
    first, second = models.build(size, device), models.build(size, device)
    assert torch.equal(first.head.weight, second.head.weight)
    assert not any(parameter.requires_grad for parameter in first.parameters())
    images = models.draw(size, device)
    assert torch.equal(images, models.draw(size, device))
    assert models.baseline("forward", first, images)().shape == (2, 1000)
    assert models.baseline("forward + backward", first, images)().shape == images.shape
    assert not images.requires_grad
