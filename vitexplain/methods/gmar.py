"""GMAR: rollout whose heads are weighed by the norm of their gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..kernels import head_norms
from ..relevance import Rows, Trace, propagate
from ..tap import BlockTrace
from .base import Method, option


@dataclass(frozen=True, kw_only=True)
class GMAR(Method):
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
    is_chain: ClassVar[bool] = True

    norm: str = option("l1", "norm of the map's gradient: sum of magnitudes, or Frobenius", choices=("l1", "l2"))
    alpha: float = option(1.0, "weight of the residual connection", minimum=0.0)
    normalize: bool = option(True, "divide each update by 1 + alpha")
    start_block: int = option(0, "first block of the product", minimum=0)

    def step(self, state: Rows, trace: Trace, block: BlockTrace, grad_out: Tensor | None) -> Rows:  # noqa: ARG002
        norms = head_norms(block.value, grad_out[:, :, : state.support], norm=self.norm, backend=block.backend)
        weights = norms / norms.sum(-1, keepdim=True).clamp_min(torch.finfo(norms.dtype).tiny)
        values = propagate(state, block, head_weights=weights) + self.alpha * state.values
        return state.dense(values / (1 + self.alpha) if self.normalize else values)
