"""Which tile shape a kernel is launched with: a table, made by ``python -m bench.tune``, and its lookup.

``launch_table.csv`` has one row per (kernel, architecture, precision, padded head width, number of tokens up to which it
holds); a kernel's launches with a handful of queries are ``…_few``. Architecture ``any`` serves every device that has no rows
of its own. ``basis`` says where a row comes from: the first of the tuner's candidates that compiles without spills, or a
measurement on a named device.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields
from functools import cache
from pathlib import Path

TABLE = Path(__file__).resolve().parent / "launch_table.csv"
ANY = "any"
UNBOUNDED = 1 << 62


SMALLEST_PRODUCT = 16  # rows, columns and depth of the smallest matrix product


def padded_head_dim(head_dim: int) -> int:
    """Head width rounded up to what a matrix product takes: a power of two, at least 16."""
    return max(SMALLEST_PRODUCT, 1 << (head_dim - 1).bit_length())


@dataclass(frozen=True)
class TileConfig:
    """Tile of queries × keys, how many warps and pipeline stages work on it, and how many registers a thread may have.

    Left alone (``max_registers`` 0), NVIDIA's assembler sometimes spills a few bytes for the sake of occupancy.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int = 0


@dataclass(frozen=True)
class TableRow:
    """One row of the table; ``tokens`` is the largest number of tokens it serves, ``"any"`` for all."""

    kernel: str
    architecture: str
    precision: str
    head_dim: str
    tokens: str
    block_m: str
    block_n: str
    num_warps: str
    num_stages: str
    max_registers: str
    basis: str

    @property
    def config(self) -> TileConfig:
        """The tile shape."""
        return TileConfig(*(int(getattr(self, field.name)) for field in fields(TileConfig)))


def read_table(path: Path = TABLE) -> list[TableRow]:
    """All rows."""
    with path.open(newline="", encoding="utf-8") as stream:
        return [TableRow(**row) for row in csv.DictReader(stream)]


def write_table(rows: Iterable[TableRow], path: Path = TABLE) -> None:
    """Replace the table; rows are sorted, so that a change reads as a change."""

    def order(row: TableRow) -> tuple[object, ...]:
        return row.kernel, row.architecture, row.precision, int(row.head_dim), _bound(row.tokens)

    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(field.name for field in fields(TableRow))
        writer.writerows(astuple(row) for row in sorted(rows, key=order))


def _bound(tokens: str) -> int:
    return UNBOUNDED if tokens == ANY else int(tokens)


@cache
def _index() -> dict[tuple[str, str, str, int], list[tuple[int, TileConfig]]]:
    index: dict[tuple[str, str, str, int], list[tuple[int, TileConfig]]] = {}
    for row in read_table():
        key = (row.kernel, row.architecture, row.precision, int(row.head_dim))
        index.setdefault(key, []).append((_bound(row.tokens), row.config))
    return {key: sorted(entries, key=lambda entry: entry[0]) for key, entries in index.items()}


@cache
def looked_up(kernel: str, architecture: str, precision: str, head_dim: int, num_tokens: int) -> TileConfig:
    """The tile shape of the row that serves these; ``head_dim`` is padded to a power of two.

    Raises:
        LookupError: no row serves them, which the table's own test excludes.
    """
    for name in (architecture, ANY):
        for bound, config in _index().get((kernel, name, precision, head_dim), ()):
            if num_tokens <= bound:
                return config
    raise LookupError(
        f"launch table: no row for {kernel}, {architecture}, {precision}, head width {head_dim}, {num_tokens} tokens"
    )
