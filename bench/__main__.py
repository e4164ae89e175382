"""The benchmark.

    python -m bench list                          # cases, works, providers, sizes
    python -m bench run                           # every case on this machine's CPU -> bench/results/cpu/benchmark.csv
    python -m bench run explanations --device cuda --work tokentm
    python -m bench run --device cuda --budget 500 --results out  # on a machine from which one folder comes back
    python -m bench merge out/nvidia-h200/benchmark.csv           # its rows into bench/results/nvidia-h200/benchmark.csv
    python -m bench run --not-measured nvidia-h200  # the lines of a device that is not at hand, each marked so
    python -m bench plot                          # time and memory over tokens, rooflines -> docs/benchmark/
    python -m bench table                         # the tables of README and docs, from the results

Whatever is timed is first held against a dense float64 reference; outside the error budget it is not timed. What fails is named
where its figures would be, and the rest goes on; a size that fails as a whole is named in the end, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

import torch

from vitexplain.errors import InputError
from vitexplain.messages import brief

from .cases import CASES
from .measuring import let_go, lost
from .record import Row, device_folder, merge, read_rows, results_path, update
from .registry import Case, Setting, Size

WRITTEN_EVERY = 20.0  # seconds


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure cases and put the figures into the device's file")
    run.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; default: all")
    run.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    run.add_argument("--size", action="append", default=[], metavar="PATTERN", help="MODEL/BATCH/TOKENS/DTYPE with * for any")
    run.add_argument("--work", action="append", default=[], help="a part of the work's name; repeat")
    run.add_argument("--provider", action="append", default=[], help="a part of the provider's name; repeat")
    run.add_argument("--seconds", type=float, default=1.0, help="of sampling for each group of calls timed in turns")
    run.add_argument("--least", type=int, default=5, help="samples at least")
    run.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    run.add_argument("--limit-gb", type=float, default=20.0, help="memory that one provider may take on a CPU")
    run.add_argument("--budget", type=float, default=float("inf"), help="seconds after which nothing further is begun")
    run.add_argument("--results", type=Path, metavar="DIR", help="write DIR/<device>/benchmark.csv, begun as a copy of the file")
    run.add_argument("--not-measured", metavar="DEVICE", help="write this device's missing lines, each marked as not measured")
    merged = commands.add_parser("merge", help="put the rows of files that --results made into bench/results")
    merged.add_argument("files", nargs="+", type=Path, metavar="FILE", help="DEVICE/benchmark.csv in any folder")
    commands.add_parser("list", help="cases, works, providers and sizes")
    plot = commands.add_parser("plot", help="draw what was measured")
    plot.add_argument("--device", help="folder of bench/results; default: all")
    table = commands.add_parser("table", help="write the generated parts of README and docs")
    table.add_argument("--check", action="store_true", help="exit 1 where one is not what would be written")
    options = parser.parse_args(arguments)
    {"run": _run, "merge": _merge, "list": _list, "plot": _plot, "table": _table}[options.command](options)


def _run(options: argparse.Namespace) -> None:
    cases = _chosen(options.cases)
    if options.not_measured:
        print(write_not_measured(cases, options.not_measured))
        return
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: expected a CUDA device, found none (--not-measured DEVICE writes the empty lines)")
    device = torch.device(options.device)
    name = device_folder(device)
    path = results_path(name, options.results) if options.results else results_path(name)
    setting = Setting(
        device, options.seconds, options.least, tuple(options.work), tuple(options.provider), not options.no_memory,
        options.limit_gb, time.perf_counter() + options.budget,
    )  # fmt: skip
    with _ended_in_order():
        failed = _measure_all([(case, size) for case in cases for size in _sizes(case, device.type, options.size)], setting, path)
    print(path)
    if failed:
        sys.exit("\n".join(["failed:", *failed]))


def _measure_all(asked: list[tuple[Case, Size]], setting: Setting, path: Path) -> list[str]:
    """Size after size; those that failed as a whole, each with what it said. After a lost device nothing is begun."""
    failed: list[str] = []
    for case, size in asked:
        if setting.spent:
            print(f"left out, the budget is spent: {case.name} {size.label}", flush=True)
            continue
        try:
            _measure(case, size, setting, path)
        except Exception as error:
            traceback.print_exception(error)
            failed.append(f"{case.name} {size.label}: {type(error).__name__}: {brief(error)}")
            if lost(str(error), setting.device):
                failed.append("the device is lost: what comes after it was not begun")
                break
        let_go(setting.device)
    return failed


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """Being told to end is an exit like any other: what was measured is written first."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _measure(case: Case, size: Size, setting: Setting, path: Path) -> None:
    """Measure one size; what there is so far is written from time to time, and in the end, however that comes."""
    rows: list[Row] = []
    written = time.perf_counter()
    try:
        for row in case.measure(size, setting):
            print(line(row), flush=True)
            if time.perf_counter() - written > WRITTEN_EVERY and rows and row.line != rows[-1].line:  # whole lines
                update(path, rows)
                written = time.perf_counter()
            rows.append(row)
    finally:
        if rows:
            update(path, rows)


def _merge(options: argparse.Namespace) -> None:
    for path in options.files:
        try:
            print(merge(path))
        except InputError as error:
            raise SystemExit(str(error)) from None


def write_not_measured(cases: list[Case], name: str) -> str:
    """Add a line for everything that this device's file lacks."""
    path = results_path(name)
    there = {row.line for row in read_rows(path)}
    rows = [row for case in cases for size in case.sizes("cuda") for row in case.blank_rows(size, name) if row.line not in there]
    return str(update(path, rows) if rows else path)


def _chosen(names: list[str]) -> list[Case]:
    for name in names:
        if name not in CASES:
            raise SystemExit(f"case: expected one of {', '.join(CASES)}, received {name!r}")
    return [CASES[name] for name in names or CASES]


def _sizes(case: Case, device_type: str, patterns: list[str]) -> Iterator[Size]:
    for size in case.sizes(device_type):
        if not patterns or any(fnmatch(size.label, pattern) for pattern in patterns):
            yield size


def line(row: Row) -> str:
    """One figure for the terminal."""
    where = f"{row.case} {row.model} B={row.batch} n={row.tokens} {row.dtype}"
    return f"{where:56s} {row.work:34s} {row.provider:38s} {row.metric:28s} {row.p50:>10s} {row.unit}"


def _list(options: argparse.Namespace) -> None:  # noqa: ARG001
    for case in CASES.values():
        print(f"{case.name} ({case.kind}): {case.title}")
        for device_type in ("cpu", "cuda"):
            sizes = case.sizes(device_type)
            print(f"  {device_type}: {', '.join(size.label for size in sizes) or 'nothing'}")
            for work in dict.fromkeys(entry.work for size in sizes for entry in case.entries(size, device_type)):
                found = (e.provider for size in sizes for e in case.entries(size, device_type) if e.work == work)
                print(f"    {work}: {', '.join(dict.fromkeys(found))}")


def _plot(options: argparse.Namespace) -> None:
    from .plot import draw

    for path in draw(options.device):
        print(path)


def _table(options: argparse.Namespace) -> None:
    from .documents import outdated, write_documents

    if not options.check:
        write_documents()
    elif found := outdated():
        sys.exit(f"{', '.join(found)}: out of date: run python -m bench table")


if __name__ == "__main__":
    main()
