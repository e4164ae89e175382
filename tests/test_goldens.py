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
from vitexplain.testing import DenseReference

from .conftest import relative_error

CASES = {
    "raw_attention": ("raw_attention", {}),
    "rollout": ("rollout", {}),
    "rollout_start1": ("rollout", {"start_block": 1}),
    "grad_cam_minmax": ("grad_cam", {}),
}
RELEVANCE_CASES = {
    "transformer_attribution": ("transformer_attribution", {}),
    "transformer_attribution_start1": ("transformer_attribution", {"start_block": 1}),
    "partial_lrp": ("partial_lrp", {}),
    "lrp": ("lrp", {}),
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


@pytest.mark.parametrize("batch", ["both images at once", "one by one"])
@pytest.mark.parametrize("backend", ["torch", "dense"])
@pytest.mark.parametrize("name", RELEVANCE_CASES)
def test_relevance_of_the_authors_code(golden, name: str, backend: str, batch: str) -> None:
    """The authors' code takes one image at a time; sums are per image here, so that a batch gives the same."""
    model, expected = golden
    method, options = RELEVANCE_CASES[name]
    explainer = vitexplain.Explainer(model.double(), method, backend, **options)
    images, target = expected["images"].double(), expected["target"]
    parts = [(images, target)] if batch == "both images at once" else list(zip(images.split(1), target.split(1), strict=True))
    maps = torch.cat([explainer.attribute(*part).maps for part in parts])
    assert relative_error(maps.flatten(), expected[name].flatten()) <= 1e-5


@pytest.mark.parametrize("name", RELEVANCE_CASES)
def test_relevance_of_the_authors_code_in_float32(golden, name: str) -> None:
    """Sums of activations that cancel are divided by: in float32 plain torch is 1 % off, and tiles may be no further."""
    model, expected = golden
    method, options = RELEVANCE_CASES[name]
    images, target = expected["images"].float(), expected["target"]
    ours = vitexplain.explain(model.float(), images, target=target, method=method, precision="float32", **options).maps
    plain = DenseReference(model, images, dtype=torch.float32).explain(method, target, **options)
    plain = plain if plain.dim() == 3 else plain[:, model.num_prefix_tokens :]
    budget = 2 * relative_error(plain.flatten(), expected[name].flatten()) + 1e-5
    assert relative_error(ours.flatten(), expected[name].flatten()) <= budget <= 0.05


@pytest.mark.parametrize("name", RELEVANCE_CASES)
def test_relevance_of_a_float32_model_is_exact_on_a_cpu(golden, name: str) -> None:
    """The pass runs in float64 there, whatever the model's element type."""
    model, expected = golden
    method, options = RELEVANCE_CASES[name]
    images, target = expected["images"].float(), expected["target"]
    ours = vitexplain.explain(model.float(), images, target=target, method=method, **options)
    assert relative_error(ours.maps.flatten(), expected[name].flatten()) <= 1e-5
    assert ours.logits.dtype == torch.float32
