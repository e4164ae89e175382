"""Photos decoded by worker processes into shared memory, in order, whatever happens to a worker."""

from __future__ import annotations

import errno
import multiprocessing
import os
import re
import shutil
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor

from ..errors import InputError
from ..loading import Preprocess
from ..messages import brief
from ..processes import process_context, start_early
from ..sources import Source

IMAGES_A_TASK = 16  # what one worker decodes at a time: a batch is shared among workers
MEMORY = 2 << 30  # bytes that photos waiting for the device may take
LEAST_SLOTS = 3  # one that the device reads, one whose results come back, one being filled
_TRIES = 3  # of one photo by itself, before it is taken to be what ends the processes
_STARTS = 3  # of processes that end before they begin, one after the other, before it is taken to be no accident
_SHARED_MEMORY = Path("/dev/shm")
T = TypeVar("T")
_PASSING = {errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EMFILE, errno.ENFILE, errno.ENOMEM}


@dataclass(frozen=True)
class Outcome:
    """What became of one photo: why it could not be read, or what was done to read it."""

    failure: str | None = None
    note: str | None = None


@dataclass(frozen=True)
class Decoded:
    """One batch of photos.

    Attributes:
        rows: indices in the source.
        photos: (batch, 3, h, w) uint8 as the model sees them; black where there is none. Memory that is used again after
            ``release``.
        outcomes: one a row.
        release: to be called when ``photos`` have been read.
    """

    rows: range
    photos: Tensor
    outcomes: tuple[Outcome, ...]
    release: Callable[[], None]


@dataclass(eq=False)
class _Task:
    """Some rows of a batch for one worker."""

    slot: int
    offset: int
    rows: range
    future: Future[list[Outcome]] | None = None
    outcomes: list[Outcome] | None = None


@dataclass(eq=False)
class _Flight:
    """A batch on its way."""

    slot: int
    rows: range
    tasks: list[_Task] = field(default_factory=list)


