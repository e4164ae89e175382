"""The rivals compute what they are timed for, leave the model as it was, and say where they are not installed."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, nn

import vitexplain
from bench.providers import hooks, models, ours, peers
from bench.providers.gate import Gate, worst
from bench.registry import TORCH, Check, Size, Unavailable
from vitexplain.methods import Rollout, own_methods
from vitexplain.relevance import Update
from vitexplain.testing import DenseReference, relative_error

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


@pytest.mark.parametrize("target", [None, (3, 1)])
def test_cdam_is_the_reference(model: nn.Module, target: tuple[int, ...] | None) -> None:
    images = images_for(model, 2)
    exact = DenseReference(model, images)
    classes = exact.logits.argmax(-1) if target is None else torch.tensor(target)
    received = hooks.explain(models.own_copy(model), images, "cdam", None if target is None else classes)
    assert relative_error(received, exact.explain("cdam", classes)) < 1e-5


@pytest.mark.parametrize("method", hooks.STANDS_IN)
def test_the_reference_stands_in_for_what_records_every_layer(model: nn.Module, method: str) -> None:
    images = images_for(model, 2)
    reference = DenseReference(model, images, torch.float32)
    assert torch.equal(hooks.explain(model, images, method), reference.explain(method, reference.logits.argmax(-1)))


def test_every_own_method_has_a_rival_and_none_computes_more_than_it_must() -> None:
    assert {*hooks.METHODS, *hooks.STANDS_IN, "cdam"} == set(own_methods())


class _Seen:
    """What a rival does with a model's blocks: calls of each, and maps that are written out."""

    def __init__(self, model: nn.Module) -> None:
        self.blocks, self.maps = 0, 0
        self._handles = [block.register_forward_hook(self._block) for block in model.blocks]
        self._handles += [block.attn.attn_drop.register_forward_hook(self._map) for block in model.blocks]

    def _block(self, *_: object) -> None:
        self.blocks += 1

    def _map(self, *_: object) -> None:
        self.maps += 1  # fused attention never calls it


@pytest.mark.parametrize(("method", "maps"), [("cdam", 0), ("legrad", 3), ("iba", 3), ("tokentm", 3)])
def test_a_rival_runs_every_block_once_and_stores_no_map_that_it_does_not_read(method: str, maps: int) -> None:
    model = build_model().requires_grad_(False)
    seen = _Seen(model)
    hooks.explain(model, images_for(model, 2), method)
    assert (seen.blocks, seen.maps) == (3, maps)


def test_a_block_s_own_graph_ends_at_its_input(model: nn.Module) -> None:
    with hooks.StoredMaps(model, by_block=True) as stored:
        stored.run(images_for(model, 2))
        assert not any(tokens.requires_grad for tokens in stored.tokens)
        assert all(parameter.grad is None for parameter in model.parameters())
        assert sorted(stored.gradients) == [0, 1, 2]


@pytest.mark.parametrize("method", ["tokentm", "attcat", "legrad"])
def test_frozen_parameters_get_no_gradients_and_change_no_value(model: nn.Module, method: str, monkeypatch) -> None:
    images = images_for(model, 2)
    expected = hooks.explain(model, images, method)
    computed, function = [], hooks.METHODS[method]

    def look(stored: hooks.StoredMaps) -> Tensor:
        computed.extend(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())
        return function(stored)

    monkeypatch.setitem(hooks.METHODS, method, look)
    assert torch.equal(hooks.explain(model, images, method, frozen=True), expected)
    assert computed
    assert not any(computed)


