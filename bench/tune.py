"""Make the launch table, and the decision between one backward pass and two.

    python -m bench.tune --compile-only      # anywhere: per architecture, the first candidate that compiles without spills
    python -m bench.tune                     # on a GPU: the fastest candidate for this architecture, measured
    python -m bench.tune --decisions         # on a GPU or CPU: one pass (attention_backward) or the library's backward and a row

Candidates stand in order of preference. Measured rows replace those of the same architecture; rows of other architectures stay.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, astuple, dataclass, replace
from functools import partial
from itertools import pairwise
from multiprocessing import get_context

import torch

from vitexplain import kernels
from vitexplain.kernels import shipped_variants
from vitexplain.kernels.aot.budgets import expected_products
from vitexplain.kernels.aot.compile import compile_variant
from vitexplain.kernels.aot.resources import resources_of
from vitexplain.kernels.attention_backward import choose
from vitexplain.kernels.launch import KernelVariant, architecture_of, forced_config, recorded_launches
from vitexplain.kernels.launch_table import ANY, TABLE, TableRow, TileConfig, padded_head_dim, read_table, write_table
from vitexplain.kernels.token_transformation.token_kernel import ANY_WIDTH
from vitexplain.loading import dtype_name

from .layer import CPU_SIZES, GPU_SIZES, Layer, LayerSize, backward_pass, one_pass, relevance, row_pass
from .record import environment, write_table_rows
from .timing import interleaved_ms, samples_ms

TOKENWISE = ("token_transformation", "attention_token_transformation")
GRAM = "l2_head_norms"
KERNELS = (
    "single_row",
    "single_row_few",
    "many_rows",
    "many_rows_few",
    "attention_backward",
    "attention_relevance",
    "contribution_map",
    GRAM,
    *TOKENWISE,
)
FEW = "_few"  # a handful of queries: the last block of a class-token model
ARCHITECTURES = ("80", "89", "90", "100")
HEAD_DIMS = (64, 128, 256)
NARROWER = {"64": ("16", "32")}  # what fits a width of 64 fits these
PRECISIONS = {"half": torch.bfloat16, "tf32": torch.float32, "ieee": torch.float32}
# Whose variants must all compile without spills, and at which head widths; elsewhere the heaviest variant stands for all.
THOROUGH = {"half": ("bfloat16", "float16"), "ieee": ("float32",)}
WIDTHS = {64: (64,), 128: (128, 80)}
A_FEW_BYTES, MOST_REGISTERS = 64, 255

# queries, keys, warps, stages; the first that compiles without spills is the default where nothing was measured
CANDIDATES: dict[str, tuple[TileConfig, ...]] = {
    "half": tuple(
        TileConfig(*shape)
        for shape in (
            (64, 128, 8, 2), (64, 64, 4, 3), (64, 64, 4, 2), (64, 64, 8, 2), (64, 64, 4, 1), (32, 64, 4, 2), (32, 64, 8, 1),
            (32, 32, 4, 2), (32, 32, 4, 1), (32, 32, 8, 1), (16, 32, 4, 1), (16, 32, 8, 1), (16, 16, 4, 1),
        )
    ),
    "tf32": tuple(
        TileConfig(*shape)
        for shape in (
            (64, 64, 4, 2), (64, 64, 8, 2), (32, 64, 4, 2), (32, 32, 4, 2), (32, 32, 4, 1), (32, 32, 8, 1), (16, 32, 4, 1),
            (16, 32, 8, 1), (16, 16, 4, 1),
        )
    ),
    "ieee": tuple(
        TileConfig(*shape)
        for shape in ((32, 32, 4, 1), (32, 32, 8, 1), (16, 32, 4, 1), (16, 32, 8, 1), (16, 16, 4, 1), (16, 16, 8, 1))
    ),
}  # fmt: skip
FEW_CANDIDATES = tuple(
    TileConfig(16, *shape)
    for shape in ((128, 8, 2), (128, 4, 2), (64, 4, 2), (64, 4, 1), (32, 4, 1), (32, 8, 1), (16, 4, 1), (16, 8, 1))
)
# tokens, dimensions, warps, stages
TOKENWISE_CANDIDATES = tuple(
    TileConfig(*shape)
    for shape in ((32, 128, 4, 2), (16, 128, 4, 2), (16, 128, 4, 1), (16, 64, 4, 2), (16, 64, 8, 2), (16, 32, 4, 2))
)
# tokens, –, warps, stages
GRAM_CANDIDATES = tuple(
    TileConfig(*shape)
    for shape in (
        (128, 16, 4, 2), (64, 16, 4, 3), (64, 16, 4, 2), (64, 16, 8, 2), (32, 16, 4, 2), (32, 16, 4, 1), (32, 16, 8, 1),
        (16, 16, 4, 1), (16, 16, 8, 1),
    )
)  # fmt: skip
MEASURED_TOKENS = (197, 577, 1025, 4097)
MEASURED_HEAD_DIMS = (32, 64, 128)


# -- by compiling ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """One cell of the table to fill by compiling."""

    kernel: str
    architecture: str
    precision: str
    head_dim: int


def candidates(kernel: str, precision: str) -> tuple[TileConfig, ...]:
    """In order of preference."""
    if kernel in TOKENWISE:
        return TOKENWISE_CANDIDATES
    if kernel == GRAM:
        return GRAM_CANDIDATES
    return FEW_CANDIDATES if kernel.endswith(FEW) else CANDIDATES[precision]


def variants_to_check(task: Task, config: TileConfig) -> list[KernelVariant]:
    """The shipped variants of a kernel with this tile shape, those that keep most in registers first."""
    torch.backends.cuda.matmul.fp32_precision = "tf32" if task.precision == "tf32" else "ieee"
    thorough = task.precision in THOROUGH and task.head_dim in WIDTHS
    dtypes = THOROUGH[task.precision] if thorough else (dtype_name(PRECISIONS[task.precision]),)
    with recorded_launches(task.architecture) as recorded, forced_config(config):
        for dtype in dtypes:
            for head_dim in WIDTHS[task.head_dim] if thorough else (task.head_dim,):
                inputs = shipped_variants.ShippedInputs(getattr(torch, dtype), head_dim, num_tokens=197)
                inputs.every_launch(1 if task.kernel.endswith(FEW) else 197)
                inputs.relevance_launches()
    wanted = f"{task.kernel.removesuffix(FEW)}_kernel"
    mine = [variant for variant in dict.fromkeys(recorded) if variant.kernel == wanted]
    mine.sort(key=lambda variant: (dict(variant.constants).get("PHI") == "p_relu_g", len(variant.types)), reverse=True)
    return mine if thorough else mine[:1]


def compiled_row(task: Task) -> TableRow:
    """The first candidate without spills within the architecture's shared memory; failing that, the one that spills least."""
    best: tuple[int, TileConfig] | None = None
    for config in candidates(task.kernel, task.precision):
        spilled = _spilled_bytes(task, config)
        if spilled and spilled <= A_FEW_BYTES:  # the assembler's choice, not a need: forbid it
            config = replace(config, max_registers=MOST_REGISTERS)
            spilled = _spilled_bytes(task, config)
        if spilled == 0:
            return table_row(task, ANY, config, "compiles without spills")
        if spilled is not None and (best is None or spilled < best[0]):
            best = spilled, config
    if best is None:
        raise SystemExit(f"{task}: no candidate compiles within the shared memory")
    return table_row(task, ANY, best[1], f"spills {best[0]} bytes, the least of the candidates")


