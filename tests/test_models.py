"""Real timm architectures, as timm builds them."""

from __future__ import annotations

import pytest
import timm
import torch

import vitexplain
from vitexplain.models import read_anatomy

from .conftest import METHODS, all_tokens, relative_error

ARCHITECTURES = {
    "test_vit": 1,
    "test_vit2": 1,
    "test_vit3": 1,
    "deit_tiny_distilled_patch16_224": 2,
    "vit_tiny_r_s16_p8_224": 1,
    "vit_wee_patch16_reg1_gap_256": 1,
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_timm_architectures_agree_with_the_reference(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name).eval().double()  # with timm's small initial weights signed maps cancel to rounding in float32
    assert read_anatomy(model).num_prefix_tokens == ARCHITECTURES[name]
    images = torch.randn(1, 3, *model.patch_embed.img_size, dtype=torch.float64)
    ours = vitexplain.explain(model, images, method=METHODS)
    dense = vitexplain.explain(model, images, target=ours["gmar"].target, method=METHODS, backend="dense")
    for method in METHODS:
        assert ours[method].maps.shape[1:] == tuple(model.patch_embed.grid_size)
        assert relative_error(all_tokens(ours[method]), all_tokens(dense[method])) <= 1e-6, method


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("vit_small_patch16_18x2_224", "runs 2 attentions side by side"),
        ("vit_dpwee_patch16_reg1_gap_256", "differential attention"),
    ],
)
def test_architectures_with_several_maps_a_block_are_refused(name: str, reason: str) -> None:
    with pytest.raises(vitexplain.UnsupportedModelError, match=reason):
        vitexplain.Explainer(timm.create_model(name))
