"""The slow metrics against cases small enough for a sheet of paper: what checks others has to be checked itself."""

from __future__ import annotations

import math

import numpy as np
import pytest

from . import slow_metrics as slow

LEVELS = list(range(0, 101, 5))
IMAGE = np.arange(1.0, 13.0).reshape(3, 2, 2)  # channels 1 2 3 4, 5 6 7 8, 9 10 11 12
RANKS = np.array([[1, 0], [3, 2]])


def two_class(image: np.ndarray) -> np.ndarray:
    """Logits (0, z) with z the sum of the image, less 1: class 1 as long as enough light is left."""
    return np.array([0.0, float(np.sum(image)) - 1.0])


# -- maps and ranks ------------------------------------------------------------------------------------------------------


def test_upsample_of_two_cells_to_four_pixels():
    # Pixel centres lie at −0.25, 0.25, 0.75, 1.25 of the cells: the outer two are clamped.
    np.testing.assert_allclose(slow.upsample(np.array([[0.0, 4.0]]), 1, 4), [[0, 1, 3, 4]])
    np.testing.assert_allclose(slow.upsample(np.array([[0.0], [4.0]]), 4, 1), [[0], [1], [3], [4]])


def test_upsample_is_separable_and_keeps_what_has_the_size():
    grid = np.array([[0.0, 4.0], [8.0, 12.0]])
    expected = np.array([0, 1, 3, 4])[None, :] + 2 * np.array([0, 1, 3, 4])[:, None]
    np.testing.assert_allclose(slow.upsample(grid, 4, 4), expected)
    np.testing.assert_array_equal(slow.upsample(grid, 2, 2), grid)


def test_upsample_is_that_of_torch():
    torch = pytest.importorskip("torch")
    grid = np.random.default_rng(0).normal(size=(3, 5))
    expected = torch.nn.functional.interpolate(torch.from_numpy(grid)[None, None], size=(7, 16), mode="bilinear")[0, 0]
    np.testing.assert_allclose(slow.upsample(grid, 7, 16), expected.numpy(), rtol=1e-12, atol=1e-12)


def test_ranks_descend_and_break_ties_by_the_second_number():
    values = np.array([[2.0, 5.0], [2.0, 1.0]])
    np.testing.assert_array_equal(slow.ranks(values, np.array([[0.1, 0.0], [0.9, 0.5]])), [[2, 0], [1, 3]])
    np.testing.assert_array_equal(slow.ranks(values, np.array([[0.9, 0.0], [0.1, 0.5]])), [[1, 0], [2, 3]])


def test_ranks_refuse_nan():
    with pytest.raises(ValueError, match="NaN"):
        slow.ranks(np.array([[np.nan, 1.0]]), np.zeros((1, 2)))


def test_min_max():
    np.testing.assert_array_equal(slow.min_max(np.array([[-1.0, 0.0, 3.0]])), [[0, 0.25, 1]])
    np.testing.assert_array_equal(slow.min_max(np.full((2, 2), 7.0)), np.zeros((2, 2)))


# -- perturbation --------------------------------------------------------------------------------------------------------


def test_level_counts_are_rounded_down_exactly():
    assert slow.level_counts([0, 5, 33, 95, 100], 50) == [0, 2, 16, 47, 50]
    assert slow.level_counts([29], 100) == [29]  # 0.29 · 100 is 28.999… in floating point
    assert slow.level_counts([0.1, 2.5], 1000) == [1, 25]


def test_removed_takes_all_channels_of_the_first_ranks():
    black = slow.removed(IMAGE, RANKS, 2, 0.0)
    np.testing.assert_array_equal(black, [[[0, 0], [3, 4]], [[0, 0], [7, 8]], [[0, 0], [11, 12]]])
    np.testing.assert_array_equal(slow.removed(IMAGE, RANKS, 1, -IMAGE)[:, 0, 1], [-2, -6, -10])
    assert IMAGE.min() == 1, "the image itself is untouched"


