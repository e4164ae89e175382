"""The device's part of a data set: packing, normalisation, batches, and the batch found by measurement."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import vitexplain
from vitexplain.dataset import auto_batch
from vitexplain.dataset.auto_batch import Measured, best_batch
from vitexplain.dataset.compute import BatchExplainer, deterministic, pack
from vitexplain.dataset.settings import Plan
from vitexplain.errors import InputError
from vitexplain.loading import LoadedModel, load_model
from vitexplain.methods import build_methods
from vitexplain.sources import open_source

SMALLEST, LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


@pytest.fixture(scope="module")
def demo() -> LoadedModel:
    return load_model("demo")


@pytest.fixture(scope="module")
def plan(demo, tmp_path_factory) -> Plan:
    """48 small photos."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(48):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{i:02d}.png")
    return Plan(demo, open_source(folder), build_methods("iba", {}))


def explainer_for(model: LoadedModel, methods: object = "iba", **options) -> BatchExplainer:
    settings = {"target": "pred", "dtype": torch.float32, "backend": "auto", "batch": 4, **options}
    return BatchExplainer(model, build_methods(methods, {}), **settings)


# -- packing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exponent", [-126, -100, -30, -8, 0, 7, 17, 60, 125])
def test_packed_values_are_exact_to_half_precision_whatever_their_size(exponent: int) -> None:
    maps = torch.randn(5, 3, 6, 7, generator=torch.Generator().manual_seed(exponent)) * 2.0**exponent
    packed, scale = pack(maps)
    assert packed.dtype == torch.float16
    assert scale.dtype == torch.float32
    assert scale.shape == (5, 3)
    largest = maps.abs().amax((-2, -1), keepdim=True)
    error = (packed.double() * scale.double()[..., None, None] - maps.double()).abs() / largest
    assert error.max() <= 2.0**-11
    mantissa, _ = torch.frexp(scale)
    assert (mantissa == 0.5).all(), "a power of two"


def test_the_ends_of_float32_are_packed_without_overflow() -> None:
    maps = torch.tensor([[[SMALLEST / 4, 0.0]], [[LARGEST, -LARGEST]], [[0.0, -0.0]], [[1.0, -1.0]]])
    packed, scale = pack(maps)
    assert torch.isfinite(packed).all()
    assert torch.isfinite(scale).all()
    unpacked = packed.double() * scale.double()[:, None, None]
    assert torch.allclose(unpacked[1:], maps[1:].double(), rtol=2.0**-11, atol=0)
    assert unpacked[2].abs().max() == 0


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
def test_a_map_that_is_not_finite_is_nan_and_leaves_the_others_alone(odd: float) -> None:
    maps = torch.ones(3, 2, 2)
    maps[1, 0, 1] = odd
    packed, scale = pack(maps)
    assert torch.isnan(scale).tolist() == [False, True, False]
    assert torch.isnan(packed[1]).all()
    assert torch.equal(packed[0].float() * scale[0], maps[0])


# -- batches -----------------------------------------------------------------------------------------------------------


def test_photos_become_to_the_last_bit_what_the_models_own_transform_gives(demo) -> None:
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))
    seen = demo.preprocess().seen(photo)
    assert seen.dtype == torch.uint8
    assert torch.equal(explainer_for(demo).normalised(seen[None])[0], demo.transform(photo))


@pytest.mark.parametrize(("target", "asked"), [("pred", None), ("label", [3, 1, 4, 1]), ("top3", "top3")])
def test_a_batch_gives_what_attribute_gives(demo, target: str, asked: object) -> None:
    methods = ["tokentm", "gmar", "lrp"]
    explainer = explainer_for(demo, methods, target=target)
    photos, _ = explainer.sample_batch()
    classes = torch.tensor(asked) if target == "label" else None
    found = explainer.submit(photos, classes, 3).result()
    expected = vitexplain.Explainer(demo.model, methods).attribute(explainer.normalised(photos), asked)
    for method in methods:
        values = found.maps[method].float() * found.scales[method][..., None, None]
        reference = expected[method].maps[:3]
        assert values.shape == reference.shape
        assert (values - reference).abs().max() <= 2.0**-11 * reference.abs().max()
        assert found.finite[method].all()
    probabilities = expected["tokentm"].logits[:3].softmax(-1)
    assert torch.equal(found.prediction, probabilities.argmax(-1))
    assert torch.allclose(found.score, probabilities.amax(-1))
    assert torch.equal(found.target, expected["tokentm"].target[:3])
    columns = found.target if found.target.dim() == 2 else found.target[:, None]
    assert torch.allclose(found.target_score.reshape(columns.shape), probabilities.gather(1, columns))


def test_unpacked_maps_are_those_of_attribute_itself(demo) -> None:
    explainer = explainer_for(demo, packed=False)
    photos, _ = explainer.sample_batch()
    found = explainer.submit(photos, None, 4).result()
    assert torch.equal(found.maps["iba"], explainer.explain(photos, None)["iba"].maps)
    assert found.scales == {}


def test_time_at_work_and_between_batches_is_counted(demo) -> None:
    explainer = explainer_for(demo)
    photos, _ = explainer.sample_batch()
    explainer.submit(photos, None, 4).result()
    assert explainer.busy > 0
    assert explainer.idle == 0
    before = explainer.busy
    explainer.submit(photos, None, 4).result()
    assert explainer.busy > before
    assert explainer.idle > 0
    assert explainer.bare_images_per_second(1) > 0


