"""Bootstrap intervals, and who may be called best."""

from __future__ import annotations

import numpy as np
import pytest

from vitexplain.evaluate import statistics
from vitexplain.evaluate.statistics import LEAST_IMAGES, Bootstrap, ends, standing

from . import slow_metrics as slow


def _counts(bootstrap: Bootstrap) -> np.ndarray:
    return np.rint(np.concatenate(list(bootstrap._weights())) * bootstrap.count).astype(int)


def test_the_interval_of_a_mean_is_that_of_the_slow_bootstrap() -> None:
    values = np.random.default_rng(1).normal(size=37)
    bootstrap = Bootstrap(37, 500, seed=3)
    (resampled,) = bootstrap.means(values[:, None]).T
    counts = _counts(bootstrap)
    assert counts.shape == (500, 37)
    assert (counts.sum(1) == 37).all()
    assert ends(resampled) == pytest.approx(slow.bootstrap_interval(values, counts), abs=1e-12)


def test_columns_share_their_draws_so_that_a_ratio_of_sums_is_resampled_as_one() -> None:
    columns = np.random.default_rng(2).uniform(1, 2, (20, 2))
    bootstrap = Bootstrap(20, 50, seed=0)
    means = bootstrap.means(columns)
    counts = _counts(bootstrap)
    assert means[:, 0] / means[:, 1] == pytest.approx((counts @ columns[:, 0]) / (counts @ columns[:, 1]))


def test_blocks_do_not_change_the_draws(monkeypatch) -> None:
    whole = _counts(Bootstrap(10, 30, seed=5))
    monkeypatch.setattr(statistics, "_COUNTS_AT_ONCE", 70)
    assert len(list(Bootstrap(10, 30, seed=5)._weights())) == 5
    assert np.array_equal(_counts(Bootstrap(10, 30, seed=5)), whole)
    assert not np.array_equal(_counts(Bootstrap(10, 30, seed=6)), whole)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for trial in range(200):
        low, high = ends(Bootstrap(60, 400, seed=trial).means(rng.normal(0.3, 1, (60, 1)))[:, 0])
        inside += low <= 0.3 <= high
    assert 0.88 <= inside / 200 <= 0.99


@pytest.mark.parametrize(("better", "sign"), [("higher", 1), ("lower", -1)])
def test_a_winner_needs_a_paired_difference_without_zero(better: str, sign: int) -> None:
    rng = np.random.default_rng(0)
    shared = rng.normal(size=1000)  # what all methods have in common, far wider than their differences
    resampled = {
        "a": sign * (shared + 0.05),
        "b": sign * shared,
        "c": sign * (shared - 0.5 + 0.01 * rng.normal(size=1000)),
    }
    values = {label: float(spread.mean()) for label, spread in resampled.items()}
    assert standing(values, resampled, better, 100) == ("a", ("a",)), "the difference is certain, however wide the intervals"
    resampled["b"] = resampled["b"] + rng.normal(size=1000)
    assert standing(values, resampled, better, 100) == (None, ("a", "b"))
    assert standing({"b": values["b"]}, {"b": resampled["b"]}, better, 100) == ("b", ("b",))
    assert standing({}, {}, better, 100) == (None, ())


def test_few_images_have_no_winner() -> None:
    resampled = {"a": np.full(10, 1.0), "b": np.full(10, 2.0)}
    values = {"a": 1.0, "b": 2.0}
    assert standing(values, resampled, "higher", LEAST_IMAGES - 1) == (None, ("b", "a"))
    assert standing(values, resampled, "higher", LEAST_IMAGES) == ("b", ("b",))


def test_two_equal_methods_seldom_have_a_winner() -> None:
    rng = np.random.default_rng(0)
    won = 0
    for trial in range(200):
        scores = rng.normal(size=(LEAST_IMAGES, 2))
        means = Bootstrap(LEAST_IMAGES, 400, seed=trial).means(scores)
        winner, _ = standing(
            dict(zip("ab", scores.mean(0), strict=True)), dict(zip("ab", means.T, strict=True)), "higher", LEAST_IMAGES
        )
        won += winner is not None
    assert won / 200 < 0.12
