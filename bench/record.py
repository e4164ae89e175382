"""One row per measurement, always with device and versions beside the figure."""

from __future__ import annotations

import csv
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

from vitexplain.environment import environment

__all__ = ["RESULTS", "Row", "environment", "read_rows", "spread", "write_rows", "write_table_rows"]

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Row:
    """One figure: what was measured, on what, with the spread and the environment.

    ``p50`` is ``"not measured"`` or ``"out of memory …"`` where there is no figure.
    """

    case: str
    provider: str
    model: str
    batch: int
    tokens: int
    dtype: str
    metric: str
    unit: str
    p20: str
    p50: str
    p80: str
    repeats: int
    device: str
    threads: int
    versions: str


def spread(samples: list[float]) -> dict[str, object]:
    """20th, 50th and 80th percentile of the samples."""
    if len(samples) == 1:
        return {"p20": f"{samples[0]:.4g}", "p50": f"{samples[0]:.4g}", "p80": f"{samples[0]:.4g}", "repeats": 1}
    tenths = statistics.quantiles(samples, n=10, method="inclusive")
    return {"p20": f"{tenths[1]:.4g}", "p50": f"{tenths[4]:.4g}", "p80": f"{tenths[7]:.4g}", "repeats": len(samples)}


def write_rows(path: Path, rows: list[Row]) -> Path:
    """Write measurements with a header; replaces what was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_table_rows(path, [asdict(row) for row in rows])


def write_table_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    """Write a CSV with a header; replaces what was there."""
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def read_rows(path: Path) -> list[Row]:
    """Rows of a CSV written by ``write_rows``."""
    with path.open(newline="") as stream:
        counts = ("batch", "tokens", "repeats", "threads")
        return [
            Row(**{name: int(text) if name in counts else text for name, text in row.items()}) for row in csv.DictReader(stream)
        ]
