"""Every operation of ``vitexplain.kernels``: time, FLOPs and bytes, and what fraction of the measured peak that is.

    python -m bench.operations                                 # on this machine's CPU, float32
    python -m bench.operations --device cuda                   # on a GPU, bfloat16
    python -m bench.operations --not-measured nvidia-h200      # the same lines, each marked "not measured"

The peaks are measured in the same run (a large product, a large copy), and so are torch's own fused attention, forward and
backward. Before an operation is timed, its result on a small case is held against float64; outside the error budget nothing is
timed. FLOPs count matrix products alone; bytes count every input read once and every output written once.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from vitexplain import kernels
from vitexplain.fused_attention import attention_backward as library_backward
from vitexplain.fused_attention import attention_forward

from .record import RESULTS, Row, environment, spread, write_rows
from .timing import samples_ms

NOT_MEASURED = "not measured"
NUM_ROWS = 8
COMPUTE, BANDWIDTH = "compute", "bandwidth"
FORWARD, BACKWARD = "torch fused attention forward", "torch fused attention backward"


@dataclass(frozen=True)
class Size:
    """One layer: images, heads, tokens, head width."""

    batch: int
    heads: int
    tokens: int
    head_dim: int

    @property
    def name(self) -> str:
        """For the table's model column."""
        return f"{self.heads} heads of {self.head_dim}"


GPU_SIZES = (
    Size(64, 12, 197, 64), Size(32, 16, 577, 64), Size(16, 16, 1025, 64), Size(8, 16, 1370, 64), Size(16, 16, 257, 80),
    Size(4, 16, 4097, 64), Size(1, 16, 16385, 64),
)  # fmt: skip
CPU_SIZES = (Size(8, 6, 197, 64), Size(2, 6, 577, 64), Size(1, 6, 1025, 64))
LARGEST_MAP = 4097  # C is n × n in float32


class Layer:
    """Random inputs of one layer on a device, and what torch's own attention leaves."""

    def __init__(self, size: Size, dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)
        self.size, self.dtype, self.device = size, dtype, device
        batch, heads, n, dh = size.batch, size.heads, size.tokens, size.head_dim

        def normal(*shape: int, kind: torch.dtype = dtype) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device).to(kind)

        self.query, self.key, self.value = normal(batch, n, 3, heads, dh).permute(2, 0, 3, 1, 4).unbind(0)
        self.grad_out, self.ratio = (normal(batch, n, heads, dh).transpose(1, 2) for _ in range(2))
        self.scale = dh**-0.5
        self.out, self.state = attention_forward(self.query, self.key, self.value, self.scale)
        self.logsumexp = self.state.logsumexp
        self.row, self.rows = (normal(batch, k, n, kind=torch.float32).abs() for k in (1, NUM_ROWS))
        self.head_weights = normal(batch, heads, kind=torch.float32)
        self.token_weights = normal(batch, heads, n, kind=torch.float32).abs()
        self.tokens, self.branch, self.moved = (normal(batch, n, heads * dh) for _ in range(3))
        self.output_weight = normal(heads * dh, heads * dh) * 0.05

    @property
    def pair_flops(self) -> float:
        """Of one product of all queries with all keys."""
        size = self.size
        return 2.0 * size.batch * size.heads * size.tokens**2 * size.head_dim

    @property
    def head_bytes(self) -> float:
        """Of one (B, H, n, dh) tensor."""
        return float(self.query.numel() * self.query.element_size())


@dataclass(frozen=True)
class Case:
    """One operation on one layer.

    Attributes:
        name: in the table.
        call: what is timed; None for a rival that is not installed or cannot run here.
        flops, moved_bytes: counted, not measured.
        bound: which peak it is held against, ``"compute"`` or ``"bandwidth"``.
        reference: the line of torch's own attention it is compared with; empty where that says nothing.
    """

    name: str
    call: Callable[[], object] | None
    flops: float
    moved_bytes: float
    bound: str
    reference: str = ""