def test_removed_in_negative_order_takes_the_last_ranks():
    black = slow.removed(IMAGE, RANKS, 1, 0.0, order="negative")
    np.testing.assert_array_equal(black[:, 1, 0], [0, 0, 0])
    assert (black == 0).sum() == 3
    np.testing.assert_array_equal(slow.removed(IMAGE, RANKS, 0, 0.0, order="negative"), IMAGE)
    np.testing.assert_array_equal(slow.removed(IMAGE, RANKS, 4, 0.0, order="negative"), np.zeros_like(IMAGE))


def test_removed_refuses_another_order():
    with pytest.raises(ValueError, match="sideways"):
        slow.removed(IMAGE, RANKS, 1, 0.0, order="sideways")


def test_log_softmax():
    np.testing.assert_allclose(slow.log_softmax(np.log([1.0, 3.0])), np.log([0.25, 0.75]))
    np.testing.assert_allclose(slow.log_softmax(np.array([1000.0, 1000.0])), np.log([0.5, 0.5]))


def test_perturbation_of_four_pixels():
    # One pixel of light 2 and three without: class 1 (logit 3·2 − 1 = 5) until the bright pixel goes.
    image = np.zeros((3, 2, 2))
    image[:, 0, 1] = 2.0
    result = slow.perturbation(two_class, image, RANKS, 1, [0, 25, 50, 75, 100])
    assert result["positive_correct"] == [1, 0, 0, 0, 0]
    assert result["negative_correct"] == [1, 1, 1, 1, 0]
    bright, dark = -math.log1p(math.exp(-5.0)), -math.log1p(math.exp(1.0))
    np.testing.assert_allclose(result["log_p_pred"], [bright, dark, dark, dark, dark])


def test_perturbation_follows_the_predicted_class_and_counts_the_label():
    image = np.zeros((3, 2, 2))
    image[:, 0, 1] = 2.0
    result = slow.perturbation(two_class, image, RANKS, 0, [0, 100])
    assert result["positive_correct"] == result["negative_correct"] == [0, 1]
    np.testing.assert_allclose(result["log_p_pred"], [-math.log1p(math.exp(-5.0)), -math.log1p(math.exp(1.0))])


def test_auc_of_constant_line_and_step():
    assert slow.auc_percent([1.0] * 21, LEVELS) == pytest.approx(100)
    assert slow.auc_percent([1 - level / 100 for level in LEVELS], LEVELS) == pytest.approx(50)
    assert slow.auc_percent([1, 0, 0], [0, 50, 100]) == pytest.approx(25)


def test_auc_of_the_older_levels_covers_nine_tenths():
    assert slow.auc_percent([1.0] * 10, list(range(0, 100, 10))) == pytest.approx(90)


def test_aopc_and_log_odds_count_the_untouched_image():
    log_p = [math.log(0.8), math.log(0.4), math.log(0.2)]
    assert slow.aopc(log_p) == pytest.approx((0 + 0.4 + 0.6) / 3)
    assert slow.log_odds(log_p) == pytest.approx((0 - math.log(2) - math.log(4)) / 3)


# -- insertion, deletion, drop, increase ---------------------------------------------------------------------------------


def test_blur_keeps_a_constant_image_and_weighs_a_line():
    np.testing.assert_allclose(slow.gaussian_blur(np.full((3, 4, 5), 2.0)), 2.0)
    near, far = 1 / (1 + 2 * math.exp(-0.5)), math.exp(-0.5) / (1 + 2 * math.exp(-0.5))
    line = slow.gaussian_blur(np.array([[[0.0, 0.0, 1.0, 0.0]]]), kernel=3, sigma=1)
    # The last pixel sees its neighbour twice, once mirrored.
    np.testing.assert_allclose(line[0, 0], [0, far, near, 2 * far])


def test_blur_mirrors_without_repeating_the_edge():
    assert [slow._mirrored(i, 3) for i in range(-5, 8)] == [1, 0, 1, 2, 1, 0, 1, 2, 1, 0, 1, 2, 1]
    assert slow._mirrored(-3, 1) == 0


def test_blur_is_that_of_torch():
    torch = pytest.importorskip("torch")
    image = np.random.default_rng(0).normal(size=(3, 9, 12))
    line = torch.exp(-(torch.arange(-5, 6, dtype=torch.float64) ** 2) / 50)
    window = (line[:, None] * line[None, :] / line.sum() ** 2)[None, None]
    padded = torch.nn.functional.pad(torch.from_numpy(image)[:, None], (5, 5, 5, 5), mode="reflect")
    expected = torch.nn.functional.conv2d(padded, window)[:, 0]
    np.testing.assert_allclose(slow.gaussian_blur(image), expected.numpy(), rtol=1e-12, atol=1e-12)


