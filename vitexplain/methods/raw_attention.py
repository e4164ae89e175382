"""Raw attention of the last block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..relevance import Rows, Trace, propagate
from ..tap import BlockTrace
from .base import Method


@dataclass(frozen=True, kw_only=True)
class RawAttention(Method):
    """The class row of the last block's mean_h P_h; the same for every class."""

    name: ClassVar[str] = "raw_attention"
    title: ClassVar[str] = "Raw attention"
    paper: ClassVar[str] = "the last block's attention, a baseline since Attention Is All You Need (NeurIPS 2017)"
    cost: ClassVar[str] = "forward"
    reads_head_rows: ClassVar[bool] = True

    def first_block(self, num_blocks: int) -> int:
        return num_blocks - 1

    def step(self, state: Rows, trace: Trace, block: BlockTrace, grad_out: Tensor | None) -> Rows:  # noqa: ARG002
        return state.dense(propagate(state, block))