def _spilled_bytes(task: Task, config: TileConfig) -> int | None:
    """Bytes that the first variant to spill spills; None where one does not fit the architecture at all."""
    for variant in variants_to_check(task, config):
        found = resources_of(compile_variant(variant, task.architecture), task.architecture)
        wanted = expected_products(variant.kernel, variant.types, variant.constants, task.architecture)
        lost = wanted and not any(name in found.instructions for name in wanted)
        if lost or not found.fits:  # a kernel without its products does nothing: the compiler could not make it
            return None
        if found.spilled_bytes:
            return found.spilled_bytes
    return 0


def table_row(task: Task, tokens: str, config: TileConfig, basis: str) -> TableRow:
    """A row of the launch table."""
    return TableRow(
        task.kernel, task.architecture, task.precision, str(task.head_dim), tokens, *map(str, astuple(config)), basis
    )  # fmt: skip


def compile_table(wanted: list[str], architectures: list[str], jobs: int) -> list[TableRow]:
    """Rows for every architecture."""
    tasks = [
        Task(kernel, architecture, precision, head_dim)
        for precision in PRECISIONS for head_dim in HEAD_DIMS for kernel in wanted for architecture in architectures
        if kernel != "token_transformation" or head_dim == ANY_WIDTH
    ]  # fmt: skip
    rows = []
    with get_context("spawn").Pool(jobs) as pool:
        for row in pool.imap_unordered(compiled_row, tasks):
            print(row, flush=True)
            rows.append(row)
    narrow = [
        replace(row, head_dim=width, basis=f"as for a width of {row.head_dim}")
        for row in rows
        for width in NARROWER.get(row.head_dim, ())
    ]
    return rows + narrow


