"""The command line: ``vitexplain explain``, ``evaluate``, ``list``, ``demo``."""

from __future__ import annotations

from . import evaluate, explain  # noqa: F401  (they register their commands)
from .app import app

__all__ = ["app", "main"]


def main() -> None:
    """Entry point."""
    app()
