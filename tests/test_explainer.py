"""The public API: targets, several methods, what is left behind, memory, and bad input."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import timm
import torch
from timm.models.vision_transformer import DiffParallelScalingBlock, ParallelThingsBlock, VisionTransformer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import vitexplain
from vitexplain import ExplanationError, InputError, UnknownNameError, UnsupportedModelError
from vitexplain.methods import GMAR, TokenTM
from vitexplain.targets import resolve_target

from .conftest import METHODS, MODEL_SHAPES, PLAIN_METHODS, build_model, images_for, relative_error


class _Category:
    """Stands for pytorch-grad-cam's ClassifierOutputTarget."""

    def __init__(self, category: int) -> None:
        self.category = category


@pytest.mark.parametrize(
    ("target", "shape"),
    [
        (None, (2,)),
        (3, (2,)),
        ([3, 5], (2,)),
        (torch.tensor([3, 5], dtype=torch.int32), (2,)),
        (np.array([3, 5]), (2,)),
        ([[3, 5, 0], [1, 2, 6]], (2, 3)),
        ([_Category(3), _Category(5)], (2,)),
    ],
)
def test_every_form_of_target_is_taken(model, images, target, shape) -> None:
    result = vitexplain.explain(model, images, target)
    assert result.target.shape == shape
    assert result.maps.shape == (*shape, 4, 4)
    assert result.prefix_values.shape == (*shape, 1)
    assert torch.equal(result.logits, model(images).detach()) or relative_error(result.logits, model(images).detach()) < 1e-6
    if target is None:
        assert torch.equal(result.target, model(images).argmax(-1))


@pytest.mark.parametrize("name", METHODS)
def test_several_classes_give_what_each_gives_alone(model, images, name: str) -> None:
    together = vitexplain.explain(model, images, [[3, 5], [1, 2]], method=name)
    for k, classes in enumerate(([3, 1], [5, 2])):
        alone = vitexplain.explain(model, images, classes, method=name)
        assert relative_error(together.maps[:, k], alone.maps) <= 1e-6


def test_several_methods_and_classes_share_one_forward(model, images) -> None:
    calls: list[int] = []
    handle = model.blocks[0].attn.qkv.register_forward_hook(lambda *_: calls.append(1))
    vitexplain.explain(model, images, [[0, 1], [2, 3]], method=PLAIN_METHODS)
    handle.remove()
    replays = 4  # iba and legrad ask each block again, for the class row alone, once a class
    assert len(calls) == 1 + replays


def test_a_batch_gives_what_its_images_give_alone(model) -> None:
    images = images_for(model, 3)
    batch = vitexplain.explain(model, images, method=METHODS)
    for i in range(3):
        single = vitexplain.explain(model, images[i : i + 1], method=METHODS)
        for name in METHODS:
            assert relative_error(batch[name].maps[i], single[name].maps[0]) <= 1e-5, name


def test_methods_can_be_instances_and_options_go_where_they_belong(model, images) -> None:
    by_instance = vitexplain.explain(model, images, method=[GMAR(norm="l2"), TokenTM(necc=False)])
    by_option = vitexplain.explain(model, images, method=["gmar", "tokentm"], norm="l2", necc=False)
    for name in ("gmar", "tokentm"):
        assert torch.equal(by_instance[name].maps, by_option[name].maps)
        assert by_instance[name].options == by_option[name].options
    assert by_option["gmar"].options["norm"] == "l2"


def test_a_mapping_of_labels_holds_one_method_with_several_options(model, images) -> None:
    calls: list[int] = []
    handle = model.blocks[0].attn.qkv.register_forward_hook(lambda *_: calls.append(1))
    variants = {"paper": "tokentm", "length": TokenTM(necc=False), "again": TokenTM(), "l2": GMAR(norm="l2")}
    together = vitexplain.explain(model, images, method=variants, score="probability")
    handle.remove()
    assert list(together) == list(variants)
    assert len(calls) == 1, "they share a forward"
    assert together["paper"].options["score"] == "probability", "options go to what is named, instances have their own"
    assert together["length"].options["score"] == "logit"
    for label, method in {"length": TokenTM(necc=False), "again": TokenTM(), "l2": GMAR(norm="l2")}.items():
        # alone, gmar lets the last block run on fewer rows, whose sums a matrix product may take in another order
        assert relative_error(together[label].maps, vitexplain.explain(model, images, method=method).maps) < 1e-6, label
    alone = vitexplain.explain(model, images, score="probability")
    assert torch.equal(together["paper"].maps, alone.maps)


