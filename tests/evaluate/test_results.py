"""Results as a file: what is written is read again, and what is no results.json is refused by name."""

from __future__ import annotations

import json

import pytest

from vitexplain import InputError
from vitexplain.evaluate.results import Results

from .made_results import made_results

WHOLE = made_results().to_json()


def test_what_is_written_is_read_again(tmp_path) -> None:
    path = tmp_path / "results.json"
    path.write_text(WHOLE, encoding="utf-8")
    assert Results.read(path).to_json() == Results.from_json(WHOLE).to_json() == WHOLE


def _without(key: str) -> str:
    return json.dumps({name: value for name, value in json.loads(WHOLE).items() if name != key})


OTHERS = {
    "cut short": (WHOLE[: len(WHOLE) // 2], "JSONDecodeError"),
    "another file": ('{"model": "demo"}', "KeyError"),
    "no object": ("[1, 2]", "TypeError"),
    "a part that is missing": (_without("curves"), "'curves'"),
    "a cell with another field": (_without("figures")[:-1] + ', "figures": [{"value": 1}]}', "TypeError"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_results_file_is_refused(tmp_path, name: str) -> None:
    text, reason = OTHERS[name]
    path = tmp_path / "some.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"results: expected a results\.json in '.*some\.json', received .*" + reason):
        Results.read(path)
    with pytest.raises(InputError, match=r"results: expected the text of a results\.json, received .*" + reason):
        Results.from_json(text)


def test_a_file_that_is_not_there_is_refused(tmp_path) -> None:
    with pytest.raises(InputError, match="results: there is no file"):
        Results.read(tmp_path / "results.json")
