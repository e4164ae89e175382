"""Every operation of ``vitexplain.kernels`` on a layer: who does it how, what it costs by count, what is right.

FLOPs count matrix products alone; bytes count every input read once and every output written once. Both are of the work that is
asked for, whoever does it: a provider that computes something twice, or writes maps down, has the lower rate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vitexplain import kernels
from vitexplain.fused_attention import attention_forward

from . import layer_formulas as formulas
from .layer import NUM_ROWS, Layer, backward_pass, one_pass, relevance, row_pass
from .registry import COLREDUCE, DENSE, TORCH, TRITON, Unavailable

COMPUTE, BANDWIDTH = "compute", "bandwidth"
EITHER = "either"  # whichever the roof at this intensity is
LIBRARY = "torch"  # its own fused attention, what everything is held against
FORWARD, BACKWARD = "torch fused attention forward", "torch fused attention backward"
NAIVE_COLREDUCE = f"{COLREDUCE} (naive)"
BACKWARD_AND_ROW = "attention backward with the row"
TWO_PASSES = "two passes"  # torch's fused backward, then row_propagation; ours is one
LARGEST_MAP = 4097  # C is n × n in float32

Call = Callable[[Layer], object]
Exact = Callable[[Layer], "Tensor | tuple[Tensor, ...]"]


@dataclass(frozen=True)
class Operation:
    """One piece of work on a layer.

    Attributes:
        work: in the table.
        ours: how this library does it, given a layer and a backend.
        flops, moved_bytes: of a layer.
        bound: which peak it is held against: ``"compute"``, ``"bandwidth"``, or ``"either"``, the one that its FLOPs a byte
            decide.
        against: the line of torch's own attention whose rate it is compared with; empty where that says nothing.
        exact: what is right, for a layer in float64, and what rounding does to it, for one in another type; None where nothing
            is compared.
        rivals: by provider, on any device; ``on_cpu`` and ``on_gpu`` on those alone.
        both: on a GPU, tiled torch is measured beside Triton.
        positive: it is checked on positive queries and keys.
        most_tokens: more are not measured.
        single_roundings: float32 epsilons that its error may have beside what every operation may.
    """

    work: str
    ours: Callable[[Layer, str], object]
    flops: Callable[[Layer], float]
    moved_bytes: Callable[[Layer], float]
    bound: str = COMPUTE
    against: str = FORWARD
    exact: Exact | None = None
    rivals: dict[str, Call] = field(default_factory=dict)
    on_cpu: dict[str, Call] = field(default_factory=dict)
    on_gpu: dict[str, Call] = field(default_factory=dict)
    both: bool = False
    positive: bool = False
    most_tokens: int | None = None
    single_roundings: int = 0

    def others(self, device_type: str) -> dict[str, Call]:
        """The rivals on a device."""
        return self.rivals | (self.on_gpu if device_type == "cuda" else self.on_cpu)


# -- counts --------------------------------------------------------------------------------------------------------------


def pairs(count: float) -> Callable[[Layer], float]:
    """FLOPs of that many products of all queries with all keys."""
    return lambda layer: count * layer.pair_flops


def moved(heads: float, by_head: float = 0.0, rows: float = 0.0) -> Callable[[Layer], float]:
    """Bytes of so many (B, H, n, dh) tensors, (B, H, n) float32 and (B, n) float32."""

    def count(layer: Layer) -> float:
        row_bytes = 4.0 * layer.size.batch * layer.size.tokens
        return heads * layer.head_bytes + (by_head * layer.size.heads + rows) * row_bytes

    return count


def _rows_flops(layer: Layer) -> float:
    return 2 * layer.pair_flops + 2.0 * NUM_ROWS * layer.size.batch * layer.size.tokens**2


def _map_flops(layer: Layer) -> float:
    return 2 * layer.pair_flops + 2.0 * layer.size.batch * layer.size.tokens**3


def _map_bytes(layer: Layer) -> float:
    return moved(4, 2, 2 * layer.size.tokens)(layer)


def _l2_flops(layer: Layer) -> float:
    return 2 * layer.pair_flops * layer.size.head_dim / layer.size.tokens


def _projected_flops(layer: Layer) -> float:
    size = layer.size
    width = size.heads * size.head_dim
    return 2.0 * size.batch * size.tokens * width * (width + size.head_dim)


def _projected_bytes(layer: Layer) -> float:
    """Tokens, values, the weight, a figure a head and token; the projected values are nobody's input or output."""
    return moved(2, 1)(layer) + layer.output_weight.numel() * layer.output_weight.element_size()


