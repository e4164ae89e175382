"""Relevance: what each rule hands on, what is conserved, and what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import vitexplain
from vitexplain import UnsupportedModelError
from vitexplain.kernels import relevance_backward
from vitexplain.models import read_anatomy
from vitexplain.relevance_tap import RelevanceTap
from vitexplain.rules import TABLES, RuleMode, divide
from vitexplain.testing import DenseReference

from .conftest import MODEL_SHAPES, all_tokens, build_model, images_for, relative_error


def sent_back(rules: str, function, *inputs: Tensor, relevance: Tensor | None = None) -> tuple[Tensor, ...]:
    """What arrives at each input of a function when ``relevance`` (one each) starts at its output."""
    inputs = tuple(value.clone().requires_grad_() for value in inputs)
    with RuleMode(rules, lambda *_, **__: None):
        out = function(*inputs)
    return torch.autograd.grad(out, inputs, torch.ones_like(out) if relevance is None else relevance)


def test_division_by_zero_is_zero_and_by_almost_nothing_is_guarded() -> None:
    a = torch.tensor([1.0, 1.0, 1.0, -2.0, 0.0], dtype=torch.float64)
    b = torch.tensor([0.0, 1e-9, -1e-9, 4.0, 0.0], dtype=torch.float64)
    expected = torch.tensor([0.0, 1 / 2e-9, 1 / 1e-9, -2 / (4 + 1e-9), 0.0], dtype=torch.float64)
    torch.testing.assert_close(divide(a, b), expected, rtol=1e-12, atol=0)


def test_a_linear_layer_by_hand() -> None:
    x = torch.tensor([[2.0, -1.0, 3.0]], dtype=torch.float64)
    layer = nn.Linear(3, 1).double().requires_grad_(False)
    layer.weight.copy_(torch.tensor([[1.0, -2.0, -1.0]]))
    layer.bias.fill_(100.0)  # ignored
    # x⁺w⁺ = 2, x⁻w⁻ = 2, and 3 · (−1) is left out
    (shared,) = sent_back("normalised", layer, x)
    (separate,) = sent_back("separate", layer, x)
    torch.testing.assert_close(shared, torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64), rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(separate, torch.tensor([[1.0, 1.0, 0.0]], dtype=torch.float64), rtol=1e-8, atol=1e-9)


def test_a_sum_by_hand_rescaled_image_by_image() -> None:
    p = torch.tensor([[3.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    q = torch.tensor([[1.0, -2.0], [1.0, 3.0]], dtype=torch.float64)
    plain = sent_back("separate", torch.add, p, q)
    torch.testing.assert_close(plain[0], p / (p + q), rtol=1e-7, atol=0)
    torch.testing.assert_close(plain[1], q / (p + q), rtol=1e-7, atol=0)
    first, second = sent_back("normalised", torch.add, p, q)
    sums = plain[0].sum(1).abs(), plain[1].sum(1).abs()
    torch.testing.assert_close(first.sum(1), 2 * sums[0] / (sums[0] + sums[1]), rtol=1e-6, atol=0)
    torch.testing.assert_close((first + second).sum(1), torch.full((2,), 2.0, dtype=torch.float64), rtol=1e-6, atol=0)
    alone = sent_back("normalised", torch.add, p[:1], q[:1])
    torch.testing.assert_close(alone[0], first[:1])


def test_what_carries_no_relevance_takes_its_part_of_a_sum_unless_it_is_a_bias() -> None:
    x, embedding, bias = torch.tensor([[3.0, 1.0]]), torch.tensor([[1.0, 3.0]]), torch.tensor([1.0, 3.0])
    torch.testing.assert_close(sent_back("separate", lambda v: v + embedding, x)[0], torch.tensor([[0.75, 0.25]]))
    for function in (lambda v: v + bias, lambda v: v + 3, lambda v: 3 + v, lambda v: bias + v):
        torch.testing.assert_close(sent_back("separate", function, x)[0], torch.ones(1, 2))


def test_sums_and_products_in_place_are_shared_like_any_other() -> None:
    def in_place(v: Tensor) -> Tensor:
        total = v * 1
        total += torch.tensor([[1.0, 3.0]])
        total *= 2
        return total

    torch.testing.assert_close(sent_back("separate", in_place, torch.tensor([[3.0, 1.0]]))[0], torch.tensor([[0.75, 0.25]]))


@pytest.mark.parametrize(
    "function",
    [F.gelu, torch.tanh, F.silu, lambda v: F.layer_norm(v, (4,)), lambda v: F.rms_norm(v, (4,)), lambda v: -v, lambda v: v * 2.5,
     lambda v: v / 3, lambda v: v * torch.arange(4), lambda v: F.dropout(v, 0.5, training=False)],
)  # fmt: skip
def test_normalisations_activations_and_scales_hand_relevance_on(function) -> None:
    torch.testing.assert_close(sent_back("normalised", function, torch.randn(2, 4))[0], torch.ones(2, 4))


def test_a_gate_gets_half() -> None:
    first, second = sent_back("normalised", lambda a, b: F.silu(a) * b, torch.randn(2, 4), torch.randn(2, 4))
    torch.testing.assert_close(first, torch.full((2, 4), 0.5))
    torch.testing.assert_close(second, torch.full((2, 4), 0.5))


def test_values_that_are_moved_or_averaged_keep_their_relevance() -> None:
    def function(v: Tensor) -> Tensor:
        return torch.cat([v[:, :1].reshape(2, -1), v[:, 1:].mean(1)], -1).unsqueeze(1).transpose(1, 2)

    (relevance,) = sent_back("normalised", function, torch.randn(2, 5, 3))
    torch.testing.assert_close(relevance[:, 0], torch.ones(2, 3))
    torch.testing.assert_close(relevance[:, 1:], torch.full((2, 4, 3), 0.25))


def test_broadcast_parts_are_summed() -> None:
    p, q = torch.ones(2, 3, 4), torch.ones(1, 1, 4)
    first, second = sent_back("separate", torch.add, p, q)
    torch.testing.assert_close(first, torch.full((2, 3, 4), 0.5))
    torch.testing.assert_close(second, torch.full((1, 1, 4), 3.0))


@pytest.mark.parametrize(
    ("function", "named"),
    [(torch.exp, "exp"), (lambda v: v.softmax(-1), "softmax"), (lambda v: v @ v.mT, "matmul"), (lambda v: v - 1, "sub"),
     (lambda v: v / v, "quotient"), (lambda v: F.linear(torch.ones(1, 4), v), "computed weight"),
     (lambda v: F.conv2d(F.conv2d(v[None, None], torch.ones(1, 1, 1, 1)), torch.ones(1, 1, 1, 1)), "a second one"),
     (lambda v: (v * 1).exp_(), r"in place by exp_\(\)"), (lambda v: (v * 1).__setitem__(0, v[1]), "in place by __setitem__")],
)  # fmt: skip
def test_functions_without_a_rule_are_refused_by_name(function, named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        sent_back("normalised", function, torch.randn(4, 4))


def test_functions_off_the_path_of_relevance_are_left_alone() -> None:
    torch.testing.assert_close(
        sent_back("normalised", lambda v: v * torch.arange(4.0).exp(), torch.randn(2, 4))[0], torch.ones(2, 4)
    )


@pytest.mark.parametrize("padding", [0, 1, "valid"])
def test_pixels_get_all_relevance_by_the_bounded_rule(padding) -> None:
    convolution = nn.Conv2d(3, 5, 4, stride=2, padding=padding, bias=False).double().requires_grad_(False)
    pixels = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    (relevance,) = sent_back("separate", convolution, pixels)
    assert (relevance >= -1e-9).all()
    if padding != 1:  # what is outside the image takes a part
        out = convolution(pixels)
        torch.testing.assert_close(relevance.sum((1, 2, 3)), torch.full((2,), float(out[0].numel()), dtype=torch.float64))


def test_every_table_is_one_that_a_method_uses() -> None:
    assert {kind.rules for kind in vitexplain.methods.REGISTRY.values()} - {None} == set(TABLES)


# -- conservation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["class_token_n17", "mean_pooling", "distilled", "registers_layerscale"])
def test_transformer_attribution_conserves_relevance_in_every_layer(shape: str) -> None:
    """One unit starts at the class; every block's input holds it, up to what the guards of the quotients take."""
    model = build_model(**MODEL_SHAPES[shape]).double()
    images = images_for(model, 2).double()
    blocks = len(model.blocks)
    sums = []
    with RelevanceTap(read_anatomy(model), "normalised", to_inputs=True) as tap:
        inputs: list[Tensor] = []
        handles = [
            block.register_forward_pre_hook(lambda _, args: (args[0].retain_grad(), inputs.append(args[0]))[0])
            for block in model.blocks
        ]
        try:
            logits = tap.forward(images)
            logits[torch.arange(2), logits.argmax(-1)].sum().backward()
        finally:
            for handle in handles:
                handle.remove()
        sums = [tokens.grad.flatten(1).sum(1) for tokens in inputs]
    assert len(sums) == blocks
    exact = DenseReference(model, images)
    for ours, dense in zip(sums, exact.relevance_of_inputs(lambda outputs: outputs.amax(-1)), strict=True):
        torch.testing.assert_close(ours, torch.ones(2, dtype=torch.float64), rtol=1e-4, atol=0)
        torch.testing.assert_close(dense.flatten(1).sum(1), torch.ones(2, dtype=torch.float64), rtol=1e-4, atol=0)


