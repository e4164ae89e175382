"""Transformer Attribution: relevance of the attention maps, weighted by their gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..options import option
from ..relevance import Rows, Trace, relevant_rows
from ..relevance_tap import AttentionRelevance
from .base import Method, precision_option


@dataclass(frozen=True, kw_only=True)
class TransformerAttribution(Method):
    """The class row of Π_l (I + mean_h relu(G_h ⊙ R_h)), R_h the relevance of the attention map.

    Relevance starts as one at the class and is sent back by the α1β0 rule; what a sum hands to its two parts is rescaled to keep
    the total, image by image. Published evaluations use ``start_block=1``.

    The rules divide by sums that can cancel: in float32 maps of trained models can be visibly off.
    """

    name: ClassVar[str] = "transformer_attribution"
    title: ClassVar[str] = "Transformer Attribution"
    paper: ClassVar[str] = "Transformer Interpretability Beyond Attention Visualization (CVPR 2021), Eq. 3 to 14"
    cost: ClassVar[str] = "two forwards + backward + a relevance pass of about three backwards"
    uses_gradient: ClassVar[bool] = True
    uses_target: ClassVar[bool] = True
    rules: ClassVar[str | None] = "normalised"
    reads_head_rows: ClassVar[bool] = True

    start_block: int = option(0, "first block of the product", minimum=0)
    precision: str = precision_option()

    def relevance_step(self, state: Rows, trace: Trace, attention: AttentionRelevance, grad_out: Tensor | None) -> Rows:  # noqa: ARG002
        return state.dense(state.values + relevant_rows(state, attention, grad_out))
