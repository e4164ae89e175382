"""Parts of messages: errors, lists, sizes and differences in one line, and other packages' logs kept out of the way."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any


def brief(error: BaseException) -> str:
    """The first line of an error, at most 160 characters."""
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return _shortened(str(text).splitlines()[0], 160)


def some(names: Iterable[str], shown: int = 3, separator: str = ", ") -> str:
    """The first few of several names, and how many there are where that is not all."""
    names = list(names)
    return separator.join(names[:shown]) + (f"{separator}… ({len(names)} in all)" if len(names) > shown else "")


def differences(standing: Any, asked: Any) -> list[str]:
    """Where two settings (JSON) differ, each with what stands there and what was asked for."""
    return list(_differences(standing, asked, ""))


def in_bytes(size: float) -> str:
    """A size in words, such as ``"1.5 GiB"``."""
    for unit, least in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= least:
            return f"{size / least:,.1f} {unit}"
    return f"{size:.0f} bytes"


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


def _differences(standing: Any, asked: Any, path: str) -> Iterator[str]:
    if isinstance(standing, dict) and isinstance(asked, dict):
        for name in {**standing, **asked}:
            yield from _differences(standing.get(name), asked.get(name), f"{path}.{name}".removeprefix("."))
    elif standing != asked:
        there, wanted = json.dumps(standing), json.dumps(asked)
        if there != wanted:  # NaN is no number that equals itself, and the same text
            yield f"{path}: {_shortened(there, 60)} there, {_shortened(wanted, 60)} asked for"


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
