"""The errors this library raises for bad input; each message names what was expected and what was received."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ExplanationError(ValueError):
    """Base class of all errors that bad input can cause."""


class InputError(ExplanationError):
    """Images, targets, options or files that do not fit."""


class UnknownNameError(ExplanationError):
    """A method, option or model of that name does not exist; the message lists near ones."""


class UnsupportedModelError(ExplanationError):
    """The model cannot be explained, or not by this method; the message says why."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UnknownNameError:
    """An error for an unknown name that offers near ones, or all where none is near."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=5, cutoff=0.5)
    if near:
        return UnknownNameError(f"unknown {kind} {name!r}: did you mean {', '.join(near)}?")
    listed = ", ".join(known[:20]) + (f", … ({len(known)} in all)" if len(known) > 20 else "")
    return UnknownNameError(f"unknown {kind} {name!r}: expected one of {listed or 'none'}")


_OUT_OF_MEMORY = ("out of memory", "allocate memory", "not enough memory", "ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was wanting, on a GPU or on the host, where torch has no error of its own for it."""
    from torch import OutOfMemoryError

    text = str(error)
    return isinstance(error, OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(said in text for said in _OUT_OF_MEMORY)
    )