def rows_for_any(rows: list[TableRow], wanted: list[str]) -> list[TableRow]:
    """For devices without rows of their own: the smallest tile among the architectures."""
    cells: dict[tuple[str, str, str], list[TableRow]] = {}
    for row in rows:
        if row.architecture in ARCHITECTURES and row.kernel in wanted:
            cells.setdefault((row.kernel, row.precision, row.head_dim), []).append(row)
    smallest = (
        min(cell, key=lambda row: (row.config.block_m * row.config.block_n, -row.config.num_warps)) for cell in cells.values()
    )
    return [replace(row, architecture=ANY, tokens=ANY, basis="the smallest tile among the architectures") for row in smallest]


# -- by measuring ---------------------------------------------------------------------------------------------------------


def calls(layer: Layer) -> dict[str, Callable[[], object]]:
    """A call of each kernel in the form that costs most."""
    inputs = layer.query, layer.key, layer.logsumexp
    weighed = {"phi": "p_relu_g", "scale": layer.scale, "value": layer.value, "grad_out": layer.grad_out}
    weighed["token_weights"] = layer.token_weights
    first = layer.query[:, :, :1], layer.key, layer.logsumexp[:, :, :1]
    weighed_first = {**weighed, "grad_out": layer.grad_out[:, :, :1]}
    contribution = torch.rand(layer.size.batch, layer.size.tokens, layer.size.tokens, device=layer.device)
    return {
        "single_row": lambda: kernels.row_propagation(*inputs, layer.row, **weighed),
        "single_row_few": lambda: kernels.row_propagation(*first, layer.row[:, :, :1], **weighed_first),
        "many_rows": lambda: kernels.row_propagation(*inputs, layer.rows, **weighed),
        "many_rows_few": lambda: kernels.row_propagation(*first, layer.rows[:, :, :1], **weighed_first),
        "attention_backward": lambda: one_pass(layer),
        "attention_relevance": lambda: relevance(layer),
        "contribution_map": lambda: kernels.contribution_map(*inputs, contribution, residual=1.0, **weighed),
        GRAM: lambda: kernels.head_norms(layer.value, layer.grad_out, norm="l2"),
        "token_transformation": lambda: kernels.add_token_transformation(layer.tokens, layer.branch, layer.moved),
        "attention_token_transformation": lambda: kernels.attention_token_transformation(
            layer.tokens, layer.value, layer.output_weight
        ),
    }


