"""A few small cases whose time is compared with the last time.

pytest tests/bench/test_regressions.py --benchmark-autosave --benchmark-compare

Without these options, and in parallel processes, they check results alone.
"""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import vitexplain
from bench.layer import Layer, LayerSize, one_pass
from vitexplain import Explainer, kernels
from vitexplain.loading import Preprocess
from vitexplain.photos import decode_photo
from vitexplain.testing import DenseReference, relative_error

from ..conftest import all_tokens, build_model, images_for

GEOMETRY = {"input_size": (3, 224, 224), "interpolation": "bicubic", "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 0.9}


@pytest.fixture(scope="module")
def model() -> VisionTransformer:
    return build_model(img_size=112, patch_size=16, embed_dim=96, depth=4, num_heads=4).requires_grad_(False)


@pytest.fixture(scope="module")
def images(model: VisionTransformer) -> Tensor:
    return images_for(model, 4)


@pytest.fixture(scope="module")
def layer() -> Layer:
    return Layer(LayerSize(batch=2, heads=3, tokens=130, head_dim=32), torch.float32, torch.device("cpu"))


@pytest.fixture(scope="module")
def photo() -> bytes:
    """An encoded photo of a usual shape: a gradient with noise."""
    noise = np.random.default_rng(0).integers(0, 64, (375, 500, 3))
    ramp = np.linspace(0, 190, 500).astype(np.int64)[None, :, None]
    stream = io.BytesIO()
    Image.fromarray((noise + ramp).astype(np.uint8)).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def _dense_update(layer: Layer) -> tuple[Tensor, Tensor]:
    """P·relu(G) of every head and G, in float64."""
    query, key, value, grad_out = (
        part.double() for part in (layer.query, layer.key, layer.value, layer.grad_out)
    )  # fmt: skip
    gradient = grad_out @ value.transpose(-1, -2)
    return (query @ key.transpose(-1, -2) * layer.scale).softmax(-1) * gradient.relu(), gradient


@pytest.mark.parametrize("method", ["tokentm", "gmar", "rollout", "iba"])
def test_attribute(benchmark, model: VisionTransformer, images: Tensor, method: str) -> None:
    found = benchmark(Explainer(model, method).attribute, images)
    exact = DenseReference(model, images).explain(method, found.target)
    assert relative_error(all_tokens(found), exact.flatten(1)) < 1e-5


def test_row_propagation(benchmark, layer: Layer) -> None:
    weighed = {"value": layer.value, "grad_out": layer.grad_out, "token_weights": layer.token_weights}
    inputs = layer.query, layer.key, layer.logsumexp, layer.row
    row = benchmark(kernels.row_propagation, *inputs, phi="p_relu_g", scale=layer.scale, **weighed)
    update, _ = _dense_update(layer)
    exact = layer.row.double() @ (update * layer.token_weights.double().unsqueeze(2)).mean(1)
    assert relative_error(row, exact) < 1e-5


def test_head_norms(benchmark, layer: Layer) -> None:
    norms = benchmark(kernels.head_norms, layer.value, layer.grad_out)
    assert relative_error(norms, _dense_update(layer)[1].abs().sum((-1, -2))) < 1e-5


def test_token_transformation(benchmark, layer: Layer) -> None:
    weights = benchmark(kernels.token_transformation, layer.tokens, layer.moved)
    tokens, moved = layer.tokens.double(), layer.moved.double()
    cosine = torch.nn.functional.cosine_similarity(tokens, moved, dim=-1)
    assert relative_error(weights, moved.norm(dim=-1) / tokens.norm(dim=-1) * cosine.softmax(-1)) < 1e-5


def test_attention_backward(benchmark, layer: Layer) -> None:
    *_, row = benchmark(one_pass, layer)
    exact = torch.einsum("bi,bhij->bhj", layer.row[:, 0].double(), _dense_update(layer)[0])
    assert relative_error(row, exact) < 1e-5


def test_reading_a_photo(benchmark, photo: bytes) -> None:
    preprocess = Preprocess(GEOMETRY)
    seen = benchmark(lambda: preprocess.seen(decode_photo(io.BytesIO(photo), "a photo").image))
    assert (seen.shape, seen.dtype) == ((3, 224, 224), torch.uint8)
    assert seen[..., -32:].float().mean() > seen[..., :32].float().mean() + 100, "it is brighter to the right"


def test_overlay(benchmark, model: VisionTransformer, images: Tensor, photo: bytes) -> None:
    found, picture = vitexplain.explain(model, images, method="rollout"), Image.open(io.BytesIO(photo))
    overlay = benchmark(found.overlay, picture)
    assert overlay.size == picture.size
    assert np.abs(np.asarray(overlay, int) - np.asarray(picture, int)).mean() > 5