def cases(layer: Layer) -> Iterator[Case]:
    """Every operation, beside torch's own attention and, where installed, flash-colreduce."""
    head, pair, size = layer.head_bytes, layer.pair_flops, layer.size
    row_bytes = 4.0 * size.batch * size.tokens
    by_head_bytes = row_bytes * size.heads
    q, k, v, lse, scale = layer.query, layer.key, layer.value, layer.logsumexp, layer.scale
    gradient = {"value": v, "grad_out": layer.grad_out}
    layer_map = {"phi": "p", "scale": scale}
    weighed = {"phi": "p_relu_g", "scale": scale, **gradient, "token_weights": layer.token_weights}
    yield Case(FORWARD, lambda: attention_forward(q, k, v, scale), 2 * pair, 4 * head + by_head_bytes, COMPUTE)
    yield Case(
        BACKWARD,
        lambda: library_backward(layer.grad_out, q, k, v, layer.out, layer.state, scale),
        5 * pair, 8 * head + by_head_bytes, COMPUTE,
    )  # fmt: skip
    yield Case(
        "row_propagation, φ = P (rollout)", lambda: kernels.row_propagation(q, k, lse, layer.row, **layer_map),
        pair, 2 * head + by_head_bytes + 2 * row_bytes, COMPUTE, FORWARD,
    )  # fmt: skip
    colreduce = _flash_colreduce()
    yield Case(
        "flash-colreduce, column means (rollout's first step; makes its own logsumexp)",
        None if colreduce is None else lambda: colreduce(q, k, "mean", scale=scale).mean(1),
        2 * pair, 2 * head + row_bytes, COMPUTE, FORWARD,
    )  # fmt: skip
    yield Case(
        "row_propagation, φ = P·relu(G), token weights (tokentm)",
        lambda: kernels.row_propagation(q, k, lse, layer.row, **weighed),
        2 * pair, 4 * head + 2 * by_head_bytes + 2 * row_bytes, COMPUTE, FORWARD,
    )  # fmt: skip
    yield Case(
        f"row_propagation, φ = P·relu(G), {NUM_ROWS} rows",
        lambda: kernels.row_propagation(q, k, lse, layer.rows, **weighed),
        2 * pair + 2.0 * NUM_ROWS * size.batch * size.tokens**2, 4 * head + 2 * by_head_bytes + 2 * NUM_ROWS * row_bytes,
        COMPUTE, FORWARD,
    )  # fmt: skip
    one = {**weighed, "grad_out": layer.grad_out[:, :, :1]}
    yield Case(
        "row_propagation, class-token row alone (last block)",
        lambda: kernels.row_propagation(q[:, :, :1], k, lse[:, :, :1], layer.row[:, :, :1], **one),
        2 * pair / size.tokens, 2 * head + by_head_bytes + row_bytes, BANDWIDTH,
    )  # fmt: skip
    yield Case(
        "row_propagation_by_head with L1 norms (gmar)",
        lambda: kernels.row_propagation_by_head(q, k, lse, layer.row[:, 0], norms=True, **layer_map, **gradient),
        2 * pair, 4 * head + 2 * by_head_bytes + row_bytes, COMPUTE, FORWARD,
    )  # fmt: skip
    yield Case("head_norms, L1", lambda: kernels.head_norms(v, layer.grad_out), pair, 2 * head, COMPUTE, FORWARD)
    yield Case(
        "head_norms, L2", lambda: kernels.head_norms(v, layer.grad_out, norm="l2"),
        2 * pair * size.head_dim / size.tokens, 2 * head, BANDWIDTH,
    )  # fmt: skip
    yield Case(
        "token_transformation", lambda: kernels.token_transformation(layer.tokens, layer.moved), 0.0, 2 * head + row_bytes,
        BANDWIDTH,
    )  # fmt: skip
    yield Case(
        "add_token_transformation", lambda: kernels.add_token_transformation(layer.tokens, layer.branch, layer.moved),
        0.0, 4 * head + row_bytes, BANDWIDTH,
    )  # fmt: skip
    width = size.heads * size.head_dim
    yield Case(
        "attention_token_transformation (with its projection)",
        lambda: kernels.attention_token_transformation(layer.tokens, v, layer.output_weight),
        2.0 * size.batch * size.tokens * width * (width + size.head_dim), 4 * head + by_head_bytes, BANDWIDTH,
    )  # fmt: skip

    def one_pass() -> object:
        return kernels.attention_backward(
            q, k, v, layer.out, layer.grad_out, lse, layer.row[:, 0], phi="p_relu_g", scale=scale
        )  # fmt: skip

    def two_passes() -> object:
        library_backward(layer.grad_out, q, k, v, layer.out, layer.state, scale)
        return kernels.row_propagation(q, k, lse, layer.row, phi="p_relu_g", scale=scale, **gradient)

    yield Case("attention_backward with the row, one pass", one_pass, 5 * pair, 8 * head + 2 * by_head_bytes, COMPUTE, BACKWARD)
    yield Case(
        "torch fused attention backward, then row_propagation", two_passes, 7 * pair, 12 * head + 2 * by_head_bytes, COMPUTE,
        BACKWARD,
    )  # fmt: skip
    relevance = q, k, v, layer.ratio, lse
    row = {"grad_out": layer.grad_out, "scale": scale}
    yield Case(
        "relevance_backward with the row",
        lambda: kernels.relevance_backward(*relevance, rows=layer.row[:, 0], **row),
        6 * pair, 8 * head + 2 * by_head_bytes + row_bytes, COMPUTE, BACKWARD,
    )  # fmt: skip
    yield Case(
        "relevance_rows", lambda: kernels.relevance_rows(*relevance, layer.row[:, 0], **row),
        3 * pair, 5 * head + 2 * by_head_bytes + row_bytes, COMPUTE, FORWARD,
    )  # fmt: skip
    if size.tokens <= LARGEST_MAP:
        contribution = torch.eye(size.tokens, device=layer.device).expand(size.batch, -1, -1).contiguous()
        yield Case(
            "contribution_map, φ = P·relu(G), token weights",
            lambda: kernels.contribution_map(q, k, lse, contribution, **weighed),
            2 * pair + 2.0 * size.batch * size.tokens**3, 4 * head + 2 * by_head_bytes + 2 * row_bytes * size.tokens,
            COMPUTE, FORWARD,
        )  # fmt: skip


