"""Parts of error messages: errors and lists in one line, and other packages' logs kept out of the way."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


def brief(error: BaseException) -> str:
    """The first line of an error, at most 160 characters."""
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    line = str(text).splitlines()[0]
    return line if len(line) <= 160 else line[:159] + "…"


def some(names: Iterable[str], shown: int = 3) -> str:
    """The first few of several names, and how many there are where that is not all."""
    names = list(names)
    return ", ".join(names[:shown]) + (f", … ({len(names)} in all)" if len(names) > shown else "")


@contextmanager
def quiet(*names: str, level: int = logging.ERROR) -> Iterator[None]:
    """Silence loggers below a level: retries and defaults are reported once, by the exception."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(level)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
