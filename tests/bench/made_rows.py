"""Rows as the benchmark would write them, made up."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from bench import record
from bench.record import Row, spread, unmeasured
from bench.registry import DENSE, EXPLANATION, FORWARD, FORWARD_BACKWARD, GRAD_CAM, MODEL_ITSELF, OPERATION, TORCH, Size

RESOLUTIONS = (197, 577, 1025, 4097)
SIZE = Size("vit_small_patch16_224", 1, 577)
LAYER = Size("6 heads of 64", 2, 577)


def row(
    case: str, work: str, provider: str, size: Size, metric: str, unit: str, figure: float | str, kind: str = EXPLANATION
) -> Row:
    """A figure with a spread of ten percent; a text stands where there is none."""
    figures = unmeasured(figure) if isinstance(figure, str) else spread([0.9 * figure, figure, 1.1 * figure])
    where = {"model": size.model, "batch": size.batch, "tokens": size.tokens, "dtype": size.dtype}
    common = {"kind": kind, "case": case, "device": "A processor", "threads": 2, "versions": "torch 2"}
    return Row(work=work, provider=provider, metric=metric, unit=unit, **where, **figures, **common)


def line(case: str, work: str, provider: str, size: Size, kind: str = EXPLANATION, /, **figures: float | str) -> list[Row]:
    """Rows of one line; ``peak_memory=2.0`` is the metric of that name."""
    units = {"time": "ms", "pace": "1/s", "peak memory": "MiB", "work": "GFLOP", "moved": "MB", "rate": "TFLOP/s"}
    named = {name.replace("__", " + ").replace("_", " "): figure for name, figure in figures.items()}
    return [row(case, work, provider, size, name, units.get(name, "1"), figure, kind) for name, figure in named.items()]


def resolution(tokens: Sequence[int] = RESOLUTIONS, full_from: int = 4097) -> Iterator[Row]:
    """Ours grows like n^1.5 in time and like n in memory, the dense reference like n² until it is out of memory."""
    for n in tokens:
        size = replace(SIZE, tokens=n)
        yield from line("resolution", FORWARD_BACKWARD, MODEL_ITSELF, size, time=0.01 * n**1.5, peak_memory=0.2 * n)
        yield from line("resolution", "tokentm", TORCH, size, time=0.02 * n**1.5, peak_memory=0.3 * n)
        yield from line("resolution", "tokentm", f"{TORCH}, checkpointed", size, time=0.03 * n**1.5, peak_memory=0.1 * n)
        full = "out of memory (limit 20 GB)"
        dense = {"time": full, "peak_memory": full} if n >= full_from else {"time": 0.001 * n**2, "peak_memory": 0.003 * n**2}
        yield from line("resolution", "tokentm", DENSE, size, **dense)
        yield row("resolution", "tokentm", DENSE, size, "stored maps, counted", "GB", 1e-6 * n**2)
        yield row("resolution", "largest batch", TORCH, size, "batch", "1", 2.0 if n < full_from else "out of memory")


def explanations() -> Iterator[Row]:
    """Baselines, methods by us and by the dense reference, one by another library, one that failed its gate."""
    size = replace(SIZE, tokens=197, batch=8)
    base = "ratio_to_forward__backward"
    yield from line("explanations", FORWARD, MODEL_ITSELF, size, time=40.0, pace=200.0, work=20.0, rate=0.5,
                    fraction_of_peak_compute=0.8, **{base: 0.4})  # fmt: skip
    yield from line("explanations", FORWARD_BACKWARD, MODEL_ITSELF, size, time=100.0, pace=80.0, **{base: 1.0})
    yield from line("explanations", "tokentm", TORCH, size, time=110.0, pace=72.7, peak_memory=300.0, **{base: 1.1})
    yield from line("explanations", "tokentm", DENSE, size, time=880.0, pace=9.09, peak_memory=2400.0, **{base: 8.8})
    yield from line("explanations", "grad_cam", GRAD_CAM, size, time=99.0, pace=80.8, **{base: 0.99})
    yield from line("explanations", "rollout", TORCH, size, relative_error=0.5, time="wrong: error 5.0e-01, limit 1.0e-05")
    yield from line("explanations", "lrp", TORCH, size, time="not measured")


def cold_start() -> Iterator[Row]:
    """Two steps of a process, and the compiler for another model."""
    yield from line("cold_start", "import torch and timm", MODEL_ITSELF, SIZE, time=2000.0)
    yield from line("cold_start", "first explanation", TORCH, SIZE, time=300.0)
    yield from line("cold_start", "compiler", TORCH, replace(SIZE, model="vit_base", dtype="bfloat16"), time="not installed")


def operations() -> Iterator[Row]:
    """Peaks, two operations at two sizes, a rival that is not installed."""
    none = Size("", 0, 0)
    yield row("operations", "peak", "large product", none, "rate", "TFLOP/s", 0.4, OPERATION)
    yield row("operations", "peak", "large copy", none, "rate", "TB/s", 0.02, OPERATION)
    for n in (197, 577):
        size = replace(LAYER, tokens=n)
        yield from line("operations", "torch fused attention forward", "torch", size, OPERATION, time=6.0, work=1e-5 * n**2,
                        moved=0.04 * n, rate=0.2, fraction_of_peak_compute=0.5)  # fmt: skip
        yield from line("operations", "row_propagation", TORCH, size, OPERATION, time=7.0, work=5e-6 * n**2, moved=0.03 * n,
                        rate=0.1, fraction_of_peak_compute=0.25, rate_over_torch_fused_attention_forward=0.5)  # fmt: skip
        yield from line("operations", "column means", "flash-colreduce", size, OPERATION, time="not installed")


def in_dtype(rows: Iterable[Row], dtype: str) -> list[Row]:
    """The same figures in another element type."""
    return [replace(one, dtype=dtype) for one in rows]


def blank(rows: Iterable[Row]) -> list[Row]:
    """The same lines for a device that was not at hand."""
    return [record.blank(one, "nvidia-h200") for one in rows]
