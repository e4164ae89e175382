"""Messages: lists, differences and sizes in one line."""

from __future__ import annotations

import json

import pytest

from vitexplain.messages import brief, differences, in_bytes, some


def test_differences_name_what_stands_and_what_is_asked_for() -> None:
    standing = {"a": 1, "b": {"c": [1, 2], "d": None}, "e": "x" * 100}
    assert differences(standing, standing) == []
    found = differences(standing, {"a": 1, "b": {"c": [1, 3]}, "e": "y", "f": True})
    assert found[0] == "b.c: [1, 2] there, [1, 3] asked for"
    assert found[1].startswith('e: "xxx')
    assert "…" in found[1]
    assert found[2:] == ["f: null there, true asked for"]


def test_what_is_no_number_is_the_same_as_itself() -> None:
    settings = {"options": {"a": float("nan"), "b": [float("nan"), 1.0]}}
    assert differences(json.loads(json.dumps(settings)), settings) == []
    assert differences(settings, {"options": {"a": 1, "b": [1, 1]}}) == [
        "options.a: NaN there, 1 asked for",
        "options.b: [NaN, 1.0] there, [1, 1] asked for",
    ]


def test_a_few_of_many() -> None:
    assert some("abc") == "a, b, c"
    assert some("abcd") == "a, b, c, … (4 in all)"
    assert some(["x: 1", "y: 2"], 1, separator="; ") == "x: 1; … (2 in all)"


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1.0 KiB"),
        (1.5 * 2**20, "1.5 MiB"),
        (2**31, "2.0 GiB"),
        (2**51, "2,048.0 TiB"),
    ],
)
def test_sizes_in_words(size: float, words: str) -> None:
    assert in_bytes(size) == words


def test_an_error_in_one_line() -> None:
    assert brief(ValueError("a\nb")) == "a"
    assert brief(ValueError()) == "ValueError"
    assert brief(OSError(5, "Input/output error")) == "Input/output error"
    assert len(brief(ValueError("x" * 1000))) == 160
