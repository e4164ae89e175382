"""Files that are there to be read, and files that are written whole or not at all."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import InputError
from .messages import brief

_PARTIAL = re.compile(r"\.(.+)\.[0-9a-f]{16}\.partial")
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP)  # some network file systems


def write_whole(path: Path, content: bytes, *, make_folder: bool = False) -> None:
    """Write a file whole or not at all; it lasts through a loss of power.

    Args:
        path: of the file.
        content: all of it.
        make_folder: make its folder where it is not there. Where it is gone that stood before, as of a disk that is no longer
            mounted, a new one would be somewhere else.

    Raises:
        InputError: it cannot be written.
    """
    partial = partial_path(path)
    with writing(path):
        if make_folder:
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("xb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the system refuses while ``path`` is written, as an error that names the file.

    Raises:
        InputError: instead of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise InputError(f"output: cannot write {str(path)!r}: {error.strerror or error}") from error


def partial_path(path: Path) -> Path:
    """A name beside ``path`` that nobody else uses, for what is not whole yet or no longer; ``remove_partials`` knows it."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")


def remove_partials(folder: Path, name: str | None = None) -> None:
    """Take away what killed runs left half written in a folder.

    Args:
        folder: need not be there.
        name: only what was to become, or has been, the file or folder of that name.

    Raises:
        OSError: something cannot be removed.
    """
    if not folder.is_dir():
        return
    for path in list(folder.iterdir()):
        found = _PARTIAL.fullmatch(path.name)
        if found and name in (None, found[1]):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make lasting what was renamed, made or removed in a folder; Windows has no such call."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)


def folder_size(folder: Path) -> int:
    """Bytes of the files in a folder; what is renamed or removed meanwhile is left out."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def check_file(path: Path, what: str) -> None:
    """Raise ``InputError`` where a path is not a file with something in it."""
    try:
        if path.is_dir():
            raise InputError(f"{what}: expected a file, received the directory {str(path)!r}")
        if not path.exists():
            raise InputError(f"{what}: there is no file {str(path)!r}")
        if path.is_file() and path.stat().st_size == 0:
            raise InputError(f"{what}: the file {str(path)!r} is empty (0 bytes)")
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{what}: cannot read {str(path)!r}: {brief(error)}") from error
