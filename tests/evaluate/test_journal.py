"""What is measured stays measured: whole chunks, the same settings, errors that say what to do."""

from __future__ import annotations

import errno
import json
import os

import numpy as np
import pytest

from vitexplain.errors import InputError
from vitexplain.evaluate.journal import Journal
from vitexplain.files import partial_path

SETTINGS = {"seed": 0, "methods": {"a": {"options": {"x": (1, 2)}}}}


def test_a_chunk_comes_back_as_it_was(tmp_path) -> None:
    journal = Journal(tmp_path / "new" / "folder", SETTINGS)
    assert not journal.has(3)
    journal.write(3, {"a|b|pred|c": np.arange(6).reshape(2, 3)}, {"left_out": [], "seconds": {"x": 0.5}})
    again = Journal(tmp_path / "new" / "folder", SETTINGS)
    assert again.has(3)
    arrays, notes = again.read(3)
    assert list(arrays) == ["a|b|pred|c"]
    assert np.array_equal(arrays["a|b|pred|c"], [[0, 1, 2], [3, 4, 5]])
    assert notes == {"left_out": [], "seconds": {"x": 0.5}}


def test_other_settings_are_refused_by_name_and_can_be_overwritten(tmp_path) -> None:
    Journal(tmp_path, SETTINGS).write(0, {"x": np.zeros(1)}, {})
    with pytest.raises(
        InputError, match=r"other settings \(seed: 0 there, 1 asked for; dtype: null there, \"float32\" asked for\)"
    ):
        Journal(tmp_path, {**SETTINGS, "seed": 1, "dtype": "float32"})
    (tmp_path / "curves").mkdir()
    for name in ("curves/old.png", "report.html", "results.json", "mine.txt"):
        (tmp_path / name).write_text("")
    assert not Journal(tmp_path, {**SETTINGS, "seed": 1}, overwrite=True).has(0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.txt", "per_image"], "what an evaluation wrote is gone"


def test_chunks_without_settings_belong_to_nobody(tmp_path) -> None:
    Journal(tmp_path, SETTINGS).write(0, {"x": np.zeros(1)}, {})
    (tmp_path / "per_image" / "settings.json").unlink()
    with pytest.raises(InputError, match=r"expected settings.json beside what stands in .*per_image"):
        Journal(tmp_path, SETTINGS)


def test_a_damaged_chunk_is_named(tmp_path) -> None:
    journal = Journal(tmp_path, SETTINGS)
    journal.write(0, {"x": np.zeros(100)}, {})
    path = next((tmp_path / "per_image").glob("chunk*.npz"))
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(InputError, match=r"chunk_000000.npz' is damaged: delete it and run again"):
        journal.read(0)


def test_damaged_settings_are_named(tmp_path) -> None:
    Journal(tmp_path, SETTINGS)
    (tmp_path / "per_image" / "settings.json").write_text("{")
    with pytest.raises(InputError, match=r"settings.json' is damaged.*--overwrite"):
        Journal(tmp_path, SETTINGS)


def test_a_full_disk_is_an_error_and_leaves_nothing_half(tmp_path, monkeypatch) -> None:
    journal = Journal(tmp_path, SETTINGS)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"cannot write .*chunk_000001.npz': No space left on device"):
        journal.write(1, {"x": np.zeros(3)}, {})
    assert [path.name for path in (tmp_path / "per_image").iterdir()] == ["settings.json"]


def test_what_a_killed_run_left_half_written_is_removed(tmp_path) -> None:
    Journal(tmp_path, SETTINGS)
    partial_path(tmp_path / "per_image" / "chunk_000000.npz").write_text("half")
    assert not Journal(tmp_path, SETTINGS).has(0)
    assert not list((tmp_path / "per_image").glob("*.partial"))


def test_a_folder_that_cannot_be_made_is_refused(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="output: cannot use the folder"):
        Journal(tmp_path / "file", SETTINGS)


def test_settings_are_readable_json(tmp_path) -> None:
    Journal(tmp_path, SETTINGS)
    assert json.loads((tmp_path / "per_image" / "settings.json").read_text())["seed"] == 0
