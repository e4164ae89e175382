"""When values must not be looked at on the host: while a CUDA graph is captured, and where a caller looks at them later."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_UNSEEN: ContextVar[bool] = ContextVar("vitexplain_unseen_values", default=False)


def unseen(device: torch.device) -> bool:
    """Whether checks of values are left out: a CUDA graph is being captured, or the caller said so."""
    return _UNSEEN.get() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing())


@contextmanager
def without_looking() -> Iterator[None]:
    """Leave out every check that needs a look at values, which on a GPU waits for all work before it."""
    token = _UNSEEN.set(True)
    try:
        yield
    finally:
        _UNSEEN.reset(token)
