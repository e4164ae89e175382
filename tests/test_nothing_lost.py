"""What went wrong once: graphs kept alive, gaps in memory, in-place changes, compiled blocks, and models that do odd things."""

from __future__ import annotations

import gc

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block, ParallelScalingBlock
from torch import Tensor, nn

import vitexplain
from vitexplain import Anatomy, BlockAnatomy, InputError, UnsupportedModelError
from vitexplain.fused_attention import attention_backward, attention_forward
from vitexplain.tap import BlockTrace

from .conftest import ALL_METHODS, METHODS, MODEL_SHAPES, PLAIN_METHODS, build_model, images_for, relative_error
from .test_families import CASES


@pytest.mark.parametrize("shape", ["class_token_n17", "mean_pooling"])
@pytest.mark.parametrize("name", [name for name in METHODS if name != "integrated_gradients"] + ["lrp", "partial_lrp"])
def test_no_explanation_keeps_its_graph_alive(shape: str, name: str) -> None:
    """Without a garbage collector's help: on a GPU memory would run out before it comes round."""
    model = build_model(**MODEL_SHAPES[shape])
    images = images_for(model, 1)
    gc.freeze()  # what was there before is not looked at
    gc.disable()
    try:
        result = vitexplain.explain(model, images, [[1, 2]], method=name)
        alive = sum(type(item) is BlockTrace for item in gc.get_objects())
    finally:
        gc.enable()
        gc.unfreeze()
    assert alive == 0
    assert not result.maps.requires_grad


def test_nothing_is_kept_alive_after_an_exception(model, images) -> None:
    gc.collect()
    with pytest.raises(InputError):
        vitexplain.explain(model, images, 99, method=["attcat", "cdam", "lrp"])
    gc.collect()
    assert not any(type(item) is BlockTrace for item in gc.get_objects())


@pytest.mark.parametrize("widths", [(8, 8), (8, 6), (6, 10)])
def test_gaps_between_elements_and_other_value_widths(widths: tuple[int, int]) -> None:
    """The operator behind the fused attention reads rows without gaps, of one width; others it reads wrongly."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 3, widths[0], 10, generator=generator, dtype=torch.float64).mT for _ in range(2))
    value = torch.randn(2, 3, widths[1], 10, generator=generator, dtype=torch.float64).mT
    grad_out = torch.randn(2, 3, widths[1], 10, generator=generator, dtype=torch.float64).mT
    leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    expected = (leaves[0] @ leaves[1].mT * 0.4).softmax(-1) @ leaves[2]
    out, state = attention_forward(query, key, value, 0.4)
    torch.testing.assert_close(out, expected.detach())
    gradients = attention_backward(grad_out, query, key, value, out, state, 0.4)
    for ours, exact in zip(gradients, torch.autograd.grad(expected, leaves, grad_out), strict=True):
        torch.testing.assert_close(ours, exact)


class InterleavedAttention(nn.Module):
    """Heads are the last axis of the packed projection: queries, keys and values have gaps."""

    def __init__(self) -> None:
        super().__init__()
        self.packed, self.out = nn.Linear(24, 72), nn.Linear(24, 24)

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = self.packed(tokens).unflatten(-1, (3, 6, 4)).permute(2, 0, 4, 1, 3)
        out = F.scaled_dot_product_attention(query, key, value)
        return self.out(out.transpose(1, 2).flatten(2))


class InterleavedModel(nn.Module):
    """One layer of it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention, self.head = nn.Conv2d(3, 24, 8, stride=8), InterleavedAttention(), nn.Linear(24, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.attention(self.embed(images).flatten(2).transpose(1, 2))[:, 0])


