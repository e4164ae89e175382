"""One row per figure, always with device and versions beside it, in one file per device."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch

from vitexplain.environment import environment as device_and_versions
from vitexplain.errors import InputError

__all__ = [
    "NOT_MEASURED", "RESULTS", "LineKey", "Row", "device_folder", "devices", "environment", "merge", "read_rows",
    "results_path", "spread", "unavailable", "unmeasured", "update", "write_table_rows",
]  # fmt: skip

RESULTS = Path(__file__).resolve().parent / "results"
NOT_MEASURED = "not measured"
UNAVAILABLE = "unavailable"
OPTIONAL = ("triton",)


@dataclass(frozen=True)
class LineKey:
    """Everything but the figures: who did what at one size.

    Attributes:
        kind: ``"operation"``, ``"explanation"``, ``"evaluation"`` or ``"data set"``.
        case: name of the case, as ``python -m bench list`` shows it.
        work: the piece of work; providers of the same work are asked for the same thing.
        provider: who did it.
        model: a timm model, or the form of a layer.
        batch, tokens, dtype: the size.
    """

    kind: str
    case: str
    work: str
    provider: str
    model: str
    batch: int
    tokens: int
    dtype: str


@dataclass(frozen=True)
class Row(LineKey):
    """One figure: what was measured, by whom, on what, with the spread and the environment.

    Attributes:
        metric, unit: what the figure is.
        p20, p50, p80: 20th, 50th and 80th percentile as text; ``p50`` is ``"not measured"``, ``"out of memory …"`` or another
            reason where there is no figure.
        repeats: number of samples.
    """

    metric: str
    unit: str
    p20: str
    p50: str
    p80: str
    repeats: int
    device: str
    threads: int
    versions: str

    @property
    def measured(self) -> bool:
        """Whether there is a figure."""
        try:
            float(self.p50)
        except ValueError:
            return False
        return True

    @property
    def value(self) -> float:
        """The median; NaN where there is no figure."""
        return float(self.p50) if self.measured else float("nan")

    @property
    def line(self) -> LineKey:
        """Rows of one line are replaced together."""
        return LineKey(self.kind, self.case, self.work, self.provider, self.model, self.batch, self.tokens, self.dtype)


_COUNTS = tuple(field.name for field in fields(Row) if field.type == "int")


def spread(samples: list[float]) -> dict[str, object]:
    """20th, 50th and 80th percentile of the samples."""
    if len(samples) == 1:
        return {"p20": f"{samples[0]:.4g}", "p50": f"{samples[0]:.4g}", "p80": f"{samples[0]:.4g}", "repeats": 1}
    tenths = statistics.quantiles(samples, n=10, method="inclusive")
    return {"p20": f"{tenths[1]:.4g}", "p50": f"{tenths[4]:.4g}", "p80": f"{tenths[7]:.4g}", "repeats": len(samples)}


def unmeasured(reason: str = NOT_MEASURED) -> dict[str, object]:
    """In the place of ``spread``: why there is no figure."""
    return {"p20": "", "p50": reason, "p80": "", "repeats": 0}


def unavailable(reason: object) -> dict[str, object]:
    """In the place of ``spread``: why it cannot be measured here, which says nothing about the provider."""
    return unmeasured(f"{UNAVAILABLE}: {reason}")


def environment(device: torch.device, *more: str) -> dict[str, object]:
    """``device``, ``threads`` and ``versions`` of a row, with those of more packages, where they are installed.

    On a GPU with the CUDA that torch was built for: kernels and libraries come with it.
    """
    found = device_and_versions(device, optional=(*OPTIONAL, *more))
    if device.type == "cuda":
        found["versions"] = f"{found['versions']}, CUDA {torch.version.cuda}"
    return found


def device_folder(device: torch.device) -> str:
    """``cpu``, or the GPU's name as a folder's."""
    if device.type == "cpu":
        return "cpu"
    return torch.cuda.get_device_name(device).lower().replace(" ", "-")


def devices() -> list[str]:
    """Devices there are results of."""
    return sorted(path.parent.name for path in RESULTS.glob("*/benchmark.csv"))


def results_path(name: str, folder: Path | None = None) -> Path:
    """Where a device's figures are kept, of the repository or of a folder; ``name`` as ``device_folder`` gives it."""
    return (folder or RESULTS) / name / "benchmark.csv"


def merge(path: Path) -> Path:
    """Put a file that was written elsewhere into the repository's of the same device, which is the name of its folder.

    Raises:
        InputError: there are no rows.
    """
    rows = read_rows(path)
    if not rows:
        raise InputError(f"{path}: expected rows of the benchmark, found none")
    return update(results_path(path.resolve().parent.name), rows)


def update(path: Path, rows: Iterable[Row]) -> Path:
    """Put figures into a file: a line that was there already is replaced where it stands, with all its metrics.

    A line that was measured before stays where now it could not be, for want of a package or of data.
    """
    made: dict[LineKey, list[Row]] = {}
    for row in rows:
        made.setdefault(row.line, []).append(row)
    kept: dict[LineKey, list[Row]] = {}
    for row in read_rows(path) if path.exists() else ():
        kept.setdefault(row.line, []).append(row)
    made = {line: rows for line, rows in made.items() if line not in kept or not all(map(_is_unavailable, rows))}
    ordered = sorted((kept | made).values(), key=lambda line: (line[0].kind, line[0].case))  # stable: sizes as they came
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_table_rows(path, [asdict(row) for line in ordered for row in line])


def _is_unavailable(row: Row) -> bool:
    return row.p50.startswith(UNAVAILABLE)


def write_table_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    """Write a CSV with a header; replaces what was there, all at once."""
    beside = path.with_suffix(".partial")
    with beside.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return beside.replace(path)


def read_rows(path: Path, **wanted: object) -> list[Row]:
    """The rows of a file whose fields have the given values; none where there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="") as stream:
        rows = [
            Row(**{name: int(text) if name in _COUNTS else text for name, text in row.items()}) for row in csv.DictReader(stream)
        ]
    return [row for row in rows if all(getattr(row, name) == value for name, value in wanted.items())]


def blank(row: Row, device: str) -> Row:
    """The same line for a device that is not at hand."""
    return replace(row, **unmeasured(), device=device, threads=0, versions=NOT_MEASURED)
