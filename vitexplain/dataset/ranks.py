"""Several processes of one run, as ``torchrun`` starts them, one for each GPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ..errors import ExplanationError, InputError
from ..messages import brief

T = TypeVar("T")

_START = timedelta(minutes=10)
_LONG = timedelta(days=7)  # ranks wait for the slowest one


class Ranks:
    """This process's place among those of a run; alone where it was not started by ``torchrun``."""

    def __init__(self) -> None:
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0")) if self.size > 1 else 0
        self._group: Any = None
        if self.size > 1:
            if not dist.is_initialized():
                dist.init_process_group("gloo", timeout=_START)
            self._group = dist.new_group(backend="gloo", timeout=_LONG)

    @property
    def is_first(self) -> bool:
        """Whether this process does what is done once."""
        return self.rank == 0

    def first(self, work: Callable[[], T]) -> T:
        """Have the first process do something, and give every process its result, or its error."""
        if self.size == 1:
            return work()
        said: list[Any] = [None]
        failure: Exception | None = None
        if self.is_first:
            try:
                said = [(work(), None)]
            except Exception as error:
                failure = error
                said = [(None, _to_send(error))]
        dist.broadcast_object_list(said, src=0, group=self._group)
        result, told = said[0]
        if told is not None:
            raise failure or told
        return result

    def together(self, work: Callable[[], T]) -> T:
        """Have every process do something, and end all of them where one fails."""
        if self.size == 1:
            return work()
        results: list[T] = []
        failure: Exception | None = None
        try:
            results.append(work())
        except Exception as error:
            failure = error
        failures = self.gather(None if failure is None else _to_send(failure))
        if failure is not None:
            raise failure
        others = next((error for error in failures if error is not None), None)
        if others is not None:
            raise others
        return results[0]

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in each of them."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def share(self, items: list[T]) -> list[T]:
        """The items that are this process's."""
        return items[self.rank :: self.size]


def _to_send(error: Exception) -> ExplanationError:
    """What other processes are told of an error."""
    return error if isinstance(error, ExplanationError) else InputError(f"another process ended: {brief(error)}")


def local_device(device: str) -> str:
    """``"auto"`` and ``"cuda"`` as the GPU of this process's place on its machine, where ``torchrun`` gave it one."""
    place = os.environ.get("LOCAL_RANK")
    if device in ("auto", "cuda") and place is not None and torch.cuda.is_available():
        return f"cuda:{int(place) % torch.cuda.device_count()}"
    return device
