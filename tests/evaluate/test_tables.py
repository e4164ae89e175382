"""Tables: rows, columns and digits as the papers have them; what is bold, and what is said where nothing is."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vitexplain import UnknownNameError
from vitexplain.evaluate.results import Column, Figure, MethodEntry, Results
from vitexplain.evaluate.tables import escaped, markdown, table

from .made_results import ABLATIONS, CONTROLS, METHODS, made_results

ENTRIES = {
    "a": MethodEntry("Method A", "method"),
    "b": MethodEntry("Method B", "method"),
    "random": MethodEntry("random", "control"),
}


def _results(*columns: tuple[Column, dict[str, tuple[float, float, float]]], entries=ENTRIES, **parts) -> Results:
    """Results of columns, each with (mean, low, high) by method."""
    figures = [
        Figure(method, column.protocol, column.metric, column.explained, *values, 10)
        for column, cells in columns
        for method, values in cells.items()
    ]
    found = {"settings": {}, "environment": {}, "left_out": (), "timing": {}} | parts
    return Results(methods=entries, columns=tuple(c for c, _ in columns), figures=tuple(figures), curves=(), **found)


def _column(
    protocol="perturbation", metric="positive", explained="pred", better="lower", unit="%", winner="a", contenders=("a",)
):
    return Column(protocol, metric, explained, better, unit, winner, contenders)


CELLS = {"a": (14.26, 13.14, 15.56), "b": (20, 19, 21), "random": (33, 32, 34)}


def _cells(text: str) -> list[list[str]]:
    """A Markdown table's rows of stripped cells, without the rule."""
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line.startswith("| ")]
    return [[*row, *[""] * (len(rows[0]) - len(row))] for row in rows]


def test_a_cell_has_its_interval_and_only_the_winner_is_bold() -> None:
    rows = _cells(table(_results((_column(), CELLS)), "perturbation"))
    assert rows == [
        ["method", "positive ↓"],
        ["Method A", "**14.3** [13.1, 15.6]"],
        ["Method B", "20.0 [19.0, 21.0]"],
        ["*controls*", ""],
        ["random", "33.0 [32.0, 34.0]"],
    ]


def test_without_a_winner_nothing_is_bold_and_the_contenders_are_named() -> None:
    text = table(_results((_column(winner=None, contenders=("b", "a")), CELLS)), "perturbation")
    assert "**" not in text
    assert text.endswith("- positive ↓: no winner; Method A is best, and cannot be told from it: Method B.\n")


def test_a_single_method_is_compared_with_nothing() -> None:
    text = table(_results((_column(winner=None), {"a": CELLS["a"]})), "perturbation")
    assert "no winner, as there is nothing to compare with" in text


def test_both_explained_classes_stand_side_by_side() -> None:
    results = _results(*((_column(metric=m, explained=e), CELLS) for e in ("pred", "gt") for m in ("positive", "negative")))
    assert _cells(table(results, "perturbation"))[0] == [
        "method",
        "predicted: positive ↓",
        "ground truth: positive ↓",
        "predicted: negative ↓",
        "ground truth: negative ↓",
    ]


@pytest.mark.parametrize(
    ("unit", "value", "shown"),
    [
        ("%", 14.25123, "14.3"),
        ("%", -0.04, "0.0"),
        ("", 0.55712, "0.557"),
        ("", -0.0157, "−0.016"),
        ("", -4.8312, "−4.83"),
        ("", 1234.56, "1234.6"),
        ("", 0.000123, "1.23e−04"),
        ("", 0.0, "0.000"),
    ],
)
def test_digits_fit_the_size(unit: str, value: float, shown: str) -> None:
    results = _results((_column(unit=unit, winner=None), {"a": (value, value, value)}))
    assert _cells(table(results, "perturbation"))[1][1] == f"{shown} [{shown}, {shown}]"


def test_a_value_that_was_not_measured_is_a_dash() -> None:
    results = _results((_column(), CELLS), (_column(metric="negative"), {"a": CELLS["a"]}))
    assert _cells(table(results, "perturbation"))[2] == ["Method B", "20.0 [19.0, 21.0]", "–"]


def test_rows_on_request() -> None:
    results = _results((_column(), CELLS))
    text = table(results, "perturbation", ["random", "b"])
    assert [row[0] for row in _cells(text)] == ["method", "Method B", "*controls*", "random"]
    assert "the best is Method A, which is not shown here" in text


def test_unknown_names_are_refused_with_near_ones() -> None:
    results = _results((_column(), CELLS))
    with pytest.raises(UnknownNameError, match="unknown protocol 'perturbaton': did you mean perturbation"):
        table(results, "perturbaton")
    with pytest.raises(UnknownNameError, match="unknown method 'c'"):
        table(results, "perturbation", ["c"])


