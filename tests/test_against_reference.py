"""Every method against the dense float64 reference, on models of every shape."""

from __future__ import annotations

import itertools

import pytest
import torch
from timm.models.vision_transformer import ParallelScalingBlock, ResPostBlock
from torch.utils._python_dispatch import TorchDispatchMode

import vitexplain
from vitexplain.kernels.attention_backward.choose import ONE_PASS, TWO_PASSES, forced
from vitexplain.testing import DenseReference

from .conftest import (
    METHODS,
    MODEL_SHAPES,
    PLAIN_METHODS,
    REFERENCED_METHODS,
    all_tokens,
    build_model,
    images_for,
    relative_error,
    rms_error,
)

CHAIN_METHODS = [info.name for info in vitexplain.methods() if info.all_rows]
# The reference's cost goes with the square of the tokens: two images of the longest sequence, the fewest that are a batch.
BATCHES = [(shape, batch) for shape in MODEL_SHAPES for batch in ((2,) if shape == "n1025" else (1, 3))]
FEW_STEPS = {"steps": 3}  # of an integral, in which each step is a whole run; the usual number is asked for among the options


@pytest.mark.parametrize(("shape", "batch"), BATCHES)
def test_all_methods_agree_with_the_reference_in_float32(shape: str, batch: int) -> None:
    model = build_model(**MODEL_SHAPES[shape])
    images = images_for(model, batch)
    together = vitexplain.explain(model, images, method=PLAIN_METHODS)
    dense = vitexplain.explain(model, images, method=PLAIN_METHODS, backend="dense")
    for name in PLAIN_METHODS:
        assert together[name].maps.shape == (batch, *model.patch_embed.grid_size)
        assert together[name].maps.dtype == torch.float32
        assert relative_error(all_tokens(together[name]), all_tokens(dense[name])) <= 1e-5, name


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("shape", ["class_token_n17", "mean_pooling", "distilled", "attention_pooling"])
def test_a_method_alone_gives_what_it_gives_in_company(shape: str, name: str) -> None:
    model = build_model(**MODEL_SHAPES[shape])
    images = images_for(model, 2)
    alone = vitexplain.explain(model, images, method=name)
    company = vitexplain.explain(model, images, method=METHODS)[name]
    assert relative_error(alone.maps, company.maps) <= 1e-5


@pytest.mark.parametrize("shape", MODEL_SHAPES)
def test_in_float64_only_the_final_rounding_differs(shape: str) -> None:
    model = build_model(**MODEL_SHAPES[shape]).double()
    images = images_for(model, 1 if shape == "n1025" else 2).double()
    ours = vitexplain.explain(model, images, method=REFERENCED_METHODS, **FEW_STEPS)
    dense = vitexplain.explain(model, images, method=REFERENCED_METHODS, backend="dense", **FEW_STEPS)
    for name in REFERENCED_METHODS:
        # LRP divides by sums that cancel to almost nothing: rounding grows a millionfold on the larger random models
        limit = 1e-5 if name in ("lrp", "partial_lrp") else 2.4e-7
        assert relative_error(ours[name].maps, dense[name].maps) <= limit, name


@pytest.mark.parametrize("shape", MODEL_SHAPES)
def test_relevance_in_float32_is_no_further_off_than_plain_torch(shape: str) -> None:
    model = build_model(**MODEL_SHAPES[shape])
    images = images_for(model, 3 if shape == "n1025" else 8)
    reference, plain = DenseReference(model, images), DenseReference(model, images, dtype=torch.float32)
    target = reference.logits.argmax(-1)
    for name in ("transformer_attribution", "partial_lrp", "lrp", "conservative_lrp"):
        precision = {} if name == "conservative_lrp" else {"precision": "float32"}
        explanation = vitexplain.explain(model, images, target=target, method=name, **precision)
        exact = reference.explain(name, target)
        ours = explanation.maps if explanation.maps.shape == exact.shape else all_tokens(explanation)
        # image by image, and the median: where a quotient is 0 / 0 up to rounding, one image is lost to both
        error, eager = (_by_image(values, exact).median() for values in (ours, plain.explain(name, target)))
        assert torch.isfinite(explanation.maps).all(), name
        assert error <= 4 * eager + 1e-5, f"{name}: error {error:.2e}, plain torch {eager:.2e}"


