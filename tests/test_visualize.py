"""Panels: layout, colours, and what is refused."""

from __future__ import annotations

import itertools
import subprocess
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from vitexplain import Explanation, ExplanationError
from vitexplain.figures.layout import PANEL, Cells, text_width, wrapped_name
from vitexplain.figures.words import Piece, read_tokens
from vitexplain.heatmap import colorize
from vitexplain.visualize import COLUMNS, contrast, evolution, panel, save_figure, save_panel, tokens

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


@pytest.mark.parametrize("name", ["漢字" * 30, "W" * 60, "MAMMOTH_" * 8, "i" * 200, "a name of several words " * 6, "short"])
@pytest.mark.parametrize("cells", [PANEL, replace(PANEL, width=1.54)])
def test_names_above_pictures_stay_within_their_cells(name: str, cells: Cells) -> None:
    lines = wrapped_name(name, cells).split("\n")
    assert 1 <= len(lines) <= 2
    assert all(text_width(line, cells.size) <= cells.width for line in lines)
    assert name.startswith(lines[0][:8])


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
        (lambda _: panel(PHOTO, {"m": torch.zeros(0, 0)}), r"expected a tensor \(gh, gw\) for 'm', received \(0, 0\)"),
        (lambda _: panel(PHOTO, {}, photo_title=None), "maps: expected at least one where photo_title=None .*, received none"),
        (lambda _: panel("cat.jpg", {}), "image: expected a PIL image"),
        (lambda _: panel(PHOTO, {"m": RISING}, alpha=2), "alpha: expected 0 to 1"),
        (lambda _: panel(PHOTO, {}, colormap="infernos"), "did you mean inferno"),
        (lambda t: save_panel(t / "p.txt", PHOTO, {}), "cannot write"),
        (lambda t: save_panel(t / "absent" / "p.png", PHOTO, {}), "cannot write .*No such file"),
        (lambda t: save_panel(t, PHOTO, {}), "cannot write"),
    ],
)
def test_bad_requests_are_refused(tmp_path, call, message: str) -> None:
    with pytest.raises(ExplanationError, match=message):
        call(tmp_path)


def test_a_colour_map_is_used_for_maps_and_legend() -> None:
    figure = panel(PHOTO, {"a": RISING}, colormap="viridis", alpha=1.0)
    shown = _pictures(figure)[1].images[0].get_array()
    assert np.array_equal(shown[0, 0], colorize(RISING, colormap="viridis")[0, 0])
    assert [axes.images[0].cmap.name for axes in figure.axes if axes.images[0].get_array().ndim == 2] == ["viridis"]


@pytest.mark.parametrize("size", [(900, 90), (250, 100), (90, 60), (60, 90), (90, 900), (2000, 3)])
def test_pictures_keep_their_shape_and_stay_on_the_figure(size: tuple[int, int]) -> None:
    figure = panel(Image.new("RGB", size), {f"map {i}": RISING for i in range(6)})
    width, height = figure.get_size_inches()
    assert width < 16
    boxes = [axes.get_position() for axes in _pictures(figure)]
    assert all(0 <= box.x0 < box.x1 <= 1 and 0 <= box.y0 < box.y1 <= 1 for box in boxes)
    for box, axes in zip(boxes, _pictures(figure), strict=True):
        pixels = axes.images[0].get_array().shape[:2]
        assert (box.height * height * 160, box.width * width * 160) == pytest.approx(pixels, abs=0.01)
        if 3 not in size:  # which leaves a pixel or two
            assert pixels[1] / pixels[0] == pytest.approx(size[0] / size[1], rel=0.02)
    for one, other in itertools.pairwise(boxes):
        assert other.x0 >= one.x1 or other.y1 <= one.y0, "pictures do not overlap"


# -- one class against another ---------------------------------------------------------------------------------------


def _explanation(maps: torch.Tensor, by_block: torch.Tensor | None = None, target: torch.Tensor | None = None) -> Explanation:
    """Of one image and K classes, (1, K, …); logits are those of probabilities 0.1 to 0.4."""
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log()
    return Explanation("method", {}, maps, target, logits, torch.zeros(*maps.shape[:2], 1), None, by_block)


