"""Generic attention explainability (Transformer-MM)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..options import option
from ..relevance import Trace, Update
from ..tap import BlockTrace
from .base import ChainMethod


@dataclass(frozen=True, kw_only=True)
class TransformerMM(ChainMethod):
    """The class row of Π_l (I + mean_h relu(P_h ⊙ G_h))."""

    name: ClassVar[str] = "transformer_mm"
    title: ClassVar[str] = "Transformer-MM"
    paper: ClassVar[str] = (
        "Generic Attention-model Explainability for Interpreting Bi-Modal and Encoder-Decoder Transformers (ICCV 2021)"
    )
    cost: ClassVar[str] = "forward + backward + one attention forward per block"
    uses_gradient: ClassVar[bool] = True
    uses_target: ClassVar[bool] = True

    start_block: int = option(0, "first block of the product", minimum=0)

    def update(self, trace: Trace, block: BlockTrace, grad_out: Tensor | None) -> Update:  # noqa: ARG002
        return Update(phi="p_relu_g")
