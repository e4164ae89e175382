"""Maps that the original authors' code gives, on a small model."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer

import vitexplain
from vitexplain.heatmap import min_max

from .conftest import relative_error

CASES = {
    "raw_attention": ("raw_attention", {}),
    "rollout": ("rollout", {}),
    "rollout_start1": ("rollout", {"start_block": 1}),
    "grad_cam_minmax": ("grad_cam", {}),
}


@pytest.fixture(scope="module")
def golden(shared):
    config = json.loads(shared("goldens/a/config.json").read_text())
    with np.load(shared("goldens/a/expected.npz")) as archive:
        expected = {name: torch.from_numpy(value) for name, value in archive.items()}
    model = VisionTransformer(
        img_size=config["img"], patch_size=config["patch"], embed_dim=config["dim"], depth=config["depth"],
        num_heads=config["heads"], num_classes=config["classes"],
    )  # fmt: skip
    model.load_state_dict(load_file(shared("goldens/a/weights.safetensors")))
    return model.eval(), expected


@pytest.mark.parametrize("backend", ["torch", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_maps_of_the_authors_code(golden, name: str, dtype: torch.dtype, backend: str) -> None:
    model, expected = golden
    method, options = CASES[name]
    images = expected["images"].to(dtype)
    ours = vitexplain.explain(model.to(dtype), images, target=expected["target"], method=method, backend=backend, **options)
    maps = min_max(ours.maps) if name == "grad_cam_minmax" else ours.maps
    assert relative_error(ours.logits, expected["logits"]) <= 1e-5
    assert relative_error(maps.flatten(), expected[name].flatten()) <= 1e-5