LEFT, RIGHT = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 5.0]])
PAIR = _explanation(torch.stack([LEFT, RIGHT])[None], target=torch.tensor([[3, 1]]))


def _middle(axes, part: float) -> np.ndarray:
    """The colour in the middle of a picture's row, at a part of its width."""
    pixels = axes.images[0].get_array().astype(int)
    return pixels[pixels.shape[0] // 2, int(part * (pixels.shape[1] - 1))]


def test_a_contrast_is_warm_for_the_first_class_and_cool_for_the_second() -> None:
    figure = contrast(PHOTO, PAIR, names=["cat", "dog"], alpha=1.0)
    pictures = _pictures(figure)
    assert len(pictures) == 4
    left, right = _middle(pictures[3], 0), _middle(pictures[3], 1)
    assert left[0] > left[2]
    assert right[2] > right[0]
    assert left.sum() == pytest.approx(right.sum(), abs=60), "shares: the second map is five times as large and counts no more"
    assert np.ptp(_middle(pictures[3], 0.5)) < 16, "zero is neutral"
    words = {text.get_text() for text in figure.texts}
    assert {"cat (40.0 %)", "dog (20.0 %)", "cat or dog?", "for cat", "for dog", "low", "high"} <= words


def test_a_contrast_names_classes_by_number_and_scores_by_place() -> None:
    words = {text.get_text() for text in contrast(PHOTO, PAIR, pair=(1, 0)).texts}
    assert {"class 1 (20.0 %)", "class 3 (40.0 %)", "for class 1"} <= words
    words = {text.get_text() for text in contrast(PHOTO, _explanation(PAIR.maps)).texts}
    assert {"score 0", "score 1"} <= words


def test_a_contrast_of_equal_maps_says_so() -> None:
    same = _explanation(torch.stack([LEFT, LEFT])[None])
    assert any("both are the same" in text.get_text() for text in contrast(PHOTO, same).texts)
    assert not any("both are the same" in text.get_text() for text in contrast(PHOTO, PAIR).texts)


def test_a_contrast_of_maps_that_differ_in_size_alone_is_neutral() -> None:
    heat = torch.rand(8, 8, generator=torch.Generator().manual_seed(0))
    figures = [contrast(PHOTO, _explanation(torch.stack([heat, times * heat])[None]), alpha=1.0) for times in (1, 3)]
    same, proportional = (_pictures(figure)[3].images[0].get_array() for figure in figures)
    assert np.array_equal(proportional, same)
    assert all(any("both are the same" in text.get_text() for text in figure.texts) for figure in figures)


# -- block by block --------------------------------------------------------------------------------------------------

BLOCKS = torch.stack([100 * LEFT + 300 * RIGHT / 5, LEFT + RIGHT / 5, LEFT])  # block 0 to 2
GROWN = _explanation(BLOCKS[None, None, 0], BLOCKS[None, None])


def test_an_evolution_has_a_picture_for_each_block_from_the_last_one_down() -> None:
    figure = evolution(PHOTO, GROWN, name="cat", alpha=1.0)
    assert len(_pictures(figure)) == 3
    words = [text.get_text() for text in figure.texts]
    assert [word for word in words if word.startswith("block")] == ["block 2", "blocks 2 … 1", "blocks 2 … 0"]
    assert any("for cat" in word for word in words)
    last, middle, whole = (_middle(axes, 0).sum() for axes in _pictures(figure))
    assert last > middle > whole, "the share of the left, 1, 1/2 and 1/4, though its value is largest in the end"


def test_an_evolution_is_scaled_in_common_and_signed_ones_about_zero() -> None:
    halves = torch.tensor([[[1.0, 1.0]], [[1.0, 0.0]]])
    even, peaked = (_middle(axes, 0) for axes in reversed(_pictures(evolution(PHOTO, _of(halves), alpha=1.0))))
    assert even.sum() < peaked.sum(), "scaled on its own, a constant map would be black, or as bright as any"
    signs = torch.tensor([[[1.0, -1.0]], [[1.0, 0.0]]])
    pictures = _pictures(evolution(PHOTO, _of(signs), alpha=1.0))
    assert np.ptp(_middle(pictures[0], 1)) < 16
    assert _middle(pictures[1], 1)[2] > _middle(pictures[1], 1)[0]


def test_an_evolution_of_constant_maps_has_equal_pictures() -> None:
    constants = torch.tensor([0.1, 0.3, 0.7]).view(3, 1, 1).expand(3, 3, 4)
    first, *others = (axes.images[0].get_array() for axes in _pictures(evolution(PHOTO, _of(constants), alpha=1.0)))
    assert all(np.array_equal(first, other) for other in others)


def _of(by_block: torch.Tensor) -> Explanation:
    return _explanation(by_block[None, None, 0], by_block[None, None])


def test_an_evolution_has_as_many_columns_as_asked_for() -> None:
    pictures = _pictures(evolution(PHOTO, _of(RISING.expand(7, 3, 4)), columns=3))
    assert len({round(axes.get_position().x0, 4) for axes in pictures}) == 3
    assert len({round(axes.get_position().y0, 4) for axes in pictures}) == 3


TEXT = Explanation("method", {}, torch.ones(1, 3), torch.tensor([0]), torch.zeros(1, 4), torch.zeros(1, 0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: contrast(PHOTO, GROWN), "expected two classes an image or more, as of target='top2', received 1"),
        (lambda: contrast(PHOTO, PAIR, pair=(0, 2)), "target_index: expected 0 to 1, received 2"),
        (lambda: contrast(PHOTO, PAIR, index=1), "index: expected 0 to 0, received 1"),
        (lambda: contrast(PHOTO, PAIR, names=["cat"]), "names: expected one for each of the 2 classes explained, received 1"),
        (lambda: contrast(PHOTO, PAIR, names="ab"), "names: expected a list of the classes' names as text, received 'ab'"),
        (lambda: contrast(PHOTO, PAIR, pair=1), "pair: expected the places of two classes.*received 1"),
        (lambda: contrast(PHOTO, PAIR, pair=(0, 1, 1)), r"pair: expected the places of two classes.*received \(0, 1, 1\)"),
        (lambda: contrast(PHOTO, PAIR, colormap="infernos"), "did you mean inferno"),
        (lambda: contrast(PHOTO, TEXT), "received one of texts"),
        (lambda: evolution(PHOTO, PAIR), "expected an explanation with rows='by_block'"),
        (lambda: evolution(PHOTO, GROWN, columns=0), "columns: expected at least 1, received 0"),
        (lambda: evolution(PHOTO, GROWN, alpha=-1), "alpha: expected 0 to 1"),
        (lambda: evolution(PHOTO, TEXT), r"vitexplain.visualize.tokens\(words, explanation\) draws them"),
        (lambda: tokens(["a"], PAIR), "values: expected an explanation of texts, received one of images"),
        (lambda: tokens(["a", "b"], TEXT), r"values: expected one for each of the 2 words, received \(3,\)"),
        (lambda: tokens(["a"] * 3, TEXT, index=1), "index: expected 0 to 0, received 1"),
        (lambda: tokens("abc", TEXT), "words: expected a list of the tokens as text"),
        (lambda: tokens(["[CLS]", "[SEP]", "[PAD]"], TEXT), "expected at least one token that stands for a word"),
        (lambda: tokens(["a"], torch.tensor([torch.nan])), "values: expected finite ones"),
        (lambda: tokens(["a"] * 3, TEXT, colormap="Redz"), "did you mean Reds"),
        (lambda: tokens(["a"] * 3, TEXT, width=1), "width: expected at least 3 inches"),
        (lambda: tokens(["a"] * 3, TEXT, width=float("nan")), "width: expected at least 3 inches, received nan"),
    ],
)
def test_figures_that_cannot_be_drawn_are_refused(call, message: str) -> None:
    with pytest.raises(ExplanationError, match=message):
        call()