def _flash_colreduce() -> Callable[..., Tensor] | None:
    """Nearest prior art, where it is installed and can run."""
    if importlib.util.find_spec("flash_colreduce") is None or not torch.cuda.is_available():
        return None
    from flash_colreduce import flash_colreduce

    return flash_colreduce


def gate(dtype: torch.dtype, device: torch.device) -> None:
    """Every operation of this module's cases once on a small layer against the float64 tiles of torch; raises where it is wrong.

    The limit is 32 machine epsilons of the input type in root mean square; the tests hold each operation to its error budget.
    """
    layer = Layer(Size(2, 2, 130, 64), dtype, device)
    wide = {
        name: getattr(layer, name).double() for name in ("query", "key", "value", "grad_out", "out", "tokens", "branch", "moved")
    }
    for name, ours, exact in _pairs(layer, wide):
        error = float((ours.double() - exact).norm() / exact.norm())
        limit = 32 * torch.finfo(dtype).eps
        if not error <= limit:
            raise SystemExit(f"{name}: relative error {error:.2e} exceeds {limit:.1e}: nothing is timed")


def _pairs(layer: Layer, wide: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Results on a small layer, ours and in float64 by the dense formula."""
    scale = layer.scale
    attention = (wide["query"] @ wide["key"].transpose(-1, -2) * scale).softmax(-1)
    gradient = wide["grad_out"] @ wide["value"].transpose(-1, -2)
    update = (attention * gradient.relu() * layer.token_weights.double().unsqueeze(2)).mean(1)
    keywords = {"phi": "p_relu_g", "scale": scale, "value": layer.value, "grad_out": layer.grad_out}
    weighed = {**keywords, "token_weights": layer.token_weights}
    inputs = layer.query, layer.key, layer.logsumexp
    for name, rows in (("one row", layer.row), ("many rows", layer.rows)):
        yield f"row_propagation, {name}", kernels.row_propagation(*inputs, rows, **weighed), rows.double() @ update
    contribution = torch.rand(2, 130, 130, device=layer.device)
    exact_map = contribution.double() + update @ contribution.double()
    yield "contribution_map", kernels.contribution_map(*inputs, contribution, **weighed), exact_map
    for norm, exact in (("l1", gradient.abs().sum((-1, -2))), ("l2", gradient.square().sum((-1, -2)).sqrt())):
        yield f"head_norms, {norm}", kernels.head_norms(layer.value, layer.grad_out, norm=norm), exact
    results = kernels.attention_backward(
        layer.query,
        layer.key,
        layer.value,
        layer.out,
        layer.grad_out,
        layer.logsumexp,
        layer.row[:, 0],
        phi="p_relu_g",
        scale=scale,
    )
    leaves = [wide[name].detach().requires_grad_() for name in ("query", "key", "value")]
    out = (leaves[0] @ leaves[1].transpose(-1, -2) * scale).softmax(-1) @ leaves[2]
    for name, ours, exact in zip(
        ("dq", "dk", "dv"), results[:3], torch.autograd.grad(out, leaves, wide["grad_out"]), strict=True
    ):
        yield f"attention_backward, {name}", ours, exact
    moved = torch.einsum("bi,bhij->bhj", layer.row[:, 0].double(), attention * gradient.relu())
    yield "attention_backward, row", results[3], moved
    yield from _relevance_pairs(layer, wide)
    cosine = F.cosine_similarity(wide["tokens"], wide["moved"], dim=-1)
    ratio = wide["moved"].norm(dim=-1) / wide["tokens"].norm(dim=-1)
    yield "token_transformation", kernels.token_transformation(layer.tokens, layer.moved), ratio * cosine.softmax(-1)


def _relevance_pairs(layer: Layer, wide: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The same of relevance. Queries and keys are made positive: it divides by their products, and near 0 no type has digits."""
    query, key = layer.query.abs(), layer.key.abs()
    q, k = query.double(), key.double()
    products = q @ k.transpose(-1, -2)
    inputs = query, key, layer.value, layer.ratio, (products * layer.scale).logsumexp(-1).float()
    row = {"grad_out": layer.grad_out, "scale": layer.scale}
    attention, ratio = (products * layer.scale).softmax(-1), layer.ratio.double()
    relevance = 0.5 * attention * (ratio @ wide["value"].transpose(-1, -2))
    share = relevance / (products + 1e-9)
    gradient = wide["grad_out"] @ wide["value"].transpose(-1, -2)
    moved = torch.einsum("bi,bhij->bhj", layer.row[:, 0].double(), (gradient * relevance).relu())
    exact = (
        0.5 * q * (share @ k),
        0.5 * k * (share.transpose(-1, -2) @ q),
        0.5 * wide["value"] * (attention.transpose(-1, -2) @ ratio),
        moved,
    )
    results = kernels.relevance_backward(*inputs, rows=layer.row[:, 0], **row)
    for name, ours, expected in zip(("query", "key", "value", "row"), results, exact, strict=True):
        yield f"relevance_backward, {name}", ours, expected
    yield "relevance_rows", kernels.relevance_rows(*inputs, layer.row[:, 0], **row), moved


def peaks(device: torch.device, dtype: torch.dtype) -> dict[str, tuple[float, list[float]]]:
    """FLOP/s of a large product and bytes/s of a large copy, with the samples behind them."""
    side, copied = (8192, 1 << 30) if device.type == "cuda" else (2048, 1 << 27)
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    source = torch.empty(copied, dtype=torch.int8, device=device).fill_(1)
    target = torch.empty_like(source)
    products = samples_ms(lambda: left @ right, device)
    copies = samples_ms(lambda: target.copy_(source), device)
    return {COMPUTE: (2.0 * side**3, products), BANDWIDTH: (2.0 * copied, copies)}


def _median(samples: list[float]) -> float:
    return statistics.median(samples)


def measured_rows(sizes: tuple[Size, ...], dtype: torch.dtype, device: torch.device, seconds: float) -> list[Row]:
    """All rows of the table on this device."""
    gate(dtype, device)
    found = peaks(device, dtype)
    peak = {bound: 1e3 * work / _median(samples) for bound, (work, samples) in found.items()}
    common = {"dtype": str(dtype).removeprefix("torch."), **environment(device)}
    rows = []
    for bound, label, unit, scale in ((COMPUTE, "large product", "TFLOP/s", 1e9), (BANDWIDTH, "large copy", "TB/s", 1e9)):
        work, samples = found[bound]
        rates = [work / (sample * scale) for sample in samples]
        rows.append(
            Row(case="peak", provider=label, model="", batch=0, tokens=0, metric="rate", unit=unit, **spread(rates), **common)
        )
    for size in sizes:
        layer = Layer(size, dtype, device)
        where = {"model": size.name, "batch": size.batch, "tokens": size.tokens, **common}
        rates: dict[str, float] = {}
        for case in cases(layer):
            if case.call is None:
                rows += _unmeasured(case, **where)
                continue
            samples = samples_ms(case.call, device, seconds)
            seconds_each = 1e-3 * _median(samples)
            rates[case.name] = case.flops / seconds_each
            fraction = (case.flops if case.bound == COMPUTE else case.moved_bytes) / seconds_each / peak[case.bound]
            figures = {
                ("work", "GFLOP"): case.flops / 1e9,
                ("moved", "MB"): case.moved_bytes / 1e6,
                ("rate", "TFLOP/s"): case.flops / seconds_each / 1e12,
                ("traffic", "TB/s"): case.moved_bytes / seconds_each / 1e12,
                (f"fraction of peak {case.bound}", "1"): fraction,
            }
            if case.reference:
                figures[f"rate over {case.reference}", "1"] = rates[case.name] / rates[case.reference]
            rows.append(Row(case="operation", provider=case.name, metric="time", unit="ms", **spread(samples), **where))
            rows += [
                Row(case="operation", provider=case.name, metric=metric, unit=unit, **spread([value]), **where)
                for (metric, unit), value in figures.items()
            ]
        del layer
    return rows


BLANK = {"p20": "", "p50": NOT_MEASURED, "p80": "", "repeats": 0}


def _unmeasured(case: Case, **where: object) -> list[Row]:
    """The lines of a case that was not timed."""
    metrics = [("time", "ms"), (f"fraction of peak {case.bound}", "1")]
    if case.reference:
        metrics.append((f"rate over {case.reference}", "1"))
    return [Row(case="operation", provider=case.name, metric=metric, unit=unit, **BLANK, **where) for metric, unit in metrics]


def unmeasured_rows(sizes: tuple[Size, ...], dtype: torch.dtype, device_name: str) -> list[Row]:
    """The same lines for a device that is not at hand, each marked so."""
    common = {
        "dtype": str(dtype).removeprefix("torch."), "device": device_name, "threads": 0, "versions": NOT_MEASURED
    }  # fmt: skip
    rows = [
        Row(case="peak", provider=label, model="", batch=0, tokens=0, metric="rate", unit=unit, **BLANK, **common)
        for label, unit in (("large product", "TFLOP/s"), ("large copy", "TB/s"))
    ]
    tiny = Layer(Size(1, 1, 16, 16), torch.float32, torch.device("cpu"))
    for size in sizes:
        where = {"model": size.name, "batch": size.batch, "tokens": size.tokens, **common}
        for case in cases(tiny):
            rows += _unmeasured(case, **where)
    return rows


def results_path(device_name: str, dtype: torch.dtype) -> Path:
    """Where a device's table is kept."""
    return RESULTS / device_name / f"operations_{str(dtype).removeprefix('torch.')}.csv"


def folder_of(device: torch.device) -> str:
    """``cpu``, or the GPU's name as a folder's."""
    if device.type == "cpu":
        return "cpu"
    return torch.cuda.get_device_name(device).lower().replace(" ", "-")


def short_table(rows: list[Row]) -> str:
    """Time, rate and fractions, a line per operation and size."""
    lines = []
    for row in rows:
        if row.case == "peak":
            lines.append(f"peak: {row.provider} {row.p50} {row.unit}")
        elif row.metric == "time":
            beside = {other.metric: other.p50 for other in rows if _same_line(row, other)}
            rest = "  ".join(f"{name} {value}" for name, value in beside.items() if name.startswith(("rate", "fraction")))
            lines.append(f"n={row.tokens:<6d} B={row.batch:<3d} {row.provider:70s} {row.p50:>9s} ms  {rest}")
    return "\n".join(lines)


def _same_line(row: Row, other: Row) -> bool:
    key = ("provider", "model", "batch", "tokens")
    return other.case == "operation" and all(getattr(row, name) == getattr(other, name) for name in key)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default: float32 on a CPU, bfloat16 on a GPU"
    )
    parser.add_argument("--seconds", type=float, default=0.25, help="of sampling for each line")
    parser.add_argument("--not-measured", metavar="DEVICE", help="write this device's lines, each marked as not measured")
    options = parser.parse_args()
    on_gpu = options.device == "cuda" or options.not_measured
    dtype = getattr(torch, options.dtype or ("bfloat16" if on_gpu else "float32"))
    sizes = GPU_SIZES if on_gpu else CPU_SIZES
    if options.not_measured:
        name, rows = options.not_measured, unmeasured_rows(sizes, dtype, options.not_measured)
    else:
        device = torch.device(options.device)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise SystemExit("--device cuda: expected a CUDA device, found none (--not-measured DEVICE writes the empty table)")
        name, rows = folder_of(device), measured_rows(sizes, dtype, device, options.seconds)
    path = write_rows(results_path(name, dtype), rows)
    print(short_table(rows))
    print(path)


if __name__ == "__main__":
    main()
