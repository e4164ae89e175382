"""Whole calls captured in CUDA graphs: replayed, they cost no launches from the host."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

Call = Callable[..., dict[str, Tensor]]


class CapturedCall:
    """A function of tensors on one GPU, captured once and replayed from then on.

    Args:
        call: takes the inputs, returns tensors by name; may not wait for the GPU.
        inputs: of the shapes and types of all calls to come; None stays None.
        device: the GPU.
        pool: memory that several captured calls share, which are never replayed at the same time.

    Raises:
        RuntimeError: the call cannot be captured, because it waits for the GPU, above all.
    """

    def __init__(
        self, call: Call, inputs: Sequence[Tensor | None], device: torch.device, pool: tuple[int, int] | None = None
    ) -> None:
        self._inputs = [None if tensor is None else tensor.clone() for tensor in inputs]
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device):
            stream = torch.cuda.Stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                call(*self._inputs)  # compiles and chooses what it needs
                with _no_synchronisation():
                    call(*self._inputs)
            torch.cuda.current_stream(device).wait_stream(stream)
            with torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                self._outputs = call(*self._inputs)

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
        self._pool: tuple[int, int] | None = None

    def __call__(self, key: Hashable, call: Call, inputs: Sequence[Tensor | None], device: torch.device) -> dict[str, Tensor]:
        """What ``call`` returns for these inputs, as tensors of their own.

        Args:
            key: everything that the call depends on beside the values of its inputs.
            call, inputs, device: see ``CapturedCall``.

        Raises:
            RuntimeError: the call cannot be captured.
        """
        if key not in self._calls:
            self._pool = torch.cuda.graph_pool_handle() if self._pool is None else self._pool
            while len(self._calls) >= self._most:
                self._calls.popitem(last=False)
            self._calls[key] = CapturedCall(call, inputs, device, self._pool)
        self._calls.move_to_end(key)
        return {name: tensor.clone() for name, tensor in self._calls[key](*inputs).items()}

    def __len__(self) -> int:
        return len(self._calls)


@contextmanager
def _no_synchronisation() -> Iterator[None]:
    """Refuse, with a RuntimeError, what waits for the GPU: it could not be captured."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
