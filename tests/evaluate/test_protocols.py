"""Every protocol against the slow, independent one, image by image and over the data set."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from vitexplain.errors import InputError, UnknownNameError
from vitexplain.evaluate.batch import RankedMaps
from vitexplain.evaluate.controls import centre_prior, random_maps
from vitexplain.evaluate.protocols import (
    PROTOCOLS,
    Ablation,
    AverageDrop,
    InsertionDeletion,
    Localisation,
    Perturbation,
    Protocol,
    SaCo,
    build_protocols,
)
from vitexplain.evaluate.protocols.ablation import VARIANTS
from vitexplain.evaluate.quantus_bridge import build_metric, quantus_scores
from vitexplain.heatmap import min_max

from . import slow_metrics as slow
from .conftest import MEAN, SIZE, STD, Scene

ALL_LEVELS, TENS = tuple(range(0, 101, 5)), tuple(range(0, 91, 10))


def _figures(protocol: Protocol, scene: Scene, target: torch.Tensor | None = None, explained: str = "pred") -> dict[str, float]:
    raw = protocol.measure(scene.batch, scene.ranked, scene.batch.predicted if target is None else target)
    arrays = {name: values.numpy() for name, values in raw.items()}
    return {
        metric.name: float(metric.combine(metric.columns(arrays).astype(np.float64).mean(0)))
        for metric in protocol.metrics(explained, labels=True)
    }


def test_maps_are_up_sampled_and_ranked(scene) -> None:
    for row in range(3):
        pixels = slow.upsample(scene.maps[row].numpy(), *SIZE)
        assert np.abs(pixels - scene.ranked.pixels[row].numpy()).max() < 1e-6
        ranks = slow.ranks(scene.ranked.pixels[row].numpy(), scene.tie_break(row))
        assert (ranks == scene.ranks[row]).all()


def test_ties_come_in_a_random_order_that_depends_on_the_image_and_the_seed_alone(scene) -> None:
    constant = RankedMaps.of(torch.full((3, 5, 10), 0.1), scene.batch, "constant")
    alone = scene.batch.take(torch.tensor([1]))
    assert torch.equal(RankedMaps.of(torch.full((1, 5, 10), 0.1), alone, "constant").ranks[0], constant.ranks[1])
    assert not torch.equal(constant.ranks[0], constant.ranks[1])
    order = constant.ranks[0].double()
    neighbours = torch.corrcoef(torch.stack([order[:-1], order[1:]]))[0, 1]
    assert abs(float(neighbours)) < 0.15  # not the layout of the memory


@pytest.mark.parametrize("value", [0.1, 0.3, 0.7, 1e-3, 123.4])
@pytest.mark.parametrize("grid", [(8, 8), (5, 10), (7, 7)])
def test_up_sampling_keeps_equal_values_equal(scene, grid: tuple[int, int], value: float) -> None:
    square = replace(scene.batch, images=torch.zeros(3, 3, 32, 32))
    ranked = RankedMaps.of(torch.full((3, *grid), value), square, "constant")
    assert len(ranked.pixels.unique()) == 1
    assert torch.equal(ranked.ranks.long().argsort(1), square.tie_order)


def test_a_map_and_its_negation_swap_positive_and_negative(scene) -> None:
    ranked = scene.ranked.negated()
    again = RankedMaps.of(-scene.maps, scene.batch, "negated")
    untied = scene.ranked.pixels.flatten(1).sort(1).values.diff(dim=1).min(1).values > 0
    assert not untied.any(), "up-sampled borders tie: the negation reverses their order, too"
    value_at = again.pixels.flatten(1).gather(1, again.ranks.long().argsort(1))
    assert torch.equal(value_at, ranked.pixels.flatten(1).gather(1, ranked.ranks.long().argsort(1)))
    protocol = Perturbation()
    one, other = (protocol.measure(scene.batch, maps, scene.batch.predicted) for maps in (scene.ranked, ranked))
    assert torch.equal(one["positive"], other["negative"])
    assert torch.equal(one["negative"], other["positive"])
    assert not torch.equal(one["positive"], one["negative"])


@pytest.mark.parametrize(("convention", "levels"), [("vtranm", ALL_LEVELS), ("chefer", TENS)])
def test_perturbation(scene, convention: str, levels: tuple[int, ...]) -> None:
    found = _figures(Perturbation(convention=convention), scene)
    wanted = [
        slow.perturbation(scene.predict01, scene.images01[i].numpy(), scene.ranks[i], int(scene.batch.labels[i]), levels)
        for i in range(3)
    ]
    assert found["positive"] == pytest.approx(
        np.mean([slow.auc_percent(w["positive_correct"], levels) for w in wanted]), abs=1e-6
    )
    assert found["negative"] == pytest.approx(
        np.mean([slow.auc_percent(w["negative_correct"], levels) for w in wanted]), abs=1e-6
    )
    assert found["AOPC"] == pytest.approx(np.mean([slow.aopc(w["log_p_pred"]) for w in wanted]), abs=1e-6)
    assert found["LOdds"] == pytest.approx(np.mean([slow.log_odds(w["log_p_pred"]) for w in wanted]), abs=1e-6)
    assert found["positive"] != found["negative"]


def test_both_conventions_of_one_run_are_what_each_gives_alone(scene) -> None:
    both, vtranm, chefer = (_figures(Perturbation(convention=c), scene) for c in ("both", "vtranm", "chefer"))
    assert both["positive"] == vtranm["positive"]
    assert both["negative (10 % steps to 90 %)"] == pytest.approx(chefer["negative"], abs=1e-9)
    assert both["AOPC"] == vtranm["AOPC"]


def test_probability_is_of_the_predicted_class_and_not_asked_of_the_true_one() -> None:
    names = [metric.name for metric in Perturbation().metrics("gt", labels=True)]
    assert names == ["positive", "negative"]
    assert [metric.name for metric in Perturbation().metrics("pred", labels=False)] == ["AOPC", "LOdds"]


@pytest.mark.parametrize("substrate", ["black", "zeros", "blur", "mean"])
def test_substrates(scene, substrate: str) -> None:
    image = scene.batch.images[0].numpy()
    fill = {
        "black": -np.array(MEAN)[:, None, None] / np.array(STD)[:, None, None],
        "zeros": 0.0,
        "blur": slow.gaussian_blur(image),
        "mean": image.mean((1, 2), keepdims=True),
    }[substrate]
    spans = torch.tensor([[0, 0], [0, 240], [560, 800], [0, 800]])
    found = scene.batch.probe(scene.ranked.ranks, spans, substrate)[0].numpy()
    counts = [(0, "positive"), (240, "positive"), (240, "negative"), (800, "positive")]
    for log_p, (count, order) in zip(found, counts, strict=True):
        changed = slow.removed(image, scene.ranks[0], count, fill, order)
        assert np.allclose(log_p, slow.log_softmax(scene.predict(changed)), rtol=1e-6, atol=1e-6)


def test_insertion_and_deletion_of_any_class(scene) -> None:
    target = scene.batch.labels
    found = _figures(InsertionDeletion(), scene, target)
    counts = slow.level_counts(ALL_LEVELS, 800)
    wanted = []
    for i in range(3):
        image = scene.batch.images[i].numpy()
        blurred = slow.gaussian_blur(image)
        wanted.append(slow.insertion_deletion(scene.predict, image, scene.ranks[i], int(target[i]), counts, blurred, 0.0))
    assert (found["insertion"], found["deletion"]) == pytest.approx(np.mean(wanted, axis=0), abs=1e-5)


def test_average_drop_and_increase(scene) -> None:
    found = _figures(AverageDrop(), scene)
    before, after = [], []
    for i in range(3):
        target = int(scene.batch.predicted[i])
        shown = slow.masked_by_map(scene.images01[i].numpy(), scene.ranked.pixels[i].numpy())
        before.append(math.exp(slow.log_softmax(scene.predict01(scene.images01[i].numpy()))[target]))
        after.append(math.exp(slow.log_softmax(scene.predict01(shown))[target]))
    assert found["average drop"] == pytest.approx(slow.average_drop(before, after), abs=1e-4)
    assert found["average increase"] == pytest.approx(slow.average_increase(before, after))


def test_localisation_and_its_average_precision_is_scikit_learns(scene) -> None:
    found = _figures(Localisation(), scene)
    maps = [pixels.numpy() for pixels in scene.ranked.pixels]
    masks = [mask.numpy() for mask in scene.batch.masks]
    assert found["pixel accuracy"] == pytest.approx(100 * slow.pixel_accuracy(maps, masks), abs=1e-6)
    assert found["mIoU"] == pytest.approx(100 * slow.mean_iou(maps, masks), abs=1e-6)
    assert found["mAP"] == pytest.approx(100 * slow.mean_average_precision(maps, masks), abs=1e-6)
    auroc = [slow.auroc(slow.min_max(pixels).ravel(), mask.ravel()) for pixels, mask in zip(maps, masks, strict=True)]
    assert found["AUROC"] == pytest.approx(100 * np.mean(auroc), abs=1e-6)
    scaled = min_max(scene.ranked.pixels[0].double()).numpy().ravel()
    truth = masks[0].ravel()
    sklearn = average_precision_score(np.concatenate([~truth, truth]), np.concatenate([1 - scaled, scaled]))
    raw = Localisation().measure(scene.batch, scene.ranked, scene.batch.predicted)
    assert float(raw["average_precision"][0]) == sklearn


def test_localisation_of_masks_of_one_kind_is_finite(scene) -> None:
    full = replace(scene.batch, masks=torch.ones_like(scene.batch.masks))
    raw, half = (
        {name: values.numpy() for name, values in protocol.measure(full, scene.ranked, full.predicted).items()}
        for protocol in (Localisation(), Localisation(threshold="half"))
    )
    for metric in Localisation().metrics("pred", labels=False):
        assert np.isfinite(metric.combine(metric.columns(raw).mean(0))), metric.name
    half = {
        name: values.numpy()
        for name, values in Localisation(threshold="half").measure(full, scene.ranked, full.predicted).items()
    }
    assert not np.array_equal(half["overlap"], raw["overlap"])


@pytest.mark.parametrize("groups", [2, 10, 7])
def test_saco(scene, groups: int) -> None:
    raw = SaCo(groups=groups).measure(scene.batch, scene.ranked, scene.batch.predicted)["saco"]
    for i in range(3):
        arguments = (scene.batch.images[i].numpy(), scene.ranked.pixels[i].numpy(), scene.ranks[i])
        wanted = slow.saco(scene.predict, *arguments, int(scene.batch.predicted[i]), groups)
        assert float(raw[i]) == pytest.approx(wanted, abs=1e-5)


def test_saco_of_a_constant_map_is_zero(scene) -> None:
    constant = RankedMaps.of(torch.full((3, 5, 10), 0.3), scene.batch, "constant")
    assert SaCo(groups=7).measure(scene.batch, constant, scene.batch.predicted)["saco"].tolist() == [0, 0, 0]


def test_saco_does_not_change_when_a_constant_is_added_to_the_map(scene) -> None:
    raised = RankedMaps(scene.ranked.pixels + 100, scene.ranked.ranks)
    one, other = (SaCo(groups=7).measure(scene.batch, maps, scene.batch.predicted)["saco"] for maps in (scene.ranked, raised))
    assert torch.allclose(one, other, atol=1e-9)


def test_the_ablation_switches_parts_on_one_after_the_other() -> None:
    switched = [(v.aggregate, v.length, v.necc) for v in VARIANTS.values()]
    assert switched[:4] == [(False, False, False), (True, False, False), (True, True, False), (True, True, True)]
    assert [v.necc_scale for v in VARIANTS.values()] == ["1"] * 4 + ["n"]
    assert issubclass(Ablation, Perturbation)


def test_controls(scene) -> None:
    noise = random_maps(scene.batch, (5, 10))
    assert torch.equal(random_maps(scene.batch.take(torch.tensor([2])), (5, 10))[0], noise[2])
    assert not torch.equal(noise[0], noise[1])
    prior = centre_prior(scene.batch, (5, 10))
    assert torch.allclose(prior, prior.flip(1))
    assert torch.allclose(prior, prior.flip(2))
    assert int(prior[0, :, 5].argmax()) == 2
    assert float(prior.max()) > 5 * float(prior.min())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_map_with_nan_is_an_error_that_names_the_image(scene, bad: float) -> None:
    maps = scene.maps.clone()
    maps[1, 2, 3] = bad
    with pytest.raises(InputError, match=r"map of 'some' for image 'b': expected finite values"):
        RankedMaps.of(maps, scene.batch, "some")


def test_protocols_from_text() -> None:
    found = build_protocols(["perturbation:convention=chefer,substrate=mean", "saco:groups=5", Localisation()])
    assert list(found) == ["perturbation:convention=chefer,substrate=mean", "saco:groups=5", "localisation"]
    assert found["saco:groups=5"] == SaCo(groups=5)
    assert {"perturbation", "insertion_deletion", "average_drop", "localisation", "saco", "ablation", "quantus"} == set(PROTOCOLS)


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        (["perturbtion"], UnknownNameError, "unknown protocol 'perturbtion': did you mean perturbation"),
        (["perturbation:step=5"], UnknownNameError, "unknown option of perturbation 'step'"),
        (["perturbation:convention=old"], InputError, "expected one of 'vtranm', 'chefer', 'both', received 'old'"),
        (["perturbation:convention"], InputError, "expected NAME=VALUE, received 'convention'"),
        (["saco:groups=1"], InputError, "expected at least 2, received 1"),
        (["saco:groups=many"], InputError, "expected int, received 'many'"),
        (["insertion_deletion:step=7"], InputError, "expected a divisor of 100, received 7"),
        (["saco", "saco"], InputError, "expected each protocol once, received 'saco' twice"),
        ([], InputError, "expected at least one of perturbation, .* received none"),
        (["quantus:metric=Sparsness"], UnknownNameError, "unknown Quantus metric 'Sparsness': did you mean Sparseness"),
        (
            ["quantus:metric=PixelFlipping,parameters=stride=3"],
            InputError,
            "PixelFlipping: expected parameters among .*received stride",
        ),
        (
            ["quantus:metric=MaxSensitivity"],
            InputError,
            "MaxSensitivity explains again: call .*quantus_scores with an explain_func",
        ),
        (["quantus:metric=Focus"], InputError, "Focus: expected a metric with a number for each image's map"),
        (["quantus:metric=Consistency"], InputError, "expected at least two images"),
    ],
)
def test_protocols_that_do_not_fit_are_refused(asked: list[str], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build_protocols(asked)


def test_any_metric_of_quantus_on_finished_maps(scene) -> None:
    protocol = build_protocols(
        ["quantus:metric=Pixel-Flipping,parameters=features_in_step=100;perturb_baseline=black"]
    ).popitem()[1]
    assert [(m.name, m.better) for m in protocol.metrics("pred", labels=True)] == [("Pixel-Flipping", "lower")]
    found = _figures(protocol, scene)["Pixel-Flipping"]
    maps = (scene.batch.images, scene.batch.predicted, scene.ranked.pixels)
    metric = build_metric("PixelFlipping", features_in_step=100, perturb_baseline="black")
    assert found == pytest.approx(float(quantus_scores(metric, scene.model, *maps).mean()))


def test_images_without_a_number_are_left_out_of_quantus_means(scene) -> None:
    protocol = build_protocols(["quantus:metric=PointingGame"])["quantus:metric=PointingGame"]
    assert protocol.needs_masks
    assert not build_protocols(["quantus"])["quantus"].needs_masks
    masks = scene.batch.masks.clone()
    masks[1] = False
    raw = {
        k: v.numpy() for k, v in protocol.measure(replace(scene.batch, masks=masks), scene.ranked, scene.batch.predicted).items()
    }
    assert np.isnan(raw["score"]).tolist() == [False, True, False]
    (metric,) = protocol.metrics("pred", labels=False)
    assert metric.combine(metric.columns(raw).mean(0)) == pytest.approx(np.nanmean(raw["score"]))
