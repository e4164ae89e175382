"""Files are whole or not there, and differences of settings are readable."""

from __future__ import annotations

import errno
import os

import pytest

from vitexplain.errors import InputError
from vitexplain.files import differences, partial_path, remove_partials, some, sync_folder, write_whole


def test_a_file_is_written_into_new_folders_and_written_over(tmp_path) -> None:
    path = tmp_path / "new" / "folder" / "file"
    write_whole(path, b"first")
    write_whole(path, b"second")
    assert path.read_bytes() == b"second"
    assert [each.name for each in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("operation", ["fsync", "replace"])
def test_what_fails_leaves_the_old_file_and_nothing_half(tmp_path, monkeypatch, operation) -> None:
    path = tmp_path / "file"
    write_whole(path, b"first")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, operation, full)
    with pytest.raises(InputError, match=r"output: cannot write '.*file': No space left on device"):
        write_whole(path, b"second")
    assert path.read_bytes() == b"first"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_an_interruption_leaves_nothing_half(tmp_path, monkeypatch) -> None:
    def interrupted(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "file", b"x")
    assert not list(tmp_path.iterdir())


def test_a_folder_in_the_place_of_the_file_is_an_error(tmp_path) -> None:
    (tmp_path / "file" / "inside").mkdir(parents=True)
    with pytest.raises(InputError, match=r"cannot write '.*file': Is a directory"):
        write_whole(tmp_path / "file", b"x")


def test_a_file_system_that_cannot_sync_folders_is_used_without(tmp_path, monkeypatch) -> None:
    def refused(code: int):
        def fsync(_: int) -> None:
            raise OSError(code, os.strerror(code))

        return fsync

    monkeypatch.setattr(os, "fsync", refused(errno.EINVAL))
    sync_folder(tmp_path)
    monkeypatch.setattr(os, "fsync", refused(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        sync_folder(tmp_path)


def test_leftovers_are_removed_and_nothing_else(tmp_path) -> None:
    kept = ["file", ".file.partial", "x.partial", ".file.0123.partial", ".other.00112233445566aa.partial"]
    for name in kept:
        (tmp_path / name).write_text("")
    partial_path(tmp_path / "file").write_text("half")
    partial_path(tmp_path / "file").mkdir()
    remove_partials(tmp_path, "file")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)
    remove_partials(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept[:-1])
    remove_partials(tmp_path / "nothing")


def test_differences_name_what_stands_and_what_is_asked_for() -> None:
    standing = {"a": 1, "b": {"c": [1, 2], "d": None}, "e": "x" * 100}
    assert differences(standing, standing) == []
    found = differences(standing, {"a": 1, "b": {"c": [1, 3]}, "e": "y", "f": True})
    assert found[0] == "b.c: [1, 2] there, [1, 3] asked for"
    assert found[1].startswith('e: "xxx')
    assert "…" in found[1]
    assert found[2:] == ["f: null there, true asked for"]
    assert some(found, 1) == f"{found[0]}; and 2 more"
    assert some(found) == "; ".join(found)