def _by_image(values: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    difference = (values.double() - exact).flatten(1).norm(dim=1)
    return difference / exact.flatten(1).norm(dim=1).clamp_min(1e-300)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", ["class_token_n17", "registers_layerscale", "mean_pooling"])
def test_low_precision_stays_within_the_error_budget(shape: str, dtype: torch.dtype) -> None:
    model = build_model(**MODEL_SHAPES[shape]).to(dtype)
    images = images_for(model, 8).to(dtype)
    reference, plain = DenseReference(model, images), DenseReference(model, images, dtype=dtype)
    target = reference.logits.argmax(-1)
    ours = vitexplain.explain(model, images, target=target, method=PLAIN_METHODS)
    eps = torch.finfo(dtype).eps
    for name in PLAIN_METHODS:
        exact = reference.explain(name, target)
        eager = rms_error(plain.explain(name, target), exact)
        error = rms_error(all_tokens(ours[name]), exact)
        assert torch.isfinite(ours[name].maps).all()
        assert error <= 2 * eager + eps, f"{name}: error {error:.2e}, plain {dtype} torch {eager:.2e}"


def _option_cases() -> list[tuple[str, dict[str, object]]]:
    switches = [
        dict(zip(("aggregate", "length", "necc"), values, strict=True)) for values in itertools.product((True, False), repeat=3)
    ]
    return [
        *(("tokentm", options) for options in switches),
        ("tokentm", {"score": "probability"}),
        ("tokentm", {"necc_scale": "n"}),
        ("tokentm", {"start_block": 1}),
        ("tokentm", {"start_block": 2, "length": False}),
        *(
            ("gmar", {"norm": norm, "alpha": alpha, "normalize": normalize})
            for norm, alpha, normalize in itertools.product(("l1", "l2"), (1.0, 0.3), (True, False))
        ),
        ("gmar", {"start_block": 1, "alpha": 0.0}),
        *(("iba", {"relevance": relevance}) for relevance in ("gradient", "gain", "probability", "uniform")),
        ("rollout", {"start_block": 1}),
        ("transformer_mm", {"start_block": 2}),
        ("transformer_attribution", {"start_block": 1}),
        ("integrated_gradients", {"steps": 3}),
        ("integrated_gradients", {"baseline": 0.5}),
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "options"), _option_cases(), ids=str)
@pytest.mark.parametrize("shape", ["registers_layerscale", "mean_pooling", "distilled"])
def test_every_option_agrees_with_the_reference(shape: str, name: str, options: dict[str, object]) -> None:
    model = build_model(**MODEL_SHAPES[shape]).double()
    images = images_for(model, 2).double()
    ours = vitexplain.explain(model, images, method=name, **options)
    dense = vitexplain.explain(model, images, method=name, backend="dense", **options)
    assert relative_error(ours.maps, dense.maps) <= 1e-6


def test_every_option_changes_the_map() -> None:
    model = build_model()
    images = images_for(model, 2)
    for name, options in _option_cases():
        differs = {
            key: value for key, value in options.items() if value != vitexplain.methods.REGISTRY[name]().__getattribute__(key)
        }
        if differs:
            default, changed = (
                vitexplain.explain(model, images, method=name),
                vitexplain.explain(model, images, method=name, **options),
            )
            assert relative_error(changed.maps, default.maps) > 1e-4, (name, options)


