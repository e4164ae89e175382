"""LeGrad: positive gradients of the attention maps, each block asked on its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..relevance import Rows, Trace, propagate, uniform_rows
from ..tap import BlockTrace
from ..targets import Target
from .base import Method
from .iba import local_gradient


@dataclass(frozen=True)
class _Total:
    """The sum of the blocks' maps so far, (B, 1, n)."""

    target: Target
    total: Tensor


@dataclass(frozen=True, kw_only=True)
class LeGrad(Method):
    """Σ_l mean_{h,i} relu(∂u_l/∂P_h)[i, j], u_l what the model's own head says at block l's output.

    The paper min-max scales the sum; maps here are not scaled.
    """

    name: ClassVar[str] = "legrad"
    title: ClassVar[str] = "LeGrad"
    paper: ClassVar[str] = (
        "LeGrad: An Explainability Method for Vision Transformers via Feature Formation Sensitivity (ICCV 2025)"
    )
    cost: ClassVar[str] = "forward; for mean- and attention-pooled heads also a backward inside each block"
    uses_target: ClassVar[bool] = True
    uses_reads: ClassVar[bool] = True
    reads_head_rows: ClassVar[bool] = True

    def start(self, trace: Trace, target: Target) -> _Total:
        return _Total(target, torch.zeros_like(trace.start_rows))

    def step(self, state: _Total, trace: Trace, block: BlockTrace, grad_out: Tensor | None) -> _Total:  # noqa: ARG002
        _, local_grad = local_gradient(trace, block, state.target)
        rows = Rows(uniform_rows(block).values, local_grad.shape[2])
        return _Total(state.target, state.total + propagate(rows, block, phi="relu_g", grad_out=local_grad))

    def finish(self, state: _Total, trace: Trace) -> Tensor:  # noqa: ARG002
        return state.total