def _state(model: nn.Module) -> list[object]:
    flags = [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    found = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    return [flags, found, [block.attn.fused_attn for block in model.blocks]]


@pytest.mark.parametrize("method", ["attcat", "cdam", "legrad"])
@pytest.mark.parametrize("frozen", [False, True])
def test_the_model_is_left_as_it_was(model: nn.Module, method: str, frozen: bool, monkeypatch) -> None:
    model.blocks[1].attn.fused_attn = False
    before, images = _state(model), images_for(model, 2)
    hooks.explain(model, images, method, frozen=frozen)
    assert _state(model) == before

    def fail(_: Tensor) -> Tensor:
        raise RuntimeError("half way")

    monkeypatch.setattr(model.blocks[2].mlp, "forward", fail)
    with pytest.raises(RuntimeError, match="half way"):
        hooks.explain(model, images, method, frozen=frozen)
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
    classes = torch.tensor([3, 1])
    values = peers.captum(model, images, method, classes, **options)
    assert Gate(model, images).check(method, values, classes, **options).passed


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
    model = build_model().to(dtype)
    gate = Gate(model, images_for(model, 2).to(dtype))

    def own(method: str) -> Check:
        return ours.check(gate, [vitexplain.explain(model, gate.images, method=method)])

    assert own("rollout").passed
    assert own("gmar").passed
    monkeypatch.setattr(Rollout, "update", lambda *_: Update(factor=0.75, residual=0.5))
    assert own("gmar").passed
    assert not own("rollout").passed


def test_the_gate_refuses_what_is_not_a_number(model: nn.Module) -> None:
    gate = Gate(model, images_for(model, 2))
    classes = torch.tensor([3, 1])
    nothing = gate.check("rollout", torch.full(gate.exact_run.pooling.shape, torch.nan), classes)
    assert not nothing.passed
    assert worst([Check(1e-9, 1e-5), nothing, Check(1e-7, 1e-5)]) is nothing
    assert worst([Check(1e-9, 1e-9), Check(1e-7, 1e-5)]) == Check(1e-9, 1e-9)


class _Wrong:
    """A reference whose values in half precision are off by a factor."""

    def __init__(self, factor: float, dtype: torch.dtype) -> None:
        self.factor = 1.0 if dtype == torch.float64 else factor

    def explain(self, _method: str, classes: Tensor) -> Tensor:
        return self.factor * torch.ones(len(classes), 5)


@pytest.mark.parametrize(("factor", "limit"), [(1.0, 4 * 2**-7), (1.01, 0.02 + 4 * 2**-7), (2.0, 0.2), (torch.nan, 0.2)])
def test_a_reference_that_is_far_off_in_half_precision_allows_no_more_than_a_fifth(factor: float, limit: float) -> None:
    images = torch.zeros(2, 3, 4, 4, dtype=torch.bfloat16)
    gate = Gate(nn.Identity(), images, lambda _model, _images, dtype: _Wrong(factor, dtype))
    check = gate.check("gmar", torch.ones(2, 5), torch.tensor([0, 1]))
    assert check.error == 0
    assert check.limit == pytest.approx(limit)


def test_the_gate_frees_its_runs_and_keeps_their_values(model: nn.Module, monkeypatch) -> None:
    gate, classes = Gate(model, images_for(model, 2)), torch.tensor([3, 1])
    values = gate.exact_run.explain("rollout", classes)
    assert gate.check("rollout", values, classes).error == 0
    gate.let_go()
    assert not {"exact_run", "plain_run"} & set(vars(gate))
    monkeypatch.setattr(DenseReference, "explain", None)
    assert gate.check("rollout", values, classes).error == 0
    gate.let_go()


@pytest.mark.parametrize(("device", "calls"), [("cpu", 1), ("cuda", 2)])
def test_the_gate_holds_a_replay_where_there_are_graphs(model: nn.Module, device: str, calls: int) -> None:
    found = [[vitexplain.explain(model, images_for(model, 2), method=("rollout", "gmar"))] for _ in range(calls)]
    explanations = ours.called(iter(found).__next__, torch.device(device))
    assert explanations == list(found[-1][0].values())


def test_what_the_library_refuses_in_a_call_is_unavailable() -> None:
    model = build_model()
    explainer = ours.build(TORCH, model, "rollout", {})
    with pytest.raises(Unavailable, match="expected dtype"):
        ours.called(ours.timed(explainer, images_for(model, 2).double()), torch.device("cpu"))


def test_flops_are_those_of_the_formula() -> None:
    tokens, width, depth = 17, 192, 12
    block = 2 * tokens * width * 12 * width + 4 * tokens**2 * width
    expected = depth * block + 2 * (tokens - 1) * 3 * 16 * 16 * width + 2 * width * models.CLASSES
    assert models.forward_flops(TINY.model, TINY.image_size) == expected
    assert models.least_work(TINY).flops == 2 * TINY.batch * expected


def test_models_and_images_are_the_same_each_time() -> None:
    size, device = Size("vit_tiny_patch16_224", 2, 17, 64, "bfloat16"), torch.device("cpu")
    first, second = models.build(size, device), models.build(size, device)
    assert len(models.build(size, device, depth=2).blocks) == 2
    assert torch.equal(first.head.weight, second.head.weight)
    assert not any(parameter.requires_grad for parameter in first.parameters())
    images = models.draw(size, device)
    assert torch.equal(images, models.draw(size, device))
    assert models.baseline("forward", first, images)().shape == (2, 1000)
    assert models.baseline("forward + backward", first, images)().shape == images.shape
    assert not images.requires_grad