@pytest.mark.parametrize("name", CHAIN_METHODS)
@pytest.mark.parametrize("shape", ["registers_layerscale", "mean_pooling", "one_block"])
def test_all_rows_agree_with_the_reference_and_contain_the_map(shape: str, name: str) -> None:
    model = build_model(**MODEL_SHAPES[shape])
    images = images_for(model, 2)
    ours = vitexplain.explain(model, images, method=name, rows="all")
    dense = vitexplain.explain(model, images, method=name, rows="all", backend="dense")
    n = model.patch_embed.num_patches + model.num_prefix_tokens
    assert ours.contribution.shape == (2, n, n)
    assert relative_error(ours.contribution, dense.contribution) <= 1e-5
    one_row = vitexplain.explain(model, images, method=name)
    assert relative_error(ours.maps, one_row.maps) <= 1e-5
    assert one_row.contribution is None


def test_rollout_rows_sum_to_one() -> None:
    model = build_model(reg_tokens=2)
    contribution = vitexplain.explain(model, images_for(model, 2), method="rollout", rows="all").contribution
    torch.testing.assert_close(contribution.sum(-1), torch.ones_like(contribution[..., 0]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", METHODS)
def test_moving_the_patches_moves_the_map(name: str) -> None:
    model = build_model(pos_embed="none")
    images = images_for(model, 1)
    patches = images.unfold(2, 8, 8).unfold(3, 8, 8).reshape(1, 3, 16, 8, 8)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    moved = patches[:, :, order].reshape(1, 3, 4, 4, 8, 8).permute(0, 1, 2, 4, 3, 5).reshape(1, 3, 32, 32)
    before = vitexplain.explain(model, images, method=name).maps.flatten()
    after = vitexplain.explain(model, moved, method=name).maps.flatten()
    assert relative_error(after, before[order]) <= 1e-5


@pytest.mark.parametrize("block_fn", [ResPostBlock, ParallelScalingBlock])
def test_blocks_without_separate_branches_get_the_methods_that_need_none(block_fn: type) -> None:
    model = build_model(block_fn=block_fn)
    images = images_for(model, 2)
    methods = [name for name in PLAIN_METHODS if name not in ("tokentm", "cdam")]
    ours = vitexplain.explain(model, images, method=methods)
    dense = vitexplain.explain(model, images, method=methods, backend="dense")
    for name in methods:
        assert relative_error(all_tokens(ours[name]), all_tokens(dense[name])) <= 1e-5, name
    with pytest.raises(vitexplain.UnsupportedModelError, match=f"tokentm.*{block_fn.__name__}"):
        vitexplain.Explainer(model, "tokentm")


@pytest.mark.parametrize("size", [(48, 48), (32, 64)])
def test_dynamic_image_sizes_give_their_own_grid(size: tuple[int, int]) -> None:
    model = build_model(dynamic_img_size=True).double()
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    ours = vitexplain.explain(model, images, method=METHODS)
    dense = vitexplain.explain(model, images, method=METHODS, backend="dense")
    for name in METHODS:
        assert ours[name].maps.shape == (2, size[0] // 8, size[1] // 8)
        assert relative_error(ours[name].maps, dense[name].maps) <= 1e-6, name


@pytest.mark.parametrize("shape", MODEL_SHAPES)
def test_one_backward_pass_gives_what_two_give(shape: str) -> None:
    """The row step beside the attention's own backward, where a table of measurements says so, changes nothing but rounding."""
    model = build_model(**MODEL_SHAPES[shape])
    images = images_for(model, 2)
    gradient_methods = ["tokentm", "gmar", "transformer_mm"]
    results = {}
    for choice in (ONE_PASS, TWO_PASSES):
        calls = OnePassCalls()
        with forced(choice), calls:
            results[choice] = vitexplain.explain(model, images, method=gradient_methods)
        # in the last block of a class-token head, and in the first, whose inputs need no gradient, there is nothing to share
        expected = max(0, len(model.blocks) - (2 if model.attn_pool is None and model.global_pool != "avg" else 1))
        assert calls.number == (expected if choice == ONE_PASS else 0)
    for name in gradient_methods:
        assert relative_error(all_tokens(results[ONE_PASS][name]), all_tokens(results[TWO_PASSES][name])) <= 1e-5


class OnePassCalls(TorchDispatchMode):
    """Counts calls of the one-pass operator."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += func.name() == "vitexplain::attention_backward"
        return func(*args, **(kwargs or {}))