def test_the_list_of_methods_names_paper_cost_and_options() -> None:
    listed = {info.name: info for info in vitexplain.methods()}
    papers = {"tokentm", "gmar", "iba", "transformer_mm", "attcat", "rollout", "raw_attention", "grad_cam"}
    relevance = {"transformer_attribution", "lrp", "partial_lrp", "conservative_lrp"}
    assert set(listed) == papers | relevance | {
        "legrad",
        "cdam",
        "input_x_gradient",
        "integrated_gradients",
        "smoothgrad",
    }
    assert all(info.paper and info.cost and info.title for info in listed.values())
    assert {option.name for option in listed["tokentm"].options} == {
        "score",
        "aggregate",
        "length",
        "necc",
        "necc_scale",
        "start_block",
    }
    assert all(option.help for info in listed.values() for option in info.options)
    assert "reconstruct" in listed["iba"].paper


# -- nothing is left behind ------------------------------------------------------------------------------------------


def _state(model: nn.Module) -> dict[str, object]:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_always_called")
    return {
        "hooks": [len(getattr(module, name)) for module in model.modules() for name in hooks],
        "training": [module.training for module in model.modules()],
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "grad": [parameter.grad is None for parameter in model.parameters()],
        "fused": [getattr(module, "fused_attn", None) for module in model.modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "checkpointing": model.grad_checkpointing,
        "rng": torch.get_rng_state().tolist(),
        "grad_mode": torch.is_grad_enabled(),
        "sdpa": torch.nn.functional.scaled_dot_product_attention,
    }


def _unusual_model() -> VisionTransformer:
    model = build_model(drop_path_rate=0.3, attn_drop_rate=0.2, proj_drop_rate=0.1)
    model.train()
    model.blocks[1].eval()
    model.blocks[0].attn.qkv.weight.requires_grad_(False)
    model.blocks[2].attn.fused_attn = False
    model.set_grad_checkpointing(True)
    return model


def test_a_model_is_left_as_it_was(images) -> None:
    model = _unusual_model()
    before = _state(model)
    ours = vitexplain.explain(model, images, method=METHODS)
    assert _state(model) == before
    again = vitexplain.explain(model, images, method=METHODS)
    for name in METHODS:  # evaluation mode while it ran: dropout would show
        assert torch.equal(ours[name].maps, again[name].maps)


def test_a_model_is_left_as_it_was_after_an_exception(images, monkeypatch) -> None:
    model = _unusual_model()
    before = _state(model)

    def broken(*_: object) -> None:
        raise RuntimeError("in the middle of a block")

    monkeypatch.setattr(model.blocks[1].mlp.fc1, "forward", broken, raising=True)
    with pytest.raises(RuntimeError, match="in the middle of a block"):
        vitexplain.explain(model, images, method=METHODS)
    monkeypatch.undo()
    assert {key: value for key, value in _state(model).items() if key != "attributes"} == {
        key: value for key, value in before.items() if key != "attributes"
    }
    with pytest.raises(InputError):
        vitexplain.explain(model, images, target=99)
    assert _state(model)["hooks"] == before["hooks"]
    assert _state(model)["requires_grad"] == before["requires_grad"]


def test_it_runs_inside_no_grad_and_inference_mode(model, images) -> None:
    expected = vitexplain.explain(model, images).maps
    with torch.no_grad():
        assert torch.equal(vitexplain.explain(model, images).maps, expected)
    with torch.inference_mode():
        assert torch.equal(vitexplain.explain(model, images * 1).maps, expected)


def test_results_carry_no_graph(model, images) -> None:
    images = images.requires_grad_()
    for result in vitexplain.explain(model, images, method=METHODS).values():
        assert not any(tensor.requires_grad for tensor in (result.maps, result.logits, result.prefix_values))
    assert images.grad is None


def test_autocast_is_followed(model, images) -> None:
    exact = vitexplain.explain(model, images, method=PLAIN_METHODS)
    with torch.autocast("cpu", torch.bfloat16):
        result = vitexplain.explain(model, images, target=exact["gmar"].target, method=PLAIN_METHODS)
    for name in PLAIN_METHODS:
        assert 0 < relative_error(result[name].maps, exact[name].maps) < 0.2, name


def test_compiled_and_wrapped_models_are_opened(model, images) -> None:
    expected = vitexplain.explain(model, images).maps
    assert torch.equal(vitexplain.explain(torch.compile(model), images).maps, expected)
    assert torch.equal(vitexplain.explain(nn.DataParallel(model), images).maps, expected)


# -- matrix-free -----------------------------------------------------------------------------------------------------


class _LargestTensor(TorchDispatchMode):
    """Remembers the largest result of any operation."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, tuple | list) else (result,):
            if isinstance(item, torch.Tensor):
                self.numel = max(self.numel, item.numel())
        return result


@pytest.mark.parametrize("name", METHODS)
def test_no_attention_map_is_ever_stored(name: str) -> None:
    model = build_model(img_size=512, patch_size=8, depth=2, embed_dim=16, num_heads=1, mlp_ratio=1)
    images = images_for(model, 1)
    tokens = 64 * 64 + 1
    with _LargestTensor() as largest:
        vitexplain.explain(model, images, method=name)
    assert images.numel() <= largest.numel < tokens * tokens / 10


# -- bad input -------------------------------------------------------------------------------------------------------

BAD_CALLS = {
    "not a tensor": (lambda m, _: vitexplain.explain(m, "cat.jpg"), InputError, r"expected a tensor.*received str"),
    "one image without batch": (lambda m, x: vitexplain.explain(m, x[0]), InputError, r"expected shape \(B, c, h, w\).*received \(3, 32, 32\)"),
    "empty batch": (lambda m, x: vitexplain.explain(m, x[:0]), InputError, r"B ≥ 1, received \(0, 3, 32, 32\)"),
    "grey image": (lambda m, x: vitexplain.explain(m, x[:, :1]), InputError, r"expected 3 channels.*received 1"),
    "wrong size": (lambda m, x: vitexplain.explain(m, x[..., :24]), InputError, r"expected height × width 32×32.*received 32×24"),
    "wrong dtype": (lambda m, x: vitexplain.explain(m, x.double()), InputError, r"expected dtype torch.float32.*received torch.float64"),
    "integer image": (lambda m, x: vitexplain.explain(m, x.to(torch.uint8)), InputError, r"expected dtype torch.float32.*torch.uint8"),
    "other device": (lambda m, x: vitexplain.explain(m, x.to("meta")), InputError, r"expected device cpu.*received meta"),
    "NaN": (lambda m, x: vitexplain.explain(m, x * float("nan")), InputError, r"expected finite values, received NaN"),
    "class too large": (lambda m, x: vitexplain.explain(m, x, 7), InputError, r"expected classes 0 to 6, received 7"),
    "negative class": (lambda m, x: vitexplain.explain(m, x, [0, -1]), InputError, r"expected classes 0 to 6, received -1"),
    "too few targets": (lambda m, x: vitexplain.explain(m, x, [1]), InputError, r"B=2; received shape \(1,\)"),
    "fractional target": (lambda m, x: vitexplain.explain(m, x, [1.5, 2.0]), InputError, r"expected integers, received torch.float32"),
    "named target": (lambda m, x: vitexplain.explain(m, x, "cat"), InputError, r"target: expected .*received 'cat'"),
    "more classes than there are": (lambda m, x: vitexplain.explain(m, x, "top99"), InputError, r"target: expected at most top\d+, as there are"),
    "ragged target": (lambda m, x: vitexplain.explain(m, x, [[1, 2], [3]]), InputError, r"target: expected"),
    "unknown method": (lambda m, x: vitexplain.explain(m, x, method="tokenm"), UnknownNameError, r"unknown method 'tokenm': did you mean tokentm"),
    "method of a wrong type": (lambda m, x: vitexplain.explain(m, x, method=[3]), InputError, r"expected a name or a Method, received int"),
    "no method": (lambda m, x: vitexplain.explain(m, x, method=[]), InputError, r"at least one method"),
    "method twice": (lambda m, x: vitexplain.explain(m, x, method=["gmar", "gmar"]), InputError, r"gmar more than once"),
    "unknown option": (lambda m, x: vitexplain.explain(m, x, method="gmar", norms="l1"), UnknownNameError, r"unknown option of gmar 'norms': did you mean norm"),
    "option out of its choices": (lambda m, x: vitexplain.explain(m, x, method="gmar", norm="l3"), InputError, r"expected one of 'l1', 'l2', received 'l3'"),
    "option of a wrong type": (lambda m, x: vitexplain.explain(m, x, necc=1), InputError, r"'necc' of tokentm: expected bool, received 1"),
    "option below its minimum": (lambda m, x: vitexplain.explain(m, x, method="gmar", alpha=-1.0), InputError, r"at least 0.0, received -1.0"),
    "start block beyond the model": (lambda m, x: vitexplain.explain(m, x, start_block=3), InputError, r"expected less than 3 \(blocks\), received 3"),
    "unknown backend": (lambda m, x: vitexplain.explain(m, x, backend="cuda"), InputError, r"expected one of auto, triton, torch, dense"),
    "unknown rows": (lambda m, x: vitexplain.explain(m, x, rows="some"), InputError, r"expected None, 'all' or 'by_block', received 'some'"),
    "rows of a method without a chain": (lambda m, x: vitexplain.explain(m, x, method="iba", rows="all"), InputError, r"chain update maps, received 'iba'"),
    "not a module": (lambda _, x: vitexplain.explain("vit", x), UnsupportedModelError, r"expected a torch.nn.Module, received str"),
    "convolutional model": (lambda _, x: vitexplain.explain(timm.create_model("resnet18"), x), UnsupportedModelError, r"received ResNet: .*without attention"),
    "hierarchical model": (lambda _, x: vitexplain.explain(timm.create_model("swin_tiny_patch4_window7_224"), x), UnsupportedModelError, r"SwinTransformer: its attention is confined to shifted windows"),
    "no classifier": (lambda _, x: vitexplain.explain(build_model(num_classes=0), x), UnsupportedModelError, r"no classifier: expected a model with logits, or score="),
    "maximum pooling": (lambda _, x: vitexplain.explain(build_model(global_pool="max"), x), UnsupportedModelError, r"maximum over patches"),
    "no pooling": (lambda _, x: vitexplain.explain(build_model(global_pool="", class_token=False), x), UnsupportedModelError, r"no pooling"),
    "parallel attentions": (lambda _, x: vitexplain.explain(build_model(block_fn=ParallelThingsBlock), x), UnsupportedModelError, r"runs 2 attentions side by side"),
    "differential attention": (lambda _, x: vitexplain.explain(build_model(block_fn=DiffParallelScalingBlock, num_heads=2), x), UnsupportedModelError, r"differential attention"),
    "normalised attention output": (lambda _, x: vitexplain.explain(build_model(scale_attn_norm=True), x), UnsupportedModelError, r"'tokentm' cannot explain block 0: a normalisation"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_input_gets_one_line_that_names_expected_and_received(model, images, name: str) -> None:
    call, kind, message = BAD_CALLS[name]
    with pytest.raises(kind, match=message) as caught:
        call(model, images)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ExplanationError)


def test_triton_is_refused_on_a_cpu_and_never_replaced(model, images, monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(InputError, match="backend 'triton' needs CUDA tensors, received tensors on 'cpu'"):
        vitexplain.explain(model, images, backend="triton")


def test_a_model_that_overflows_is_reported(model, images) -> None:
    with torch.no_grad():
        model.head.weight.mul_(1e38)
    with pytest.raises(InputError, match="expected finite logits"):
        vitexplain.explain(model, images)


def test_attention_that_does_something_else_is_refused_at_run_time(model, images, monkeypatch) -> None:
    attention = model.blocks[1].attn
    monkeypatch.setattr(attention, "forward", lambda x, **_: attention.proj(x))
    with pytest.raises(UnsupportedModelError, match=r"block 1.*received no call"):
        vitexplain.explain(model, images)
    monkeypatch.undo()


class _NoLookOnTheHost(TorchDispatchMode):
    """Refuses what a CUDA graph cannot capture: reading a value, and making a tensor of the host's values."""

    REFUSED = ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero", "aten::equal", "aten::lift_fresh")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.name() not in self.REFUSED, f"{func.name()} looks at a value on the host"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("shape", ["class_token_n17", "mean_pooling", "attention_pooling"])
@pytest.mark.parametrize("rows", [None, "all"])
def test_nothing_is_looked_at_on_the_host_while_a_graph_is_captured(monkeypatch, shape: str, rows: str | None) -> None:
    """Stands in for a capture, which needs a GPU: tests/kernels/test_gpu.py has the real one."""
    model = build_model(**MODEL_SHAPES[shape])
    images = images_for(model, 2)
    methods = [info.name for info in vitexplain.methods() if (info.all_rows if rows else info.name in METHODS)]
    explainer = vitexplain.Explainer(model, methods, rows=rows)
    target = torch.tensor([1, 2])
    expected = explainer.attribute(images, target)
    for module in ("value_checks", "targets"):
        monkeypatch.setattr(f"vitexplain.{module}.unseen", lambda _device: True)
    with _NoLookOnTheHost():
        captured = explainer.attribute(images, target)
    for name in methods:
        assert torch.equal(captured[name].maps, expected[name].maps)


def test_the_likeliest_classes_are_explained_as_if_they_had_been_named() -> None:
    model = build_model(**MODEL_SHAPES["class_token_n17"])
    images = images_for(model, 3)
    explainer = vitexplain.Explainer(model, ["tokentm", "iba"])
    found = explainer.attribute(images, "top3")
    with torch.no_grad():
        likeliest = model(images).topk(3).indices
    named = explainer.attribute(images, likeliest)
    for name in ("tokentm", "iba"):
        assert found[name].maps.shape[:2] == (3, 3)
        assert torch.equal(found[name].target, likeliest)
        assert torch.equal(found[name].maps, named[name].maps)


def test_without_checks_of_values_one_odd_image_shows_in_its_own_map_alone() -> None:
    model = build_model(**MODEL_SHAPES["class_token_n17"])
    images = images_for(model, 3)
    images[1, 0, 0, 0] = float("nan")
    explainer = vitexplain.Explainer(model, "tokentm")
    with pytest.raises(InputError, match="expected finite values"):
        explainer.attribute(images)
    with _NoLookOnTheHost():
        maps = explainer.attribute(images, check_values=False).maps
    assert torch.isfinite(maps).flatten(1).all(1).tolist() == [True, False, True]
    with pytest.raises(InputError, match="expected finite values"):  # the next call looks again
        explainer.attribute(images)


def test_one_call_takes_what_the_two_steps_take(model, images) -> None:
    steps = [vitexplain.Explainer.__init__, vitexplain.Explainer.attribute]
    taken = {name: parameter for step in steps for name, parameter in inspect.signature(step).parameters.items()}
    found = inspect.signature(vitexplain.explain).parameters
    assert {name: parameter.default for name, parameter in found.items()} == {
        name: parameter.default for name, parameter in taken.items() if name != "self"
    }
    odd = images * float("nan")
    with pytest.raises(InputError, match="expected finite values"):
        vitexplain.explain(model, odd)
    assert vitexplain.explain(model, odd, check_values=False).maps.isnan().all()
    plain = vitexplain.explain(model, images)
    assert torch.equal(vitexplain.explain(model, images, checkpoint=True).maps, plain.maps)
    for name, refused in (("compile", "fast"), ("checkpoint", 1), ("cuda_graph", 1)):
        with pytest.raises(InputError, match=f"^{name}: expected"):
            vitexplain.explain(model, images, **{name: refused})


def test_a_target_on_the_host_is_refused_while_a_graph_is_captured(monkeypatch) -> None:
    monkeypatch.setattr("vitexplain.targets.unseen", lambda _device: True)
    logits = torch.empty(2, 7, device="meta")
    with pytest.raises(InputError, match=r"expected None or a tensor on meta where values are not looked at .*received cpu"):
        resolve_target([1, 2], logits)
