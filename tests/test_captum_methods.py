"""The adapters over captum: what they compute, and what is said where captum is missing."""

from __future__ import annotations

import copy
import sys

import pytest
import torch

import vitexplain
from vitexplain import InputError, UnsupportedModelError, margin

from .conftest import MODEL_SHAPES, build_model, images_for, relative_error

CAPTUM_METHODS = ["input_x_gradient", "integrated_gradients", "smoothgrad"]


def test_maps_are_at_pixel_resolution_and_several_classes_give_what_each_gives_alone(model, images) -> None:
    together = vitexplain.explain(model, images, [[3, 5], [1, 2]], method=CAPTUM_METHODS, steps=4, samples=3)
    for name, result in together.items():
        assert result.maps.shape == (2, 2, 32, 32)
        assert result.maps.dtype == torch.float32
        alone = vitexplain.explain(model, images, [5, 2], method=name, **({"steps": 4} if "integrated" in name else
                                   {"samples": 3} if name == "smoothgrad" else {}))  # fmt: skip
        assert relative_error(result.maps[:, 1], alone.maps) <= 1e-5, name


def test_integrated_gradients_are_complete(model, images) -> None:
    result = vitexplain.explain(model, images, 3, method="integrated_gradients", steps=200, baseline=0.25)
    with torch.no_grad():
        difference = model(images)[:, 3] - model(torch.full_like(images, 0.25))[:, 3]
    torch.testing.assert_close(result.maps.sum((1, 2)), difference, rtol=2e-3, atol=2e-3)


def test_smoothgrad_without_noise_is_the_gradient(model, images) -> None:
    pixels = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(pixels)[:, 3].sum(), pixels)
    result = vitexplain.explain(model, images, 3, method="smoothgrad", noise=0.0, samples=2)
    assert relative_error(result.maps, gradient.abs().sum(1)) <= 1e-5


def test_smoothgrad_repeats_itself_and_leaves_the_random_state_alone(model, images) -> None:
    before = torch.get_rng_state()
    first, second = (vitexplain.explain(model, images, method="smoothgrad", samples=2).maps for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, second)
    other = vitexplain.explain(model, images, method="smoothgrad", samples=2, seed=1).maps
    assert relative_error(other, first) > 1e-2


def test_the_mean_over_many_noisy_copies_converges() -> None:
    model = build_model(**MODEL_SHAPES["one_block"])
    images = images_for(model, 1)
    result = vitexplain.explain(model, images, 2, method="smoothgrad", samples=400, noise=0.3)
    generator = torch.Generator().manual_seed(9)
    pixels = (images + 0.3 * torch.randn(400, 3, 32, 32, generator=generator)).requires_grad_()
    (gradient,) = torch.autograd.grad(model(pixels)[:, 2].sum(), pixels)
    assert float((result.maps - gradient.abs().mean(0).sum(0)).norm() / result.maps.norm()) < 0.1


def test_half_precision_is_taken_and_gives_the_map_of_single_precision_but_for_rounding(model, images) -> None:
    exact = vitexplain.explain(model, images, [[3, 5], [1, 2]], method=CAPTUM_METHODS, steps=4, samples=2)
    found = vitexplain.explain(
        copy.deepcopy(model).bfloat16(), images.bfloat16(), [[3, 5], [1, 2]], method=CAPTUM_METHODS, steps=4, samples=2
    )
    for name in CAPTUM_METHODS:
        assert found[name].maps.dtype == torch.float32
        assert relative_error(found[name].maps, exact[name].maps) < 0.1, name


def test_scores_are_taken(model, images) -> None:
    result = vitexplain.explain(model, images, method="input_x_gradient", score=margin(1, 2))
    parts = [vitexplain.explain(model, images, k, method="input_x_gradient").maps for k in (1, 2)]
    torch.testing.assert_close(result.maps, parts[0] - parts[1], rtol=1e-4, atol=1e-5)


def test_a_missing_captum_is_said_before_any_work(model, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    for name in CAPTUM_METHODS:
        with pytest.raises(InputError, match=rf"method '{name}' needs captum.*pip install 'vitexplain\[captum\]'"):
            vitexplain.Explainer(model, name)
    assert "input_x_gradient" in {info.name for info in vitexplain.methods()}


def test_the_dense_reference_has_no_noise(model, images) -> None:
    with pytest.raises(InputError, match="no reference of 'smoothgrad'"):
        vitexplain.explain(model, images, method="smoothgrad", backend="dense")


def test_all_rows_are_refused(model) -> None:
    with pytest.raises(InputError, match="chain update maps, received 'lrp'"):
        vitexplain.Explainer(model, "lrp", rows="all")
    with pytest.raises(UnsupportedModelError, match="no classifier"):
        vitexplain.Explainer(build_model(num_classes=0), "input_x_gradient")