def measured_table(wanted: list[str], device: torch.device, seconds: float) -> Iterator[TableRow]:
    """Rows of this architecture: the fastest candidate at each measured length, which serves up to midway to the next."""
    where = environment(device)
    for precision, dtype in PRECISIONS.items():
        torch.backends.cuda.matmul.fp32_precision = "tf32" if precision == "tf32" else "ieee"
        for head_dim in MEASURED_HEAD_DIMS:
            for tokens, bound in zip(MEASURED_TOKENS, _bounds(), strict=True):
                batch = max(1, 16384 // tokens if precision == "half" else 4096 // tokens)
                layer = Layer(LayerSize(batch, 12, tokens, head_dim), dtype, device)
                for kernel, call in calls(layer).items():
                    if kernel not in wanted or (kernel == "token_transformation" and head_dim != ANY_WIDTH):
                        continue
                    timed = {config: _time(call, config, device, seconds) for config in candidates(kernel, precision)}
                    times = {config: time for config, time in timed.items() if time is not None}
                    fastest = min(times, key=times.__getitem__)
                    basis = f"measured {times[fastest]:.4g} ms at {tokens} tokens, {where['device']}, {where['versions']}"
                    row = table_row(Task(kernel, architecture_of(device), precision, head_dim), bound, fastest, basis)
                    print(row, flush=True)
                    yield row


def _bounds() -> tuple[str, ...]:
    """Up to which number of tokens each measured length serves: the geometric mean with the next."""
    means = (round((first * second) ** 0.5) for first, second in pairwise(MEASURED_TOKENS))
    return (*map(str, means), ANY)


def _time(call: Callable[[], object], config: TileConfig, device: torch.device, seconds: float) -> float | None:
    """Median milliseconds; None where the device refuses the shape (shared memory)."""
    from triton.runtime.errors import OutOfResources

    try:
        with forced_config(config):
            samples = samples_ms(call, device, seconds)
    except OutOfResources:
        return None
    return statistics.median(samples)


def measured_decisions(device: torch.device, seconds: float) -> Iterator[choose.Decision]:
    """One pass against two at the benchmark's sizes."""
    where = environment(device)
    sizes, dtypes = (GPU_SIZES, (torch.bfloat16, torch.float16, torch.float32))
    if device.type == "cpu":
        sizes, dtypes = CPU_SIZES, (torch.float32, torch.bfloat16)
    for dtype in dtypes:
        for size in sizes:
            layer = Layer(size, dtype, device)
            timed = [partial(way, layer) for way in (one_pass, backward_pass, row_pass)]
            medians = [statistics.median(samples) for samples in interleaved_ms(timed, device, seconds)]
            decision = choose.Decision(
                architecture=choose.decision_architecture(device), dtype=dtype_name(dtype),
                head_dim=str(padded_head_dim(size.head_dim)), tokens=str(size.tokens), batch_heads=str(size.batch * size.heads),
                **dict(zip(("one_pass_ms", "backward_ms", "row_ms"), (f"{median:.4g}" for median in medians), strict=True)),
                device=str(where["device"]), versions=str(where["versions"]),
            )  # fmt: skip
            print(decision, decision.faster, flush=True)
            yield decision


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile-only", action="store_true", help="no GPU: choose by compiling for --architectures")
    parser.add_argument("--kernels", nargs="+", default=list(KERNELS), choices=KERNELS, help="whose rows are made")
    parser.add_argument("--architectures", nargs="+", default=list(ARCHITECTURES), metavar="SM")
    parser.add_argument("--decisions", action="store_true", help="measure one backward pass against two")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--seconds", type=float, default=0.1, help="of sampling for each candidate")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile")
    options = parser.parse_args()
    device = torch.device(options.device)
    if options.decisions:
        made = list(measured_decisions(device, options.seconds))
        others = [row for row in choose.read_decisions() if row.architecture != made[0].architecture]
        write_table_rows(choose.TABLE, [asdict(row) for row in (*others, *made)])
        print(choose.TABLE)
        return
    if options.compile_only:
        rows = compile_table(options.kernels, options.architectures, options.jobs)
    elif device.type == "cuda":
        rows = list(measured_table(options.kernels, device, options.seconds))
    else:
        raise SystemExit("expected a CUDA device to measure on, found none (--compile-only fills the table without one)")
    replaced = {(row.kernel, row.architecture) for row in rows}
    rows += [row for row in read_table() if (row.kernel, row.architecture) not in replaced]
    if options.compile_only:
        rows = [row for row in rows if row.kernel not in options.kernels or row.architecture != ANY]
        rows += rows_for_any(rows, options.kernels)
    write_table(rows)
    print(TABLE)


if __name__ == "__main__":
    main()