def test_deterministic_algorithms_are_left_as_they_were() -> None:
    with deterministic(torch.device("cpu"), enabled=True):
        assert not torch.are_deterministic_algorithms_enabled(), "a CPU needs nothing"
    with deterministic(torch.device("cuda"), enabled=True):
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
    with suppress(KeyError), deterministic(torch.device("cuda"), enabled=True):
        raise KeyError
    assert not torch.are_deterministic_algorithms_enabled()


# -- the batch found by measurement ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("speeds", "expected"),
    [
        ({1: 10, 2: 20, 4: 39, 8: 70, 16: 71, 32: 72, 64: 72}, 8),
        ({1: 10, 2: 10, 4: 9, 8: 1000}, 1),  # nothing gained twice: larger ones are not tried
        ({1: 10, 2: 20, 4: 40, 8: 80, 16: 160, 32: 320, 64: 640}, 64),
        ({1: 10, 2: 20, 4: None}, 2),  # out of memory
    ],
)
def test_the_smallest_batch_of_nearly_the_best_speed_is_taken(monkeypatch, plan, speeds, expected: int) -> None:
    def seconds(_plan: Plan, batch: int) -> float:
        if speeds[batch] is None:
            raise torch.OutOfMemoryError
        return batch / speeds[batch]

    monkeypatch.setattr(auto_batch, "_seconds", seconds)
    monkeypatch.setattr(auto_batch, "_PART", 100)
    measured: list[Measured] = []
    assert best_batch(plan, measured.append) == expected
    assert all(found.images_per_second == pytest.approx(speeds[found.batch]) for found in measured)
    assert 8 not in [found.batch for found in measured] or speeds.get(8) != 1000


def test_where_no_image_fits_it_is_said(monkeypatch, plan) -> None:
    def full(_plan: Plan, _batch: int) -> float:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(auto_batch, "_seconds", full)
    with pytest.raises(InputError, match="not even one image of 'demo' fits into the memory of cpu"):
        best_batch(plan)


def test_a_small_data_set_is_not_measured_longer_than_it_takes(plan) -> None:
    measured: list[Measured] = []
    assert best_batch(plan, measured.append) in (1, 2)
    assert [found.batch for found in measured] == [1, 2]


# -- the plan ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": "best"}, "target: expected pred, label or topK, such as top3, received 'best'"),
        ({"target": "top"}, "target: expected"),
        ({"target": "top11"}, "target: expected at most top10, as there are 10 classes, received 'top11'"),
        ({"target": "label"}, "target: 'label' needs labels, and .* has none"),
        ({"resize": "stretch"}, "resize: expected one of model, squash, received 'stretch'"),
        ({"workers": -1}, "workers: expected 0 or more processes, received -1"),
        ({"workers": True}, "workers: expected 0 or more processes, received True"),
        ({"deterministic": 1}, "deterministic: expected True or False, received 1"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(plan, change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(plan, **change)


def test_a_label_outside_the_models_classes_is_refused(plan) -> None:
    labelled = replace(plan.source, labels=(10,) * len(plan.source))
    with pytest.raises(InputError, match=r"label: expected a class from 0 to 9, received 10 for image '00\.png'"):
        replace(plan, source=labelled)


def test_the_layout_has_a_map_of_patches_or_of_pixels_for_each_target(plan) -> None:
    changed = replace(plan, methods=build_methods(["iba", "lrp"], {}), target="top2")
    layout = changed.layout(16)
    assert layout.maps == {"iba": (2, 8, 8), "lrp": (2, 32, 32)}
    assert (layout.num_images, layout.num_targets) == (48, 2)


def test_settings_tell_all_that_the_maps_depend_on(plan) -> None:
    settings = plan.settings(4, 16)
    for change, where in (
        ({"target": "top1"}, "target"),
        ({"dtype": torch.bfloat16}, "dtype"),
        ({"backend": "torch"}, "backend"),
        ({"resize": "squash"}, "model"),
        ({"methods": build_methods("iba", {"relevance": "gain"})}, "methods"),
        ({"source": plan.source.select(slice(0, 8))}, "data"),
        ({"deterministic": False}, "deterministic"),
    ):
        changed = replace(plan, **change).settings(4, 16)
        assert [name for name in settings if settings[name] != changed[name]] == [where]
    assert replace(plan, workers=3, cuda_graph=False).settings(4, 16) == settings, "how fast does not matter"
    assert {"vitexplain", "torch", "timm", "pillow", "zarr"} <= set(settings["versions"])


def test_blocks_can_be_compiled(demo, plan, monkeypatch) -> None:
    from vitexplain import compiled

    called: list[str] = []
    monkeypatch.setattr(compiled, "_compiled", lambda forward, mode: called.append(mode) or forward)
    made = replace(plan, compile=True)
    compiled_explainer = BatchExplainer(demo, made.methods, batch=4, **made.how)
    photos, classes = compiled_explainer.sample_batch()
    found = compiled_explainer.submit(photos, classes, 4).result()
    plain = explainer_for(demo).submit(photos, classes, 4).result()
    assert called, "the blocks went through the compiler"
    assert torch.equal(found.maps["iba"], plain.maps["iba"])
    assert made.settings(4, 16) != plan.settings(4, 16), "compiled blocks round otherwise"
    with pytest.raises(InputError, match="compile: expected True or False"):
        replace(plan, compile="default")