def test_a_model_whose_heads_are_interleaved_computes_what_it_computes_alone() -> None:
    torch.manual_seed(0)
    model = InterleavedModel().eval()
    anatomy = Anatomy(
        model=model,
        blocks=(BlockAnatomy(model.attention, model.attention),),
        num_classes=5,
        head=lambda tokens: model.head(tokens[:, 0]),
        grid=lambda height, width: (height // 8, width // 8),
        num_prefix_tokens=0,
    )
    images = torch.randn(2, 3, 32, 32)
    for method in ("gmar", "transformer_attribution"):
        result = vitexplain.explain(model, images, method=method, anatomy=anatomy)
        torch.testing.assert_close(result.logits, model(images).detach())


def test_an_attention_pool_set_to_separate_products_is_read_all_the_same() -> None:
    model = build_model(**MODEL_SHAPES["attention_pooling"])
    images = images_for(model, 2)
    expected = vitexplain.explain(model, images, method=METHODS)
    model.attn_pool.fused_attn = False
    ours = vitexplain.explain(model, images, method=METHODS)
    assert model.attn_pool.fused_attn is False
    for name in METHODS:
        assert relative_error(ours[name].maps, expected[name].maps) <= 1e-5, name


def test_an_attention_pool_without_an_attention_call_is_refused(monkeypatch) -> None:
    model = build_model(**MODEL_SHAPES["attention_pooling"])
    monkeypatch.setattr(model.attn_pool, "forward", lambda tokens, **_: tokens.mean(1))
    with pytest.raises(UnsupportedModelError, match=r"attention pool.*received no call"):
        vitexplain.explain(model, images_for(model, 1))


class InPlaceBlock(Block):
    """Changes a tensor, and goes on with it; torch itself has no gradient of that."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:  # noqa: ARG002
        x = x + self.attn(self.norm1(x))
        x.add_(self.mlp(self.norm2(x)))
        return x


def test_changes_in_place_are_refused_or_right() -> None:
    model = build_model(block_fn=InPlaceBlock)
    images = images_for(model, 2)
    for name in ("partial_lrp", "lrp"):
        with pytest.raises(UnsupportedModelError, match="changes one in place and goes on with it"):
            vitexplain.explain(model, images, method=name)
    with pytest.raises(UnsupportedModelError, match="expected it to call the modules before and after its MLP branch"):
        vitexplain.explain(model, images, method="tokentm")
    torch.testing.assert_close(vitexplain.explain(model, images, method="rollout").logits, model(images).detach())


def test_cdam_needs_an_attention_of_its_own() -> None:
    model = build_model(block_fn=ParallelScalingBlock)
    with pytest.raises(UnsupportedModelError, match=r"cdam.*ParallelScalingBlock: its attention is not a module of its own"):
        vitexplain.Explainer(model, "cdam")


def test_models_and_blocks_compiled_in_place(model, images) -> None:
    expected = vitexplain.explain(model, images, method=PLAIN_METHODS)
    whole, parts = build_model(), build_model()
    whole.compile(backend="eager")
    for block in parts.blocks:
        block.compile(backend="eager")
    for compiled in (whole, parts):
        ours = vitexplain.explain(compiled, images, method=PLAIN_METHODS)
        for name in PLAIN_METHODS:
            assert relative_error(ours[name].maps, expected[name].maps) <= 1e-5, name


def test_targets_made_in_inference_mode_and_of_any_integer_type(model, images) -> None:
    with torch.inference_mode():
        target = model(images).argmax(-1)
        ours = vitexplain.explain(model, images, target, method=ALL_METHODS, steps=2, samples=2)
    expected = vitexplain.explain(model, images, method="gmar")
    assert torch.equal(ours["gmar"].target, expected.target)
    assert torch.equal(vitexplain.explain(model, images, target.to(torch.uint16)).target, expected.target)


def test_a_model_built_in_inference_mode_is_refused() -> None:
    with torch.inference_mode():
        model = build_model()
    with pytest.raises(UnsupportedModelError, match="built in inference mode"):
        vitexplain.Explainer(model)


@pytest.mark.parametrize("name", [name for name in CASES if "padded" in name])
def test_texts_that_a_model_cannot_take(name: str) -> None:
    pytest.importorskip("transformers", reason="transformers is an extra, and is not installed")
    case = CASES[name]
    model, inputs = case.model(torch.float32), case.inputs()
    with pytest.raises(InputError, match="input_ids: expected 0 to 49, received 5 to 50"):
        vitexplain.explain(model, {"input_ids": torch.tensor([[5, 50]])})
    with pytest.raises(InputError, match=r"at most [0-9]+ tokens a text for this model, received 40"):
        vitexplain.explain(model, {"input_ids": torch.full((1, 40), 7)})
    with pytest.raises(InputError, match=r"expected integers \(B, n\)"):
        vitexplain.explain(model, {"input_ids": inputs["input_ids"].bool()})
    expected = vitexplain.explain(model, inputs, method=["tokentm", "legrad"])
    for layer in model.base_model.encoder.layer:
        layer.chunk_size_feed_forward = 4
    ours = vitexplain.explain(model, inputs, method=["tokentm", "legrad"])
    for method in ours:
        assert relative_error(ours[method].maps, expected[method].maps) <= 1e-5
    assert model.base_model.encoder.layer[0].chunk_size_feed_forward == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pixels_are_reached_behind_casts_and_padding(dtype: torch.dtype) -> None:
    pytest.importorskip("transformers", reason="transformers is an extra, and is not installed")
    case = CASES["transformers DINOv2"]
    assert torch.isfinite(vitexplain.explain(case.model(dtype), case.inputs(dtype), method="lrp").maps).all()
    padded = timm.create_model("vit_tiny_patch16_224", depth=1, dynamic_img_size=True, dynamic_img_pad=True).eval().to(dtype)
    result = vitexplain.explain(padded, torch.randn(1, 3, 60, 60).to(dtype), method=["lrp", "gmar"])
    assert result["lrp"].maps.shape == (1, 60, 60)
    assert result["gmar"].maps.shape == (1, 4, 4)


def test_nested_configurations_keep_their_attention() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is an extra, and is not installed")
    case = CASES["transformers CLIP, classifier"]
    model = case.model(torch.float32)
    model.config.text_config._attn_implementation = "eager"
    assert isinstance(model, transformers.CLIPForImageClassification)
    vitexplain.explain(model, case.inputs(torch.float32), method="rollout")
    assert model.config.text_config._attn_implementation == "eager"
    assert model.config.vision_config._attn_implementation == "sdpa"
