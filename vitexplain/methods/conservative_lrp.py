"""Conservative LRP: gradient × input of a network whose attention maps and normalisers are constants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .base import Method


@dataclass(frozen=True, kw_only=True)
class ConservativeLRP(Method):
    """Σ_channels x⁰ ⊙ ∂z/∂x⁰ with softmax maps and LayerNorm's denominators constant and GELU x · const; signed.

    x⁰ is what enters block 0. Without biases the values of all tokens add up to z. A product of two activations (a gate) hands
    half of its gradient to each.
    """

    name: ClassVar[str] = "conservative_lrp"
    title: ClassVar[str] = "Conservative LRP"
    paper: ClassVar[str] = "XAI for Transformers: Better Explanations through Conservative Propagation (ICML 2022)"
    cost: ClassVar[str] = "forward + backward, in float32"
    uses_target: ClassVar[bool] = True
    rules: ClassVar[str | None] = "conservative"
    to_inputs: ClassVar[bool] = True

    def finish_at_inputs(self, inputs: Tensor, relevance: Tensor) -> Tensor:
        return (inputs * relevance).sum(-1).unsqueeze(1)