class Decoder:
    """Reads the photos of a source ahead of the device.

    Args:
        source: of the photos.
        preprocess: what makes them the model's input.
        input_size: its height and width.
        batch: images a batch; the last one may have fewer, the rest is black.
        workers: processes; with 0 photos are read in this one, when they are asked for.
        pinned_for: a GPU that photos are copied to: the memory is pinned for it.

    A worker that is killed is replaced, and what it had to do is done again. A photo that ends three processes when it is read by
    itself counts as unreadable.

    Raises:
        InputError: there is not enough shared memory for photos of this size.
    """

    def __init__(
        self,
        source: Source,
        preprocess: Preprocess,
        input_size: tuple[int, int],
        batch: int,
        workers: int,
        *,
        pinned_for: torch.device | None = None,
    ) -> None:
        self._source, self._preprocess, self._batch, self._workers = source, preprocess, batch, workers
        # Each task brings its part of the source, so that workers need not hold the names of millions of images.
        self._sent_whole = source if workers and source.part(range(1)) is None else None
        slots = _num_slots(batch, input_size, workers)
        self._slots = torch.zeros((slots, batch, 3, *input_size), dtype=torch.uint8, device="cpu")
        if workers:
            self._slots.share_memory_()
        self._pinned_for, self._pinned = pinned_for, False
        self._free = deque(range(slots))
        self._flights: deque[_Flight] = deque()
        self._pool: ProcessPoolExecutor | None = None
        self._started: Future[None] | None = None
        self._done_since_restart = 0
        self._failed_starts = 0
        self.replaced = 0  # how often workers were replaced

    def __enter__(self) -> Decoder:
        if self._pinned_for is not None:
            self._pinned = _pin(self._slots, self._pinned_for)
        if self._workers:
            self._start_pool()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._pool is not None:
            _end(self._pool)
            self._pool = None
        self._flights.clear()
        if self._pinned and self._pinned_for is not None:
            _unpin(self._slots, self._pinned_for)
            self._pinned = False

    def batches(self, wanted: Iterable[range]) -> Iterator[Decoded]:
        """The batches of these rows in order; as many as there is room for are read ahead.

        At most two of them may be kept while the next one is asked for.

        Raises:
            InputError: the machine is in trouble, the source is gone, or processes cannot be started.
        """
        remaining = iter(wanted)
        while True:
            self._read_ahead(remaining)
            if not self._flights:
                if not self._free and next(remaining, None) is not None:
                    raise RuntimeError("batches: expected the release of one before the next is asked for; all places are taken")
                return
            flight = self._flights[0]
            for task in flight.tasks:
                self._finish(task)
            self._flights.popleft()
            outcomes = tuple(outcome for task in flight.tasks for outcome in task.outcomes or ())
            photos = self._slots[flight.slot]
            photos[len(flight.rows) :].zero_()
            yield Decoded(flight.rows, photos, outcomes, partial(self._free.append, flight.slot))

    def _read_ahead(self, remaining: Iterator[range]) -> None:
        while self._free:
            rows = next(remaining, None)
            if rows is None:
                return
            flight = _Flight(self._free.popleft(), rows)
            step = min(IMAGES_A_TASK, -(-self._batch // max(1, self._workers)))
            for offset in range(0, len(rows), step):
                flight.tasks.append(_Task(flight.slot, offset, rows[offset : offset + step]))
            self._flights.append(flight)
            for task in flight.tasks:
                self._submit(task)

    # -- the processes ---------------------------------------------------------------------------------------------------

    def _start_pool(self) -> None:
        self._pool = self._new_pool(self._workers)
        self._started = _submitted(self._pool, _begin)
        self._done_since_restart = 0

    def _new_pool(self, workers: int) -> ProcessPoolExecutor:
        """Processes that share no lock and no thread with this one, which may hold a GPU."""
        start_early()
        return ProcessPoolExecutor(workers, process_context(), _prepare_worker, (self._sent_whole, self._preprocess, self._slots))

    def _submit(self, task: _Task) -> None:
        if self._pool is not None:
            task.future = self._sent(self._pool, task.slot, task.offset, task.rows)

    def _sent(self, pool: ProcessPoolExecutor, slot: int, offset: int, rows: range) -> Future[list[Outcome]] | None:
        return _submitted(pool, _decode, slot, offset, rows, self._source.part(rows))

    def _finish(self, task: _Task) -> None:
        """Wait for a task; where workers were killed, begin anew with all that is not done."""
        while task.outcomes is None:
            if not self._workers:
                task.outcomes = decode_rows(self._source, self._preprocess, self._slots[task.slot], task.offset, task.rows)
                return
            try:
                task.outcomes = _result(task.future)
                self._done_since_restart += 1
            except BrokenProcessPool:
                self._restart()

    def _restart(self) -> None:
        unfinished = self._collect()
        if self._pool is not None:
            _end(self._pool)
        self.replaced += 1
        if self._have_begun(self._started) and self._done_since_restart == 0 and self.replaced > 1:
            for task in unfinished:
                task.outcomes = self._one_by_one(task)
            unfinished = []
        self._start_pool()
        for task in unfinished:
            self._submit(task)

    def _collect(self) -> list[_Task]:
        """Take over what was finished before the processes ended; the rest is returned."""
        unfinished = []
        for task in (task for flight in self._flights for task in flight.tasks if task.outcomes is None):
            if _is_done(task.future):
                task.outcomes = task.future.result()
                self._done_since_restart += 1
            else:
                unfinished.append(task)
        return unfinished

    def _one_by_one(self, task: _Task) -> list[Outcome]:
        """A task's photos one after the other, so that the one that ends processes is known."""
        outcomes: list[Outcome] = []
        failed = 0
        while len(outcomes) < len(task.rows):
            pool = self._new_pool(1)
            started = _submitted(pool, _begin)
            try:
                for position in range(len(outcomes), len(task.rows)):
                    rows = task.rows[position : position + 1]
                    decoded = _result(self._sent(pool, task.slot, task.offset + position, rows))
                    outcomes += decoded
                    failed = 0
            except BrokenProcessPool:
                failed += self._have_begun(started)
            finally:
                _end(pool)
            if failed == _TRIES:
                self._slots[task.slot, task.offset + len(outcomes)].zero_()
                outcomes.append(Outcome(failure="photo: reading it ended the process that read it"))
                failed = 0
        return outcomes

    def _have_begun(self, started: Future[None] | None) -> bool:
        """Whether processes that ended had begun; what ended them before is no photo.

        Raises:
            InputError: none has begun several times.
        """
        self._failed_starts = 0 if _is_done(started) else self._failed_starts + 1
        if self._failed_starts == _STARTS:
            raise InputError(
                "workers: the processes that decode photos end before they begin: expected a script whose work stands under "
                "if __name__ == '__main__', as Python's multiprocessing needs it; or workers=0"
            )
        return self._failed_starts == 0


def _submitted(pool: ProcessPoolExecutor, work: Callable[..., Any], *arguments: Any) -> Future[Any] | None:
    """None where the pool is broken, breaks just now, or what starts its processes was killed."""
    with _uninterrupted():  # Ctrl-C would leave a process that is half started, and that nobody knows of
        try:
            return pool.submit(work, *arguments)
        except (BrokenProcessPool, EOFError, OSError):
            return None


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C back until the end; Python gives it to the main thread alone."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    received: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: received.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if received:
        handler(*received[0])


def _result(future: Future[T] | None) -> T:
    if future is None:
        raise BrokenProcessPool
    return future.result()


def _is_done(future: Future[T] | None) -> TypeGuard[Future[T]]:
    return future is not None and future.done() and not future.cancelled() and future.exception() is None


def _end(pool: ProcessPoolExecutor) -> None:
    """End a pool at once: its processes may wait for a lock that a killed one held, and what they still do is not needed."""
    for process in list((pool._processes or {}).values()):
        process.kill()
    pool.shutdown(wait=True, cancel_futures=True)


def _num_slots(batch: int, input_size: tuple[int, int], workers: int) -> int:
    """How many batches are in memory: enough for every worker to have work, within limits."""
    size = batch * 3 * input_size[0] * input_size[1]
    if not workers:
        return LEAST_SLOTS
    wanted = LEAST_SLOTS + -(-2 * workers * min(IMAGES_A_TASK, batch) // batch)
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # that torchrun has started here, each with memory of its own
    room = MEMORY
    if _SHARED_MEMORY.is_dir():  # writing beyond it kills the process that writes
        free = shutil.disk_usage(_SHARED_MEMORY).free // processes
        room = min(room, free // 2)
        if LEAST_SLOTS * size > free:
            raise InputError(
                f"workers: expected {LEAST_SLOTS * size / 2**20:.0f} MiB of shared memory for {LEAST_SLOTS} batches of {batch}, "
                f"received {free / 2**20:.0f} MiB free in {_SHARED_MEMORY}; a smaller batch or workers=0 needs less (containers: "
                "--shm-size)"
            )
    return max(LEAST_SLOTS, min(wanted, room // size))


def _pin(memory: Tensor, device: torch.device) -> bool:
    """Pin memory that stands already; copies from it need not wait then. Where that fails they do."""
    with torch.cuda.device(device):
        if int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)) == 0:
            return True
        with suppress(RuntimeError):  # the error is kept, and would be taken for that of the next kernel
            torch.zeros(1, device=device)
    return False


def _unpin(memory: Tensor, device: torch.device) -> None:
    """Undo ``_pin`` when nothing is being copied any more."""
    with torch.cuda.device(device):
        with suppress(RuntimeError):  # that of a run that failed is known already
            torch.cuda.synchronize(device)
        torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())


# -- in a worker ---------------------------------------------------------------------------------------------------------

_worker: tuple[Source | None, Preprocess, Tensor] | None = None


def _prepare_worker(source: Source | None, preprocess: Preprocess, slots: Tensor) -> None:
    global _worker
    _worker = source, preprocess, slots
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interruption means
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A pool's worker would wait forever for work from a parent that was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _begin() -> None:
    """Tells that a worker has begun."""


def _decode(slot: int, offset: int, rows: range, part: Source | None) -> list[Outcome]:
    """Fill a slot with rows of a source, or with the part of it that has these rows alone."""
    assert _worker is not None
    source, preprocess, slots = _worker
    if part is not None:
        source, rows = part, range(len(part))
    assert source is not None
    try:
        return decode_rows(source, preprocess, slots[slot], offset, rows)
    except MemoryError:  # as if the system had ended this process: the photos are tried again, at last each by itself
        os._exit(1)


def decode_rows(source: Source, preprocess: Preprocess, photos: Tensor, offset: int, rows: range) -> list[Outcome]:
    """Fill ``photos`` from ``offset`` on; black where a photo cannot be read.

    Raises:
        InputError: the machine is in trouble, or the source is gone.
        MemoryError: so it may be for want of memory, which says nothing of the photo.
    """
    outcomes = []
    for position, row in enumerate(rows, offset):
        try:
            sample = source.sample(row, masks=False)
            photos[position] = preprocess.seen(sample.photo)
            outcomes.append(Outcome(note=sample.note))
        except MemoryError:
            raise
        except Exception as error:  # one odd photo must not stop a run
            failure = str(error)
            if not isinstance(error, InputError):
                failure = f"photo: cannot be made the model's input: {type(error).__name__}: {brief(error)}"
            if _has_passing_cause(error) or _is_cut_off(source, row):
                raise InputError(f"{failure}; nothing is recorded of it, as it may pass: run the same command again") from error
            photos[position].zero_()
            outcomes.append(Outcome(failure=failure))
    return outcomes


def _is_cut_off(source: Source, row: int) -> bool:
    """Whether more than one file is gone: a disk that is no longer mounted leaves an empty folder, or none."""
    path = source.path(row)
    if path is None or "\\x" in path:  # bytes that are no text: such a path cannot be looked at
        return False
    if source.kind == "webdataset":
        return not any(os.path.isfile(path[: found.start()]) for found in re.finditer("::", path))
    try:
        return not os.path.exists(path) and not os.listdir(os.path.dirname(path))
    except OSError:
        return True


def _has_passing_cause(error: BaseException | None) -> bool:
    """Whether the trouble is the machine's, not the photo's: such a photo must not be recorded as unreadable."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _PASSING:
            return True
        error = error.__cause__
    return False