def test_attention_conserves_relevance() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value, relevance = (torch.randn(2, 3, 9, 8, generator=generator, dtype=torch.float64) for _ in range(4))
    scores = query @ key.mT * 8**-0.5
    out = scores.softmax(-1) @ value
    parts = relevance_backward(query, key, value, divide(relevance, out), scores.logsumexp(-1), scale=8**-0.5)[:3]
    total = sum(part.flatten(1).sum(1) for part in parts)
    torch.testing.assert_close(total, relevance.flatten(1).sum(1), rtol=1e-5, atol=0)


def _without_biases(model: VisionTransformer) -> VisionTransformer:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    return model


@pytest.mark.parametrize("shape", ["class_token_n17", "mean_pooling", "distilled", "registers_layerscale", "attention_pooling"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_conservative_lrp_is_complete_without_biases(shape: str, dtype: torch.dtype) -> None:
    model = build_model(**MODEL_SHAPES[shape])
    if model.attn_pool is not None:  # its latent query is added to nothing, but its MLP's residual is part of the sum
        nn.init.zeros_(model.attn_pool.latent)
    model = _without_biases(model).to(dtype)
    images = images_for(model, 3).to(dtype)
    result = vitexplain.explain(model, images, [1, 2, 3], method="conservative_lrp")
    logits = result.logits[torch.arange(3), result.target]
    torch.testing.assert_close(all_tokens(result).sum(1).double(), logits.double(), rtol=1e-4, atol=1e-5)


def test_conservative_lrp_is_complete_with_gates() -> None:
    from vitexplain.testing.families import FAMILY_CASES

    model = _without_biases(next(case for case in FAMILY_CASES if "SwiGLU" in case.family and case.package == "timm").model())
    result = vitexplain.explain(model, torch.randn(2, 3, 32, 32, dtype=torch.float64), 3, method="conservative_lrp")
    torch.testing.assert_close(all_tokens(result).sum(1).double(), result.logits[:, 3], rtol=1e-5, atol=1e-6)


# -- the pass --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_model_is_widened(dtype: torch.dtype) -> None:
    """Relevance is float32: the map is that of the same weights in float32."""
    model = build_model().to(dtype)
    images = images_for(model, 2).to(dtype)
    methods = ["conservative_lrp", "partial_lrp", "lrp"]
    half = vitexplain.explain(model, images, 3, method=methods)
    widened = vitexplain.explain(build_model().to(dtype).float(), images.float(), 3, method=methods)
    for name in methods:
        assert relative_error(half[name].maps, widened[name].maps) <= 1e-6, name
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = vitexplain.explain(build_model(), images.float(), 3, method="conservative_lrp")
    exact = vitexplain.explain(build_model(), images.float(), 3, method="conservative_lrp")
    assert relative_error(ours.maps, exact.maps) <= 1e-6


def test_methods_of_the_same_rules_share_a_pass() -> None:
    model = build_model()
    calls: list[int] = []
    handle = model.blocks[0].attn.qkv.register_forward_hook(lambda *_: calls.append(1))
    together = vitexplain.explain(model, images_for(model, 2), [[1, 2], [3, 4]], method=["lrp", "partial_lrp"])
    handle.remove()
    assert len(calls) == 1
    alone = vitexplain.explain(model, images_for(model, 2), [[1, 2], [3, 4]], method="partial_lrp")
    assert relative_error(together["partial_lrp"].maps, alone.maps) <= 1e-5
    assert together["lrp"].maps.shape == (2, 2, 32, 32)
    assert together["lrp"].prefix_values.shape == (2, 2, 0)


def test_nothing_is_propagated_below_the_first_block_that_is_looked_at(monkeypatch) -> None:
    looked_at: list[int] = []

    def counted(*args, **kwargs):
        looked_at.append(1)
        return relevance_backward(*args, **kwargs)

    monkeypatch.setattr("vitexplain.relevance.relevance_backward", counted)
    monkeypatch.setattr("vitexplain.relevance_tap.relevance_backward", counted)
    model = build_model()
    for options, expected in (({"method": "partial_lrp"}, 0), ({"method": "transformer_attribution", "start_block": 1}, 1),
                              ({"method": "transformer_attribution"}, 2), ({"method": "lrp"}, 3)):  # fmt: skip
        looked_at.clear()
        vitexplain.explain(model, images_for(model, 1), **options)
        assert len(looked_at) == expected, options


def test_a_model_with_a_function_without_a_rule_is_refused_by_name_and_left_as_it_was() -> None:
    model = build_model()
    model.blocks[1].mlp.act = nn.Softmax(-1)
    images = images_for(model, 1)
    for name in ("transformer_attribution", "lrp"):
        with pytest.raises(UnsupportedModelError, match=r"no rule for softmax\(\)"):
            vitexplain.explain(model, images, method=name)
    assert not any(parameter.grad is not None or not parameter.requires_grad for parameter in model.parameters())
    assert torch.isfinite(vitexplain.explain(model, images).maps).all()


def test_convolutional_stems_have_no_relevance_to_pixels() -> None:
    import timm

    model = timm.create_model("vit_tiny_r_s16_p8_224", depth=1).eval()
    images = torch.randn(1, 3, 224, 224)
    with pytest.raises(UnsupportedModelError, match=r"no rule for|a second one"):
        vitexplain.explain(model, images, method="lrp")
    assert vitexplain.explain(model, images, method="transformer_attribution").maps.shape == (1, 7, 7)
