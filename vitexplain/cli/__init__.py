"""The command line: ``vitexplain explain``, ``evaluate``, ``dataset``, ``show``, ``summary``, ``list``, ``demo``."""

from __future__ import annotations

from . import dataset, evaluate, explain, store  # noqa: F401  (they register their commands)
from .app import app

__all__ = ["app", "main"]


def main() -> None:
    """Entry point."""
    app()
