"""Files are whole or not there, and folders are made only where that is asked for."""

from __future__ import annotations

import errno
import os

import pytest

from vitexplain.errors import InputError
from vitexplain.files import folder_size, partial_path, remove_partials, sync_folder, write_whole


def test_a_file_is_written_into_new_folders_and_written_over(tmp_path) -> None:
    path = tmp_path / "new" / "folder" / "file"
    write_whole(path, b"first", make_folder=True)
    write_whole(path, b"second")
    assert path.read_bytes() == b"second"
    assert [each.name for each in path.parent.iterdir()] == ["file"]


def test_a_folder_that_is_gone_is_not_made_again(tmp_path) -> None:
    with pytest.raises(InputError, match=r"output: cannot write '.*disk/file': No such file or directory"):
        write_whole(tmp_path / "disk" / "file", b"x")
    assert not list(tmp_path.iterdir())


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


def test_the_files_of_a_folder_are_counted_together(tmp_path) -> None:
    write_whole(tmp_path / "a" / "b", bytes(5), make_folder=True)
    write_whole(tmp_path / "c", bytes(7))
    assert folder_size(tmp_path) == 12
    assert folder_size(tmp_path / "nothing") == 0
