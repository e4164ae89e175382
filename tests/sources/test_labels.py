"""Labels as written, and the classes of the model that they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from vitexplain.loading import LoadedModel
from vitexplain.sources import open_source

from .made import npz_of, put, refused, with_classes

CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def _labels(folder: Path, names: Sequence[str], classes: LoadedModel | None) -> dict[str, int]:
    """What folders of these names stand for."""
    source = open_source(put(folder, *(f"{name}/a.png" for name in names)), classes=classes)
    return dict(zip([identity.partition("/")[0] for identity in source.ids], source.labels, strict=True))


def test_names_are_looked_up_among_the_models(tmp_path, demo, imagenet) -> None:
    assert _labels(tmp_path / "1", ["Cat", "airplane"], demo) == {"Cat": 3, "airplane": 0}
    assert _labels(tmp_path / "2", ["tabby cat", "Tinca tinca"], imagenet) == {"tabby cat": 281, "Tinca tinca": 0}


def test_wordnet_ids_are_imagenets_classes(tmp_path, imagenet, demo) -> None:
    wnids = {"n01440764": 0, "n02123045": 281, "n15075141": 999}
    assert _labels(tmp_path / "1", list(wnids), imagenet) == wnids
    assert _labels(tmp_path / "2", ["n02123045", "tench"], imagenet) == {"n02123045": 281, "tench": 0}
    refused("of the 3 in '1', not among them are 'n01440764', 'n02123045'", tmp_path / "1", classes=demo)


def test_numbers_are_indices(tmp_path, demo) -> None:
    assert _labels(tmp_path / "1", ["7", "2", "05"], demo) == {"7": 7, "2": 2, "05": 5}
    assert _labels(tmp_path / "1", ["7", "2", "05"], None) == {"7": 7, "2": 2, "05": 5}
    ten = [str(number) for number in range(1, 11)]
    put(tmp_path / "2", *(f"{number}/a.png" for number in ten))
    refused("expected a class index from 0 to 9, received 10 for '10/a.png'", tmp_path / "2", classes=demo)


def test_names_count_in_order_where_nothing_else_is_known(tmp_path, demo) -> None:
    assert _labels(tmp_path / "1", ["b", "c", "a"], with_classes(demo, 3, None)) == {"a": 0, "b": 1, "c": 2}
    assert _labels(tmp_path / "1", ["b", "c", "a"], None) == {"a": 0, "b": 1, "c": 2}
    assert _labels(tmp_path / "1", ["b", "c", "a"], with_classes(demo, 3, ["x", "y", "z"])) == {"a": 0, "b": 1, "c": 2}


def test_empty_class_folders_are_numbered_too(tmp_path, demo) -> None:
    (tmp_path / "b").mkdir()
    assert _labels(tmp_path, ["a", "c"], with_classes(demo, 3, None)) == {"a": 0, "c": 2}
    assert _labels(tmp_path, ["a", "c"], with_classes(demo, 2, None)) == {"a": 0, "c": 1}
    assert _labels(tmp_path, ["a", "c"], with_classes(demo, 9, ["a", "c", *"defghij"])) == {"a": 0, "c": 1}


def test_names_that_do_not_fit(tmp_path, demo, imagenet) -> None:
    put(tmp_path / "1", *(f"{name}/a.png" for name in ("plane", *CIFAR[1:])))
    # The sorted order would call a bird 1 and the plane 8.
    refused("such as 'airplane'.* model's 10 classes; of the 10 .*not among them are 'plane'$", tmp_path / "1", classes=demo)
    put(tmp_path / "2", "crane/a.png", "tench/a.png", "no such thing/a.png")
    refused("among them are 'no such thing'; names of several are 'crane'$", tmp_path / "2", classes=imagenet)
    refused("names of exactly 7 classes, .*received 3 names", tmp_path / "2", classes=with_classes(demo, 7, None))


NAMED = {
    "another order": ([0, 1, 2], ["z", "y", "x"], ["x", "y", "z"], (2, 1, 0)),
    "a subset": ([0, 1, 1], ["z", "x"], ["x", "y", "z"], (2, 0, 0)),
    "other names": ([0, 1, 2], ["p", "q", "r"], ["x", "y", "z"], (0, 1, 2)),
    "other names, fewer": ([0, 1, 1], ["p", "q"], ["x", "y", "z"], (0, 1, 1)),
    "two names of a class": ([0, 1, 2, 2], ["z", "Z ", "x", "y"], ["x", "y", "z"], (2, 2, 0, 0)),
    "some known, in the model's order": ([0, 1, 2], ["x", "y", "r"], ["x", "y", "z"], (0, 1, 2)),
    "no names of the model": ([0, 2, 1], ["z", "y", "x"], None, (0, 2, 1)),
    "numbers": ([0, 1, 1], ["2", "0"], ["x", "y", "z"], (2, 0, 0)),
    "no names beside them": ([2, 0, 1], None, ["x", "y", "z"], (2, 0, 1)),
    "names as labels": (["z", "x", "y"], None, ["x", "y", "z"], (2, 0, 1)),
    "names as labels, in the order given": (["q", "p", "r"], ["r", "q", "p"], ["x", "y", "z"], (1, 2, 0)),
}


@pytest.mark.parametrize("case", NAMED)
def test_indices_with_names_beside_them(tmp_path, demo, case: str) -> None:
    labels, class_names, own, expected = NAMED[case]
    path = npz_of(tmp_path, labels, class_names)
    assert open_source(path, classes=with_classes(demo, 3, own)).labels == expected
    if isinstance(labels[0], int):
        assert open_source(path).labels == tuple(labels)


def test_indices_that_mean_nothing(tmp_path, demo) -> None:
    three = with_classes(demo, 3, ["x", "y", "z"])
    refused("not among them are 'q'", npz_of(tmp_path, [0, 1], ["x", "q"]), classes=three)
    refused("of the 3 in 'd.npz', not among them are 'r'", npz_of(tmp_path, [0, 1], ["z", "y", "r"]), classes=three)
    refused("expected one of 0, 1, received 2 for '000001'", npz_of(tmp_path, [0, 2], ["x", "y"]), classes=three)
    refused("index from 0 to 2, received 3 for '000001' in 'd.npz'", npz_of(tmp_path, [0, 3], None), classes=three)
    refused("index 0 or more, received -1 for '000001'", npz_of(tmp_path, [0, -1], None))
    refused("expected one of 'x', 'y', received 'q' for '000001'", npz_of(tmp_path, ["x", "q"], ["x", "y"]))
    refused(r"of integers or text .* received \(2,\) float64", npz_of(tmp_path, [0.0, 1.0], None))