# -- localisation --------------------------------------------------------------------------------------------------------

PRIOR = {"centre prior": MethodEntry("centre prior", "control")}
LOCATED = _column("localisation", "mIoU", better="higher")


@pytest.mark.parametrize(
    ("prior", "said"),
    [
        ((17.2, 16.9, 18.5), "the interval lies above that of the centre prior for Method B; not so Method A."),
        ((13, 12.5, 13.1), "every method's interval lies above that of the centre prior."),
        ((25, 20.9, 29), "no method's interval lies above that of the centre prior."),
    ],
)
def test_localisation_is_compared_with_the_centre_prior(prior: tuple[float, float, float], said: str) -> None:
    text = table(_results((LOCATED, {**CELLS, "centre prior": prior}), entries=ENTRIES | PRIOR), "localisation")
    assert f"- mIoU ↑: {said}\n" in text


def test_many_methods_below_the_centre_prior_are_counted() -> None:
    assert "; not so the other 14 methods." in table(made_results(), "localisation")


@pytest.mark.parametrize("protocol", ["localisation", "localisation:threshold=half"])
def test_localisation_without_a_centre_prior_claims_nothing(protocol: str) -> None:
    text = table(_results((replace(LOCATED, protocol=protocol), CELLS)), protocol)
    assert "- centre prior: not among the rows, so no claim about localisation can be made." in text


# -- the whole document ----------------------------------------------------------------------------------------------------


def test_every_protocol_has_a_table_of_the_rows_that_have_figures() -> None:
    parts = markdown(made_results()).split("\n## ")
    titles = [part.splitlines()[0] for part in parts[1:]]
    assert titles == [
        "Perturbation",
        "Insertion and deletion",
        "Average drop and increase",
        "Localisation",
        "SaCo",
        "Ablation of TokenTM",
        "Quantus (metric = Sparseness)",
        "Left out",
        "Settings",
    ]
    rows = {title: len(_cells(part)) - 1 for title, part in zip(titles, parts[1:], strict=True) if "| " in part}
    assert rows["Perturbation"] == len(METHODS) + len(CONTROLS) + 1
    assert rows["Ablation of TokenTM"] == len(ABLATIONS)
    assert rows["Quantus (metric = Sparseness)"] == 3


def test_the_header_says_what_was_evaluated() -> None:
    header = markdown(made_results()).split("\n## ")[0]
    for words in (
        "**Model**: deit_tiny_patch16_224 (weights_sha256 = 8c2f60b1e27a…",
        "**Data**: imagenet_sample",
        "**Images**: 500; 2 left out",
        "**Explained class**: predicted and ground truth",
        "**Device**: NVIDIA H200, bfloat16",
        "torch 2.9.0+cu128",
    ):
        assert words in header


def test_a_table_says_which_options_were_used() -> None:
    text = markdown(made_results())
    assert "Options: convention = vtranm, substrate = black." in text
    assert "gmar (norm = l1, alpha = 1.0)" in text


def test_images_left_out_are_counted_and_the_first_named() -> None:
    lost = tuple({"id": f"photo {number}", "reason": "truncated"} for number in range(8))
    text = markdown(replace(made_results(), left_out=lost))
    assert "8 images could not be read:" in text
    assert "- photo 4: truncated\n- and 3 more, see results.json" in text
    assert "photo 5" not in text


def test_one_method_with_two_sets_of_options_has_two_names() -> None:
    assert "| TokenTM / VTranM (necc = false) |" in markdown(made_results())
    twice = {"first": MethodEntry("GMAR", "method"), "second": MethodEntry("GMAR", "method")}
    rows = _cells(table(_results((_column(), {"first": CELLS["a"], "second": CELLS["b"]}), entries=twice), "perturbation"))
    assert [row[0] for row in rows[1:]] == [r"GMAR \[first\]", r"GMAR \[second\]"]


def test_nothing_measured_is_still_a_document() -> None:
    assert markdown(_results()).startswith("# Evaluation\n\n- **Images**: none\n")


def test_names_stay_text() -> None:
    hostile = {"a": MethodEntry("<script>|*x*\n# `y` _z_ a_b", "method")}
    text = table(_results((_column(winner=None), {"a": CELLS["a"]}), entries=hostile), "perturbation")
    assert _cells(text)[1][0] == r"&lt;script>\|\*x\* # \`y\` \_z\_ a_b"
    assert escaped("\udcff.jpg") == r"\\udcff.jpg"


def test_results_survive_their_file() -> None:
    results = made_results()
    assert Results.from_json(results.to_json()) == results
