"""What was measured is drawn, and nothing else."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from PIL import Image

from bench import plot
from bench.plot import draw, fitted_exponent
from bench.record import Row
from bench.registry import CAPTUM, COLREDUCE, DENSE, GRAD_CAM, MODEL_ITSELF, TORCH, TRITON

from . import made_rows

ALL = (*made_rows.resolution(), *made_rows.explanations(), *made_rows.operations())


@pytest.mark.parametrize("exponent", [0.9, 1.0, 2.0])
def test_an_exponent_is_found(exponent: float) -> None:
    assert fitted_exponent([(n, 3 * n**exponent) for n in (577, 1025, 4097)]) == pytest.approx(exponent)


def test_an_exponent_is_of_many_tokens_alone_and_of_two_at_least() -> None:
    points = [(197, 1e6), (577, 577.0), (1025, 1025.0)]
    assert fitted_exponent(points) == pytest.approx(1)
    assert fitted_exponent(points, least=100) < 0
    assert math.isnan(fitted_exponent(points[:2]))
    assert math.isnan(fitted_exponent([(577, 1.0), (577, 2.0)]))
    assert math.isnan(fitted_exponent([]))


def _texts(figure: Figure) -> list[str]:
    """All that is written in the panels and their legends."""
    texts = []
    for axes in figure.axes:
        texts += [text.get_text() for text in axes.texts]
        texts += [text.get_text() for text in axes.get_legend().get_texts()]
    return texts


def _marks(figure: Figure) -> list[tuple[float, str]]:
    """Tokens and colour of every cross."""
    return [(line.get_xdata()[0], line.get_color()) for axes in figure.axes for line in axes.lines if line.get_marker() == "x"]


def test_every_figure_is_drawn_and_none_is_blank(results, capsys) -> None:
    results("cpu", ALL)
    paths = draw("cpu")
    assert [path.name for path in paths] == ["time_over_tokens.png", "memory_over_tokens.png", "roofline.png", "methods.png"]
    assert {path.parent for path in paths} == {plot.DOCS / "cpu"}
    for path in paths:
        pixels = np.asarray(Image.open(path).convert("L"))
        assert min(pixels.shape) > 200
        assert 0.005 < (pixels < 250).mean() < 0.6
    assert capsys.readouterr().out == ""


def test_a_figure_is_the_same_file_when_it_is_drawn_again(results) -> None:
    results("cpu", made_rows.resolution())
    first = {path: path.read_bytes() for path in draw("cpu")}
    assert {path: path.read_bytes() for path in draw("cpu")} == first


def test_nothing_is_drawn_of_what_was_not_measured(results, capsys) -> None:
    results("cpu", ALL)
    results("nvidia-h200", made_rows.blank(ALL))
    assert {path.parent.name for path in draw(None)} == {"cpu"}
    assert not (plot.DOCS / "nvidia-h200").exists()
    assert Counter(line.split(":")[0] for line in capsys.readouterr().out.splitlines()) == {"nvidia-h200": 4}


@pytest.mark.parametrize("drawing", [plot.time_over_tokens, plot.memory_over_tokens])
def test_where_a_rival_is_out_of_memory_is_marked(drawing: plot.Drawing) -> None:
    figure = drawing([*made_rows.resolution(full_from=1025)])
    assert _marks(figure) == [(1025, plot.color_of(DENSE))], "once, at the smallest"
    assert _texts(figure).count("out of memory") == 1
    assert _marks(drawing([*made_rows.resolution(full_from=9999)])) == []


def test_exponents_stand_in_the_legend() -> None:
    texts = _texts(plot.time_over_tokens([*made_rows.resolution()]))
    assert any(text.startswith(f"tokentm, {TORCH}  ") and "n^{1.50}" in text for text in texts)
    assert any(text.startswith(f"tokentm, {DENSE}  ") and "n^{2.00}" in text for text in texts)
    assert {"∝ n", "∝ n²"} <= set(texts)


def test_there_is_a_panel_for_each_element_type() -> None:
    rows: Iterable[Row] = [*made_rows.resolution(), *made_rows.in_dtype(made_rows.resolution(), "bfloat16")]
    figure = plot.memory_over_tokens([*rows])
    assert [axes.get_title() for axes in figure.axes] == [f"{made_rows.SIZE.model}, {dtype}" for dtype in ("bfloat16", "float32")]


def test_bars_are_of_the_ratio_whoever_explains() -> None:
    figure = plot.methods([*made_rows.explanations()])
    (axes,) = figure.axes
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([1.1, 8.8, 0.99])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["tokentm", "grad_cam"], "not what failed or is missing"
    assert set(_texts(figure)) >= {TORCH, DENSE, GRAD_CAM, "8.8"}


def test_a_ratio_is_of_medians_where_it_was_not_taken_in_turns() -> None:
    rows = [row for row in made_rows.explanations() if not (row.provider == DENSE and row.metric.startswith("ratio"))]
    (axes,) = plot.methods(rows).axes
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([1.1, 8.8, 0.99])


def test_operations_stand_under_the_measured_roof() -> None:
    figure = plot.roofline([*made_rows.operations()])
    (axes,) = figure.axes
    (roof,) = (line for line in axes.lines if line.get_color() == "black" and len(line.get_xdata()) == 3)
    assert max(roof.get_ydata()) == pytest.approx(0.4)
    assert roof.get_ydata()[0] == pytest.approx(0.02 * roof.get_xdata()[0])
    texts = _texts(figure)
    assert "1  torch fused attention forward\n2  row_propagation" in texts
    assert {"1", "2", "0.4 TFLOP/s", "0.02 TB/s"} <= set(texts)
    assert plot.roofline([row for row in made_rows.operations() if row.work != "peak"]) is None, "no roof, no figure"


def test_a_provider_has_one_colour() -> None:
    colors = [plot.color_of(name) for name in (TORCH, TRITON, DENSE, CAPTUM, GRAD_CAM, MODEL_ITSELF)]
    assert len(set(colors)) == len(colors)
    for provider in (TORCH, TRITON):
        assert plot.color_of(f"{provider}, compiled, CUDA graph") == plot.color_of(provider)
    assert plot.color_of(f"{DENSE}, frozen parameters") == plot.color_of(DENSE)
    assert plot.color_of(f"{COLREDUCE} (naive)") == plot.color_of(COLREDUCE) != plot.OTHER
    assert plot.color_of("somebody else, compiled") == plot.OTHER


def test_variants_are_dashed_in_the_colour_of_their_provider() -> None:
    (axes,) = plot.time_over_tokens([*made_rows.resolution()]).axes
    lines = {line.get_label().partition("  ")[0]: line for line in axes.lines}
    plain, variant = lines[f"tokentm, {TORCH}"], lines[f"tokentm, {TORCH}, checkpointed"]
    assert plain.get_color() == variant.get_color() == plot.color_of(TORCH)
    assert (plain.get_linestyle(), variant.get_linestyle()) == ("-", "--")
    assert lines[f"tokentm, {DENSE}"].get_linestyle() == "-"


def test_works_are_told_by_their_markers() -> None:
    rows = [*made_rows.resolution()]
    others = [replace(row, work="rollout") for row in rows if (row.work, row.provider) == ("tokentm", TORCH)]
    (axes,) = plot.time_over_tokens([*rows, *others]).axes
    drawn = [line for line in axes.lines if line.get_label().startswith((f"tokentm, {TORCH}  ", f"rollout, {TORCH}  "))]
    assert [(line.get_marker(), line.get_linestyle()) for line in drawn] == [("o", "-"), ("s", "-")]


def test_bars_of_variants_are_hatched_each_in_its_own_way() -> None:
    rows = [*made_rows.explanations()]
    for variant in ("compiled", "CUDA graph"):
        rows += [replace(row, provider=f"{TORCH}, {variant}") for row in rows if (row.work, row.provider) == ("tokentm", TORCH)]
    figure = plot.methods(rows)
    (axes,) = figure.axes
    ours = [bar for bar in axes.patches if bar.get_facecolor() == to_rgba(plot.color_of(TORCH))]
    assert len({bar.get_hatch() for bar in ours}) == len(ours) == 3
    assert {TORCH, f"{TORCH}, compiled", f"{TORCH}, CUDA graph"} <= set(_texts(figure))


def test_two_ways_of_one_operation_are_named_under_the_roof() -> None:
    rows = [*made_rows.operations()]
    again = [replace(row, provider=f"{TORCH}, two passes") for row in rows if row.work == "row_propagation"]
    texts = _texts(plot.roofline([*rows, *again]))
    assert "1  torch fused attention forward\n2  row_propagation\n3  row_propagation, two passes" in texts
    assert f"{TORCH}, two passes" not in texts


def test_pictures_of_the_documentation_are_of_devices_with_results() -> None:
    for folder in Path(plot.DOCS).glob("*"):
        assert folder.name in plot.devices()
