"""Curves: which files, what they show, and that the same results give the same bytes."""

from __future__ import annotations

import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from matplotlib.colors import to_hex
from PIL import Image

from vitexplain import InputError
from vitexplain.evaluate.curves import COLORS, CONTROL_COLOR, curve_groups, draw, save_curves, strokes
from vitexplain.evaluate.results import MethodEntry, Results
from vitexplain.evaluate.tables import names

from .made_results import CONTROLS, METHODS, made_results

RESULTS = made_results()
FILES = [
    "perturbation_positive_pred",
    "perturbation_positive_gt",
    "perturbation_negative_pred",
    "perturbation_negative_gt",
    "insertion_deletion_insertion_pred",
    "insertion_deletion_deletion_pred",
]


def _few(results: Results = RESULTS, **changes: object) -> Results:
    """The first protocol's first group of curves."""
    return replace(results, curves=tuple(replace(c, **changes) for c in curve_groups(results)[0].curves))


def test_a_png_and_an_svg_for_each_group(tmp_path: Path) -> None:
    paths = save_curves(RESULTS, tmp_path / "new")
    assert [path.name for path in paths] == [f"{name}{suffix}" for name in FILES for suffix in (".png", ".svg")]
    for path in paths[::2]:
        with Image.open(path) as picture:
            assert picture.width > 1200
    assert ElementTree.parse(paths[1]).getroot().tag == "{http://www.w3.org/2000/svg}svg"


def test_the_same_results_give_the_same_files(tmp_path: Path) -> None:
    results = _few()
    first, second = (save_curves(results, tmp_path / name) for name in "ab")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert b"dc:date" not in first[1].read_bytes()


def test_lines_bands_and_legend_of_every_method() -> None:
    group = curve_groups(RESULTS)[1]
    figure = draw(group, names(RESULTS), strokes(RESULTS))
    (axes,) = figure.axes
    assert len(axes.lines) == len(axes.collections) == len(METHODS) + len(CONTROLS)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [names(RESULTS)[c.method] for c in group.curves]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("pixels removed, %", "accuracy, %")
    assert [text.get_text() for text in figure.texts] == [
        "Perturbation: positive",
        "explained class: ground truth; bands: 95 % intervals",
    ]


def test_the_legend_lies_beside_the_axes_and_inside_the_figure() -> None:
    figure = draw(curve_groups(RESULTS)[0], names(RESULTS), strokes(RESULTS))
    figure.canvas.draw()
    legend, axes = figure.legends[0].get_window_extent(), figure.axes[0].get_window_extent()
    assert legend.x0 > axes.x1
    assert legend.x1 <= figure.bbox.x1
    assert legend.y0 >= 0


def test_pixels_are_put_in_by_insertion() -> None:
    labels = {group.title: group.x_label for group in curve_groups(RESULTS)}
    assert labels["Insertion and deletion: insertion"] == "pixels put in, %"
    assert labels["Insertion and deletion: deletion"] == "pixels removed, %"


def test_no_two_methods_look_the_same_and_controls_are_grey() -> None:
    looks = strokes(RESULTS)
    assert len(set(looks.values())) == len(looks) == len(RESULTS.methods)
    assert {looks[label].color for label in CONTROLS} == {None}
    assert all(looks[label].dashes for label in CONTROLS)
    lines = draw(curve_groups(RESULTS)[0], names(RESULTS), looks).axes[0].lines
    assert [to_hex(line.get_color()) for line in lines[-len(CONTROLS) :]] == [CONTROL_COLOR] * len(CONTROLS)
    assert {to_hex(line.get_color()).upper() for line in lines[: len(METHODS)]} == set(COLORS)


def test_more_methods_than_looks() -> None:
    many = {f"method {number}": MethodEntry(f"method {number}", "method") for number in range(60)}
    assert len(strokes(replace(RESULTS, methods=many))) == 60


def test_names_are_text_and_neither_mathematics_nor_paths(tmp_path: Path) -> None:
    title = "_$cost$ <b> & ü" + " long" * 30
    entries = {label: replace(entry, title=title) for label, entry in RESULTS.methods.items()}
    results = _few(replace(RESULTS, methods=entries), protocol="quantus:a=../B/ü", name="$x_{", quantity="$^y")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        paths = save_curves(results, tmp_path)
    assert [path.name for path in paths] == ["quantus-a-b_x__pred.png", "quantus-a-b_x__pred.svg"]
    assert all(path.parent == tmp_path for path in paths)


def test_two_groups_never_share_a_file(tmp_path: Path) -> None:
    one, other = _few(protocol="a:b").curves, _few(protocol="a?b").curves
    names_of = [path.name for path in save_curves(replace(RESULTS, curves=(one[0], other[0])), tmp_path)][::2]
    assert names_of == ["a-b_positive_pred.png", "a-b_positive_pred-2.png"]


def test_a_single_point_is_drawn(tmp_path: Path) -> None:
    point = _few(share=(0.0,), mean=(1.0,), low=(0.5,), high=(1.5,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(save_curves(point, tmp_path)) == 2


def test_no_curves_no_files(tmp_path: Path) -> None:
    assert save_curves(replace(RESULTS, curves=()), tmp_path) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write '.*positive_pred\.png': (File exists|Not a directory)"):
        save_curves(_few(), tmp_path / "file")


def test_no_global_state_of_matplotlib_is_touched() -> None:
    code = "import sys, vitexplain.evaluate.curves; assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
