"""The command line: ``explain``, ``demo``, ``serve``, ``dataset``, ``show``, ``summary``, ``evaluate``, and listings."""

from __future__ import annotations

import sys

from . import dataset, evaluate, explain, listings, serve, store  # noqa: F401  (they register their commands)
from .app import app

__all__ = ["app", "main"]


def main() -> None:
    """Entry point."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a pipe on Windows does not know every letter
    app()
