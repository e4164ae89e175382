"""Looking at values on the host: when it must not be done, and once for all checks of a call where it may."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from .errors import InputError

_UNSEEN: ContextVar[bool] = ContextVar("vitexplain_unseen_values", default=False)
_Check = tuple[Tensor, Callable[[], Exception]]
_LATER: ContextVar[list[_Check] | None] = ContextVar("vitexplain_checks_for_later", default=None)


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


def expect(holds: Callable[[], Tensor], device: torch.device, error: Callable[[], Exception]) -> None:
    """Raise ``error()`` where ``holds()``, a boolean scalar on the device, is false.

    On a CPU at once; on a GPU, where a look waits for all work before it, at the end of ``looking_once``.
    """
    if unseen(device):
        return
    later = _LATER.get()
    if later is not None and device.type != "cpu":
        later.append((holds(), error))
    elif not holds():
        raise error()


def expect_finite(values: Tensor, message: str) -> None:
    """Raise ``InputError`` where any value is NaN or infinite; see ``expect``."""
    expect(lambda: torch.isfinite(values).all(), values.device, lambda: InputError(message))


@contextmanager
def looking_once() -> Iterator[None]:
    """Gather what ``expect`` is told of values on a GPU, and look at all of it at the end, with one wait.

    Raises:
        Exception: the first of the errors; in place of any other that came later and may follow from it.
    """
    later: list[_Check] = []
    token = _LATER.set(later)
    try:
        yield
    except Exception:
        _look(later)
        raise
    finally:
        _LATER.reset(token)
    _look(later)


def _look(checks: list[_Check]) -> None:
    if not checks:
        return
    for held, (_, error) in zip(torch.stack([holds for holds, _ in checks]).tolist(), checks, strict=True):
        if not held:
            raise error()
