"""Whole calls captured in CUDA graphs: replayed, they cost no launches from the host."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .errors import is_out_of_memory
from .messages import brief

if TYPE_CHECKING:
    from torch.cuda import _POOL_HANDLE  # torch's only name for it

Call = Callable[..., dict[str, Tensor]]


class CannotBeCapturedError(RuntimeError):
    """A call does something that no CUDA graph can hold: it waits for the GPU, above all."""


class CapturedCall:
    """A function of tensors on one GPU, captured once and replayed from then on.

    Args:
        call: takes the inputs, returns tensors by name; may not wait for the GPU.
        inputs: of the shapes and types of all calls to come; None stays None.
        device: the GPU.
        pool: memory that several captured calls share, which are never replayed at the same time.
        stream: that it is captured on; one and the same for all that share a pool.

    Raises:
        CannotBeCapturedError: it cannot.
    """

    def __init__(
        self,
        call: Call,
        inputs: Sequence[Tensor | None],
        device: torch.device,
        pool: _POOL_HANDLE | None = None,
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        self._inputs = [None if tensor is None else tensor.clone() for tensor in inputs]
        self._graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.device(device):
                self._outputs = self._capture(call, pool, torch.cuda.Stream(device) if stream is None else stream)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise CannotBeCapturedError(brief(error)) from error

    def _capture(self, call: Call, pool: _POOL_HANDLE | None, stream: torch.cuda.Stream) -> dict[str, Tensor]:
        current = torch.cuda.current_stream(stream.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            call(*self._inputs)  # compiles and chooses what it needs
            with no_synchronisation():
                call(*self._inputs)
        current.wait_stream(stream)
        with torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            return call(*self._inputs)

    def __call__(self, *inputs: Tensor | None) -> dict[str, Tensor]:
        """What the call returns for these inputs; the next call writes over it."""
        for static, tensor in zip(self._inputs, inputs, strict=True):
            if static is not None and tensor is not None:
                static.copy_(tensor, non_blocking=True)
        self._graph.replay()
        return self._outputs


class GraphCache:
    """Captured calls of several shapes, which share their memory; the one that was not used for longest goes first.

    Args:
        most: how many are kept.
    """

    def __init__(self, most: int = 4) -> None:
        self._most = most
        self._calls: OrderedDict[Hashable, CapturedCall] = OrderedDict()
        self._place: _Place | None = None

    def __call__(self, key: Hashable, call: Call, inputs: Sequence[Tensor | None], device: torch.device) -> dict[str, Tensor]:
        """What ``call`` returns for these inputs, as tensors of their own.

        Args:
            key: everything that the call depends on beside the values of its inputs.
            call, inputs, device: see ``CapturedCall``.

        Raises:
            CannotBeCapturedError: it cannot.
        """
        if self._place is None or not self._calls:
            self._place = _Place(device)
        place = self._place
        place.wait()
        if key not in self._calls:
            while len(self._calls) >= self._most:
                self._calls.popitem(last=False)
            self._calls[key] = CapturedCall(call, inputs, device, place.pool, place.stream)
        self._calls.move_to_end(key)
        outputs = {name: tensor.clone() for name, tensor in self._calls[key](*inputs).items()}
        place.finished()
        return outputs

    def __len__(self) -> int:
        return len(self._calls)


class _Place:
    """Memory and stream of one device's captured calls, and when the last of them was done: they must not overlap."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
        self._done: torch.cuda.Event | None = None

    def wait(self) -> None:
        """Have the current stream wait for the last call, which another stream may have made."""
        if self._done is not None:
            torch.cuda.current_stream(self.device).wait_event(self._done)

    def finished(self) -> None:
        """The last call's results are copied, as far as the current stream is concerned."""
        self._done = torch.cuda.Event() if self._done is None else self._done
        self._done.record(torch.cuda.current_stream(self.device))


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Refuse, with a RuntimeError, what waits for the GPU, in every thread of the process: it could not be captured."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