def _nothing(layer: Layer) -> float:  # noqa: ARG001
    return 0.0


# -- calls ---------------------------------------------------------------------------------------------------------------


def _inputs(layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
    return layer.query, layer.key, layer.logsumexp


def _gradient(layer: Layer) -> dict[str, Any]:
    return {"value": layer.value, "grad_out": layer.grad_out}


def _weighed(layer: Layer, backend: str = "auto") -> dict[str, Any]:
    """φ = P·relu(G) with token weights."""
    weights = {"token_weights": layer.token_weights, "backend": backend}
    return {"phi": "p_relu_g", "scale": layer.scale, **_gradient(layer), **weights}


def _propagated(layer: Layer, rows: Tensor, backend: str) -> Tensor:
    return kernels.row_propagation(*_inputs(layer), rows, phi="p", scale=layer.scale, backend=backend)


def _column_means_alone(layer: Layer, backend: str) -> Tensor:
    """Nobody has left logsumexp: a forward is made for it."""
    _, state = attention_forward(layer.query, layer.key, layer.value, layer.scale)
    inputs = layer.query, layer.key, state.logsumexp, layer.even_row
    return kernels.row_propagation(*inputs, phi="p", scale=layer.scale, backend=backend)[:, 0]


def _first_row(layer: Layer, backend: str) -> Tensor:
    first = {**_weighed(layer, backend), "grad_out": layer.grad_out[:, :, :1]}
    return kernels.row_propagation(
        layer.query[:, :, :1], layer.key, layer.logsumexp[:, :, :1], layer.row[:, :, :1], **first
    )  # fmt: skip


def _by_head(layer: Layer, backend: str) -> tuple[Tensor, Tensor]:
    return kernels.row_propagation_by_head(
        *_inputs(layer), layer.row[:, 0], norms=True, phi="p", scale=layer.scale, **_gradient(layer), backend=backend
    )  # fmt: skip


def _one_pass(layer: Layer, backend: str) -> tuple[Tensor, ...]:
    """The row's mean over heads, as a running row is."""
    *gradients, rows = one_pass(layer, backend)
    return *gradients, rows.mean(1, keepdim=True)


def _two_passes(layer: Layer) -> tuple[Tensor, ...]:
    return *backward_pass(layer), row_pass(layer)


def _relevance_rows(layer: Layer, backend: str) -> Tensor:
    return kernels.relevance_rows(
        layer.query, layer.key, layer.value, layer.ratio, layer.logsumexp, layer.row[:, 0], grad_out=layer.grad_out,
        scale=layer.scale, backend=backend,
    )  # fmt: skip


def _colreduce(name: str) -> Call:
    """The nearest prior art: (B, H, n), then the mean over heads."""

    def call(layer: Layer) -> Tensor:
        try:
            import flash_colreduce
        except ImportError as error:
            raise Unavailable(f"{COLREDUCE} is not installed") from error
        if layer.device.type == "cuda" and layer.dtype == torch.float32 and name == "flash_colreduce":
            raise Unavailable(f"{COLREDUCE} multiplies float32 in TF32")  # Triton's default, which its API does not change
        return getattr(flash_colreduce, name)(layer.query, layer.key, "mean", scale=layer.scale).mean(1)

    return call


COLUMN_MEANS = "column means, rollout's first step"
COLUMN_MEANS_ALONE = f"{COLUMN_MEANS}, logsumexp made as well"

OPERATIONS: tuple[Operation, ...] = (
    Operation(
        "row_propagation, φ = P (rollout)", lambda layer, backend: _propagated(layer, layer.row, backend),
        pairs(1), moved(2, 1, 2), exact=formulas.rollout_row, rivals={DENSE: formulas.rollout_row}, both=True,
    ),
    Operation(  # logsumexp is what the model's own forward left
        COLUMN_MEANS, lambda layer, backend: _propagated(layer, layer.even_row, backend)[:, 0],
        pairs(1), moved(2, 1, 1), exact=formulas.column_means, rivals={DENSE: formulas.column_means}, both=True,
    ),
    Operation(  # flash-colreduce takes no logsumexp, so it stands here alone
        COLUMN_MEANS_ALONE, _column_means_alone,
        pairs(2), moved(2, 0, 1), exact=formulas.column_means, rivals={DENSE: formulas.column_means},
        on_cpu={NAIVE_COLREDUCE: _colreduce("naive_colreduce")}, on_gpu={COLREDUCE: _colreduce("flash_colreduce")},
    ),
    Operation(
        "row_propagation, φ = P·relu(G), token weights (tokentm)",
        lambda layer, backend: kernels.row_propagation(*_inputs(layer), layer.row, **_weighed(layer, backend)),
        pairs(2), moved(4, 2, 2), exact=formulas.weighed_row, rivals={DENSE: formulas.weighed_row}, both=True,
    ),
    Operation(
        f"row_propagation, φ = P·relu(G), {NUM_ROWS} rows",
        lambda layer, backend: kernels.row_propagation(*_inputs(layer), layer.rows, **_weighed(layer, backend)),
        _rows_flops, moved(4, 2, 2 * NUM_ROWS), exact=formulas.weighed_rows, rivals={DENSE: formulas.weighed_rows}, both=True,
    ),
    Operation(
        "row_propagation, class-token row alone (last block)", _first_row,
        lambda layer: 2 * layer.pair_flops / layer.size.tokens, moved(2, 1, 1), BANDWIDTH, "", exact=formulas.first_row,
        both=True, single_roundings=12,  # of one query's exp(s - logsumexp), of magnitude 8, which no other query averages out
    ),
    Operation(
        "row_propagation_by_head with L1 norms (gmar)", _by_head, pairs(2), moved(4, 2, 1), exact=formulas.rows_by_head,
        rivals={DENSE: formulas.rows_by_head}, both=True,
    ),
    Operation(
        "head_norms, L1", lambda layer, backend: kernels.head_norms(layer.value, layer.grad_out, backend=backend),
        pairs(1), moved(2), exact=formulas.l1_norms, rivals={DENSE: formulas.l1_norms}, both=True,
    ),
    Operation(
        "head_norms, L2", lambda layer, backend: kernels.head_norms(layer.value, layer.grad_out, norm="l2", backend=backend),
        _l2_flops, moved(2), BANDWIDTH, "", exact=formulas.l2_norms, both=True,
    ),
    Operation(
        "token_transformation",
        lambda layer, backend: kernels.token_transformation(layer.tokens, layer.moved, backend=backend),
        _nothing, moved(2, 0, 1), BANDWIDTH, "", exact=formulas.token_weights, both=True,
    ),
    Operation(
        "add_token_transformation",
        lambda layer, backend: kernels.add_token_transformation(layer.tokens, layer.branch, layer.moved, backend=backend),
        _nothing, moved(4, 0, 1), BANDWIDTH, "", exact=formulas.added_token_weights, both=True,
    ),
    Operation(
        "attention_token_transformation (with its projection)",
        lambda layer, backend: kernels.attention_token_transformation(
            layer.tokens, layer.value, layer.output_weight, backend=backend
        ),
        _projected_flops, _projected_bytes, EITHER, "", exact=formulas.attention_token_weights, both=True,
    ),
    Operation(
        BACKWARD_AND_ROW, _one_pass, pairs(5), moved(8, 1, 2), against=BACKWARD, exact=formulas.gradients_and_row,
        on_cpu={f"{TORCH}, {TWO_PASSES}": _two_passes}, on_gpu={f"{TRITON}, {TWO_PASSES}": _two_passes}, both=True,
    ),
    Operation(
        "relevance_backward with the row", lambda layer, backend: relevance(layer), pairs(6), moved(8, 2, 1),  # noqa: ARG005
        against=BACKWARD, exact=formulas.relevance_and_rows, positive=True,
    ),
    Operation(
        "relevance_rows", _relevance_rows, pairs(3), moved(5, 2, 1), exact=formulas.relevance_rows, positive=True,
    ),
    Operation(
        "contribution_map, φ = P·relu(G), token weights",
        lambda layer, backend: kernels.contribution_map(
            *_inputs(layer), layer.contribution, residual=1.0, **_weighed(layer, backend)
        ),
        _map_flops, _map_bytes, exact=formulas.contribution, rivals={DENSE: formulas.contribution}, most_tokens=LARGEST_MAP,
    ),
)  # fmt: skip
BY_WORK = {operation.work: operation for operation in OPERATIONS}

# torch's own: call, FLOPs and bytes
LIBRARY_CALLS: dict[str, tuple[Call, Callable[[Layer], float], Callable[[Layer], float]]] = {
    FORWARD: (
        lambda layer: attention_forward(layer.query, layer.key, layer.value, layer.scale), pairs(2), moved(4, 1)
    ),
    BACKWARD: (backward_pass, pairs(5), moved(8, 1)),
}  # fmt: skip


def tensors_of(result: object) -> tuple[Tensor, ...]:
    """What an operation returned, as a tuple."""
    return (result,) if isinstance(result, torch.Tensor) else tuple(result)
