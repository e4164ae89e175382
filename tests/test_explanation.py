"""The result: shapes, up-sampling, overlays, files."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import vitexplain
from vitexplain import InputError
from vitexplain.heatmap import as_photo, colorize, min_max, upsample


@pytest.fixture
def explanation(model, images):
    return vitexplain.explain(model, images, [[0, 1], [2, 3]], method="tokentm", rows="all")


def test_up_sampling_is_bilinear_and_keeps_classes_apart(explanation) -> None:
    enlarged = explanation.to_image((40, 24))
    assert enlarged.shape == (2, 2, 40, 24)
    expected = torch.nn.functional.interpolate(explanation.maps, (40, 24), mode="bilinear", align_corners=False)
    torch.testing.assert_close(enlarged, expected)
    assert explanation.to_image(16).shape == (2, 2, 16, 16)


@pytest.mark.parametrize("kind", ["pil", "array", "float tensor", "uint8 tensor"])
def test_an_overlay_has_the_photos_size_and_is_a_blend(explanation, kind: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    photo = {"pil": Image.fromarray(pixels), "array": pixels, "float tensor": tensor / 255, "uint8 tensor": tensor}[kind]
    overlay = explanation.overlay(photo, index=1, target_index=1)
    assert overlay.size == (50, 30)
    assert np.array_equal(np.asarray(explanation.overlay(photo, alpha=0.0)), pixels)
    assert not np.array_equal(np.asarray(overlay), np.asarray(explanation.overlay(photo, index=0)))


def test_signed_maps_have_a_neutral_zero() -> None:
    colors = colorize(torch.tensor([[-2.0, 0.0], [0.5, 1.0]]), signed=True).astype(int)
    assert np.ptp(colors[0, 1]) < 12  # zero is grey
    assert colors[0, 0, 2] > colors[0, 0, 0]  # against the class: blue
    assert colors[1, 1, 0] > colors[1, 1, 2]  # for the class: red


def test_a_constant_map_becomes_zeros() -> None:
    assert torch.equal(min_max(torch.full((3, 3), 7.0)), torch.zeros(3, 3))


def test_arrays_come_back_from_npz(explanation, tmp_path) -> None:
    path = explanation.save(tmp_path / "map.npz")
    with np.load(path) as archive:
        assert str(archive["method"]) == "tokentm"
        for name in ("maps", "target", "logits", "prefix_values", "contribution"):
            assert np.array_equal(archive[name], getattr(explanation, name).numpy())


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_pictures_are_written(explanation, tmp_path, suffix: str) -> None:
    path = explanation.save(tmp_path / f"map{suffix}")
    with Image.open(path) as picture:
        assert picture.size == (224, 224)
    path = explanation.save(tmp_path / f"overlay{suffix}", image=Image.new("RGB", (64, 48)))
    with Image.open(path) as picture:
        assert picture.size == (64, 48)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e, t: e.save(t / "map.txt"), "expected a suffix of .npz"),
        (lambda e, t: e.save(t / "absent" / "map.png"), "cannot write"),
        (lambda e, t: e.save(t / "absent" / "map.npz"), "cannot write"),
        (lambda e, _: e.overlay(Image.new("RGB", (8, 8)), index=2), "index: expected 0 to 1, received 2"),
        (lambda e, _: e.overlay(Image.new("RGB", (8, 8)), target_index=2), "target_index: expected 0 to 1, received 2"),
        (lambda e, _: e.overlay(Image.new("RGB", (8, 8)), alpha=1.5), "alpha: expected 0 to 1, received 1.5"),
        (lambda e, _: e.overlay(Image.new("RGB", (8, 8)), colormap="infernos"), "did you mean inferno"),
        (lambda e, _: e.overlay(torch.full((3, 8, 8), 2.0)), r"expected values in \[0, 1\].*received 2 to 2"),
        (lambda e, _: e.overlay(np.zeros((8, 8))), r"received ndarray of shape \(8, 8\)"),
        (lambda e, _: e.to_image(0), "expected a positive int"),
        (lambda _e, _t: upsample(torch.zeros(2, 2), (3, 4, 5)), "size: expected"),
        (lambda e, _: e.overlay(torch.full((3, 8, 8), torch.nan)), r"expected values in \[0, 1\].*received nan to nan"),
        (lambda _e, _t: as_photo("cat.jpg"), "received str"),
        (lambda _e, _t: as_photo(torch.zeros(3, 8, 8, dtype=torch.int64)), r"received Tensor of shape \(3, 8, 8\) torch.int64"),
        (lambda _e, _t: as_photo(torch.zeros(3, 0, 8)), r"received Tensor of shape \(3, 0, 8\)"),
        (lambda _e, _t: as_photo(Image.new("RGB", (0, 8))), r"received Image of shape \(0, 8\)"),
        (lambda _e, _t: as_photo(Image.new("F", (8, 8), torch.nan)), "mode 'F': none of its values is finite"),
    ],
)
def test_bad_requests_are_refused(explanation, tmp_path, call, message: str) -> None:
    with pytest.raises(vitexplain.ExplanationError, match=message):
        call(explanation, tmp_path)
    assert issubclass(InputError, vitexplain.ExplanationError)


def test_one_map_is_selected_by_image_and_class(explanation, model, images) -> None:
    assert explanation.num_targets == 2
    assert torch.equal(explanation.select(1, 0), explanation.maps[1, 0])
    single = vitexplain.explain(model, images)
    assert single.num_targets is None
    assert torch.equal(single.select(1), single.maps[1])
    assert not single.is_text


def test_maps_of_several_classes_are_laid_over_a_photo_one_by_one(explanation) -> None:
    photo = np.full((20, 40, 3), 128, np.uint8)
    first, second = (np.asarray(explanation.overlay(photo, index=1, target_index=k, colormap="viridis")) for k in (0, 1))
    assert first.shape == (20, 40, 3)
    assert not np.array_equal(first, second)


def test_a_picture_of_a_text_is_refused_with_what_draws_one(tmp_path) -> None:
    text = vitexplain.Explanation("tokentm", {}, torch.ones(2, 5), None, torch.zeros(2, 3), torch.zeros(2, 0))
    assert text.is_text
    with pytest.raises(InputError, match=r"received one of texts.*vitexplain.visualize.tokens\(words, explanation\)"):
        text.save(tmp_path / "x.png")
    assert text.save(tmp_path / "x.npz").exists()


def test_several_maps_can_share_a_scale() -> None:
    heat = torch.tensor([[0.0, 5.0, 10.0]])
    shared = colorize(heat, limits=(5.0, 20.0))
    assert np.array_equal(shared[0, 0], shared[0, 1]), "what lies below has the colour of the lower end"
    assert np.array_equal(shared[0, 2], colorize(torch.tensor([[0.0, 1.0, 3.0]]))[0, 1])
    assert np.array_equal(colorize(heat, limits=(1.0, 1.0))[0, 0], colorize(heat)[0, 0])


def test_maps_of_pixels_and_of_scores_are_written_and_shown_like_any_other(model, images, tmp_path) -> None:
    pixels = vitexplain.explain(model, images, method="lrp", score=vitexplain.margin(0, 1))
    assert pixels.maps.shape == (2, 32, 32)
    assert pixels.overlay(np.zeros((40, 50, 3), np.uint8), index=1).size == (50, 40)
    assert pixels.to_image((8, 12)).shape == (2, 8, 12)
    with np.load(pixels.save(tmp_path / "maps.npz")) as archive:
        assert archive["maps"].shape == (2, 32, 32)
        assert archive["prefix_values"].shape == (2, 0)
        assert "target" not in archive
    assert Image.open(pixels.save(tmp_path / "map.png")).size == (224, 224)
