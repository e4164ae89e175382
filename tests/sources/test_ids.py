"""Ids that are made unique, quickly."""

from __future__ import annotations

import time

from vitexplain.sources.ids import made_unique


def test_repeats_are_numbered() -> None:
    assert made_unique(["a", "a", "a #2", "a", "b", "a #2"]) == ("a", "a #2", "a #2 #2", "a #3", "b", "a #2 #3")
    assert made_unique(["a #2", "a", "a", "a"]) == ("a #2", "a", "a #3", "a #4")


def test_the_same_keys_in_many_shards() -> None:
    keys = [f"{number:04d}" for number in range(100)] * 2000
    started = time.perf_counter()
    ids = made_unique(keys)
    assert time.perf_counter() - started < 10, "every repeat was counted from the first one"
    assert len(set(ids)) == len(keys)
    assert (ids[0], ids[100], ids[-1]) == ("0000", "0000 #2", "0099 #2000")