# -- texts -----------------------------------------------------------------------------------------------------------


def _boxes(figure) -> list[tuple[str, tuple[float, float, float]]]:
    """Each piece of text with the colour behind it."""
    boxes = [(artist.get_x(), artist.get_y(), artist) for artist in figure.artists if hasattr(artist, "get_facecolor")]
    pieces = [text for text in figure.texts if text.get_ha() == "center"]
    assert len(boxes) == len(pieces)
    return [(text.get_text(), box[2].get_facecolor()[:3]) for text, box in zip(pieces, boxes, strict=True)]


def test_words_have_the_colours_of_their_values_and_special_tokens_are_left_out() -> None:
    words = ["[CLS]", "good", "film", "[SEP]", "[PAD]"]
    values = torch.tensor([100.0, 1.0, 0.0, 50.0, 0.0])
    (good, red), (film, white) = _boxes(tokens(words, values))
    assert (good, film) == ("good", "film")
    assert min(white) > 0.9, "the lowest of what is shown is paper"
    assert red[0] > red[2]
    assert max(red) < 0.5, "the highest: [CLS] does not count"
    assert len(_boxes(tokens(words, values, special=True))) == 5


def test_signed_words_diverge_about_zero() -> None:
    figure = tokens(["bad", "the", "good"], torch.tensor([-2.0, 0.0, 1.0]))
    (_, bad), (_, the), (_, good) = _boxes(figure)
    assert bad[2] > bad[0]
    assert max(the) - min(the) < 0.05
    assert good[0] > good[2]
    assert {"against the class", "for the class"} <= {text.get_text() for text in figure.texts}


