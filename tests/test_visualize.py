"""Panels: layout, colours, and what is refused."""

from __future__ import annotations

import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from vitexplain import InputError
from vitexplain.visualize import COLUMNS, panel, save_panel

PHOTO = Image.new("RGB", (90, 60), "white")
RISING = torch.arange(12.0).view(3, 4)


def _pictures(figure) -> list:
    """Axes of the pictures: all but the legend's bars."""
    return [axes for axes in figure.axes if axes.images[0].get_array().ndim == 3]


@pytest.mark.parametrize(("count", "columns", "rows"), [(0, 1, 1), (1, 2, 1), (4, 5, 1), (5, 3, 2), (8, 5, 2), (14, 5, 3)])
def test_at_most_five_pictures_a_row_all_of_one_size(count: int, columns: int, rows: int) -> None:
    pictures = _pictures(panel(PHOTO, {f"method {i}" * (1 + i): RISING for i in range(count)}, title="Title"))
    assert len(pictures) == count + 1
    boxes = [axes.get_position() for axes in pictures]
    assert len({round(box.x0, 4) for box in boxes}) == columns <= COLUMNS
    assert len({round(box.y0, 4) for box in boxes}) == rows
    assert len({(round(box.width, 6), round(box.height, 6)) for box in boxes}) == 1
    assert all(0 <= box.x0 < box.x1 <= 1 and 0 <= box.y0 < box.y1 <= 1 for box in boxes)
    assert {axes.images[0].get_array().shape for axes in pictures} == {(299, 448, 3)}


def test_signed_maps_diverge_and_the_others_do_not() -> None:
    figure = panel(PHOTO, {"unsigned": RISING, "signed": RISING - 5.5}, alpha=1.0)
    _, unsigned, signed = (axes.images[0].get_array().astype(int) for axes in _pictures(figure))
    assert unsigned[0, 0].sum() < 20  # the lowest value is nearly black
    assert signed[0, 0, 2] > signed[0, 0, 0]  # against the class: blue
    assert signed[-1, -1, 0] > signed[-1, -1, 2]  # for the class: red
    words = [text.get_text() for text in figure.texts]
    assert {"low", "high", "against the class", "for the class", "photo", "signed", "unsigned"} <= set(words)


def test_the_legend_shows_only_what_is_there() -> None:
    words = {text.get_text() for text in panel(PHOTO, {"a": RISING}).texts}
    assert "low" in words
    assert "for the class" not in words


def test_titles_are_text_and_not_mathematics(tmp_path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = save_panel(tmp_path / "p.png", PHOTO, {"cost in $ or $_": RISING, "long " * 40: RISING}, title="a $ b_{ " * 30)
    with Image.open(path) as picture:
        assert picture.width > 3 * 448
        assert picture.convert("RGB").getpixel((1, 1)) == (255, 255, 255)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".pdf", ".svg"])
def test_files_of_every_kind(tmp_path, suffix: str) -> None:
    assert save_panel(tmp_path / f"p{suffix}", PHOTO, {"map": RISING}).stat().st_size > 500


def test_no_global_state_of_matplotlib_is_touched() -> None:
    code = "import sys, vitexplain.visualize; assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("photo", [np.zeros((8, 8, 3), np.uint8), torch.zeros(3, 8, 8), Image.new("L", (8, 8))])
def test_photos_of_every_kind(photo: object) -> None:
    assert len(_pictures(panel(photo, {"map": RISING.requires_grad_(False)}))) == 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda _: panel(PHOTO, {"m": torch.zeros(1, 2, 2)}), r"expected a tensor \(gh, gw\) for 'm', received \(1, 2, 2\)"),
        (lambda _: panel(PHOTO, {"m": "map"}), "received str"),
        (lambda _: panel(PHOTO, {"m": torch.full((2, 2), torch.nan)}), "expected finite values for 'm'"),
        (lambda _: panel("cat.jpg", {}), "image: expected a PIL image"),
        (lambda _: panel(PHOTO, {"m": RISING}, alpha=2), "alpha: expected 0 to 1"),
        (lambda t: save_panel(t / "p.txt", PHOTO, {}), "cannot write"),
        (lambda t: save_panel(t / "absent" / "p.png", PHOTO, {}), "cannot write .*No such file"),
        (lambda t: save_panel(t, PHOTO, {}), "cannot write"),
    ],
)
def test_bad_requests_are_refused(tmp_path, call, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(tmp_path)