def test_insertion_and_deletion_of_four_pixels():
    def predict(image: np.ndarray) -> np.ndarray:  # probability of class 0 is the first channel's sum / 10
        share = image[0].sum() / 10
        return np.log([share, 1 - share])

    image, blurred, zeros = np.zeros((3, 2, 2)), np.full((3, 2, 2), 1.0), np.full((3, 2, 2), 0.25)
    image[0] = [[2, 3], [1, 2]]
    insertion, deletion = slow.insertion_deletion(predict, image, RANKS, 0, [0, 2, 4], blurred, zeros)
    # Insertion: 4, then 3 + 2 of the image and 1 + 1 of the blur, then 8, of 10. Deletion: 8, then 1 + 2 + 0.5, then 1.
    assert insertion == pytest.approx(100 * (0.5 * (0.4 + 0.7) / 2 + 0.5 * (0.7 + 0.8) / 2))
    assert deletion == pytest.approx(100 * (0.5 * (0.8 + 0.35) / 2 + 0.5 * (0.35 + 0.1) / 2))


def test_masked_by_map():
    masked = slow.masked_by_map(IMAGE, np.array([[0.0, 1.0], [2.0, 4.0]]))
    np.testing.assert_array_equal(masked[0], [[0, 0.5], [1.5, 4]])
    np.testing.assert_array_equal(masked[2], [[0, 2.5], [5.5, 12]])
    np.testing.assert_array_equal(slow.masked_by_map(IMAGE, np.ones((2, 2))), np.zeros_like(IMAGE))


def test_average_drop_and_increase():
    before, after = [0.8, 0.5, 0.4, 0.5], [0.4, 0.6, 0.4, 0.0]
    assert slow.average_drop(before, after) == pytest.approx(100 * (0.5 + 0 + 0 + 1) / 4)
    assert slow.average_increase(before, after) == pytest.approx(25)


# -- localisation --------------------------------------------------------------------------------------------------------

MAPS = [np.array([[0.0, 1.0], [2.0, 9.0]]), np.array([[4.0, 4.0], [4.0, 4.0]])]  # means 3 and 4: one pixel, and none
MASKS = [np.array([[0, 0], [1, 1]]), np.array([[1, 0], [0, 0]])]


def test_pixel_accuracy_over_the_data_set():
    assert slow.pixel_accuracy(MAPS, MASKS) == (3 + 3) / 8


def test_mean_iou_sums_before_it_divides():
    # Background: 2 + 3 common of 3 + 4. Foreground: 1 + 0 common of 2 + 1.
    assert slow.mean_iou(MAPS, MASKS) == pytest.approx((5 / 7 + 1 / 3) / 2)


def test_mean_iou_of_a_class_found_nowhere():
    assert slow.mean_iou([np.ones((2, 2))], [np.zeros((2, 2))]) == 0.5


def test_average_precision_by_hand():
    # Descending: true (1/1), false, true (2/3).
    assert slow.average_precision([0.9, 0.5, 0.1], [1, 0, 1]) == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    # The equals come as one threshold, whichever stands first: recall 1/2 at precision 1/2, then 1 at 2/3.
    assert slow.average_precision([0.5, 0.5, 0.1], [1, 0, 1]) == pytest.approx(0.5 * 1 / 2 + 0.5 * 2 / 3)
    assert slow.average_precision([0.5, 0.5, 0.1], [0, 1, 1]) == pytest.approx(0.5 * 1 / 2 + 0.5 * 2 / 3)
    assert slow.average_precision([0.5, 0.1], [0, 0]) == 0