@pytest.mark.parametrize(
    ("words", "read"),
    [
        (["act", "##ing", ",", "##"], [("act", True), ("ing", False), (",", False), ("##", True)]),
        (["ĠI", "Ġact", "ing", "Ġ", "."], [("I", True), ("act", True), ("ing", False), ("·", True), (".", False)]),
        (["caf", "Ã", "©", "Ġno"], [("caf", False), ("·", False), ("é", False), ("no", True)]),
        (["ä½ł", "å¥½"], [("你", False), ("好", False)]),
        (["c", "afÃ©"], [("c", False), ("afé", False)]),
        (["caf", "é"], [("caf", True), ("é", True)]),  # no bytes: a letter of a vocabulary of words
        (
            ["Ġa", "Ġä½", "ł", "[UNK]", "å", "Ġb"],
            [("a", True), ("·", True), ("你", False), ("[UNK]", False), ("·", False), ("b", True)],
        ),
        (
            ["Ġä½", "<s>", "ł", "å", "Ġb"],
            [("·", True), ("<s>", True), ("\N{REPLACEMENT CHARACTER}", False), ("·", False), ("b", True)],
        ),
        (["▁act", "ing", "▁"], [("act", True), ("ing", False), ("·", True)]),
    ],
)
def test_marks_of_tokenizers_are_read(words: list[str], read: list[tuple[str, bool]]) -> None:
    assert read_tokens(words) == [Piece(*piece) for piece in read]


def test_long_texts_are_wrapped_and_parts_of_a_word_stay_together(tmp_path) -> None:
    words = ["act", "##ing"] * 250 + ["x" * 400, "$_{"]
    figure = tokens(words, torch.arange(502.0), title="A review")
    pieces = [text for text in figure.texts if text.get_ha() == "center"]
    assert len(pieces) == 502
    assert len({text.get_position()[1] for text in pieces}) > 10
    assert all(0 < text.get_position()[0] < 1 and 0 < text.get_position()[1] < 1 for text in pieces)
    for first, second in zip(pieces[:500:2], pieces[1:500:2], strict=True):
        assert first.get_position()[1] == second.get_position()[1]
    assert pieces[-2].get_text().endswith("…")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert save_figure(tmp_path / "text.png", figure).stat().st_size > 500


def test_words_of_an_explanation_are_those_of_the_text_and_class_asked_for() -> None:
    maps = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
    explanation = Explanation("method", {}, maps, torch.tensor([[0, 1]]), torch.zeros(1, 2), torch.zeros(1, 2, 0))
    (_, first), (_, second) = _boxes(tokens(["a", "b"], explanation, target_index=1))
    assert sum(first) < sum(second)
