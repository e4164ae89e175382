"""Results and pictures in a folder of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from bench import plot, record
from bench.record import Row


@pytest.fixture
def results(tmp_path: Path, monkeypatch) -> Callable[[str, Iterable[Row]], Path]:
    """Writes made-up rows as a device's results; nothing outside the test's folder is read or written."""
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(plot, "DOCS", tmp_path / "docs")
    return lambda device, rows: record.update(record.results_path(device), rows)
