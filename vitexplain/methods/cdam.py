"""CDAM: class-discriminative attention maps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import UnsupportedModelError
from ..models import Anatomy
from ..relevance import Trace
from ..tap import BlockTrace
from ..targets import Target
from .base import Method


@dataclass(frozen=True, kw_only=True)
class CDAM(Method):
    """Σ_channels t_j ⊙ ∂z/∂t_j, t the (normalised) tokens that enter the last block's attention; signed."""

    name: ClassVar[str] = "cdam"
    title: ClassVar[str] = "CDAM"
    paper: ClassVar[str] = "Class-Discriminative Attention Maps for Vision Transformers (TMLR 2024)"
    cost: ClassVar[str] = "forward + backward of the head and the last block"
    uses_gradient: ClassVar[bool] = True
    uses_target: ClassVar[bool] = True
    uses_attention_input_gradient: ClassVar[bool] = True
    reads_head_rows: ClassVar[bool] = True

    def check(self, anatomy: Anatomy) -> None:
        super().check(anatomy)
        last = anatomy.blocks[-1]
        if last.attention is last.block:
            raise UnsupportedModelError(
                f"method {self.name!r} cannot explain {type(last.block).__name__}: its attention is not a module of its own, so "
                "that what enters it is not known"
            )

    def first_block(self, num_blocks: int) -> int:
        return num_blocks - 1

    def start(self, trace: Trace, target: Target) -> Tensor:  # noqa: ARG002
        return torch.zeros_like(trace.start_rows)

    def attention_input_step(self, state: Tensor, block: BlockTrace, tokens: Tensor, grad_tokens: Tensor) -> Tensor:  # noqa: ARG002
        return (tokens.to(state.dtype) * grad_tokens.to(state.dtype)).sum(-1).unsqueeze(1)

    def finish(self, state: Tensor, trace: Trace) -> Tensor:  # noqa: ARG002
        return state
