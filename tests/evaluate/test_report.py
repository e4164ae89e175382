"""The report, opened in a real browser that has no network."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from vitexplain import InputError
from vitexplain.evaluate.report import render, write_report
from vitexplain.evaluate.results import GalleryPhoto, MethodEntry, Results

from ..browser import Opened, watched
from .made_results import ABLATIONS, CONTROLS, METHODS, made_photos, made_results

HOSTILE = "<script>window.broken = 1</script> \"Süß\" & 'x' <img src=x onerror=window.broken=1>"


@pytest.fixture
def open_report(browser, tmp_path: Path) -> Iterator[Callable[..., Opened]]:
    """Write and open a report; afterwards nothing may have been asked for but its file, and no error have occurred."""
    contexts, all_opened = [], []

    def opened(results: Results, photos: list[GalleryPhoto], *, width: int = 1280, height: int = 900) -> Opened:
        path = write_report(results, photos, tmp_path / "report.html")
        context = browser.new_context(offline=True, viewport={"width": width, "height": height})
        contexts.append(context)
        found = watched(context)
        found.page.goto(path.as_uri())
        all_opened.append((found, path.as_uri()))
        return found

    yield opened
    for context in contexts:
        context.close()
    for found, address in all_opened:
        assert [url for url in found.requests if not url.startswith("data:")] == [address]
        assert found.errors == []


def _column(table, index: int) -> list[str]:
    """Values of a column as shown, without intervals, row by row."""
    cells = table.locator(f"tbody tr[data-m] > :nth-child({index + 1})").all()
    return [cell.inner_text().split("[")[0].strip() for cell in cells]


def _numbers(texts: list[str]) -> list[float]:
    return [float(text.replace("−", "-")) for text in texts]


# -- tables ----------------------------------------------------------------------------------------------------------------


def test_tables_have_the_rows_of_their_protocol(open_report) -> None:
    page = open_report(made_results(), []).page
    tables = page.locator("table.figures").all()
    counts = [table.locator("tbody tr[data-m]").count() for table in tables]
    every = len(METHODS) + len(CONTROLS)
    assert counts == [every] * 5 + [len(ABLATIONS), 3]
    assert page.locator("#figures h3").all_inner_texts()[:2] == ["Perturbation", "Insertion and deletion"]
    assert page.locator("#gallery").count() == 0


def test_only_winners_are_bold(open_report) -> None:
    results = made_results()
    page = open_report(results, []).page
    assert page.locator("table.figures td strong").count() == sum(column.winner is not None for column in results.columns)


def test_every_metric_is_explained_in_a_line(open_report) -> None:
    results = made_results()
    page = open_report(results, []).page
    explained = page.locator(".meanings dt").all_inner_texts()
    assert set(explained) == {column.title for column in results.columns}
    assert all(" is better" in text for text in page.locator(".meanings dd").all_inner_texts())


def test_a_heading_sorts_by_number_the_best_first_and_then_the_other_way(open_report) -> None:
    page = open_report(made_results(), []).page
    table = page.locator("table.figures").first
    head, names = table.locator("th[data-better]").first, _column(table, 0)
    head.locator("button").click()
    values = _numbers(_column(table, 1))
    assert head.get_attribute("aria-sort") == "ascending"  # lower is better
    assert values == sorted(values)
    assert _column(table, 0) != names
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "descending"
    assert _numbers(_column(table, 1)) == values[::-1]
    table.locator("thead button").first.click()
    assert _column(table, 0) == names
    assert head.get_attribute("aria-sort") == "none"


def test_sorting_is_numeric_and_keeps_what_was_not_measured_last(open_report) -> None:
    results = made_results()
    values = dict(zip(METHODS, (9.5, 100.0, -3.0, 20.0), strict=False))  # as text 100 would come before 20
    figures = tuple(replace(f, mean=values[f.method]) for f in results.figures if f.protocol == "saco" and f.method in values)
    others = tuple(f for f in results.figures if f.protocol != "saco")
    columns = tuple(c for c in results.columns if c.protocol == "saco")
    second = replace(columns[0], metric="second", better="higher")
    measured = tuple(replace(f, metric="second") for f in figures[:3])
    page = open_report(replace(results, columns=(*columns, second), figures=(*others, *figures, *measured)), []).page
    table = page.locator("table.figures")
    heads = table.locator("th[data-better]")
    heads.nth(0).locator("button").click()
    assert heads.nth(0).get_attribute("aria-sort") == "descending"  # higher is better
    assert _numbers(_column(table, 1)) == [100, 20, 9.5, -3]
    heads.nth(1).locator("button").click()
    assert heads.nth(0).get_attribute("aria-sort") == "none"
    assert _column(table, 2) == ["100.0", "9.5", "−3.0", "–"]
    heads.nth(1).locator("button").click()
    assert _column(table, 2) == ["−3.0", "9.5", "100.0", "–"]


def test_controls_lose_their_heading_while_sorted(open_report) -> None:
    page = open_report(made_results(), []).page
    table = page.locator("table.figures").first
    heading = table.locator("tr.group")
    assert heading.is_visible()
    table.locator("th[data-better] button").first.click()
    assert heading.is_hidden()
    table.locator("thead button").first.click()
    assert heading.is_visible()
    assert table.locator("tbody tr").nth(len(METHODS)).inner_text().strip() == "controls"


# -- methods, curves, gallery ------------------------------------------------------------------------------------------------


def test_the_gallery_keeps_its_order_and_its_pictures_load(open_report) -> None:
    photos = made_photos(5)[::-1]
    page = open_report(made_results(), photos).page
    assert page.locator("#gallery h3").all_inner_texts() == [photo.name for photo in photos]
    assert "disagreement 0.52" in page.locator(".photo").first.inner_text()
    sizes = page.evaluate("[...document.images].map((i) => [i.complete, i.naturalWidth, i.naturalHeight, i.alt.length > 0])")
    assert sizes == [[True, 160, 160, True]] * (5 * (1 + len(METHODS)))


def test_a_method_that_is_not_ticked_is_hidden_everywhere(open_report) -> None:
    page = open_report(made_results(), made_photos(2)).page
    key = f"m{list(METHODS).index('iba')}"
    assert page.locator(f'[data-m="{key}"]:visible').count() > 0
    page.locator("#choice summary").click()
    page.locator(f'#choice input[value="{key}"]').uncheck()
    assert page.locator(f'[data-m="{key}"]:visible').count() == 0
    assert page.locator(".tile img[alt*='IBA']:visible").count() == 0
    assert page.locator(".tile img[alt*='GMAR']:visible").count() == 2
    assert "23 of 24" in page.locator("#choice summary").inner_text()
    page.locator("#choose-none").click()
    assert page.locator(".tile:visible").count() == 2  # the photos stay
    page.locator("#choose-all").click()
    assert page.locator(f'.tile[data-m="{key}"]:visible').count() == 2
    page.keyboard.press("Escape")
    assert page.locator("#choose-all").is_hidden()


@pytest.mark.parametrize(("view", "opacity"), [("overlay", "0.55"), ("map", "1"), ("photo", "0")])
def test_maps_lie_over_the_photo_alone_or_not_at_all(open_report, view: str, opacity: str) -> None:
    page = open_report(made_results(), made_photos(1)).page
    page.get_by_label(view, exact=True).check()
    assert page.evaluate("getComputedStyle(document.querySelector('img.map')).opacity") == opacity
    assert "data:image" in page.evaluate("getComputedStyle(document.querySelector('.frame')).backgroundImage")


def test_photos_keep_their_shape(open_report) -> None:
    wide = replace(made_photos(1)[0], photo=np.zeros((60, 120, 3), np.uint8))
    page = open_report(made_results(), [wide]).page
    assert page.evaluate("[...document.images].every((i) => i.naturalWidth === 160 && i.naturalHeight === 80)")


def test_only_the_scales_in_use_are_shown(open_report) -> None:
    page = open_report(made_results(), [replace(photo, signed=frozenset()) for photo in made_photos(1)]).page
    assert "low" in page.locator(".tools").inner_text()
    assert "against the class" not in page.locator(".tools").inner_text()


def test_a_chart_for_each_curve_and_one_line_comes_forward(open_report) -> None:
    page = open_report(made_results(), []).page
    assert page.locator(".charts svg[role=img]").count() == 6
    assert page.locator(".charts svg").first.locator(".curve").count() == len(METHODS) + len(CONTROLS)
    button = page.locator("[data-line]").nth(2)
    button.click()
    assert button.get_attribute("aria-pressed") == "true"
    assert page.locator(".curve.on").count() == 6
    button.click()
    page.mouse.move(0, 0)
    assert page.locator(".chosen").count() == 0


# -- the page ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [390, 768, 1280])
def test_nothing_overflows_the_page(open_report, width: int) -> None:
    page = open_report(made_results(), made_photos(2), width=width).page
    assert _overflowing(page) == []
    assert page.evaluate("[...document.querySelectorAll('.scroll')].every((e) => e.tabIndex === 0)")


def _overflowing(page) -> list[str]:
    """What sticks out of the page on the right, but for what scrolls in a box of its own."""
    outside = """[...document.querySelectorAll("html, body *")].filter((e) => !e.closest(".scroll, .choice, svg")
      && (e.getBoundingClientRect().right > innerWidth + 1 || e.scrollWidth > innerWidth)).map((e) => e.outerHTML.slice(0, 80))"""
    return page.evaluate(outside)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_light_and_dark(open_report, scheme: str) -> None:
    page = open_report(made_results(), []).page
    page.emulate_media(color_scheme=scheme)
    colors = page.evaluate("""["color", "backgroundColor"].map((n) => getComputedStyle(document.body)[n])""")
    quiet = page.evaluate("getComputedStyle(document.querySelector('.quiet')).color")
    assert _contrast(colors[0], colors[1]) > 12
    assert _contrast(quiet, colors[1]) > 4.5
    assert (_luminance(colors[1]) < 0.1) == (scheme == "dark")


def _luminance(color: str) -> float:
    channels = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(one: str, other: str) -> float:
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_headings_go_down_one_level_at_a_time(open_report) -> None:
    page = open_report(made_results(), made_photos(1)).page
    levels = page.evaluate("""[...document.querySelectorAll("h1, h2, h3, h4")].map((h) => Number(h.tagName[1]))""")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(below - above <= 1 for above, below in pairwise(levels))
    assert page.evaluate("document.documentElement.lang") == "en"
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map((e) => e.id)")
    assert len(ids) == len(set(ids))


def test_settings_environment_and_lost_images_stand_at_the_end(open_report) -> None:
    page = open_report(made_results(), []).page
    assert "n04238763_118.JPEG: not a picture" in page.locator("#left-out").inner_text()
    text = page.locator("#settings").inner_text()
    assert all(word in text for word in ("8c2f60b1e27a" * 5, "norm = l1, alpha = 1", "bootstrap", "torch 2.9.0+cu128", "412.7"))


def test_hostile_names_stay_text(open_report) -> None:
    results = made_results()
    entries = {label: replace(entry, title=f"{entry.title} {HOSTILE}") for label, entry in results.methods.items()}
    entries[HOSTILE] = MethodEntry(HOSTILE, "method")
    photo = made_photos(1)[0]
    maps = {**photo.maps, HOSTILE: np.ones((14, 14), np.float32), "only here </style>": np.eye(14, dtype=np.float32)}
    results = replace(
        results,
        methods=entries,
        columns=tuple(replace(c, metric=f"{c.metric}{HOSTILE}") for c in results.columns[:2]),
        figures=tuple(replace(f, metric=f"{f.metric}{HOSTILE}") for f in results.figures),
        settings={"model": {"name": HOSTILE}, HOSTILE: [HOSTILE, {HOSTILE: None}]},
        environment={HOSTILE: HOSTILE},
        left_out=({"id": HOSTILE, "reason": HOSTILE},),
        timing={},
    )
    page = open_report(results, [replace(photo, name=HOSTILE, caption=HOSTILE, maps=maps)], width=390).page
    assert page.evaluate("window.broken") is None
    assert page.locator("script").count() == 1
    assert page.locator("img[src=x]").count() == 0
    assert page.locator("#gallery h3").inner_text() == HOSTILE
    assert page.locator("#gallery .photo header p").first.inner_text() == HOSTILE
    assert (
        page.locator(f'img[alt="map of only here </style> for photo {HOSTILE.replace(chr(34), chr(92) + chr(34))}"]').count() == 1
    )
    assert page.title() == f"Evaluation of {HOSTILE}"
    assert _overflowing(page) == []
    page.set_viewport_size({"width": 1280, "height": 900})
    assert _overflowing(page) == []


# -- without a browser -----------------------------------------------------------------------------------------------------------


def test_the_same_results_give_the_same_page() -> None:
    results, photos = made_results(), made_photos(1)
    page = render(results, photos)
    assert page == render(results, photos)
    assert page.startswith("<!doctype html>")
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page


def test_a_gallery_of_twelve_is_a_page_to_send(tmp_path: Path) -> None:
    assert write_report(made_results(), made_photos(12), tmp_path / "new" / "report.html").stat().st_size < 2_500_000


def test_empty_results_are_still_a_page(tmp_path: Path) -> None:
    empty = Results({}, (), (), (), {}, {}, (), {})
    assert "<h1>" in write_report(empty, [], tmp_path / "report.html").read_text(encoding="utf-8")


def test_names_that_are_no_text_are_written_as_escapes(tmp_path: Path) -> None:
    photo = replace(made_photos(1)[0], name="caf\udce9.jpg")
    assert r"caf\udce9.jpg" in write_report(made_results(), [photo], tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_missing_jinja2_is_named_with_what_installs_it(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(InputError, match=r"report: needs jinja2.*pip install 'vitexplain\[evaluate\]'"):
        render(made_results(), [])


def test_a_path_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"output: cannot write '.*': Is a directory"):
        write_report(made_results(), [], tmp_path)
