"""Partial LRP: relevance of the last block's attention map."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..relevance import Rows, Trace, relevant_rows
from ..relevance_tap import AttentionRelevance
from .base import Method, precision_option


@dataclass(frozen=True, kw_only=True)
class PartialLRP(Method):
    """The class row of the last block's mean_h relu(R_h), R_h the relevance of the attention map.

    As published, positive and negative parts of a linear layer have denominators of their own, so that relevance doubles at each.
    """

    name: ClassVar[str] = "partial_lrp"
    title: ClassVar[str] = "Partial LRP"
    paper: ClassVar[str] = "Analyzing Multi-Head Self-Attention (ACL 2019), as in Transformer Interpretability (CVPR 2021)"
    cost: ClassVar[str] = "forward + a relevance pass of the head and the last MLP"
    uses_target: ClassVar[bool] = True
    rules: ClassVar[str | None] = "separate"

    precision: str = precision_option()

    def first_block(self, num_blocks: int) -> int:
        return num_blocks - 1

    def relevance_step(self, state: Rows, trace: Trace, attention: AttentionRelevance, grad_out: Tensor | None) -> Rows:  # noqa: ARG002
        return state.dense(relevant_rows(state, attention, None))
