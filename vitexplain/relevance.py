"""The relevance pass: methods walk over the blocks from the last to the first, beside a backward or without one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .kernels import row_propagation
from .kernels.dispatch import accumulation_dtype
from .models import Anatomy
from .tap import BlockTrace, Tap


@dataclass(frozen=True)
class Trace:
    """One forward as methods see it.

    Attributes:
        anatomy: of the model.
        blocks: what each block left behind, first to last.
        start_rows: (B, R, n), the rows of the product that are followed: the head's pooling weights (R = 1), or the
            identity (R = n) where all rows were asked for.
        support: number of leading tokens outside which ``start_rows`` is zero.
    """

    anatomy: Anatomy
    blocks: Sequence[BlockTrace]
    start_rows: Tensor
    support: int

    @property
    def num_blocks(self) -> int:
        """Number of blocks of the model."""
        return len(self.blocks)


@dataclass(frozen=True)
class Rows:
    """Running rows r of a chain of update maps: ``values`` (B, R, n), zero beyond the first ``support`` tokens."""

    values: Tensor
    support: int

    def dense(self, values: Tensor) -> Rows:
        """New values, any of which may be non-zero."""
        return Rows(values, values.shape[-1])

    def scaled(self, factors: Tensor) -> Rows:
        """Token j times ``factors`` (B, n) [j]."""
        return Rows(self.values * factors.unsqueeze(1), self.support)


def propagate(
    rows: Rows,
    block: BlockTrace,
    *,
    phi: str = "p",
    grad_out: Tensor | None = None,
    head_weights: Tensor | None = None,
    token_weights: Tensor | None = None,
) -> Tensor:
    """Σ_h w_h c_h ⊙ Σ_i r_i φ(P_h, G_h)[i, ·] of one block, (B, R, n); only rows that carry weight are computed.

    Args:
        rows: the running rows.
        block: a traced block.
        phi: ``"p"`` or ``"p_relu_g"``.
        grad_out: (B, H, n, dv) or at least its first ``rows.support`` rows; needed by ``"p_relu_g"``.
        head_weights: (B, H), the plain mean where None.
        token_weights: (B, H, n).
    """
    m = rows.support
    return row_propagation(
        block.query[:, :, :m],
        block.key,
        block.logsumexp[:, :, :m],
        rows.values[:, :, :m],
        phi=phi,
        scale=block.scale,
        value=block.value if grad_out is not None else None,
        grad_out=grad_out[:, :, :m] if grad_out is not None else None,
        head_weights=head_weights,
        token_weights=token_weights,
        backend=block.backend,
    )


class WalkingMethod(Protocol):
    """What the pass asks of a method; see ``methods.base.Method``."""

    name: str

    def start(self, trace: Trace, target: Tensor) -> Any: ...
    def step(self, state: Any, trace: Trace, block: BlockTrace, grad_out: Tensor | None) -> Any: ...
    def input_step(self, state: Any, block: BlockTrace, tokens: Tensor, grad_tokens: Tensor) -> Any: ...
    def finish(self, state: Any, trace: Trace) -> Tensor: ...
    def first_block(self, num_blocks: int) -> int: ...


class _BackwardWalk:
    """Listens to one backward and steps every method."""

    def __init__(self, trace: Trace, methods: Sequence[WalkingMethod], target: Tensor) -> None:
        self.trace, self.methods = trace, methods
        self.states = [method.start(trace, target) for method in methods]
        self.first = [method.first_block(trace.num_blocks) for method in methods]

    def attention_gradient(self, block: BlockTrace, grad_out: Tensor) -> None:
        for i, method in enumerate(self.methods):
            if block.index >= self.first[i]:
                self.states[i] = method.step(self.states[i], self.trace, block, grad_out)

    def input_gradient(self, block: BlockTrace, tokens: Tensor, grad_tokens: Tensor) -> None:
        for i, method in enumerate(self.methods):
            if block.index >= self.first[i]:
                self.states[i] = method.input_step(self.states[i], block, tokens, grad_tokens)


def walk_with_gradient(
    tap: Tap, trace: Trace, methods: Sequence[WalkingMethod], scalars: Tensor, target: Tensor, *, last: bool
) -> list[Tensor]:
    """One backward of ``scalars`` (B,), one per image; returns (B, R, n) values for each method.

    ``last`` says that no further backward over this forward will follow, so that its graph can go.
    """
    listener = _BackwardWalk(trace, methods, target)
    tap.listener = listener
    try:
        torch.autograd.grad(scalars.sum(), tap.leaves, retain_graph=not last)
    finally:
        tap.listener = None
    return [method.finish(state, trace) for method, state in zip(methods, listener.states, strict=True)]


def walk_without_gradient(trace: Trace, method: WalkingMethod, target: Tensor) -> Tensor:
    """The same walk for a method that needs no backward over the model."""
    state = method.start(trace, target)
    for block in reversed(trace.blocks[method.first_block(trace.num_blocks) :]):
        state = method.step(state, trace, block, None)
    return method.finish(state, trace)


def start_rows(tap: Tap, num_tokens: int, batch: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, int]:
    """The head's pooling weights as rows (B, 1, n), and the number of leading tokens that carry weight."""
    dtype = accumulation_dtype(dtype)
    anatomy = tap.anatomy
    if tap.pooling_attention is not None:
        weights = tap.pooling_attention.to(dtype)
        weights = torch.nn.functional.pad(weights, (anatomy.pooled_prefix, 0))
        return weights.unsqueeze(1), num_tokens
    weights = torch.tensor(anatomy.pooling_weights(num_tokens), dtype=dtype, device=device)
    return weights.expand(batch, 1, -1), anatomy.num_read_tokens or num_tokens
