"""GMAR: rollout whose heads are weighed by the norm of their gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..options import option
from ..relevance import Trace, Update
from ..tap import BlockTrace
from .base import ChainMethod


@dataclass(frozen=True, kw_only=True)
class GMAR(ChainMethod):
    """The class row of Π_l (Σ_h w_h P_h + α I) / (1 + α) with w_h = ‖G_h‖_p / Σ_h' ‖G_h'‖_p per image and block.

    This is the paper's definition. The authors' repository computes something else: gradients of a LayerNorm output split
    into "heads", one weight vector for all layers, and a near-zero residual.
    """

    name: ClassVar[str] = "gmar"
    title: ClassVar[str] = "GMAR"
    paper: ClassVar[str] = "GMAR: Gradient-Driven Multi-Head Attention Rollout for Vision Transformer Interpretability (2025)"
    cost: ClassVar[str] = "forward + backward + half (l2) to one (l1) attention forward per block"
    uses_gradient: ClassVar[bool] = True
    uses_target: ClassVar[bool] = True

    norm: str = option("l1", "norm of the map's gradient: sum of magnitudes, or Frobenius", choices=("l1", "l2"))
    alpha: float = option(1.0, "weight of the residual connection", minimum=0.0)
    normalize: bool = option(True, "divide each update by 1 + alpha")
    start_block: int = option(0, "first block of the product", minimum=0)

    def update(self, trace: Trace, block: BlockTrace, grad_out: Tensor | None) -> Update:  # noqa: ARG002
        total = 1 + self.alpha if self.normalize else 1.0
        return Update(norm=self.norm, factor=1 / total, residual=self.alpha / total)
