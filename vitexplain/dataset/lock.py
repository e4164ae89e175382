"""One run at a time: a store's lock, which the system frees when a process ends."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import InputError
from ..files import writing
from .layout import LOCK, checked_output, index_path
from .standing import check_index, read_settings

_HELD: set[tuple[int, str]] = set()  # process and folder of the locks that are held
_GUARD = threading.Lock()


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Keep other runs away from a store; the system frees it when the process ends, however it ends.

    Raises:
        InputError: another run is writing there, the folder cannot be written, or something else stands there.
    """
    output = checked_output(output)
    index = index_path(output)
    held = (os.getpid(), os.path.realpath(index))
    taken = InputError(f"output: another run is writing into {str(output)!r}; wait until it has ended, or use another output")
    # The system's locks are a process's own: it would let a second run of this process in, and closing the file a second
    # time would free it for everyone. So a run of this process is refused before the file is opened.
    with _GUARD:
        if held in _HELD:
            raise taken
        _HELD.add(held)
    try:
        with writing(index / LOCK):
            check_index(index)
            read_settings(output)  # nothing is left in a place that is not ours
            index.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(index / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            with writing(index / LOCK):
                try:
                    _take(descriptor)
                except (BlockingIOError, PermissionError) as error:
                    raise taken from error
            yield
        finally:
            os.close(descriptor)
    finally:
        with _GUARD:
            _HELD.discard(held)


def _take(descriptor: int) -> None:
    """Lock a file, or raise BlockingIOError or PermissionError at once where another process has it.

    A POSIX record lock is not inherited by forked processes, which may outlive this one, and holds across machines on NFS;
    ``flock``, which most libraries use, does neither. Windows has neither of them nor forks.
    """
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
