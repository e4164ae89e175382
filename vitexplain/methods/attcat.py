"""AttCAT: attentive class activation tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..relevance import Trace, propagate, uniform_rows
from ..tap import BlockTrace
from ..targets import Target
from .base import Method


@dataclass(frozen=True, kw_only=True)
class AttCAT(Method):
    """Σ_l mean_{h,i} P_h[i, j] · (x_j · ∂z/∂x_j), x the block's input; signed."""

    name: ClassVar[str] = "attcat"
    title: ClassVar[str] = "AttCAT"
    paper: ClassVar[str] = "AttCAT: Explaining Transformers via Attentive Class Activation Tokens (NeurIPS 2022)"
    cost: ClassVar[str] = "forward + backward + half an attention forward per block"
    uses_gradient: ClassVar[bool] = True
    uses_target: ClassVar[bool] = True
    uses_input_gradient: ClassVar[bool] = True
    observes: ClassVar[bool] = True

    def observe(self, block: BlockTrace) -> Tensor:
        """Column means of the head-averaged map, (B, 1, n): the same for every class."""
        return propagate(uniform_rows(block), block)

    def start(self, trace: Trace, target: Target) -> Tensor:  # noqa: ARG002
        return torch.zeros_like(trace.start_rows)

    def input_step(self, state: Tensor, block: BlockTrace, tokens: Tensor, grad_tokens: Tensor) -> Tensor:
        activation = (tokens.to(state.dtype) * grad_tokens.to(state.dtype)).sum(-1)  # (B, n)
        return state + block.observed[self] * activation.unsqueeze(1)

    def finish(self, state: Tensor, trace: Trace) -> Tensor:  # noqa: ARG002
        return state
