"""Layer-wise relevance propagation through the whole model, to pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .base import Method, precision_option


@dataclass(frozen=True, kw_only=True)
class LRP(Method):
    """Relevance of every pixel, summed over channels: the α1β0 rule in the blocks, the z^B rule at the patch embedding.

    As published, positive and negative parts of a linear layer have denominators of their own, so that relevance doubles at each.

    The rules divide by sums that can cancel: in float32 maps of trained models are off by as much as they are large.
    """

    name: ClassVar[str] = "lrp"
    title: ClassVar[str] = "LRP (to pixels)"
    paper: ClassVar[str] = "On Pixel-Wise Explanations (PLoS ONE 2015), as in Transformer Interpretability (CVPR 2021)"
    cost: ClassVar[str] = "forward + a relevance pass of about three backwards"
    uses_target: ClassVar[bool] = True
    rules: ClassVar[str | None] = "separate"
    to_inputs: ClassVar[bool] = True
    resolution: ClassVar[str] = "pixels"

    precision: str = precision_option()

    def finish_at_inputs(self, inputs: Tensor, relevance: Tensor) -> Tensor:  # noqa: ARG002
        return relevance.sum(1, keepdim=True)