def test_mean_average_precision_pools_both_sides():
    # R = 0, 1 against background, foreground: the scores 1, 0, 0, 1 are right throughout.
    perfect = slow.mean_average_precision([np.array([[3.0, 5.0]])], [np.array([[0, 1]])])
    assert perfect == 1
    # R all 0: the scores 1 1 | 0 0 against 1 0 | 0 1: half at precision 1/2, the rest at 2/4.
    constant = slow.mean_average_precision([np.array([[3.0, 3.0]])], [np.array([[0, 1]])])
    assert constant == pytest.approx(0.5)
    both = slow.mean_average_precision([np.array([[3.0, 5.0]]), np.array([[3.0, 3.0]])], [np.array([[0, 1]])] * 2)
    assert both == pytest.approx(0.75)


def test_auroc_by_hand():
    assert slow.auroc([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1]) == pytest.approx(0.75)
    assert slow.auroc([1, 1, 1], [0, 1, 1]) == pytest.approx(0.5)
    assert slow.auroc([2, 2, 1], [1, 0, 0]) == pytest.approx(0.75)  # one pair equal, one right
    assert math.isnan(slow.auroc([1, 2], [1, 1]))


@pytest.mark.parametrize("seed", range(20))
def test_ranking_scores_are_those_of_scikit_learn(seed: int):
    metrics = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(seed)
    scores = generator.integers(0, 2 + 10 * seed, 60) / 7  # few values first, so many ties
    targets = generator.random(60) < 0.3
    targets[:2] = True, False
    assert slow.average_precision(scores, targets) == pytest.approx(metrics.average_precision_score(targets, scores), abs=1e-12)
    assert slow.auroc(scores, targets) == pytest.approx(metrics.roc_auc_score(targets, scores), abs=1e-12)


# -- consistency of groups, intervals ------------------------------------------------------------------------------------


def linear(image: np.ndarray) -> np.ndarray:
    """Logits whose probability of class 0 is a weighted sum of the first row of the first channel."""
    share = 0.5 + float(image[0, 0] @ np.array([0.08, 0.04, 0.01]))
    return np.log([share, 1 - share])


def saco_of(pixels: list[float], image: list[float], target: int = 0) -> float:
    heat = np.array([pixels])
    rank = slow.ranks(heat, np.zeros_like(heat))
    return slow.saco(linear, np.array([[image]] * 3), heat, rank, target, groups=3)


def test_saco_by_hand():
    # Values 1, 3, −1, mean 1. Effects on class 0: 0.08·0, 0.04·2, 0.01·(−2) = 0, 0.08, −0.02.
    # Salience 5, 2, 1, most salient first: pairs 5−2 wrong, 5−1 right, 2−1 right: (−3 + 4 + 1) / 8.
    assert saco_of([5, 2, 1], [1, 3, -1]) == pytest.approx(2 / 8)
    # For the other class the effects turn around: 0, −0.08, 0.02: right, wrong, wrong.
    assert saco_of([5, 2, 1], [1, 3, -1], target=1) == pytest.approx(-2 / 8)
    # The map that ranks by effect is consistent throughout, its reverse nowhere.
    assert saco_of([2, 5, 1], [1, 3, -1]) == pytest.approx(1)
    assert saco_of([2, 1, 5], [1, 3, -1]) == pytest.approx(-1)


def test_saco_of_a_constant_map_is_zero():
    assert saco_of([1, 1, 1], [1, 3, -1]) == 0


def test_saco_groups_of_unequal_size():
    heat = np.arange(7.0, 0.0, -1)[None]  # 7 pixels in 3 groups: ranks 0–1, 2–3, 4–6, salience 13, 9, 6
    seen = []

    def predict(image: np.ndarray) -> np.ndarray:
        seen.append(tuple(np.flatnonzero(image[0, 0] == 3.0)))
        return np.array([float(len(seen)), 0.0])  # ever surer: each group's effect is below the one before

    image = np.array([[[0.0, 1, 2, 10, 4, 5, -1]]] * 3)  # mean 3, a value no pixel has
    assert slow.saco(predict, image, heat, np.arange(7)[None], 0, groups=3) == pytest.approx(1)
    assert seen == [(), (0, 1), (2, 3), (4, 5, 6)]


def test_bootstrap_interval():
    counts = np.array([[2, 0], [1, 1], [0, 2]])  # means 1, 2, 3; quantiles by linear interpolation
    np.testing.assert_allclose(slow.bootstrap_interval([1.0, 3.0], counts), [1.05, 2.95])
